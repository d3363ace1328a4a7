"""A checkpoint's own chat_template (jinja): dialogue -> text spans, with which text the model has to produce.

The template runs in the sandbox that transformers uses. Where an answer begins and ends is found by rendering
prefixes of the dialogue: the prompt for generation must be a prefix of the dialogue that ends with this
answer, and that must be a prefix of the whole. {% generation %} marks are used where the template has them.

Source: transformers' apply_chat_template (environment, names of its values).
Run: python -c "from text.jinja_template import *; print(JinjaTemplate('{{ messages }}').render([], '', ''))"
"""

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from options.errors import UserError
from text.render import PRODUCED, Message, Span, split_thought, tool_calls


@dataclass(frozen=True)
class JinjaTemplate:
    """The chat_template of a checkpoint, run in a sandbox as transformers runs it."""

    source: str
    default_system: str | None = None
    name: str = "checkpoint"

    def render(
        self, messages: list[Message], bos, eos, *, generation_prompt=False, enable_thinking=True, tools=None
    ) -> list[Span]:
        """Spans of the dialogue. An answer is trained where the prompt that generation would be given is what
        stands before it, and later turns leave it unchanged. UserError when not so for the last answer."""
        written = _writer(self.source, bos, eos, enable_thinking, tools)
        dialogue = self._dialogue(messages, enable_thinking)
        whole = written(dialogue, generation_prompt)
        probe = _probe(self.source, bos, eos, enable_thinking)
        if generation_prompt:
            whole += probe.missing_header
        if ANSWER_BEGINS in whole:
            return _marked_spans(whole, messages)
        spans, cursor, inserted = [], 0, len(dialogue) - len(messages)
        if bos and whole.startswith(bos):
            spans.append(Span(bos, False, -1, "prefix"))
            cursor = len(bos)
        for turn, message in enumerate(messages):
            before, upto = dialogue[: turn + inserted], dialogue[: turn + inserted + 1]
            if message.role not in PRODUCED:
                end = _end_of(written, upto, whole)
                if end > cursor:
                    spans.append(Span(whole[cursor:end], False, turn, message.role))
                    cursor = end
                continue
            prompt, finished = written(before, True), written(upto)
            header = prompt + probe.missing_header
            begin, text = len(header), finished.removesuffix(probe.after_end)
            fits = cursor <= begin <= len(text) and text.startswith(header)
            if fits and whole.startswith(text):
                spans.append(Span(whole[cursor:begin], False, turn, message.role))
                spans.append(Span(text[begin:], True, turn, message.role))
                cursor = len(text)
            elif turn == len(messages) - 1:
                raise UserError(_explain(self.source, prompt, finished))
        owner = len(messages) if generation_prompt else len(messages) - 1
        role = "assistant" if generation_prompt or not messages else messages[-1].role
        spans.append(Span(whole[cursor:], False, owner, role))
        return [span for span in spans if span.text]

    def stop_words(self, eos: str | None) -> tuple[str, ...]:
        """The template's end-of-turn mark and the tokenizer's eos."""
        end = _probe(self.source, "", eos, True).end_mark.strip()
        return tuple(dict.fromkeys(word for word in (end, eos) if word))

    def content(self, text: str) -> str:
        """A generated text as an assistant's content: without the space that some templates begin with."""
        return text.removeprefix(_probe(self.source, "", "", True).lead)

    def to_jinja(self) -> str:
        return self.source

    def _dialogue(self, messages: list[Message], enable_thinking: bool) -> list[dict]:
        """Messages as the template expects them: observations as tool, calls as tool_calls if known."""
        dialogue = []
        if self.default_system is not None and not (messages and messages[0].role == "system"):
            dialogue.append({"role": "system", "content": self.default_system})
        roles = {"observation": "tool", "function": "assistant"}
        for role, content in messages:
            entry = {"role": roles.get(role, role), "content": content}
            calls = tool_calls(content) if role == "function" and "tool_calls" in self.source else None
            if calls is not None:
                functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
                calls = [{"type": "function", "function": function} for function in functions]
                entry |= {"content": "", "tool_calls": calls}
            if role in PRODUCED and not enable_thinking and "enable_thinking" in self.source:
                entry["content"] = split_thought(entry["content"])[1]
            dialogue.append(entry)
        return dialogue


# private use: {% generation %} and {% endgeneration %}
ANSWER_BEGINS, ANSWER_ENDS = "\U000f1000", "\U000f1001"


TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)


def _writer(source: str, bos, eos, enable_thinking: bool, tools=None) -> Callable[..., str]:
    """(dialogue, generation_prompt) -> text, for given values of all that a template reads beside them."""
    template, shared = _compile(source), {"tools": tools, "documents": None}
    shared |= {"enable_thinking": enable_thinking}
    shared |= {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}

    def written(dialogue: list[dict], generation_prompt: bool = False) -> str:
        try:
            return template.render(messages=dialogue, add_generation_prompt=generation_prompt, **shared)
        except TEMPLATE_FAULTS as error:  # such as a missing value, or a range too long
            roles = ", ".join(message["role"] for message in dialogue) or "no message"
            raise UserError(
                f"the checkpoint's chat_template refuses a dialogue of {roles}: {error}. Change the "
                f"dialogue, or choose a built-in template, for example `template: {_closest(source)}`."
            ) from error

    return written


class _Probe(NamedTuple):
    """What a template does around an answer, found with a sample dialogue."""

    missing_header: str  # header of an answer that add_generation_prompt fails to give
    lead: str  # white space between the prompt and the content
    end_mark: str  # between the content and the end of the turn, as <|im_end|>
    after_end: str  # white space after the end mark: not trained


@functools.lru_cache(maxsize=64)
def _probe(source: str, bos: str | None, eos: str | None, enable_thinking: bool) -> _Probe:
    written = _writer(source, bos or "", eos or "", enable_thinking)
    question = {"role": "user", "content": "question"}
    answers = [{"role": "assistant", "content": content} for content in ("alpha", "omega")]
    texts = [written([question, answer]) for answer in answers]
    texts = [text.replace(ANSWER_BEGINS, "").replace(ANSWER_ENDS, "") for text in texts]
    plain, prompt, missing = written([question]), written([question], True), ""
    header = os.path.commonprefix(texts)[len(plain) :]
    if prompt == plain and header.strip() and texts[0].startswith(plain):
        missing = header.rstrip(" ")  # the space belongs to the answer's first word
    begin, _, tail = texts[0].rpartition("alpha")
    lead = begin[len(prompt + missing) :] if begin.startswith(prompt + missing) else ""
    end_mark = tail.rstrip()
    after_end = tail[len(end_mark) :] if end_mark else ""  # without an end mark, the white space is the mark
    return _Probe(missing, lead if lead.isspace() else "", end_mark or tail, after_end)


def _end_of(written: Callable[..., str], dialogue: list[dict], whole: str) -> int:
    """Where the text of these first messages ends in the whole text; 0 when it is no prefix of it."""
    try:
        text = written(dialogue)
    except UserError:  # many refuse a dialogue that is not complete, such as a system message alone
        return 0
    return len(text) if whole.startswith(text) else 0


def _explain(source: str, prompt: str, finished: str) -> str:
    same = len(os.path.commonprefix([prompt, finished]))
    one, other = prompt[same : same + 40], finished[same : same + 40]
    return (
        "the checkpoint's chat_template does not show where the answer begins: the prompt for generation "
        f"continues with {one!r}, the finished dialogue with {other!r}. "
        f"Choose a built-in template, for example `template: {_closest(source)}`."
    )


def _marked_spans(whole: str, messages: list[Message]) -> list[Span]:
    """Spans of a template that marks its answers by {% generation %}: one mark per answer, in order."""
    produced = [turn for turn, message in enumerate(messages) if message.role in PRODUCED]
    pieces = re.split(f"{ANSWER_BEGINS}(.*?){ANSWER_ENDS}", whole, flags=re.DOTALL)
    if len(pieces) // 2 != len(produced):
        raise UserError(
            f"the checkpoint's chat_template marks {len(pieces) // 2} answers by {{% generation %}}, but the "
            f"dialogue has {len(produced)}; choose a built-in template with the option `template`"
        )
    spans, turn = [], 0
    for index, piece in enumerate(pieces):
        turn = produced[index // 2] if index // 2 < len(produced) else max(len(messages) - 1, 0)
        spans.append(Span(piece, index % 2 == 1, turn, messages[turn].role))
    return [span for span in spans if span.text]


def _closest(source: str) -> str:
    """The built-in template that looks most like a jinja text."""
    signs = {"<think>": "qwen3", "<|im_start|>": "chatml", "Cutting Knowledge": "llama31"}
    signs |= {"<|start_header_id|>": "llama3", "<<SYS>>": "llama2", "[INST]": "mistral"}
    signs |= {"<|assistant|>": "zephyr", "ASSISTANT": "vicuna", "### Response": "alpaca"}
    signs |= {"Assistant:": "deepseek"}
    return next((name for sign, name in signs.items() if sign in source), "default")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the model writes, as in transformers."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return ANSWER_BEGINS + caller() + ANSWER_ENDS


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """In the environment of transformers' apply_chat_template: sandboxed, for strangers wrote the code."""
    extensions = [_Generation, jinja2.ext.loopcontrols]
    layout = {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=extensions, **layout)
    # jinja's own tojson escapes HTML characters, which would change the text
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        why = f"is not valid jinja ({error}); choose a built-in one by `template`"
        raise UserError(f"the checkpoint's chat_template {why}") from error
