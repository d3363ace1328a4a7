"""Rows of any supported format -> a list of messages, or a document for pretraining.

alpaca    {"instruction", "input", "output"[, "system", "history": [[user, answer], ...]]}
sharegpt  {"conversations": [{"from": "human"|"gpt"|"observation"|"function_call"|"system", "value": ...}]
          [, "tools"]}
openai    {"messages": [{"role": "user"|"assistant"|"system"|"tool", "content": ...}]}: other tags; beside the
          content tool_calls, reasoning_content, tool_call_id, weight (0: not trained) and what else there is
text      {"text": ...}: a document (stage pt); so is the prompt column of an alpaca row

Rules (LLaMA-Factory's): user text = prompt + "\\n" + query, empty ones skipped; answers of `history` are
trained too; the first system message beats the system column; then (user | observation) and (assistant |
function) alternate; an odd tail is cut off. Two kinds of trouble are kept apart:
  UserError   the row is not what dataset_info.json says (missing column, wrong type, unknown role): stop
  Dropped     the row is readable but holds nothing to train on: left out, counted, and shown in the report
The template writes tool lists and calls as its model knows them; here they are only checked.
"""

import json
from dataclasses import dataclass, field, replace

from options import json_reader
from options.errors import UserError, located, refuse
from pipeline.sources import DatasetInfo, as_messages
from text.render import PRODUCED, THOUGHTS, Message, is_parts, parsed, split_calls
from text.tools import wrapped

LATER = {"images": "pictures", "videos": "videos", "audios": "sound"}
# what a stage makes of a row: the stages of one kind train on the same tokens
KINDS = {"pt": "document", "sft": "dialogue", "kto": "rated"}
KINDS |= dict.fromkeys(("rm", "dpo", "orpo"), "pair") | dict.fromkeys(("ppo", "grpo"), "prompt")
ASKED = ("user", "observation")  # roles that PRODUCED ones answer
# what a row may not set of a chat_template's variables: they are what is asked of it
FIXED = ("messages", "conversation", "add_generation_prompt", "chat_template", "tokenize")


class Dropped(Exception):
    """This row holds nothing to train on; the text is the reason that the report counts. detail: of this row
    alone, said where it is the first of them."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


@dataclass(frozen=True)
class Conversation:
    turns: list[Message]
    tools: tuple[dict, ...] = ()  # definitions, wrapped; the template puts them behind the system text
    variables: dict = field(default_factory=dict)  # of the template, as this row sets them
    notes: tuple[str, ...] = ()  # what was repaired: "odd tail cut"


def is_ranked(info: DatasetInfo) -> bool:
    return info.ranking or "chosen" in info.columns or "rejected" in info.columns


def check_stage(info: DatasetInfo, stage: str, kind: str | None = None) -> None:
    """Refuse a dataset that the stage cannot use, before a row is read. kind: None = the stage's (KINDS)."""
    kind, ranked = kind or KINDS[stage], is_ranked(info)
    with located(f"dataset {info.name!r}"):
        if (ranked and kind not in ("pair", "prompt")) or (kind == "pair" and not ranked):
            holds = "pairs of answers" if ranked else "single answers"
            needs = "single answers" if ranked else "pairs (ranking: true)"
            raise UserError(f"it holds {holds}, but stage {stage} needs {needs}")
        if kind == "rated" and "kto_tag" not in info.columns:
            way_out = 'name the column of true and false in its entry: columns: {"kto_tag": "<column>"}'
            raise UserError(f"stage {stage} needs to know which answers are good; {way_out}")
        if ("chosen" in info.columns) != ("rejected" in info.columns):
            given, other = ("chosen", "rejected") if "chosen" in info.columns else ("rejected", "chosen")
            raise UserError(f"columns.{given} is given without columns.{other}")
        for column, what in LATER.items():
            refuse(column in info.columns, f"columns.{column}: {what} cannot be used by stage {stage}")
        if kind == "document" and info.formatting != "alpaca":
            found = f"stage pt reads one text column, but formatting is {info.formatting!r}"
            raise UserError(f'{found}; give it columns: {{"prompt": "<the text column>"}} and no formatting')


def to_document(row: dict, info: DatasetInfo) -> str:
    """The text of one row for stage pt: the prompt column, or `text` when the entry names no columns."""
    column = info.columns["prompt"]
    if column not in row and column == "instruction" and "text" in row:
        column = "text"
    text = _text(row, column)
    if text is None or not text.strip():
        raise Dropped("empty text")
    return text


def to_conversation(row: dict, info: DatasetInfo) -> Conversation:
    """The turns of one row for stage sft, always ending with an assistant or function turn.

    Raises Dropped (nothing to train on) or UserError that names the column and what was found there.
    """
    if info.formatting != "alpaca" and "response" in info.columns:
        row = _with_response(row, info)
    conversation = _question(row, info)
    turns, notes = list(conversation.turns), conversation.notes
    if info.formatting == "alpaca":
        answer = _text(row, _response_column(info))
        if answer is None:
            raise Dropped("no answer")
        return replace(conversation, turns=[*turns, Message("assistant", answer)])
    if turns and turns[-1].role in ASKED:
        notes = (*notes, "odd tail cut")
    while turns and turns[-1].role in ASKED:
        turns.pop()
    if not turns or turns[-1].role not in PRODUCED:
        raise Dropped("no answer")
    return replace(conversation, turns=turns, notes=notes)


def _with_response(row: dict, info: DatasetInfo) -> dict:
    """trl's prompt and completion: the messages of both columns in the first."""
    asked, answer = (as_messages(_value(row, info.columns[name])) for name in ("messages", "response"))
    if isinstance(answer, str):
        answer = [{info.tags["role_tag"]: info.tags["assistant_tag"], info.tags["content_tag"]: answer}]
    both = isinstance(asked, list) and isinstance(answer, list)
    return row | {info.columns["messages"]: [*asked, *answer]} if both else row


def to_pair(row: dict, info: DatasetInfo) -> tuple[Conversation, Message, Message]:
    """(the conversation up to the answer, chosen, rejected) of one row for stages rm, dpo and orpo.

    The answers are `columns.chosen` and `columns.rejected`, or the two entries of `columns.response`; each is
    a text, a message object, or a list that ends with one. A list may begin with the conversation if the row
    has no other.
    """
    found = _ranked_answers(row, info)
    if info.formatting != "alpaca" and row.get(info.columns["messages"]) is None:
        before = [value[:-1] if isinstance(value, list) else [] for value in found.values()]
        if before[0] != before[1]:
            raise Dropped("chosen and rejected differ before the last answer")
        if before[0]:
            row = row | {info.columns["messages"]: before[0]}
            found = {where: value[-1:] for where, value in found.items()}
    conversation = _require_question(_question(row, info))
    answers = [_answer(value, where, info) for where, value in found.items()]
    for name, answer in zip(("chosen", "rejected"), answers):
        if answer is None:
            raise Dropped(f"empty {name} answer")
    if answers[0] == answers[1]:
        raise Dropped("identical answers")
    return conversation, *answers


def to_rated(row: dict, info: DatasetInfo) -> tuple[Conversation, Message, int]:
    """(the conversation up to the answer, the answer, 1 = good or 0 = bad) of one row for stage kto."""
    tag = _tag(row, info.columns["kto_tag"])
    conversation, answer = _split_answer(row, info)
    if answer is None:
        raise Dropped("empty answer")
    return conversation, answer, tag


def to_prompt(row: dict, info: DatasetInfo) -> tuple[Conversation, Message | None]:
    """(the conversation up to the answer, the answer to compare with or None) of one row, for generation.

    Of a pair the chosen answer is taken; a bad answer (kto_tag false) is none.
    """
    if is_ranked(info):
        return to_pair(row, info)[:2]
    conversation, answer = _split_answer(row, info, required=False)
    if answer is not None and "kto_tag" in info.columns and not _tag(row, info.columns["kto_tag"]):
        answer = None
    return conversation, answer


def _require_question(conversation: Conversation) -> Conversation:
    if not conversation.turns or conversation.turns[-1].role not in ASKED:
        raise Dropped("no question before the answer")
    return conversation


def _split_answer(row: dict, info: DatasetInfo, required: bool = True) -> tuple[Conversation, Message | None]:
    """The conversation and its last answer; None for an answer that is empty, or missing where it may."""
    conversation, answer = _question(row, info), None
    if info.formatting != "alpaca" and "response" not in info.columns:
        if conversation.turns and conversation.turns[-1].role in PRODUCED:
            *before, answer = conversation.turns
            conversation = replace(conversation, turns=before)
            answer = _if_any(answer)
    elif required or info.columns.get("response") in row:
        column = _response_column(info)
        answer = _answer(_value(row, column), f"column {column!r}", info)
    return _require_question(conversation), answer


def _response_column(info: DatasetInfo) -> str:
    if "response" not in info.columns:
        raise UserError("columns.response is not given: no answer to train on (stage pt reads plain text)")
    return info.columns["response"]


def _ranked_answers(row: dict, info: DatasetInfo) -> dict:
    """{place: value} of the chosen and the rejected answer as the row has them."""
    if "chosen" in info.columns:
        columns = [info.columns[name] for name in ("chosen", "rejected")]
        named = () if info.formatting == "alpaca" else (info.tags["role_tag"],)
        return {f"column {column!r}": as_messages(_value(row, column), named) for column in columns}
    column = _response_column(info)
    answers = parsed(_value(row, column))
    if not isinstance(answers, list | tuple) or len(answers) != 2:
        raise _wrong(f"column {column!r}", "[chosen, rejected] (ranking: true)", answers)
    return {f"column {column!r}[{i}]": answers[i] for i in range(2)}


def _answer(value, where: str, info: DatasetInfo) -> Message | None:
    """A text, a message object, or a list of one -> an assistant or function message; None if empty."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        message = _message(value, where, _roles(info.tags), info.tags)
        if message.role not in PRODUCED:
            raise UserError(f"{where}: expected an answer, found a message of role {message.role}")
    elif isinstance(value, str) or value is None:
        message = Message("assistant", value or "")
    else:
        raise _wrong(where, "text or a message", value)
    return _if_any(message)


def _if_any(answer: Message) -> Message | None:
    thinks = any(answer.more.get(key) for key in THOUGHTS)
    return answer if thinks or answer.content.strip() or answer.role == "function" else None


def _tag(row: dict, column: str) -> int:
    """1 for a good answer, 0 for a bad one. A table of text has no booleans, so their names count too."""
    value = _value(row, column, " (kto_tag)")
    if value is None:
        raise Dropped("no kto_tag")
    named = {"true": 1, "1": 1, "false": 0, "0": 0}
    if isinstance(value, str) and value.strip().lower() in named:
        return named[value.strip().lower()]
    if isinstance(value, bool | int | float) and value in (0, 1):  # pandas makes 1.0 of it beside a null
        return int(value)
    raise _wrong(f"column {column!r} (kto_tag)", "true or false", value)


def _question(row: dict, info: DatasetInfo) -> Conversation:
    """Alpaca: all turns but the answer. Messages: all of them, whoever speaks last."""
    turns, notes = (_alpaca if info.formatting == "alpaca" else _sharegpt)(row, info), ()
    if not (turns and turns[0].role == "system" and turns[0].content):
        turns = [turn for turn in turns if turn.role != "system"]
        system = _optional_text(row, info.columns.get("system"))
        turns = [Message("system", system), *turns] if system else turns
    unused = [name for name in ("tools", "functions") if row.get(name) and "tools" not in info.columns]
    if info.formatting != "alpaca" and unused:
        notes = (f"column {unused[0]!r} is not used: the data set's entry does not name it",)
    return Conversation(turns, _tools(row, info.columns.get("tools")), _variables(row, info), notes)


def _alpaca(row: dict, info: DatasetInfo) -> list[Message]:
    turns, column = [], info.columns.get("history")
    history = parsed(row.get(column) if row.get(column) is not None else [])
    if not isinstance(history, list):
        raise _wrong(f"column {column!r}", "a list of [user, answer] pairs", history)
    for i, pair in enumerate(history):
        paired = isinstance(pair, list | tuple) and len(pair) == 2
        if not paired or not all(isinstance(text, str) for text in pair):
            raise _wrong(f"column {column!r}[{i}]", "[user, answer]", pair)
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    prompt, query = _text(row, info.columns["prompt"]), _optional_text(row, info.columns.get("query"))
    user = "\n".join(text for text in (prompt, query) if text)
    if not user:
        raise Dropped("empty prompt")
    return [*turns, Message("user", user)]


def _sharegpt(row: dict, info: DatasetInfo) -> list[Message]:
    """Its messages, a system message first or none."""
    column, roles = info.columns["messages"], _roles(info.tags)
    messages = parsed(_value(row, column, " (messages)"))  # a table of text has JSON there
    if messages is None:
        raise Dropped("no messages")
    if not isinstance(messages, list):
        raise _wrong(f"column {column!r}", "a list of messages", messages)
    places = (f"column {column!r}[{i}]" for i in range(len(messages)))
    turns = [_message(entry, place, roles, info.tags) for entry, place in zip(messages, places)]
    order = [turn.role for turn in turns]
    order = order[1:] if order[:1] == ["system"] else order
    # the results of parallel calls stand for one turn
    order = [role for role, before in zip(order, ["", *order]) if not role == before == "observation"]
    if any(role not in (ASKED, PRODUCED)[i % 2] for i, role in enumerate(order)):
        raise Dropped("roles do not alternate")
    return turns


def _roles(tags: dict[str, str]) -> dict[str, str]:
    """The dataset's word for each role -> ours."""
    ours = ("user", "assistant", "observation", "function", "system")
    roles = {tags[f"{role}_tag"]: role for role in ours}
    roles.setdefault("developer", "system")  # OpenAI's newer word
    roles.setdefault("function", "observation")  # and its older one: the result of a function_call
    return roles


def _message(entry, where: str, roles: dict[str, str], tags: dict[str, str]) -> Message:
    if not isinstance(entry, dict):
        raise _wrong(where, "an object", entry)
    named, content = tags["role_tag"], tags["content_tag"]
    if named not in entry:
        raise UserError(f"{where}: no {named!r} (role_tag); the message has {_names(entry)}")
    role = roles.get(entry[named]) if isinstance(entry[named], str) else None
    if role is None:
        raise UserError(f"{where}: role {entry[named]!r} is none of {', '.join(map(repr, roles))} (tags)")
    given = _without_nulls(entry)
    text, more = given.get(content), {}
    if entry[named] == "developer":
        more["role"] = "developer"
    if role == "observation" and not (isinstance(text, str | None) or is_parts(text)):
        text, more["content"] = json.dumps(text, ensure_ascii=False), text  # whatever a tool gave
    elif isinstance(text, list):
        text, of_parts = _parts(text, where)
        more |= of_parts
    more |= {key: value for key, value in given.items() if key not in (named, content, "role", "content")}
    if "loss_weight" in more:  # LLaMA-Factory's newer name
        more["weight"] = more.pop("loss_weight")
    if more.get("weight", 1) not in (0, 1):
        raise _wrong(f"{where}.weight", "0 or 1", more["weight"])
    if not isinstance(more.get("reasoning_content", ""), str):
        raise _wrong(f"{where}.reasoning_content", "text", more["reasoning_content"])
    calls = more.pop("tool_calls", None)
    if role in PRODUCED and more.get("function_call"):  # OpenAI's older form, of one call without an id
        calls = calls or [more.pop("function_call")]
    if calls and role in PRODUCED:
        role, more["tool_calls"] = "function", _tool_calls(calls, where)
    none_given = role == "function" or (role == "observation" and content in entry)
    if text is None and (none_given or any(key in more for key in THOUGHTS)):
        text, more["content"] = "", None
    if content not in entry and text is None:
        raise UserError(f"{where}: no {content!r} (content_tag); the message has {_names(entry)}")
    if not isinstance(text, str):
        raise _wrong(f"{where}.{content}", "text", text)
    if role == "function" and "tool_calls" not in more and split_calls(text) is None:
        found = "a function call is not JSON of 'name' and 'arguments'"
        raise UserError(f"{where}: {found}: {_show(text)}")
    return Message(role, text, more)


def _parts(parts: list, where: str) -> tuple[str, dict]:
    """(the text, what goes beside it) of a content that is a list of parts: OpenAI's, or those of
    LLaMA-Factory's newer form, which have a `value`."""
    texts, kept, more = [], [], {}
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        kind = kind if isinstance(kind, str) else _show(kind)
        value = part.get(kind, part.get("value", part.get("text"))) if isinstance(part, dict) else None
        if kind == "tool_call":
            more.setdefault("tool_calls", []).append(value)
        elif not isinstance(value, str) or kind not in ("text", "thinking", "reasoning"):
            raise UserError(f"{where}: a part of the content is not text but {kind!r}: {_show(part)}")
        elif kind == "text":
            texts.append(value)
            kept.append(part if "text" in part else {"type": "text", "text": value})
        else:
            more["reasoning_content"] = more.get("reasoning_content", "") + value
            kept.append(part)
    return "".join(texts), more | {"content": kept}


def _without_nulls(value):
    """Arrow gives each object of a column the keys of all of them, and nulls: those are absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------------
# fields


def _value(row: dict, column: str, what: str = ""):
    if column not in row:
        raise UserError(f"column {column!r}{what} is missing; the row has {_names(row)}")
    return row[column]


def _text(row: dict, column: str) -> str | None:
    """A column that the row must have, but may leave null."""
    value = _value(row, column)
    if value is not None and not isinstance(value, str):
        raise _wrong(f"column {column!r}", "text", value)
    return value


def _optional_text(row: dict, column: str | None) -> str:
    """A column that the row may leave out or leave null."""
    return (_text(row, column) or "") if column in row else ""


def _wrong(where: str, expected: str, value) -> UserError:
    return UserError(f"{where}: expected {expected}, found {_show(value)}")


def _names(row: dict) -> str:
    return ", ".join(map(str, row)) or "nothing"


def _show(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ------------------------------------------------------------------------------------------------------------
# tools


def _tools(row: dict, column: str | None) -> tuple[dict, ...]:
    """The tool definitions of a row, wrapped: JSON text, as LLaMA-Factory has it, or the list itself."""
    value, where = row.get(column), f"column {column!r} (tools)"
    blank = isinstance(value, str) and not value.strip()
    value = None if blank else _read(value, where)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _wrong(where, "a list of objects", value)
    tools = [_read(tool, f"{where}[{i}]") for i, tool in enumerate(value)]
    for i, tool in enumerate(tools):
        about = tool.get("function", tool) if isinstance(tool, dict) else None  # OpenAI wraps it
        if not isinstance(about, dict) or not isinstance(about.get("name"), str):
            raise _wrong(f"{where}[{i}]", "an object with a 'name'", tool)
    return tuple(map(wrapped, tools))


def _variables(row: dict, info: DatasetInfo) -> dict:
    """trl's chat_template_kwargs, an object or its JSON; and the documents of an answer out of documents."""
    where, given = "column 'chat_template_kwargs'", row.get("chat_template_kwargs")
    variables = {} if given in (None, "") else _read(given, where)
    if not isinstance(variables, dict) or any(name in variables for name in FIXED):
        raise _wrong(where, f"an object without {', '.join(FIXED)}", given)
    documents = parsed(row.get("documents")) if info.formatting != "alpaca" else None
    if documents and isinstance(documents, list) and all(isinstance(each, dict) for each in documents):
        variables = {"documents": _without_nulls(documents)} | variables
    return variables


def _tool_calls(calls, where: str) -> list[dict]:
    """OpenAI's `tool_calls`, or the calls alone, in its form; the arguments are JSON or what it spells."""
    where = f"{where}.tool_calls"
    calls = _read(calls, where)
    if not isinstance(calls, list):
        raise _wrong(where, "a list of objects with 'function'", calls)
    calls = [_read(call, where) for call in calls]
    calls = [dict(wrapped(call)) if isinstance(call, dict) else call for call in calls]
    for call in calls:
        function = call["function"] if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(where, "a list of objects with 'function'", call)
        if "id" not in call and "id" in function:  # of a call alone
            call["id"] = function["id"]
            function = {key: value for key, value in function.items() if key != "id"}
        call["function"] = function | {"arguments": function.get("arguments", {})}  # of none: no arguments
    return calls


def _read(value, where: str):
    """What a text spells as JSON; anything else without the nulls of Arrow."""
    if not isinstance(value, str):
        return _without_nulls(value)
    return json_reader.parse(value, where, expected=None, way_out=f"found {_show(value)}")
