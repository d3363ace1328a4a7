"""Rows of any supported format -> a list of (role, text) turns, or a document for pretraining.

alpaca    {"instruction", "input", "output"[, "system", "history": [[user, answer], ...]]}
sharegpt  {"conversations": [{"from": "human"|"gpt"|"observation"|"function_call"|"system", "value": ...}][, "tools"]}
openai    {"messages": [{"role": "user"|"assistant"|"system"|"tool", "content": ...}]}: sharegpt with other tags
text      {"text": ...}: a document (stage pt); so is the prompt column of an alpaca row

Rules (LLaMA-Factory's): user text = prompt + "\\n" + query, empty ones skipped; answers of `history` are trained too;
the first system message beats the system column; then (user | observation) and (assistant | function) alternate; an
odd tail is cut off. Two kinds of trouble are kept apart:
  ValueError   the row is not what dataset_info.json says (missing column, wrong type, unknown role): stop and fix it
  Dropped      the row is readable but holds nothing to train on: left out, counted, and shown in the report
The template writes tool lists and calls as its model knows them; here they are only checked.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sources import DatasetInfo

LATER = {"images": "pictures", "videos": "videos", "audios": "sound"}
# what a stage makes of a row: the stages of one kind train on the same tokens
KINDS = {
    "pt": "document", "sft": "dialogue", "rm": "pair", "dpo": "pair", "orpo": "pair", "kto": "rated", "ppo": "prompt",
    "grpo": "prompt",
}  # fmt: skip


class Dropped(Exception):
    """This row holds nothing to train on; the text is the reason that the report counts."""


@dataclass(frozen=True)
class Conversation:
    turns: list[tuple[str, str]]  # (role, text); role: system, user, assistant, observation, function
    tools: tuple[dict, ...] = ()  # definitions; the template puts them behind the system text
    notes: tuple[str, ...] = field(default=())  # what was repaired: "odd tail cut"


def check_stage(info: DatasetInfo, stage: str) -> None:
    """Refuse a dataset that the stage cannot use, before a row is read."""
    kind = KINDS[stage]
    ranked = info.ranking or "chosen" in info.columns
    if ranked != (kind == "pair"):
        kinds = ("pairs of answers", "single answers") if ranked else ("single answers", "pairs (ranking: true)")
        raise ValueError(f"dataset {info.name!r}: it holds {kinds[0]}, but stage {stage} needs {kinds[1]}")
    for column, what in LATER.items():
        if column in info.columns:
            raise ValueError(
                f"dataset {info.name!r}: columns.{column}: {what} cannot be used by stage {stage}"
            )
    if stage == "pt" and info.formatting != "alpaca":
        raise ValueError(
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
    return (_alpaca if info.formatting == "alpaca" else _sharegpt)(row, info)


def to_pair(row: dict, info: DatasetInfo) -> tuple[Conversation, str, str]:
    """(the conversation up to the answer, chosen, rejected) of one row for stages rm, dpo and orpo."""
    prompt = (_alpaca_prompt if info.formatting == "alpaca" else _sharegpt_prompt)(row, info)
    if "chosen" in info.columns:
        answers = [row.get(info.columns[name]) for name in ("chosen", "rejected")]
    else:
        answers = row.get(info.columns["response"])
    if not isinstance(answers, list) or len(answers) != 2:
        column = info.columns.get("response")
        raise ValueError(f"column {column!r}: expected [chosen, rejected], found {_show(answers)}")
    texts = []
    for name, answer in zip(("chosen", "rejected"), answers):
        if isinstance(answer, dict):
            answer = answer.get(info.tags["content_tag"])
        if not isinstance(answer, str):
            raise ValueError(f"{name}: expected text, found {_show(answer)}")
        if not answer.strip():
            raise Dropped(f"empty {name} answer")
        texts.append(answer)
    if texts[0] == texts[1]:
        raise Dropped("identical answers")
    return prompt, texts[0], texts[1]


def _alpaca_prompt(row: dict, info: DatasetInfo) -> Conversation:
    answered = _alpaca({**row, "answer": "-"}, replace(info, columns=info.columns | {"response": "answer"}))
    return replace(answered, turns=answered.turns[:-1])


def _sharegpt_prompt(row: dict, info: DatasetInfo) -> Conversation:
    tags, messages = info.tags, row.get(info.columns["messages"])
    if isinstance(messages, list):
        messages = [*messages, {tags["role_tag"]: tags["assistant_tag"], tags["content_tag"]: "-"}]
    answered = _sharegpt({**row, info.columns["messages"]: messages}, info)
    return replace(answered, turns=answered.turns[:-1])


def _alpaca(row: dict, info: DatasetInfo) -> Conversation:
    turns: list[tuple[str, str]] = []
    history = _optional(row, info.columns.get("history"), lambda value: value, [])
    if not isinstance(history, list):
        raise ValueError(
            f"column {info.columns['history']!r}: expected a list of [user, answer] pairs, found {_show(history)}"
        )
    for i, pair in enumerate(history):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise ValueError(
                f"column {info.columns['history']!r}[{i}]: expected [user, answer], found {_show(pair)}"
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    if "response" not in info.columns:
        raise ValueError(
            "columns.response is not given, so there is no answer to train on (stage pt reads plain text)"
        )
    prompt = _text(row, info.columns["prompt"], empty_ok=True)
    query = _optional(row, info.columns.get("query"), _is_text, "")
    user = "\n".join(text for text in (prompt, query) if text)
    answer = _text(row, info.columns["response"], empty_ok=True)
    if row[info.columns["response"]] is None:
        raise Dropped("no answer")
    if not user:
        raise Dropped("empty prompt")
    turns += [("user", user), ("assistant", answer)]
    return _finish(turns, row, info, system="", notes=[])


def _sharegpt(row: dict, info: DatasetInfo) -> Conversation:
    column, tags = info.columns["messages"], info.tags
    messages = row.get(column)
    if column not in row:
        raise ValueError(f"column {column!r} (messages) is missing; the row has {_names(row)}")
    if not isinstance(messages, list):
        raise ValueError(f"column {column!r}: expected a list of messages, found {_show(messages)}")
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "observation",
        tags["function_tag"]: "function",
        tags["system_tag"]: "system",
    }
    system, notes = "", []
    turns: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        role, text = _message(message, f"column {column!r}[{i}]", roles, tags)
        if role == "system" and i == 0:
            system = text
        elif role == "observation" and turns and turns[-1][0] == "observation":
            turns[-1] = (role, turns[-1][1] + "\n" + text)  # answers to parallel tool calls
        else:
            turns.append((role, text))
    for i, (role, _) in enumerate(turns):
        if role not in (("user", "observation"), ("assistant", "function"))[i % 2]:
            raise Dropped("roles do not alternate")
    if len(turns) % 2:
        turns.pop()
        notes.append("odd tail cut")
    if not turns:
        raise Dropped("no answer")
    return _finish(turns, row, info, system, notes)


def _message(message, where: str, roles: dict[str, str], tags: dict[str, str]) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: expected an object, found {_show(message)}")
    if tags["role_tag"] not in message:
        raise ValueError(f"{where}: no {tags['role_tag']!r} (role_tag); the message has {_names(message)}")
    role = roles.get(message[tags["role_tag"]]) if isinstance(message[tags["role_tag"]], str) else None
    if role is None:
        raise ValueError(
            f"{where}: role {message[tags['role_tag']]!r} is none of {', '.join(map(repr, roles))} (tags)"
        )
    if role == "assistant" and message.get("tool_calls"):
        return "function", _tool_calls(message["tool_calls"], where)
    if tags["content_tag"] not in message:
        raise ValueError(
            f"{where}: no {tags['content_tag']!r} (content_tag); the message has {_names(message)}"
        )
    text = message[tags["content_tag"]]
    if isinstance(text, list):  # OpenAI's list of parts
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in text
        ]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where}: a part of the content is not text: {_show(text)}")
        text = "".join(parts)
    if not isinstance(text, str):
        raise ValueError(f"{where}.{tags['content_tag']}: expected text, found {_show(text)}")
    return (role, _check_calls(text, where)) if role == "function" else (role, text)


def _finish(
    turns: list[tuple[str, str]], row: dict, info: DatasetInfo, system: str, notes: list[str]
) -> Conversation:
    system = system or _optional(row, info.columns.get("system"), _is_text, "")
    tools = _tools(row, info.columns.get("tools"))
    if system:
        turns = [("system", system), *turns]
    return Conversation(turns, tools, tuple(notes))


# ---------------------------------------------------------------------------------------------------------- fields


def _text(row: dict, column: str, empty_ok: bool = False) -> str:
    if column not in row:
        raise ValueError(f"column {column!r} is missing; the row has {_names(row)}")
    value = row[column]
    if value is None:
        if empty_ok:
            return ""
        raise Dropped("empty text")
    if not isinstance(value, str):
        raise ValueError(f"column {column!r}: expected text, found {_show(value)}")
    return value


def _optional(row: dict, column: str | None, check: Callable, default):
    """A column that the row may leave out or leave null."""
    if column is None or row.get(column) is None:
        return default
    try:
        return check(row[column])
    except TypeError as error:
        raise ValueError(f"column {column!r}: expected text, found {_show(row[column])}") from error


def _is_text(value) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _names(row: dict) -> str:
    return ", ".join(map(str, row)) or "nothing"


def _show(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ----------------------------------------------------------------------------------------------------------- tools


def _tools(row: dict, column: str | None) -> tuple[dict, ...]:
    """The tool definitions of a row: a JSON string, as LLaMA-Factory has it, or the list itself."""
    value = row.get(column) if column else None
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"column {column!r} (tools): not JSON ({error.msg}): {_show(row[column])}"
            ) from error
    if not isinstance(value, list):
        raise ValueError(f"column {column!r} (tools): expected a list of objects, found {_show(value)}")
    for i, tool in enumerate(value):
        about = (
            tool.get("function", tool) if isinstance(tool, dict) else None
        )  # OpenAI wraps it in "function"
        if not isinstance(about, dict) or not isinstance(about.get("name"), str):
            raise ValueError(
                f"column {column!r} (tools)[{i}]: expected an object with a 'name', found {_show(tool)}"
            )
    return tuple(value)


def _check_calls(text: str, where: str) -> str:
    """A function turn is the JSON of one call or of a list of calls."""
    try:
        calls = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: a function call is not JSON ({error.msg}): {_show(text)}") from error
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            raise ValueError(f"{where}: expected an object with 'name' and 'arguments', found {_show(call)}")
    return text


def _tool_calls(calls, where: str) -> str:
    """OpenAI's `tool_calls`, where the arguments are a JSON string, as the text of a function turn."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and "function" in call for call in calls
    ):
        raise ValueError(
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
