"""A checkpoint's own chat_template (jinja): dialogue -> text spans, with which text the model has to produce.

The template runs in the sandbox that transformers uses. Where an answer begins and ends is found by rendering
prefixes of the dialogue: the prompt for generation must be a prefix of the dialogue that ends with this
answer, and that must be a prefix of the whole. {% generation %} marks are used where the template has them.

Source: transformers' apply_chat_template (environment, names of its values).
Run: python -c "from text.jinja_template import *; print(JinjaTemplate('{{ messages }}').render([], '', ''))"
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from options.errors import UserError
from options.limits import bounded
from text.render import PRODUCED, THOUGHTS, Message, Span, bare, is_parts, parsed, split_thought

# of the time and the memory that one dialogue takes
IN_BOUNDS = bounded("the checkpoint's chat_template", "choose a built-in one by `template`")


@dataclass(frozen=True)
class JinjaTemplate:
    """The chat_template of a checkpoint, run in a sandbox as transformers runs it."""

    source: str
    default_system: str | None = None
    name: str = "checkpoint"
    tool_use: str | None = None  # takes the place of source where there are tool definitions
    needs_tools: bool = False  # there is no other than that

    @IN_BOUNDS
    def render(
        self, messages, bos, eos, *, generation_prompt=False, enable_thinking=None, tools=None, variables=None
    ) -> list[Span]:
        """Spans of the dialogue. An answer is trained where the prompt that generation would be given is what
        stands before it, and later turns leave it unchanged. UserError when not so for the last answer.

        messages: [Message]. enable_thinking: None = the template's own way. variables: {name: value} of what
        else it may read: further special tokens, and what the row itself sets.
        """
        if self.needs_tools and not tools:
            found = "the checkpoint has a chat_template for dialogues with tool definitions alone (tool_use)"
            raise UserError(f"{found}, and this one has none; `template: tool_use` takes it for all")
        if tools and self.tool_use is not None:
            how = {"generation_prompt": generation_prompt, "enable_thinking": enable_thinking, "tools": tools}
            chosen = replace(self, source=self.tool_use, tool_use=None)
            return chosen.render(messages, bos, eos, variables=variables, **how)
        written = _writer(self.source, bos, eos, enable_thinking, tools, variables)
        dialogue = self._dialogue(messages, enable_thinking)
        whole = written(dialogue, generation_prompt)
        answers = [turn for turn, message in enumerate(messages) if message.role in PRODUCED]
        probe = _sample_probe(self.source, bos, eos, enable_thinking)
        if probe is None:  # it refuses the sample dialogue, which says nothing about this one
            before = dialogue[: answers[-1] - len(messages)] if answers else dialogue
            probe = _probe(written, before, self.source) or _Probe("", "", "", "")
        if generation_prompt:
            whole += probe.missing_header
        if answers and MARKS.search(self.source):
            if answers[-1] == len(messages) - 1 and not _shows_thought(dialogue[-1], whole):
                whole = _with_thought(written, dialogue, "") or whole
            begin = self._bos_length(whole, bos)
            inserted = len(dialogue) - len(messages)
            named = dialogue[:inserted]
            for turn, (message, entry) in enumerate(zip(messages, dialogue[inserted:])):
                text = message.content + chr(TURN_NAMES + turn)
                named.append(entry | ({} if turn in answers else _said(self.source, entry["role"], text)))
            spans = _marked_spans(whole[begin:], lambda: written(named, generation_prompt), messages)
            if not generation_prompt:
                self._check_marked(spans, dialogue[inserted:])
            return [*_prefix(whole[:begin]), *spans]
        begin = self._bos_length(whole, bos)
        spans = _prefix(whole[:begin])
        how = {"generation_prompt": generation_prompt, "enable_thinking": enable_thinking}
        spans += self._spans(written, dialogue, messages, whole, begin, probe, **how)
        return [span for span in spans if span.text]

    def _bos_length(self, whole: str, bos: str | None) -> int:
        """Characters of the bos at the beginning. Where each turn's header begins with it, and the template
        does not name it (SmolLM2's is <|im_start|>), it is a part of the first of these."""
        apart = bos and (self.reads("bos_token", of_message=False) or whole.count(bos) == 1)
        return len(bos) if apart and whole.startswith(bos) else 0

    def _spans(
        self, written, dialogue, messages, whole, cursor, probe: "_Probe", generation_prompt, enable_thinking
    ) -> list[Span]:
        """What stands behind the first `cursor` characters of the whole text, turn by turn."""
        spans, inserted = [], len(dialogue) - len(messages)
        for turn, message in enumerate(messages):
            before, upto = dialogue[: turn + inserted], dialogue[: turn + inserted + 1]
            if message.role not in PRODUCED:
                end = _end_of(written, upto, whole)
                if end > cursor:
                    spans.append(Span(whole[cursor:end], False, turn, message.role))
                    cursor = end
                continue
            last = turn == len(messages) - 1
            try:
                header, text = written(before, True) + probe.missing_header, written(upto)
            except UserError:
                if last:
                    raise
                continue  # it cannot be asked for here: context of a later answer
            modes = (False, True) if enable_thinking is None and "enable_thinking" in self.source else ()
            for mode in modes:  # with a thought or without one, it may answer the prompt of that mode
                if not text.startswith(header):
                    header = written(before, True, enable_thinking=mode) + probe.missing_header
            begin = len(header)
            kept = text.startswith(header) and _shows_thought(upto[-1], text[begin:])
            if last and not generation_prompt and not kept:
                whole = text = _with_thought(written, upto, header) or text
            finished, text = text, text.removesuffix(probe.after_end)
            fits = cursor <= begin <= len(text) and text.startswith(header) and whole.startswith(text)
            reads = not last and any(map(self.reads, THOUGHTS))
            thinks = fits and _shows_thought(upto[-1], text[begin:], reads)
            shown = thinks and _shows_answer(upto[-1], text[begin:])
            if shown:
                spans.append(Span(whole[cursor:begin], False, turn, message.role))
                spans.append(Span(text[begin:], True, turn, message.role))
                end = len(finished) if whole.startswith(finished) else len(text)
                spans.append(Span(whole[len(text) : end], False, turn, message.role))  # white space
                cursor = end
            elif last or (thinks and not generation_prompt):
                raise UserError(_explain(self.source, upto[-1], header, text))
        owner = len(messages) if generation_prompt else len(messages) - 1
        role = "assistant" if generation_prompt or not messages else messages[-1].role
        return [*spans, Span(whole[cursor:], False, owner, role)]

    def _check_marked(self, spans: list[Span], dialogue: list[dict]) -> None:
        """UserError for an answer that is marked and whose text, or call, is not within the marks."""
        marked: dict[int, str] = {}
        for span in spans:
            if span.answer:
                marked[span.turn] = marked.get(span.turn, "") + span.text
        for turn, text in marked.items():
            alone = {"content": dialogue[turn].get("content")}
            said = bare(split_thought(_text_of(alone))[1])
            if not _shows_answer(dialogue[turn], text) and not (said and _shows_answer(alone, text)):
                found = f"marks {text[:40]!r} as the answer {_text_of(alone)[:40]!r}"
                way_out = f"Choose a built-in template, for example `template: {_closest(self.source)}`."
                raise UserError(f"the checkpoint's chat_template {found}, which does not hold it. {way_out}")

    def reads(self, key: str, of_message: bool = True) -> bool:
        """Whether the template names this key of a message (or this variable)."""
        if key in THOUGHTS and "think>" in self.source:
            return True  # if not by that name, then in the content
        return _names(f"{self.source} {self.tool_use}", key, of_message)

    @IN_BOUNDS
    def stop_words(self, eos: str | None) -> tuple[str, ...]:
        """The template's end-of-turn mark and the tokenizer's eos."""
        probe = _sample_probe(self.source, "", eos, None)
        end = "" if probe is None else probe.end_mark.strip()
        return tuple(dict.fromkeys(word for word in (end, eos) if word))

    @IN_BOUNDS
    def content(self, text: str) -> str:
        """A generated text as an assistant's content: without the space that some templates begin with."""
        probe = _sample_probe(self.source, "", "", None)
        return text if probe is None else text.removeprefix(probe.lead)

    def to_jinja(self) -> str:
        """One text for all dialogues, with the default system text in it."""
        text = self.source
        if self.tool_use not in (None, text):
            with_tools = "{%- if tools %}\n" + self.tool_use.removesuffix("\n")
            text = with_tools + "{% else %}\n" + text.removesuffix("\n") + "{% endif %}"
        if self.default_system is None:
            return text
        spoken = json.dumps([_said(self.source, "system", self.default_system)], ensure_ascii=False)
        lacking = "{%- if not messages or messages[0]['role'] not in ['system', 'developer'] %}"
        return f"{lacking}{{%- set messages = {spoken} + messages %}}{{%- endif %}}\n{text}"

    def _dialogue(self, messages: list[Message], enable_thinking: bool | None) -> list[dict]:
        """Messages as the template expects them, where it does not take them as they are."""
        dialogue = []
        if self.default_system is not None and not (messages and messages[0].role == "system"):
            dialogue.append(_said(self.source, "system", self.default_system))
        silent = enable_thinking is False and "enable_thinking" in self.source
        folds = "think>" in self.source and not any(_names(self.source, key, True) for key in THOUGHTS)
        keeps = folds and _keeps_thoughts(self.source)
        for turn, message in enumerate(messages):
            entry = message.entry()
            if entry["role"] == "developer" and not _forms(self.source, "developer"):
                entry["role"] = "system"
            if entry.get("tool_calls"):
                entry = self._with_calls(message, entry)
            thought, text = entry.get("reasoning_content"), entry.get("content")
            if message.role in PRODUCED and silent:
                entry = {key: value for key, value in entry.items() if key not in THOUGHTS}
                if isinstance(text, str):
                    entry["content"] = split_thought(text)[1]
            elif thought and message.role in PRODUCED and folds and (keeps or turn == len(messages) - 1):
                entry["content"] = _thought_and_text(thought, message.content)
            dialogue.append(self._in_form(message, entry))
        return dialogue

    def _with_calls(self, message: Message, entry: dict) -> dict:
        """The calls where the template reads them: as tool_calls, their arguments as objects or as text; else
        as JSON in the content."""
        functions = [call["function"] for call in entry["tool_calls"]]
        if not self.reads("tool_calls"):
            text = message.content
            if "tool_calls" in message.more:
                plain = [each | {"arguments": parsed(each["arguments"])} for each in functions]
                calls = json.dumps(plain if len(plain) > 1 else plain[0], ensure_ascii=False)
                text = f"{text}\n{calls}" if text else calls
            return {key: value for key, value in entry.items() if key != "tool_calls"} | {"content": text}
        as_read = _as_text if _wants_text_arguments(self.source) else parsed
        functions = [each | {"arguments": as_read(each["arguments"])} for each in functions]
        calls = [call | {"function": each} for call, each in zip(entry["tool_calls"], functions)]
        return entry | {"tool_calls": calls}

    def _in_form(self, message: Message, entry: dict) -> dict:
        """Its content as text or as a list of parts, whichever the template reads."""
        content = entry.get("content")
        if isinstance(content, str):
            return entry | _said(self.source, entry["role"], content)
        if content is not None and not is_parts(content):  # what a tool gave
            as_it_is = isinstance(content, dict | list) and "object" in _forms(self.source, "tool")
            return entry | {"content": content if as_it_is else message.content}
        if isinstance(content, list):
            if "parts" not in _forms(self.source, entry["role"]):
                return entry | {"content": message.content}
            kinds = {part["type"] for part in content} - {"text"}
            if not all(map(self.reads, kinds)):
                content = [part for part in content if part["type"] == "text"]
            elif kinds:  # the thought stands in a part of its own
                entry = {key: value for key, value in entry.items() if key not in THOUGHTS}
            return entry | {"content": content}
        if "content" not in entry and not _takes_no_content(self.source):
            return entry | {"content": ""}
        return entry


# private use: {% generation %} and {% endgeneration %}
ANSWER_BEGINS, ANSWER_ENDS = "\U000f1000", "\U000f1001"
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
BLANK = "\U000f1002"  # in the place of a content
TURN_NAMES = 0xF2000  # and the characters behind it, one for each turn that asks


# what filters and methods raise; not Exception, for one from outside stops a template that takes too long
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError)
TEMPLATE_FAULTS += (AttributeError, AssertionError, RuntimeError)


def _writer(
    source: str, bos, eos, enable_thinking: bool | None = None, tools=None, variables=None
) -> Callable[..., str]:
    """(dialogue, generation_prompt, other values) -> text, for given values of all that a template reads."""
    template, shared = _compile(source), {"tools": tools, "documents": None}
    named = {"bos_token": bos, "eos_token": eos, "enable_thinking": enable_thinking}
    shared |= {name: value for name, value in named.items() if value is not None} | (variables or {})

    def written(dialogue: list[dict], generation_prompt: bool = False, **other) -> str:
        asked = shared | {"messages": dialogue, "add_generation_prompt": generation_prompt} | other
        try:
            return template.render(asked)
        except TEMPLATE_FAULTS as error:  # such as a missing value, or a range too long
            roles = ", ".join(message["role"] for message in dialogue) or "no message"
            found = (
                f"the checkpoint's chat_template refuses a dialogue of {roles}: {error}. Change the dialogue"
            )
            way_out = f"choose a built-in template, for example `template: {_closest(source)}`."
            raise UserError(f"{found}, or {way_out}") from error

    return written


class _Probe(NamedTuple):
    """What a template does around an answer, found with a sample dialogue."""

    missing_header: str  # header of an answer that add_generation_prompt fails to give
    lead: str  # white space between the prompt and the content
    end_mark: str  # between the content and the end of the turn, as <|im_end|>
    after_end: str  # white space after the end mark: not trained


@functools.lru_cache(maxsize=64)
def _sample_probe(source: str, bos: str | None, eos: str | None, enable_thinking) -> _Probe | None:
    """What a template does around the answer to a plain question."""
    question = _said(source, "user", "question")
    return _probe(_writer(source, bos or "", eos or "", enable_thinking), [question], source)


def _probe(written: Callable[..., str], before: list[dict], source: str) -> _Probe | None:
    """None: the template refuses an answer here, or does not write it."""
    try:
        texts = [written([*before, _said(source, "assistant", word)]) for word in ("alpha", "omega")]
        texts += [written(before), written(before, True)]
    except UserError:
        return None
    *texts, plain, prompt = (text.replace(ANSWER_BEGINS, "").replace(ANSWER_ENDS, "") for text in texts)
    missing = ""
    if "alpha" not in texts[0]:
        return None
    header = os.path.commonprefix(texts)[len(plain) :]
    if prompt == plain and header.strip() and texts[0].startswith(plain):
        missing = header.rstrip(" ")  # the space belongs to the answer's first word
    begin, _, tail = texts[0].rpartition("alpha")
    lead = begin[len(prompt + missing) :] if begin.startswith(prompt + missing) else ""
    end_mark = tail.rstrip()
    after_end = tail[len(end_mark) :] if end_mark else ""  # without an end mark, the white space is the mark
    return _Probe(missing, lead if lead.isspace() else "", end_mark or tail, after_end)


@functools.lru_cache(maxsize=1024)
def _names(source: str, key: str, of_message: bool) -> bool:
    before = "[.'\"]" if of_message else r"\b"
    return re.search(rf"{before}{re.escape(key)}\b", source) is not None


_SAMPLE_CALL = {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": {"k": "v"}}}


def _shown(source: str, *dialogue: dict) -> str | None:
    """A sample dialogue as the template writes it; None when it is refused."""
    with contextlib.suppress(UserError):
        return _writer(source, "", "")(list(dialogue))


@functools.lru_cache(maxsize=256)
def _forms(source: str, role: str) -> tuple[str, ...]:
    """In which forms ("text", "parts", "object": as JSON) a content of this role is shown; () when the sample
    is refused."""
    found = []
    for form in ("text", "parts", "object")[: 3 if role == "tool" else 2]:
        words = "question", {"k": "PROBE"} if form == "object" else "PROBE"
        contents = ([{"type": "text", "text": word}] if form == "parts" else word for word in words)
        asked, said = ({"role": who, "content": what} for who, what in zip(("user", role), contents))
        call = asked | {"role": "assistant", "tool_calls": [_SAMPLE_CALL]}
        result = said | {"tool_call_id": "abcdef123", "name": "f"}
        dialogues = {"user": [said], "assistant": [asked, said], "tool": [asked, call, result]}
        text = _shown(source, *dialogues.get(role, [said, asked])) or ""
        # not a list or an object that is printed as it is
        if "PROBE" in text and not re.search("""['"]text['"]: ['"]PROBE|'k': 'PROBE'""", text):
            found.append(form)
    return tuple(found) or (_forms(source, "user") if role == "tool" else ())


def _said(source: str, role: str, text: str) -> dict:
    """A message with this text in the form that the template reads: as text if it can."""
    parts = _forms(source, role) == ("parts",)
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


@functools.lru_cache(maxsize=64)
def _takes_no_content(source: str) -> bool:
    """Whether a call may have no content at all, as transformers gives a null."""
    call = {"role": "assistant", "tool_calls": [_SAMPLE_CALL]}
    return _shown(source, _said(source, "user", "question"), call) is not None


@functools.lru_cache(maxsize=64)
def _wants_text_arguments(source: str) -> bool:
    """Whether the arguments of a call have to be JSON text: as an object they are refused, or printed as
    Python writes them."""
    seen = []
    for arguments in ({"k": "v"}, json.dumps({"k": "v"})):
        calls = [_SAMPLE_CALL | {"function": {"name": "f", "arguments": arguments}}]
        call = {"role": "assistant", "content": "", "tool_calls": calls}
        seen.append(_shown(source, _said(source, "user", "question"), call))
    as_object, as_text = seen
    return as_text is not None and (as_object is None or "{'k'" in as_object)


def _as_text(arguments) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _text_of(entry: dict) -> str:
    content = entry.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _shows_thought(entry: dict, text: str, apart: bool = False) -> bool:
    """Whether the thought that stands in an answer's content, or also one apart from it, is in this text."""
    thought = split_thought(_text_of(entry))[0] or (entry.get("reasoning_content") or "") * apart
    return not thought or bare(thought) in bare(text)


def _shows_answer(entry: dict, text: str) -> bool:
    """Whether an answer, or else the names of its calls, is in this text."""
    names = [call["function"]["name"] for call in entry.get("tool_calls") or []]
    content = entry.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return all(bare(each) in bare(text) for each in names or [split_thought(each)[1] for each in texts])


def _with_thought(written: Callable[..., str], dialogue: list[dict], header: str) -> str | None:
    """The dialogue with its last content unchanged, where the template leaves a thought out of it: that is
    right for earlier answers, and nothing to learn from for the last. None where it does not fit the header,
    which may open the thought, and a line behind that."""
    *before, answer = dialogue
    said, text = _text_of(answer), written([*before, answer | {"content": BLANK}])
    ways = [said, _thought_and_text(*split_thought(said))] if "</think>" in said else []
    texts = (text.replace(BLANK, way) for way in ways)
    return next((text for text in texts if text.startswith(header)), None)


def _thought_and_text(thought: str, text: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{text}"


@functools.lru_cache(maxsize=64)
def _keeps_thoughts(source: str) -> bool:
    """Whether a thought in the content of an earlier answer is shown."""
    said = ("user", "question"), ("assistant", _thought_and_text("PROBE", "a")), ("user", "question")
    return "PROBE" in (_shown(source, *(_said(source, *each) for each in said)) or "PROBE")


def _end_of(written: Callable[..., str], dialogue: list[dict], whole: str) -> int:
    """Where the text of these first messages ends in the whole text; 0 when it is no prefix of it."""
    try:
        text = written(dialogue)
    except UserError:  # many refuse a dialogue that is not complete, such as a system message alone
        return 0
    return len(text) if whole.startswith(text) else 0


def _explain(source: str, answer: dict, prompt: str, finished: str) -> str:
    same = len(os.path.commonprefix([prompt, finished]))
    one, other = prompt[same : same + 40], finished[same : same + 40]
    found = f"the prompt for generation continues with {one!r}, the finished dialogue with {other!r}"
    found = f"does not show where the answer begins: {found}"
    if same == len(prompt):
        found = f"does not write the answer {_text_of(answer)[:40]!r}: it writes {other!r}"
    way_out = f"Choose a built-in template, for example `template: {_closest(source)}`."
    return f"the checkpoint's chat_template {found}. {way_out}"


def _prefix(bos: str) -> list[Span]:
    return [Span(bos, False, -1, "prefix")] if bos else []


def _pieces(whole: str) -> list[str]:
    """What is not marked and what is, in turns."""
    return re.split(f"{ANSWER_BEGINS}(.*?){ANSWER_ENDS}", whole, flags=re.DOTALL)


def _marked_spans(whole: str, named: Callable[[], str], messages: list[Message]) -> list[Span]:
    """Spans of a template that marks what it trains by {% generation %}. named: gives the same dialogue, each
    question ending with its turn's name."""
    pieces = _pieces(whole)
    owners = [*_owners(len(pieces) // 2, named, messages), len(messages) - 1]
    spans = []
    for index, piece in enumerate(pieces):
        turn = owners[index // 2]
        spans.append(Span(piece, index % 2 == 1, turn, messages[turn].role))
    return [span for span in spans if span.text]


def _owners(marked: int, named: Callable[[], str], messages: list[Message]) -> list[int]:
    """The turn of each marked text: the first answer behind the last question in front of it; the last answer
    where the template marks something else for the names' sake."""
    produced = [turn for turn, message in enumerate(messages) if message.role in PRODUCED]
    turns, seen = [], -1
    with contextlib.suppress(UserError):
        for index, piece in enumerate(_pieces(named())):
            if index % 2:
                turns.append(next((turn for turn in produced if turn > seen), produced[-1]))
            names = (ord(letter) - TURN_NAMES for letter in piece)
            seen = max((turn for turn in names if 0 <= turn < len(messages)), default=seen)
    return turns if len(turns) == marked else produced[-1:] * marked


# built-in templates and what a chat_template has whose model knows their tokens; the first that fits
SIGNS = {
    "deepseekr1": ("<\uff5cUser\uff5c>", "think>"),
    "deepseek3": ("<\uff5cUser\uff5c>",),
    "qwen3": ("<|im_start|>", "<think>"),
    "chatml": ("<|im_start|>",),
    "llama31": ("<|start_header_id|>", "Cutting Knowledge"),
    "llama3": ("<|start_header_id|>",),
    "llama2": ("[INST]", "<<SYS>>"),
    "mistral": ("[INST]",),
    "zephyr": ("<|assistant|>", "<|user|>"),
    "vicuna": ("ASSISTANT", "USER"),
    "alpaca": ("### Response",),
    "deepseek": ("Assistant:", "User:"),
}


def _closest(source: str) -> str:
    """The built-in template that looks most like a jinja text; the default one has no tokens of its own."""
    return next((name for name, signs in SIGNS.items() if all(sign in source for sign in signs)), "default")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the model writes, as in transformers."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return ANSWER_BEGINS + caller() + ANSWER_ENDS


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja's own escapes HTML characters, which would change the text."""
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _refuse_long(bits: int) -> None:
    """For whole numbers of thousands of digits, whose arithmetic nothing stops."""
    if bits > 10_000:
        raise OverflowError(f"a number of {bits} bits")


def _round(value, precision=0, method="common") -> float:
    _refuse_long(4 * abs(precision))  # jinja's own takes that power of ten
    return jinja2.filters.do_round(value, precision, method)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' sandbox, with short numbers."""

    intercepted_binops = frozenset(("*", "**", "//", "%"))

    def call_binop(self, context, operator, left, right):
        if isinstance(left, int) and isinstance(right, int):
            _refuse_long(left.bit_length() * (right if operator == "**" else 1) + right.bit_length())
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """In the environment of transformers' apply_chat_template: sandboxed, for strangers wrote the code."""
    extensions = [_Generation, jinja2.ext.loopcontrols]
    layout = {"trim_blocks": True, "lstrip_blocks": True}
    environment = _Sandbox(extensions=extensions, **layout)
    environment.filters |= {"tojson": _tojson, "round": _round}
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (*TEMPLATE_FAULTS, SyntaxError) as error:  # SyntaxError: nested too deeply for Python
        why = f"is not valid jinja ({error}); choose a built-in one by `template`"
        raise UserError(f"the checkpoint's chat_template {why}") from error
