"""Rows of any supported format -> a list of (role, text) turns, or a document for pretraining.

alpaca    {"instruction", "input", "output"[, "system", "history": [[user, answer], ...]]}
sharegpt  {"conversations": [{"from": "human"|"gpt"|"observation"|"function_call"|"system", "value": ...}][,
"tools"]}
openai    {"messages": [{"role": "user"|"assistant"|"system"|"tool", "content": ...}]}: sharegpt with other tags
text      {"text": ...}: a document (stage pt); so is the prompt column of an alpaca row

Rules (LLaMA-Factory's): user text = prompt + "\\n" + query, empty ones skipped; answers of `history` are
trained too; the first system message beats the system column; then (user | observation) and (assistant |
function) alternate; an odd tail is cut off. Two kinds of trouble are kept apart:
  ValueError   the row is not what dataset_info.json says (missing column, wrong type, unknown role): stop and fix it
  Dropped      the row is readable but holds nothing to train on: left out, counted, and shown in the report
The template writes tool lists and calls as its model knows them; here they are only checked.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from options.errors import UserError
from pipeline.sources import DatasetInfo

LATER = {"images": "pictures", "videos": "videos", "audios": "sound"}
# what a stage makes of a row: the stages of one kind train on the same tokens
KINDS = {
    "pt": "document",
    "sft": "dialogue",
    "rm": "pair",
    "dpo": "pair",
    "orpo": "pair",
    "kto": "rated",
    "ppo": "prompt",
    "grpo": "prompt",
}


Turn = tuple[str, str]  # (role, text)
ASKED, PRODUCED = ("user", "observation"), ("assistant", "function")  # whose turn it is


class Dropped(Exception):
    """This row holds nothing to train on; the text is the reason that the report counts."""


@dataclass(frozen=True)
class Conversation:
    turns: list[Turn]  # role: system, user, assistant, observation, function
    tools: tuple[dict, ...] = ()  # definitions; the template puts them behind the system text
    notes: tuple[str, ...] = field(default=())  # what was repaired: "odd tail cut"


def is_ranked(info: DatasetInfo) -> bool:
    return info.ranking or "chosen" in info.columns or "rejected" in info.columns


def check_stage(info: DatasetInfo, stage: str, kind: str | None = None) -> None:
    """Refuse a dataset that the stage cannot use, before a row is read.  kind: None = the stage's, see
    KINDS."""
    kind = kind or KINDS[stage]
    ranked = is_ranked(info)
    if (ranked and kind not in ("pair", "prompt")) or (kind == "pair" and not ranked):
        kinds = (
            ("pairs of answers", "single answers") if ranked else ("single answers", "pairs (ranking: true)")
        )
        raise UserError(f"dataset {info.name!r}: it holds {kinds[0]}, but stage {stage} needs {kinds[1]}")
    if kind == "rated" and "kto_tag" not in info.columns:
        raise UserError(
            f"dataset {info.name!r}: stage {stage} needs to know which answers are good; name the column of "
            "true and "
            'false in its entry: columns: {"kto_tag": "<column>"}'
        )
    if ("chosen" in info.columns) != ("rejected" in info.columns):
        given, other = ("chosen", "rejected") if "chosen" in info.columns else ("rejected", "chosen")
        raise UserError(f"dataset {info.name!r}: columns.{given} is given without columns.{other}")
    for column, what in LATER.items():
        if column in info.columns:
            raise UserError(
                f"dataset {info.name!r}: columns.{column}: {what} cannot be used by stage {stage}"
            )
    if kind == "document" and info.formatting != "alpaca":
        raise UserError(
            f"dataset {info.name!r}: stage pt reads one text column, but formatting is {info.formatting!r}; "
            'give it columns: {"prompt": "<the text column>"} and no formatting'
        )


def to_document(row: dict, info: DatasetInfo) -> str:
    """The text of one row for stage pt: the prompt column, or `text` when the entry names no columns."""
    column = info.columns["prompt"]
    if column not in row and column == "instruction" and "text" in row:
        column = "text"
    text = _text(row, column)
    if not text.strip():
        raise Dropped("empty text")
    return text


def to_conversation(row: dict, info: DatasetInfo) -> Conversation:
    """The turns of one row for stage sft, always ending with an assistant or function turn.

    Raises Dropped (nothing to train on) or ValueError that names the column and what was found there.
    """
    conversation = _question(row, info)
    turns = list(conversation.turns)
    if info.formatting == "alpaca":
        column = _response_column(info)
        answer = _text(row, column, empty_ok=True)
        if row[column] is None:
            raise Dropped("no answer")
        return replace(conversation, turns=[*turns, ("assistant", answer)])
    notes = conversation.notes
    if turns and turns[-1][0] in ASKED:
        turns.pop()
        notes = (*notes, "odd tail cut")
    if not turns or turns[-1][0] not in PRODUCED:
        raise Dropped("no answer")
    return replace(conversation, turns=turns, notes=notes)


def to_pair(row: dict, info: DatasetInfo) -> tuple[Conversation, Turn, Turn]:
    """(the conversation up to the answer, chosen, rejected) of one row for stages rm, dpo and orpo.

    The answers are `columns.chosen` and `columns.rejected`, or the two entries of `columns.response`; each is
    a text, a message object, or a list that ends with one. A list may begin with the conversation if the row
    has no other.
    """
    found = _ranked_answers(row, info)
    if info.formatting != "alpaca" and info.columns["messages"] not in row:
        before = [value[:-1] if isinstance(value, list) else [] for value in found.values()]
        if before[0] != before[1]:
            raise Dropped("chosen and rejected differ before the last answer")
        if before[0]:
            row = row | {info.columns["messages"]: before[0]}
            found = {where: value[-1:] for where, value in found.items()}
    conversation = _question(row, info)
    _require_question(conversation)
    answers = [_answer(value, where, info) for where, value in found.items()]
    for name, answer in zip(("chosen", "rejected"), answers):
        if answer is None:
            raise Dropped(f"empty {name} answer")
    if answers[0] == answers[1]:
        raise Dropped("identical answers")
    return conversation, *answers


def to_rated(row: dict, info: DatasetInfo) -> tuple[Conversation, Turn, int]:
    """(the conversation up to the answer, the answer, 1 = good or 0 = bad) of one row for stage kto."""
    tag = _tag(row, info.columns["kto_tag"])
    conversation, answer = _split_answer(row, info)
    _require_question(conversation)
    if answer is None:
        raise Dropped("empty answer")
    return conversation, answer, tag


def to_prompt(row: dict, info: DatasetInfo) -> tuple[Conversation, Turn | None]:
    """(the conversation up to the answer, the answer to compare with or None) of one row, for generation.

    Of a pair the chosen answer is taken; a bad answer (kto_tag false) is none.
    """
    if is_ranked(info):
        conversation, answer, _ = to_pair(row, info)
        return conversation, answer
    conversation, answer = _split_answer(row, info, required=False)
    _require_question(conversation)
    if answer is not None and "kto_tag" in info.columns and not _tag(row, info.columns["kto_tag"]):
        answer = None
    return conversation, answer


def _require_question(conversation: Conversation) -> None:
    if not conversation.turns or conversation.turns[-1][0] not in ASKED:
        raise Dropped("no question before the answer")


def _split_answer(row: dict, info: DatasetInfo, required: bool = True) -> tuple[Conversation, Turn | None]:
    """The conversation and its last answer; None for an answer that is empty, or missing where it may."""
    conversation = _question(row, info)
    if info.formatting != "alpaca" and "response" not in info.columns:
        if conversation.turns and conversation.turns[-1][0] in PRODUCED:
            *before, answer = conversation.turns
            return replace(conversation, turns=before), answer if answer[1].strip() else None
        return conversation, None
    if not required and info.columns.get("response") not in row:
        return conversation, None
    column = _response_column(info)
    if column not in row:
        raise UserError(f"column {column!r} is missing; the row has {_names(row)}")
    return conversation, _answer(row[column], f"column {column!r}", info)


def _response_column(info: DatasetInfo) -> str:
    if "response" not in info.columns:
        raise UserError(
            "columns.response is not given, so there is no answer to train on (stage pt reads plain text)"
        )
    return info.columns["response"]


def _ranked_answers(row: dict, info: DatasetInfo) -> dict:
    """{place: value} of the chosen and the rejected answer as the row has them."""
    if "chosen" in info.columns:
        columns = [info.columns[name] for name in ("chosen", "rejected")]
        for column in columns:
            if column not in row:
                raise UserError(f"column {column!r} is missing; the row has {_names(row)}")
        return {f"column {column!r}": row[column] for column in columns}
    column = _response_column(info)
    if column not in row:
        raise UserError(f"column {column!r} is missing; the row has {_names(row)}")
    answers = row[column]
    if not isinstance(answers, list | tuple) or len(answers) != 2:
        raise UserError(
            f"column {column!r}: expected [chosen, rejected] (ranking: true), found {_show(answers)}"
        )
    return {f"column {column!r}[{i}]": answers[i] for i in range(2)}


def _answer(value, where: str, info: DatasetInfo) -> Turn | None:
    """A text, a message object, or a list of one -> (assistant or function, text); None when it is empty."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        role, text = _message(value, where, _roles(info.tags), info.tags)
        if role not in PRODUCED:
            raise UserError(f"{where}: expected an answer, found a message of role {role}")
    elif isinstance(value, str) or value is None:
        role, text = "assistant", value or ""
    else:
        raise UserError(f"{where}: expected text or a message, found {_show(value)}")
    return (role, text) if text.strip() else None


def _tag(row: dict, column: str) -> int:
    """1 for a good answer, 0 for a bad one. A table of text has no booleans, so their names count too."""
    if column not in row:
        raise UserError(f"column {column!r} (kto_tag) is missing; the row has {_names(row)}")
    value = row[column]
    if value is None:
        raise Dropped("no kto_tag")
    named = {"true": 1, "1": 1, "false": 0, "0": 0}
    if isinstance(value, str) and value.strip().lower() in named:
        return named[value.strip().lower()]
    if isinstance(value, bool | int) and value in (0, 1):
        return int(value)
    raise UserError(f"column {column!r} (kto_tag): expected true or false, found {_show(value)}")


def _question(row: dict, info: DatasetInfo) -> Conversation:
    """Alpaca: all turns but the answer. Messages: all of them, whoever speaks last."""
    return (_alpaca if info.formatting == "alpaca" else _sharegpt)(row, info)


def _alpaca(row: dict, info: DatasetInfo) -> Conversation:
    turns: list[Turn] = []
    history = _optional(row, info.columns.get("history"), lambda value: value, [])
    if not isinstance(history, list):
        raise UserError(
            f"column {info.columns['history']!r}: expected a list of [user, answer] pairs, found "
            f"{_show(history)}"
        )
    for i, pair in enumerate(history):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise UserError(
                f"column {info.columns['history']!r}[{i}]: expected [user, answer], found {_show(pair)}"
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    prompt = _text(row, info.columns["prompt"], empty_ok=True)
    query = _optional(row, info.columns.get("query"), _is_text, "")
    user = "\n".join(text for text in (prompt, query) if text)
    if not user:
        raise Dropped("empty prompt")
    return _finish([*turns, ("user", user)], row, info, system="")


def _sharegpt(row: dict, info: DatasetInfo) -> Conversation:
    column, tags = info.columns["messages"], info.tags
    messages = row.get(column)
    if column not in row:
        raise UserError(f"column {column!r} (messages) is missing; the row has {_names(row)}")
    if not isinstance(messages, list):
        raise UserError(f"column {column!r}: expected a list of messages, found {_show(messages)}")
    roles = _roles(tags)
    system = ""
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        role, text = _message(message, f"column {column!r}[{i}]", roles, tags)
        if role == "system" and i == 0:
            system = text
        elif role == "observation" and turns and turns[-1][0] == "observation":
            turns[-1] = (role, turns[-1][1] + "\n" + text)  # answers to parallel tool calls
        else:
            turns.append((role, text))
    for i, (role, _) in enumerate(turns):
        if role not in (ASKED, PRODUCED)[i % 2]:
            raise Dropped("roles do not alternate")
    return _finish(turns, row, info, system)


def _roles(tags: dict[str, str]) -> dict[str, str]:
    """The dataset's word for each role -> ours."""
    return {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "observation",
        tags["function_tag"]: "function",
        tags["system_tag"]: "system",
    }


def _message(message, where: str, roles: dict[str, str], tags: dict[str, str]) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object, found {_show(message)}")
    if tags["role_tag"] not in message:
        raise UserError(f"{where}: no {tags['role_tag']!r} (role_tag); the message has {_names(message)}")
    role = roles.get(message[tags["role_tag"]]) if isinstance(message[tags["role_tag"]], str) else None
    if role is None:
        raise UserError(
            f"{where}: role {message[tags['role_tag']]!r} is none of {', '.join(map(repr, roles))} (tags)"
        )
    if role == "assistant" and message.get("tool_calls"):
        return "function", _tool_calls(message["tool_calls"], where)
    if tags["content_tag"] not in message:
        raise UserError(
            f"{where}: no {tags['content_tag']!r} (content_tag); the message has {_names(message)}"
        )
    text = message[tags["content_tag"]]
    if isinstance(text, list):  # OpenAI's list of parts
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in text
        ]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: a part of the content is not text: {_show(text)}")
        text = "".join(parts)
    if not isinstance(text, str):
        raise UserError(f"{where}.{tags['content_tag']}: expected text, found {_show(text)}")
    return (role, _check_calls(text, where)) if role == "function" else (role, text)


def _finish(turns: list[Turn], row: dict, info: DatasetInfo, system: str) -> Conversation:
    system = system or _optional(row, info.columns.get("system"), _is_text, "")
    tools = _tools(row, info.columns.get("tools"))
    if system:
        turns = [("system", system), *turns]
    return Conversation(turns, tools)


# ----------------------------------------------------------------------------------------------------------
# fields


def _text(row: dict, column: str, empty_ok: bool = False) -> str:
    if column not in row:
        raise UserError(f"column {column!r} is missing; the row has {_names(row)}")
    value = row[column]
    if value is None:
        if empty_ok:
            return ""
        raise Dropped("empty text")
    if not isinstance(value, str):
        raise UserError(f"column {column!r}: expected text, found {_show(value)}")
    return value


def _optional(row: dict, column: str | None, check: Callable, default):
    """A column that the row may leave out or leave null."""
    if column is None or row.get(column) is None:
        return default
    try:
        return check(row[column])
    except TypeError as error:
        raise UserError(f"column {column!r}: expected text, found {_show(row[column])}") from error


def _is_text(value) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _names(row: dict) -> str:
    return ", ".join(map(str, row)) or "nothing"


def _show(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# -----------------------------------------------------------------------------------------------------------
# tools


def _tools(row: dict, column: str | None) -> tuple[dict, ...]:
    """The tool definitions of a row: a JSON string, as LLaMA-Factory has it, or the list itself."""
    value = row.get(column) if column else None
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(
                f"column {column!r} (tools): not JSON ({error.msg}): {_show(row[column])}"
            ) from error
    if not isinstance(value, list):
        raise UserError(f"column {column!r} (tools): expected a list of objects, found {_show(value)}")
    for i, tool in enumerate(value):
        about = (
            tool.get("function", tool) if isinstance(tool, dict) else None
        )  # OpenAI wraps it in "function"
        if not isinstance(about, dict) or not isinstance(about.get("name"), str):
            raise UserError(
                f"column {column!r} (tools)[{i}]: expected an object with a 'name', found {_show(tool)}"
            )
    return tuple(value)


def _check_calls(text: str, where: str) -> str:
    """A function turn is the JSON of one call or of a list of calls."""
    try:
        calls = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: a function call is not JSON ({error.msg}): {_show(text)}") from error
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            raise UserError(f"{where}: expected an object with 'name' and 'arguments', found {_show(call)}")
    return text


def _tool_calls(calls, where: str) -> str:
    """OpenAI's `tool_calls`, where the arguments are a JSON string, as the text of a function turn."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and "function" in call for call in calls
    ):
        raise UserError(
            f"{where}.tool_calls: expected a list of objects with 'function', found {_show(calls)}"
        )
    texts = [call["function"] for call in calls]
    for i, call in enumerate(texts):
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            texts[i] = call | {"arguments": _parsed(call["arguments"])}
    return _check_calls(json.dumps(texts if len(texts) > 1 else texts[0], ensure_ascii=False), where)


def _parsed(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # a tool that takes plain text
        return text
