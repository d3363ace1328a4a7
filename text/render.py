"""A dialogue -> text spans that say which text the model has to produce -> tokens; a template as data.

A `ChatTemplate` is a slot of text per role, with {{content}}, {{bos}} and {{eos}} to fill in; templates.py is
their catalogue. jinja_template.JinjaTemplate, a checkpoint's own chat_template, renders the same spans. Both
keep one promise: the text before a trained answer is exactly the text that generation is given.

Run: python -c "from text.render import *; print(ChatTemplate('a').render([Message('user', 'Hi')], '', ''))"
"""

import itertools
import json
import re
from dataclasses import dataclass
from typing import NamedTuple

from options import json_reader
from options.errors import UserError
from text.tools import TOOL_TEXTS, generic_tools, qwen_tools

PRODUCED = ("assistant", "function")  # roles whose text the model writes
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a thought, in transformers' order
TAGGED_CALL = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)
SLOT = re.compile(r"\{\{(content|bos|eos|name|arguments)\}\}")
NO_THOUGHT = "<think>\n\n</think>\n\n"


class Message(NamedTuple):
    """One turn. function: the assistant's call of a tool (trained); observation: the tool's result (not).

    The calls of a function turn are more["tool_calls"], as OpenAI wraps them; without that its content is
    their JSON (split_calls). more: the other keys that the row's message has, for templates to read;
    `role` and `content` there are the row's own where those above are not (developer; parts, null, or what a
    tool gave that is no text)."""

    role: str  # system, user, assistant, observation, function
    content: str
    more: dict = {}  # never written to

    def entry(self) -> dict:
        """The message as transformers gives it to a chat_template: without nulls, a thought under each name
        that templates know."""
        role = {"observation": "tool", "function": "assistant"}.get(self.role, self.role)
        entry = {"role": role, "content": self.content}
        in_content = self.role == "function" and "tool_calls" not in self.more
        found = split_calls(self.content) if in_content else None
        if found is not None:
            functions = [{"name": name, "arguments": arguments} for name, arguments in found[1]]
            calls = [{"type": "function", "function": function} for function in functions]
            entry |= {"content": found[0], "tool_calls": calls}
        entry |= self.more
        thought = next((entry[key] for key in THOUGHTS if isinstance(entry.get(key), str)), None)
        if thought is not None:
            entry = {"thinking": thought, **entry, "reasoning_content": thought}
        return {key: value for key, value in entry.items() if value is not None}


class Span(NamedTuple):
    """A piece of the rendered text. turn: index of the message; -1 = what stands before the first one."""

    text: str
    answer: bool  # the model has to produce it
    turn: int
    role: str


@dataclass(frozen=True)
class ChatTemplate:
    """In a slot {{content}} is the message, {{bos}} and {{eos}} are the tokenizer's tokens."""

    name: str
    prefix: str = ""
    system: str = "{{content}}"
    user: str = "{{content}}"
    header: str = ""  # before an answer: what generation is given last
    answer: str = "{{content}}{{eos}}"  # trained
    turn_end: str = ""  # after an answer, not trained
    observation: str | None = None  # None: as user
    results: str | None = "\n"  # between the results of parallel calls; None: each is a turn
    # what becomes of a function turn that is a JSON call; any other text stands as it is
    function: str = "Action: {{name}}\nAction Input: {{arguments}}"
    tools: str = "generic"  # how tool definitions are written, a key of TOOL_TEXTS
    default_system: str | None = None
    system_in_first_user: bool = False
    trim: bool = False  # strip white space around every content
    thinking: bool = False  # <think> blocks as Qwen3
    stop: tuple[str, ...] = ()

    def render(
        self, messages, bos, eos, *, generation_prompt=False, enable_thinking=None, tools=None, variables=None
    ) -> list[Span]:
        """Spans of the dialogue; with generation_prompt, the text up to where the next answer begins.

        messages: [Message]. bos, eos: the tokenizer's, or None. enable_thinking: None = True. tools: [dict]
        or None; described at the end of the system text. variables: for a checkpoint's own template.
        """
        thinks = enable_thinking is not False
        late = [turn for turn, message in enumerate(messages) if turn and message.role == "system"]
        if late:
            raise UserError(f"message {late[0]} is a system message; only the first one can be one")
        if eos is None and "{{eos}}" in self.answer:
            raise UserError(
                f"template {self.name!r} ends an answer with the tokenizer's eos token, but the tokenizer "
                "has none; name eos_token in tokenizer_config.json, or choose one with its own end as chatml"
            )
        tokens = {"bos": bos or "", "eos": eos or ""}
        spans = [Span(_fill(self.prefix, tokens), False, -1, "prefix")]
        system, system_turn, first = self.default_system, -1, 0
        if messages and messages[0].role == "system":
            system, system_turn, first = messages[0].content, 0, 1
        if tools:
            system = TOOL_TEXTS[self.tools](system or "", tools)
        before_user = ""
        if system is not None:
            trim = self.trim and not self.system_in_first_user  # there the user turn is trimmed with it
            text = _fill(self.system, tokens, content=system.strip() if trim else system)
            if self.system_in_first_user:
                before_user = text
                if len(messages) == first or messages[first].role != "user":
                    why = "writes the system text into the first user turn, so a system message needs"
                    raise UserError(f"template {self.name!r} {why} a user message after it")
            else:
                spans.append(Span(text, False, system_turn, "system"))
        slots = {"user": self.user, "observation": self.observation or self.user}
        last_query = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        for turn, (role, content, _) in enumerate(messages[first:], start=first):
            if role in PRODUCED:
                spans += self._answer(messages, turn, last_query, tokens, thinks)
                continue
            content, before_user = before_user + content, ""
            next_role = next((each.role for each in messages[turn + 1 : turn + 2]), None)
            if role == next_role == "observation" and self.results is not None:
                before_user = content + self.results
                continue
            text = _fill(slots[role], tokens, content=content.strip() if self.trim else content)
            spans.append(Span(text, False, turn, role))
        if generation_prompt:
            text = _fill(self.header, tokens) + (NO_THOUGHT if self.thinking and not thinks else "")
            spans.append(Span(text, False, len(messages), "assistant"))
        return [span for span in spans if span.text]

    def _answer(self, messages, turn, last_query, tokens: dict, enable_thinking: bool) -> list[Span]:
        (role, content, _), entry = messages[turn], messages[turn].entry()
        header, trained, last = _fill(self.header, tokens), True, turn == len(messages) - 1
        if isinstance(entry.get("content"), str):
            content = entry["content"]
        thought = entry.get("reasoning_content")
        if self.thinking and thought:
            thought, content = thought.strip("\n"), content.lstrip("\n")
        elif self.thinking:
            thought, content = split_thought(content)
        if entry.get("tool_calls"):
            content += ("\n" if content else "") + _function_text(entry["tool_calls"], self.function)
        if self.trim:
            content = content.strip()
        if self.thinking:
            thinks = turn > last_query
            if thinks and not enable_thinking and last:
                header += NO_THOUGHT
            elif thinks and enable_thinking and (thought or last):
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            else:
                # An earlier answer is shown without its thought, and that is not what the model is to write.
                trained = False
        return [
            Span(header, False, turn, role),
            Span(_fill(self.answer, tokens, content=content), trained, turn, role),
            Span(_fill(self.turn_end, tokens), False, turn, role),
        ]

    def reads(self, key: str, of_message: bool = True) -> bool:
        """Whether a further key of a message (or a variable of the row) has a place in the text."""
        return of_message and (key == "tool_calls" or (self.thinking and key in THOUGHTS))

    def stop_words(self, eos: str | None) -> tuple[str, ...]:
        """Texts that end an answer in generation."""
        return tuple(dict.fromkeys([*self.stop, *([eos] if eos else [])]))

    def content(self, text: str) -> str:
        """A generated text as an assistant's content: without the space that some templates begin with."""
        return text.removeprefix(self.answer.partition("{{content}}")[0])

    def to_jinja(self) -> str:
        """The same template as a chat_template for transformers and servers."""
        return _as_jinja(self)


def _fill(slot: str, tokens: dict[str, str], **values: str) -> str:
    values = tokens | values
    return SLOT.sub(lambda match: values[match.group(1)], slot)


def _function_text(calls: list[dict], slot: str) -> str:
    """Calls in the template's own form."""
    functions = [call["function"] for call in calls]
    texts = [(each["name"], json.dumps(parsed(each["arguments"]), ensure_ascii=False)) for each in functions]
    return "\n".join(_fill(slot, {"name": name, "arguments": text}) for name, text in texts)


def split_thought(content: str) -> tuple[str, str]:
    """("t", "a") of "<think>\\nt\\n</think>\\n\\na", as Qwen3's jinja cuts it; no block: ("", content)."""
    if "</think>" not in content:
        return "", content
    head, answer = content.split("</think>")[0], content.split("</think>")[-1]
    thought = head.rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought.strip("\n"), answer.lstrip("\n")


def tool_calls(content: str) -> list[tuple[str, dict]] | None:
    """[(name, arguments)] of a JSON call {"name": ..., "arguments": ...} or a list of them; else None."""
    calls = parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    known = all(isinstance(c, dict) and isinstance(c.get("name"), str) and "arguments" in c for c in calls)
    return [(call["name"], parsed(call["arguments"])) for call in calls] if calls and known else None


def split_calls(content: str) -> tuple[str, list[tuple[str, dict]]] | None:
    """(text beside them, tool_calls) of a function turn as LLaMA-Factory has it: the JSON alone, behind a
    <think> block, or between <tool_call> marks; None for any other text."""
    tagged = TAGGED_CALL.findall(content)
    text, mark, rest = content.rpartition("</think>")
    text = TAGGED_CALL.sub("", content).rstrip("\n") if tagged else text + mark
    found = [tool_calls(each) for each in tagged or [rest]]
    if None in found:
        return None
    text += "\n" if text.endswith("</think>") else ""  # a newline stands before calls: that makes two
    return text, list(itertools.chain.from_iterable(found))


def parsed(value):
    """The value that a text spells as JSON; anything else as it is, for a tool may take plain text."""
    try:
        return json_reader.parse(value, "a call", expected=None) if isinstance(value, str) else value
    except UserError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return value
        raise


def is_parts(content) -> bool:
    """Whether a content is a list of parts, each with its type."""
    listed = isinstance(content, list)
    return listed and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def bare(text: str) -> str:
    """A text without its white space: templates strip and join, and that is no loss."""
    return "".join(text.split())


def unused(template, messages: list[Message], spans: list[Span], variables: dict) -> list[str]:
    """What a row gave and the template did not write, for the report. variables: the row's own."""
    held = (item for message in messages for item in message.more.items())
    keys = dict.fromkeys(key for key, value in held if value not in ("", [], {}))
    thoughts = any(map(template.reads, THOUGHTS))
    notes, name = [], template.name
    for key in keys:
        if key == "tool_calls" and not template.reads(key):
            notes.append(f"template {name!r} has no form for tool calls: they stand as JSON")
        elif not (
            key in ("role", "content", "weight") or template.reads(key) or (key in THOUGHTS and thoughts)
        ):
            notes.append(f"template {name!r} does not read {key!r} of a message")
    for key in variables:
        if key != "enable_thinking" and not template.reads(key, of_message=False):
            notes.append(f"template {name!r} does not read {key!r}")
    written = bare("".join(span.text for span in spans))
    for message in messages:
        if message.role == "function" and "tool_calls" not in message.more:
            continue  # its content is no text
        if message.role != "assistant" and bare(split_thought(message.content)[1]) not in written:
            called = message.role == "function"
            what = "the text beside a tool call" if called else f"a text of role {message.role}"
            notes.append(f"template {name!r} leaves out {what}")
    thought = messages[-1].entry().get("reasoning_content") if messages and thoughts else None
    if thought and bare(thought) not in written:
        notes.append(f"template {name!r} leaves out the thought of the last answer")
    return notes


# ------------------------------------------------------------------------------------------------ tokens


class EncodedDialogue(NamedTuple):
    """A dialogue as tokens."""

    ids: list[int]
    answer: list[bool]  # of each token: the model has to produce it
    counts: list[int]  # of each span: its tokens
    firsts: list[int]  # of each place: the first token that begins there or later


def encode_dialogue(tokenizer, spans: list[Span], places: list[int] = ()) -> EncodedDialogue:
    """Tokens of rendered spans. Neighbouring spans with the same `answer` are joined first, so that the
    tokens are those of the whole text; a token belongs to the span in which it begins. places: characters of
    the text."""
    parts, flags = [], []
    for span in spans:
        if flags and flags[-1] == span.answer:
            parts[-1] += span.text
        else:
            parts.append(span.text)
            flags.append(span.answer)
    begins = list(itertools.accumulate((len(span.text) for span in spans), initial=0))[:-1]
    part_ids, firsts = tokenizer.encode_parts_at(parts, [*begins, *places])
    firsts, at_places = firsts[: len(begins)], firsts[len(begins) :]
    ids, answer = list(itertools.chain.from_iterable(part_ids)), []
    for flag, of_part in zip(flags, part_ids):
        answer += [flag] * len(of_part)
    counts = [b - a for a, b in itertools.pairwise([*firsts, len(ids)])]
    return EncodedDialogue(ids, answer, counts, at_places)


# ------------------------------------------------------------------------------------------------ as jinja

# Every tag strips the white space before it, so line breaks mean nothing. @name@ is filled in by _as_jinja.
JINJA = """
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] %}
{%- set dialogue = messages[1:] %}
{%- else %}{%- set system_message = @default@ %}{%- set dialogue = messages %}{%- endif %}
@tools@
@prefix@
{%- set state = namespace(before='', query=-1) %}
{%- set tool_roles = ['tool', 'observation', 'ipython'] %}
{%- if system_message is not none %}
@system@
{%- endif %}
{%- for message in dialogue %}{%- if message['role'] == 'user' %}
{%- set state.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in dialogue %}
{%- if message['role'] == 'assistant' %}
{%- set content = (message['content'] or '')@trim@ %}
{%- if message['tool_calls'] %}
{%- set calls = namespace(text='') %}
{%- for entry in message['tool_calls'] %}
{%- set call = entry['function'] if entry['function'] else entry %}
{%- set calls.text = calls.text + ('' if loop.first else '\\n') + @call@ %}
{%- endfor %}
{%- set content = (content + '\\n' if content else '') + calls.text %}
{%- endif %}
@thought@
{{- @answer@ }}
@results@
{%- else %}
{%- set content = (state.before + message['content'])@trim@ %}{%- set state.before = '' %}
{%- if message['role'] == 'user' %}
{{- @user@ }}
{%- elif message['role'] in tool_roles %}
{{- @observation@ }}
{%- else %}{{- raise_exception('no place for a message of ' + message['role']) }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}
{{- @header@ }}
@no_thought@
{%- endif %}"""
JINJA_QWEN_TOOLS = """\
{%- if tools %}
{%- set system_message = (system_message + '\\n\\n' if system_message else '') + @before_tools@ %}
{%- set defined = namespace(text='') %}
{%- for tool in tools %}{%- set defined.text = defined.text + '\\n' + (tool | tojson) %}{%- endfor %}
{%- set system_message = system_message + defined.text + @after_tools@ %}
{%- endif %}"""
# 'items' is asked for by `in`: a missing key would give the dictionary's method; ~ takes what is missing too
JINJA_GENERIC_TOOLS = """\
{%- if tools %}
{%- set defined = namespace(text='', names='', values='') %}
{%- for entry in tools %}
{%- set tool = entry['function'] if entry['function'] else entry %}
{%- set parameters = tool['parameters'] or {} %}
{%- set defined.values = '' %}
{%- for name, about in (parameters['properties'] or {}).items() %}
{%- set kind = about['type'] ~ (', required' if name in (parameters['required'] or []) else '') %}
{%- set defined.values = defined.values ~ '  - ' ~ name ~ ' (' ~ kind ~ '): ' ~ about['description'] %}
{%- if about['enum'] %}
{%- set defined.values = defined.values ~ ', should be one of [' ~ (about['enum'] | join(', ')) ~ ']' %}
{%- endif %}
{%- if 'items' in about and about['items'] %}
{%- set defined.values = defined.values ~ ', where each item should be ' ~ about['items']['type'] %}
{%- endif %}
{%- set defined.values = defined.values ~ '\\n' %}
{%- endfor %}
{%- set text = '> Tool Name: ' ~ tool['name'] ~ '\\nTool Description: ' ~ tool['description'] %}
{%- set defined.text = defined.text ~ text ~ '\\nTool Args:\\n' ~ defined.values ~ '\\n' %}
{%- set defined.names = defined.names ~ ('' if loop.first else ', ') ~ tool['name'] %}
{%- endfor %}
{%- set system_message = (system_message or '') ~ @before_tools@ ~ defined.text ~ @before_names@ %}
{%- set system_message = system_message ~ defined.names ~ @after_tools@ %}
{%- endif %}"""
JINJA_TOOLS = {"generic": JINJA_GENERIC_TOOLS, "qwen": JINJA_QWEN_TOOLS}
JINJA_THOUGHT = """\
{%- set thought = '' %}{%- if message['reasoning_content'] %}
{%- set thought = message['reasoning_content'].strip('\\n') %}{%- set content = content.lstrip('\\n') %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > state.query and (loop.last or thought) %}
{%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}{%- endif %}"""
JINJA_RESULTS = """\
{%- elif message['role'] in tool_roles and not loop.last
and dialogue[loop.index0 + 1]['role'] in tool_roles %}
{%- set state.before = state.before + message['content'] + @between@ %}"""
JINJA_NO_THOUGHT = """\
{%- if enable_thinking is defined and not enable_thinking %}
{{- @empty_thought@ }}{%- endif %}"""


def _as_jinja(template: ChatTemplate) -> str:
    trim, merged = " | trim" if template.trim else "", template.system_in_first_user
    before, after = ("{%- set state.before = ", " %}") if merged else ("{{- ", " }}")
    before_tools, after_tools = qwen_tools("", ["here"]).split('\n"here"')
    before_names = ""
    if template.tools == "generic":
        empty = "> Tool Name: @\nTool Description: \nTool Args:\n\n"
        before_tools, after_tools = generic_tools("", [{"name": "@"}]).split(empty)
        before_names, after_tools = after_tools.split("@")
    system = f"(system_message{trim})" if trim and not merged else "system_message"
    answer = [slot for slot in (template.header, template.answer, template.turn_end) if slot]
    values = {
        "default": "none" if template.default_system is None else _literal(template.default_system),
        "prefix": f"{{{{- {_expression(template.prefix)} }}}}" if template.prefix else "",
        "system": before + _expression(template.system, system) + after,
        "user": _expression(template.user),
        "observation": _expression(template.observation or template.user),
        "header": _expression(template.header),
        "answer": " + ".join(map(_expression, answer)),
        "call": _expression(template.function, name="call['name']", arguments="(call['arguments'] | tojson)"),
        "between": _literal(template.results or ""),
        "trim": trim,
        "before_tools": _literal(before_tools),
        "before_names": _literal(before_names),
        "after_tools": _literal(after_tools),
        "empty_thought": _literal(NO_THOUGHT),
    }
    text = JINJA.replace("@tools@", JINJA_TOOLS[template.tools])
    text = text.replace("@results@", "" if template.results is None else JINJA_RESULTS)
    text = text.replace("@thought@", JINJA_THOUGHT if template.thinking else "")
    text = text.replace("@no_thought@", JINJA_NO_THOUGHT if template.thinking else "")
    text = re.sub("@([a-z_]+)@", lambda match: values[match.group(1)], text)
    return "\n".join(line for line in text.split("\n") if line)


def _expression(slot: str, content: str = "content", **names: str) -> str:
    """A slot as a jinja expression: literals and variables joined by +."""
    names = {"content": content, "bos": "(bos_token or '')", "eos": "(eos_token or '')", **names}
    pieces = SLOT.split(slot)
    terms = [names[piece] if i % 2 else _literal(piece) for i, piece in enumerate(pieces) if i % 2 or piece]
    return " + ".join(terms) or "''"


def _literal(text: str) -> str:
    """A jinja string literal."""
    text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{text}'"
