"""Talk to a model in the terminal.

    python chat.py model_name_or_path=models/SmolLM2-135M-Instruct
    python chat.py model_name_or_path=saves/demo                # a run folder names its base and template
    python chat.py model_name_or_path=BASE adapter_name_or_path=A,B template=chatml prompt="Who are you?"
    python chat.py model_name_or_path=saves/rm prompt="2 + 2?" score="4"      # what a reward model says

`clear` forgets the conversation, `exit` (or `quit`, `bye`) leaves, Ctrl-C stops an answer; pasted lines are
one message, which Enter sends. The keys and values that the model computed for the conversation so far are
kept, so a turn costs only its own tokens.
"""

if __name__ == "__main__":
    from options.errors import begin

    begin("chat.py")

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

import kernels
import quant
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import DTYPES, chosen_quantization
from checkpoints.source import find_source, load_head, load_source
from generation.cache import KVCache
from generation.generate import TextStream, context_limit, split_stop_words
from generation.layout import lay_out_for_decoding
from generation.sampling import GenerateOptions
from model import Decoder
from options import config as configuration
from options.errors import UserError, exit_status, fitting, harmless, refuse
from options.option import COMMON, RESUMABLE, option
from quant import QuantOptions
from quant.linear import quantisation_report, quantised_linears
from templates import TemplateOptions
from text.render import Message, encode_dialogue
from text.tokenizer import Tokenizer

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
THINK, THOUGHT = "<think>", "</think>"
LEAVE = {slash + word for slash in ("", "/") for word in ("exit", "quit", "bye")} | {"exit()", "quit()"}
CLEAR = ("clear", "/clear")


@dataclass(frozen=True)
class ChatOptions:
    prompt: str | None = option(None, "answer this one message and end; default: a conversation", COMMON)
    score: str | None = option(None, "print what a reward model thinks of this answer to `prompt`", COMMON)
    seed: int | None = option(None, "seed of the draws; default: another one each time")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto = a GPU if there is one", RESUMABLE)

    def __post_init__(self):
        lonely = self.score is not None and self.prompt is None
        refuse(lonely, "score: there is no prompt that it is an answer to; give prompt too")


SECTIONS = [ModelOptions, QuantOptions, TemplateOptions, GenerateOptions, ChatOptions]


def main(argv: list[str]) -> int:
    return exit_status("chat.py", lambda: run(argv))


def run(argv: list[str]) -> int:
    about = {"program": "chat.py", "description": __doc__.splitlines()[0]}
    config = configuration.load(argv, SECTIONS, reads_files_of_others=True, **about)  # of a training, say
    for notice in config.notices:
        _say(f"note: {notice}")
    conversation = open_conversation(config)
    options = config[ChatOptions]
    if options.score is not None:
        print(f"{conversation.score(options.prompt, options.score):.4f}")
        return 0
    if options.prompt is None:
        return talk(conversation)
    return 130 if answer(conversation, options.prompt) else 0


def open_conversation(config: configuration.Config) -> "Conversation":
    """Load everything the options name."""
    options, named = config[ChatOptions], config[ModelOptions]
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = device == "cuda" and not torch.cuda.is_available()
    refuse(missing, "device: cuda was asked for, but torch sees no GPU; use device=cpu")
    kernels.require_attention(named.flash_attn, device)
    source = find_source(named, config[TemplateOptions], config.given, config[QuantOptions])
    quantization, notice = chosen_quantization(source.base, quant.from_options(source.quantization))
    for line in (*source.notices, *([notice] if notice else [])):
        _say(f"note: {line}")
    model, tokenizer, template = load_source(source, DTYPES.get(named.infer_dtype), device, quantization)
    if tokenizer.notice:
        _say(f"note: {tokenizer.notice}")
    dtype = model.embed_tokens.weight.dtype
    model.runtime.flash_attn = kernels.require_attention(named.flash_attn, device, dtype)
    if quantised_linears(model):
        _say(quantisation_report(model))
    if options.score is None:
        lay_out_for_decoding(model)
    else:
        load_head(model, source)
    generator = torch.Generator()
    generator.manual_seed(generator.seed() if options.seed is None else options.seed)
    parts = " + ".join(str(path) for path in (source.base, *source.adapters))
    _say(f"{parts}, {str(dtype).removeprefix('torch.')} on {device}, template {template.name}")
    thinks = source.template.enable_thinking
    return Conversation(model, tokenizer, template, config[GenerateOptions], thinks, generator)


def talk(conversation: "Conversation") -> int:
    """Read messages until `exit` or the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # line editing for input()

            readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
        _say("`clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer")
    while True:
        try:
            text = input("User: " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return 0
        except KeyboardInterrupt:
            print("\n(`exit` or Ctrl-D leaves)", file=sys.stderr)
            continue
        if text.lower() in LEAVE:
            return 0
        if text.lower() in CLEAR:
            conversation.clear()
            _say("the conversation is forgotten")
        elif text:
            if terminal:
                print("Assistant: ", end="", flush=True)
            try:
                answer(conversation, text)
            except UserError as error:
                print(f"chat.py: {error} (`clear` starts anew)", file=sys.stderr)


@fitting("the conversation", "shorten it, lower max_new_tokens, or load the model with quantization_bit=4")
def answer(conversation: "Conversation", text: str) -> bool:
    """Print one answer as it is made, then its speed. True if Ctrl-C stopped it."""
    painter = Painter(sys.stdout.isatty(), conversation.begins_in_thought)
    started, first, interrupted = time.perf_counter(), None, False
    try:
        for piece in conversation.ask(text):
            first = first or time.perf_counter()
            sys.stdout.write(painter.paint(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    print(painter.end() + (" (stopped)" if interrupted else ""), flush=True)
    now, count = time.perf_counter(), conversation.new_tokens
    if count:
        rate = (count - 1) / (now - first) if first and count > 1 and now > first else count / (now - started)
        _say(f"[{count} tokens, {rate:.1f} tokens/s, the first after {(first or now) - started:.2f} s]")
    return interrupted


class Conversation:
    """Messages so far, and the model's cache of them. ask() adds the user's message at once and the answer
    when the iteration ends, however it ends; a message that got no answer at all is taken back."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template, options, enable_thinking, generator):
        """options: GenerateOptions; enable_thinking: bool | None; generator: torch.Generator of the draws."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.enable_thinking, self.generator = enable_thinking, generator
        words = template.stop_words(tokenizer.eos_token)
        _, self.stop_ids = tokenizer.ends(words)
        _, words = split_stop_words(tokenizer, words)
        # words that the template knows as text, as the next "Human:" of a template without special tokens
        self.options = replace(options, stop=tuple(dict.fromkeys([*options.stop, *words])))
        self.messages: list[Message] = []
        self.cache: KVCache | None = None
        self.cached_ids: list[int] = []  # what the cache holds
        self.new_tokens = 0  # of the last answer
        prompt = "".join(span.text for span in self._render([Message("user", "")]))
        self.begins_in_thought = prompt.rstrip().endswith(THINK)

    def clear(self) -> None:
        self.messages = []

    def score(self, prompt: str, answer: str) -> float:
        """Of the model as a reward model (checkpoints.source.load_head)."""
        from stages.rm import score_dialogues  # a conversation needs no stage

        dialogue = [Message("user", prompt), Message("assistant", answer)]
        return score_dialogues(self.model, self.tokenizer, self.template, [dialogue]).item()

    def ask(self, text: str) -> Iterator[str]:
        """The answer to one more message, piece by piece. Raises UserError when the talk gets too long."""
        self.new_tokens = 0
        # a lone surrogate (bytes that were no UTF-8) has no tokens
        self.messages.append(Message("user", text.encode("utf-8", "replace").decode("utf-8")))
        pieces, stream = [], None
        try:
            state = {"stop_ids": self.stop_ids, "generator": self.generator, "cache": self.cache}
            prompt, limit = self._prompt(), context_limit(self.model.config)
            said = "the conversation" if len(self.messages) > 1 else "the message"
            reads = f"but the model takes {limit} with the answer"
            remedy = "shorten it, or stretch the model with rope_scaling"
            refuse(len(prompt) >= limit, f"{said} has {len(prompt)} tokens, {reads}; {remedy}")
            stream = TextStream(self.model, self.tokenizer, prompt, self.options, **state)
            self.cache = stream.decoding.cache
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            if stream is not None:  # else the prompt was refused
                self.cached_ids, self.new_tokens = stream.cached_ids, len(stream.ids)
            content = self.template.content("".join(pieces))
            if content:
                self.messages.append(Message("assistant", content))
            else:
                self.messages.pop()

    def _prompt(self) -> list[int]:
        """Tokens of the conversation; the cache is cut back to what it shares with them."""
        ids = encode_dialogue(self.tokenizer, self._render(self.messages)).ids
        if self.cache is not None:
            # one token at least has to be fed, so that there are logits
            shared = len(os.path.commonprefix([ids[:-1], self.cached_ids]))
            if self.model.config.rope.kind == "dynamic":
                shared = 0  # its angles change with the length of the text
            self.cache.lengths = [shared]
            self.cached_ids = self.cached_ids[:shared]
        return ids

    def _render(self, messages: list[Message]):
        tokenizer, how = self.tokenizer, {"generation_prompt": True, "enable_thinking": self.enable_thinking}
        how |= {"variables": tokenizer.special_tokens}
        return self.template.render(messages, tokenizer.bos_token, tokenizer.eos_token, **how)


class Painter:
    """Text between <think> and </think> is dimmed in a terminal; a mark may come in several pieces."""

    def __init__(self, colours: bool, begins_in_thought: bool = False):
        self.colours, self.in_thought, self._held = colours, False, ""
        self._begin = begins_in_thought and colours

    def paint(self, piece: str) -> str:
        if not self.colours:
            return piece
        piece = harmless(piece)
        out = ""
        if self._begin:
            out, self.in_thought, self._begin = DIM, True, False
        text, self._held = self._held + piece, ""
        while True:
            mark = THOUGHT if self.in_thought else THINK
            before, found, text_after = text.partition(mark)
            if not found:
                break
            out += before + (mark + PLAIN if self.in_thought else DIM + mark)
            self.in_thought, text = not self.in_thought, text_after
        keep = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
        self._held = text[len(text) - keep :]
        return out + text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, and the end of the colour."""
        return self._held + (PLAIN if self.in_thought else "")


def _say(text: str) -> None:
    """A remark that is no answer: to stderr, dimmed in a terminal."""
    print(f"{DIM}{text}{PLAIN}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also when a shell started it in the background
    # what cannot be shown, or was typed in another encoding, becomes a question mark instead of an error
    sys.stdout.reconfigure(errors="replace")
    sys.stdin.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))
