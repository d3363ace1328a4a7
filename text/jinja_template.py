"""A checkpoint's own chat_template (jinja): dialogue -> text spans, with which text the model has to produce.

The template runs in the sandbox that transformers uses. Where an answer begins and ends is found by rendering
prefixes of the dialogue: the prompt for generation must be a prefix of the dialogue that ends with this
answer, and that must be a prefix of the whole. {% generation %} marks are used where the template has them.

Sources: transformers' apply_chat_template (environment, names of its values). `Message` and `Span` also serve
the built-in templates of templates.py. Run: python -c "from jinja_template import *;
print(JinjaTemplate('...').render([Message('user', 'Hi')], '', ''))"
"""

import functools
import json
import re
from dataclasses import dataclass
from datetime import datetime

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

    def render_text(
        self,
        messages: list[Message],
        bos: str | None,
        eos: str | None,
        *,
        generation_prompt: bool = False,
        enable_thinking: bool = True,
        tools: list[dict] | None = None,
    ) -> str:
        """The rendered text, as transformers' apply_chat_template(tokenize=False)."""
        settings = _Settings(bos, eos, enable_thinking, tools)
        text = self._text(self._dialogue(messages, enable_thinking), settings, generation_prompt)
        if generation_prompt:
            text += self._probe(settings).missing_header
        return text.replace(ANSWER_BEGINS, "").replace(ANSWER_ENDS, "")

    def render(
        self,
        messages: list[Message],
        bos: str | None,
        eos: str | None,
        *,
        generation_prompt: bool = False,
        enable_thinking: bool = True,
        tools: list[dict] | None = None,
    ) -> list[Span]:
        """Spans of the dialogue. An answer is trained where the prompt that generation would be given is what
        stands before it, and later turns leave it unchanged. ValueError when that fails for the last answer.
        """
        settings = _Settings(bos, eos, enable_thinking, tools)
        dialogue = self._dialogue(messages, enable_thinking)
        whole = self._text(dialogue, settings, generation_prompt)
        probe = self._probe(settings)
        if generation_prompt:
            whole += probe.missing_header
        if ANSWER_BEGINS in whole:
            return _marked_spans(whole, messages)
        inserted = len(dialogue) - len(messages)
        spans, cursor = [], 0
        if bos and whole.startswith(bos):
            spans.append(Span(bos, False, -1, "prefix"))
            cursor = len(bos)
        for turn, message in enumerate(messages):
            position = turn + inserted
            if message.role not in PRODUCED:
                end = self._end_of(dialogue[: position + 1], settings, whole)
                if end > cursor:
                    spans.append(Span(whole[cursor:end], False, turn, message.role))
                    cursor = end
                continue
            last = turn == len(messages) - 1
            found = self._answer(dialogue, position, settings, whole, probe)
            if found is None or found[0] < cursor:
                if last:
                    raise UserError(self._explain(dialogue, position, settings))
                continue
            spans.append(Span(whole[cursor : found[0]], False, turn, message.role))
            spans.append(Span(whole[found[0] : found[1]], True, turn, message.role))
            cursor = found[1]
        owner = len(messages) if generation_prompt else len(messages) - 1
        role = "assistant" if generation_prompt or not messages else messages[-1].role
        spans.append(Span(whole[cursor:], False, owner, role))
        return [span for span in spans if span.text]

    def stop_words(self, eos: str | None) -> tuple[str, ...]:
        """The template's end-of-turn mark and the tokenizer's eos."""
        end = self._probe(_Settings("", eos, True, None)).end_mark.strip()
        return tuple(dict.fromkeys(word for word in (end, eos) if word))

    def content(self, text: str) -> str:
        """A generated text as the content of an assistant message: without the space that some templates
        begin with."""
        return text.removeprefix(self._probe(_Settings("", "", True, None)).lead)

    def describe(self) -> str:
        text = f"template of the checkpoint ({len(self.source)} characters of jinja"
        text += (
            ", answers marked by {% generation %})"
            if _has_marks(self.source)
            else ", answers found by prefixes)"
        )
        if "strftime_now" in self.source:
            text += "; it writes today's date into the text"
        if not self.trains_earlier_answers():
            text += "; it rewrites earlier answers once later turns exist, so only the last one is trained"
        return text

    def trains_earlier_answers(self) -> bool:
        """Whether the first answer of a dialogue with two answers is trained."""
        sample = [
            Message("user", "a"),
            Message("assistant", "b"),
            Message("user", "c"),
            Message("assistant", "d"),
        ]
        return any(span.answer and span.turn == 1 for span in self.render(sample, "<s>", "</s>"))

    def to_jinja(self) -> str:
        return self.source

    def _text(self, dialogue: list[dict], settings: "_Settings", generation_prompt: bool) -> str:
        values = {"bos_token": settings.bos, "eos_token": settings.eos}
        try:
            return _compile(self.source).render(
                messages=dialogue,
                tools=settings.tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                enable_thinking=settings.enable_thinking,
                **{key: value for key, value in values.items() if value is not None},
            )
        except (jinja2.TemplateError, TypeError, OverflowError) as error:  # a missing value; a range too long
            roles = ", ".join(message["role"] for message in dialogue) or "no message"
            raise UserError(
                f"the checkpoint's chat_template refuses a dialogue of {roles}: {error}. Change the "
                "dialogue, or "
                f"choose a built-in template, for example `template: {_closest(self.source)}`."
            ) from error

    def _dialogue(self, messages: list[Message], enable_thinking: bool) -> list[dict]:
        """Messages as the template expects them: observations as tool, calls as tool_calls if it knows
        these."""
        dialogue = []
        if self.default_system is not None and not (messages and messages[0].role == "system"):
            dialogue.append({"role": "system", "content": self.default_system})
        for message in messages:
            entry = {"role": message.role, "content": message.content}
            if message.role == "observation":
                entry["role"] = "tool"
            elif message.role == "function":
                entry["role"] = "assistant"
                calls = tool_calls(message.content) if "tool_calls" in self.source else None
                if calls is not None:
                    entry["content"] = ""
                    entry["tool_calls"] = [
                        {"type": "function", "function": {"name": name, "arguments": arguments}}
                        for name, arguments in calls
                    ]
            if message.role in PRODUCED and not enable_thinking and "enable_thinking" in self.source:
                entry["content"] = split_thought(entry["content"])[1]
            dialogue.append(entry)
        return dialogue

    def _end_of(self, dialogue: list[dict], settings: "_Settings", whole: str) -> int:
        """Where the text of these first messages ends in the whole text; 0 when it is no prefix of it."""
        try:
            text = self._text(dialogue, settings, False)
        except UserError:  # many refuse a dialogue that is not complete, such as a system message alone
            return 0
        return len(text) if whole.startswith(text) else 0

    def _answer(
        self, dialogue, position: int, settings, whole: str, probe: "_Probe"
    ) -> tuple[int, int] | None:
        """Begin and end of the trained text of one answer in `whole`; None when the prefixes do not agree."""
        prompt = self._text(dialogue[:position], settings, True) + probe.missing_header
        upto = self._text(dialogue[: position + 1], settings, False)
        end = len(upto) - len(probe.after_end) if upto.endswith(probe.after_end) else len(upto)
        if len(prompt) > end or not upto.startswith(prompt) or not whole.startswith(upto[:end]):
            return None
        return len(prompt), end

    def _probe(self, settings: "_Settings") -> "_Probe":
        return _probe(self.source, settings.bos, settings.eos, settings.enable_thinking)

    def _explain(self, dialogue: list[dict], position: int, settings: "_Settings") -> str:
        prompt = self._text(dialogue[:position], settings, True)
        upto = self._text(dialogue[: position + 1], settings, False)
        same = len(_common_prefix([prompt, upto]))
        return (
            "the checkpoint's chat_template does not show where the answer begins: the prompt for generation "
            f"continues with {prompt[same : same + 40]!r}, the finished dialogue with "
            f"{upto[same : same + 40]!r}. "
            f"Choose a built-in template, for example `template: {_closest(self.source)}`."
        )


ANSWER_BEGINS, ANSWER_ENDS = (
    "\U000f1000",
    "\U000f1001",
)  # private use: {% generation %} and {% endgeneration %}


@dataclass(frozen=True)
class _Settings:
    bos: str | None
    eos: str | None
    enable_thinking: bool
    tools: list[dict] | None


@dataclass(frozen=True)
class _Probe:
    """What a template does around an answer, found with a sample dialogue."""

    missing_header: str  # header of an answer that add_generation_prompt fails to give
    lead: str  # white space between the prompt and the content
    end_mark: str  # between the content and the end of the turn, as <|im_end|>
    after_end: str  # white space after the end mark: not trained


@functools.lru_cache(maxsize=64)
def _probe(source: str, bos: str | None, eos: str | None, enable_thinking: bool) -> _Probe:
    template, settings = JinjaTemplate(source), _Settings(bos or "", eos or "", enable_thinking, None)
    question = {"role": "user", "content": "question"}
    texts = [
        template._text([question, {"role": "assistant", "content": content}], settings, False)
        for content in ("alpha", "omega")
    ]
    texts = [text.replace(ANSWER_BEGINS, "").replace(ANSWER_ENDS, "") for text in texts]
    plain = template._text([question], settings, False)
    prompt = template._text([question], settings, True)
    missing = ""
    header = _common_prefix(texts)[len(plain) :]
    if prompt == plain and header.strip() and texts[0].startswith(plain):
        missing = header.rstrip(" ")  # the space belongs to the answer's first word
    begin, _, tail = texts[0].rpartition("alpha")
    lead = begin[len(prompt + missing) :] if begin.startswith(prompt + missing) else ""
    end_mark = tail.rstrip()
    after_end = tail[len(end_mark) :] if end_mark else ""  # without an end mark, the white space is the mark
    return _Probe(missing, lead if lead.isspace() else "", end_mark or tail, after_end)


def _common_prefix(texts: list[str]) -> str:
    count = 0
    for characters in zip(*texts):
        if len(set(characters)) > 1:
            break
        count += 1
    return texts[0][:count]


def _has_marks(source: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


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
    signs = (
        ("<think>", "qwen3"),
        ("<|im_start|>", "chatml"),
        ("Cutting Knowledge", "llama31"),
        ("<|start_header_id|>", "llama3"),
        ("<<SYS>>", "llama2"),
        ("[INST]", "mistral"),
        ("<|assistant|>", "zephyr"),
        ("ASSISTANT", "vicuna"),
        ("### Response", "alpaca"),
        ("Assistant:", "deepseek"),
    )
    return next((name for sign, name in signs if sign in source), "default")


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


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own tojson escapes HTML characters, which would change the text
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """In the environment of transformers' apply_chat_template: sandboxed, for the code comes from
    strangers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the checkpoint's chat_template is not valid jinja ({error}); choose a built-in one by "
            "`template`"
        ) from error
