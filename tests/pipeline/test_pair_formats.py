"""Rows of preference and prompt stages in every format: turns and answers, what is dropped, mistakes by
field."""

import json

import pytest

from pipeline.formats import Dropped, check_stage, to_pair, to_prompt, to_rated
from pipeline.sources import OPENAI_TAGS, SHAREGPT_TAGS, DatasetInfo
from text.render import Message

CALL = '{"name": "f", "arguments": {"x": 1}}'
WRAPPED = {"type": "function", "function": json.loads(CALL)}
RANKED = {"chosen": "chosen", "rejected": "rejected"}
QUESTION = [Message("user", "q")]


def alpaca(**columns):
    default = {"prompt": "instruction", "query": "input", "response": "output"}
    return DatasetInfo("x", "file", "x", columns=default | columns)


def sharegpt(tags=SHAREGPT_TAGS, **columns):
    return DatasetInfo(
        "x", "file", "x", "sharegpt", columns={"messages": "conversations"} | columns, tags=tags
    )


def say(*turns):
    return [{"from": role, "value": text} for role, text in turns]


PAIRS = {
    "alpaca, output": (
        alpaca(),
        {"instruction": "q", "output": ["c", "r"]},
        QUESTION,
        Message("assistant", "c"),
        Message("assistant", "r"),
    ),
    "alpaca, columns": (
        alpaca(**RANKED, system="s", history="h"),
        {"instruction": "q", "input": "i", "chosen": "c", "rejected": "r", "s": "S", "h": [["a", "b"]]},
        [Message(*turn) for turn in (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "q\ni"))],
        Message("assistant", "c"),
        Message("assistant", "r"),
    ),
    "sharegpt, messages": (
        sharegpt(**RANKED),
        {
            "conversations": say(("system", "S"), ("human", "q")),
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
        [Message("system", "S"), *QUESTION],
        Message("assistant", "c"),
        Message("assistant", "r"),
    ),
    "sharegpt, texts": (
        sharegpt(**RANKED),
        {"conversations": say(("human", "q")), "chosen": "c", "rejected": "r"},
        QUESTION,
        Message("assistant", "c"),
        Message("assistant", "r"),
    ),
    "sharegpt, response": (
        sharegpt(response="answers"),
        {"conversations": say(("human", "q")), "answers": ["c", say(("gpt", "r"))]},
        QUESTION,
        Message("assistant", "c"),
        Message("assistant", "r"),
    ),
    "calls of tools": (
        sharegpt(**RANKED),
        {
            "conversations": say(("human", "q")),
            "chosen": {"from": "function_call", "value": CALL},
            "rejected": {"from": "gpt", "value": "r"},
        },
        QUESTION,
        Message("function", CALL),
        Message("assistant", "r"),
    ),
    "after an observation": (
        sharegpt(**RANKED),
        {
            "conversations": say(("human", "q"), ("function_call", CALL), ("observation", "7")),
            "chosen": "c",
            "rejected": "r",
        },
        [*QUESTION, Message("function", CALL), Message("observation", "7")],
        Message("assistant", "c"),
        Message("assistant", "r"),
    ),
    "openai": (
        sharegpt(OPENAI_TAGS, **RANKED),
        {
            "conversations": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": json.loads(CALL)}],
            },
        },
        QUESTION,
        Message("assistant", "c"),
        Message("function", "", {"tool_calls": [WRAPPED], "content": None}),
    ),
    "openai, the conversation in both": (
        sharegpt(OPENAI_TAGS, **RANKED),
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
        },
        QUESTION,
        Message("assistant", "c"),
        Message("assistant", "r"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_every_format(name):
    info, row, turns, chosen, rejected = PAIRS[name]
    conversation, *answers = to_pair(row, info)
    assert conversation.turns == turns
    assert answers == [chosen, rejected]


RATED = {
    "alpaca": (
        alpaca(kto_tag="ok"),
        {"instruction": "q", "output": "a", "ok": True},
        QUESTION,
        Message("assistant", "a"),
        1,
    ),
    "sharegpt": (
        sharegpt(kto_tag="ok"),
        {"conversations": say(("human", "p"), ("gpt", "b"), ("human", "q"), ("gpt", "a")), "ok": False},
        [Message("user", "p"), Message("assistant", "b"), *QUESTION],
        Message("assistant", "a"),
        0,
    ),
    "sharegpt, response": (
        sharegpt(kto_tag="ok", response="answer"),
        {"conversations": say(("human", "q")), "answer": {"from": "function_call", "value": CALL}, "ok": 1},
        QUESTION,
        Message("function", CALL),
        1,
    ),
    "a column of pandas with a null": (
        alpaca(kto_tag="ok"),
        {"instruction": "q", "output": "a", "ok": 1.0},
        QUESTION,
        Message("assistant", "a"),
        1,
    ),
    "a table": (
        alpaca(kto_tag="ok"),
        {"instruction": "q", "output": "a", "ok": "False"},
        QUESTION,
        Message("assistant", "a"),
        0,
    ),
}


@pytest.mark.parametrize("name", RATED)
def test_a_rated_row_of_every_format(name):
    info, row, turns, answer, tag = RATED[name]
    found = to_rated(row, info)
    assert (found[0].turns, *found[1:]) == (turns, answer, tag)
    # the same row as a prompt: a bad answer is nothing to compare with
    conversation, label = to_prompt(row, info)
    assert (conversation.turns, label) == (turns, answer if tag else None)


@pytest.mark.parametrize(
    ("info", "row", "label"),
    [
        (alpaca(), {"instruction": "q", "output": "a"}, Message("assistant", "a")),
        (alpaca(), {"instruction": "q", "output": ""}, None),
        (alpaca(), {"instruction": "q"}, None),
        (DatasetInfo("x", "file", "x", columns={"prompt": "p"}), {"p": "q", "output": "a"}, None),
        (alpaca(**RANKED), {"instruction": "q", "chosen": "a", "rejected": "r"}, Message("assistant", "a")),
        (sharegpt(), {"conversations": say(("human", "q"), ("gpt", "a"))}, Message("assistant", "a")),
        (sharegpt(), {"conversations": say(("human", "q"))}, None),
    ],
)
def test_a_prompt_keeps_the_answer_of_its_row_as_the_label(info, row, label):
    conversation, found = to_prompt(row, info)
    assert (conversation.turns, found) == (QUESTION, label)


@pytest.mark.parametrize(
    ("take", "info", "row", "reason"),
    [
        (
            to_pair,
            alpaca(**RANKED),
            {"instruction": "q", "chosen": "a", "rejected": "a"},
            "identical answers",
        ),
        (
            to_pair,
            alpaca(**RANKED),
            {"instruction": "q", "chosen": "a", "rejected": " "},
            "empty rejected answer",
        ),
        (
            to_pair,
            alpaca(**RANKED),
            {"instruction": "q", "chosen": None, "rejected": "a"},
            "empty chosen answer",
        ),
        (to_pair, alpaca(**RANKED), {"instruction": "", "chosen": "b", "rejected": "a"}, "empty prompt"),
        (
            to_pair,
            sharegpt(**RANKED),
            {"conversations": say(("human", "q"), ("gpt", "x")), "chosen": "b", "rejected": "a"},
            "no question before",
        ),
        (
            to_pair,
            sharegpt(**RANKED),
            {"chosen": say(("human", "q"), ("gpt", "a")), "rejected": say(("human", "p"), ("gpt", "b"))},
            "chosen and rejected differ before the last answer",
        ),
        (to_rated, alpaca(kto_tag="ok"), {"instruction": "q", "output": "", "ok": True}, "empty answer"),
        (to_rated, alpaca(kto_tag="ok"), {"instruction": "q", "output": "a", "ok": None}, "no kto_tag"),
        (
            to_rated,
            sharegpt(kto_tag="ok"),
            {"conversations": say(("human", "q"), ("gpt", "a"), ("human", "thanks")), "ok": True},
            "empty answer",
        ),
        (to_prompt, sharegpt(), {"conversations": say(("system", "s"))}, "no question before"),
    ],
)
def test_rows_with_nothing_to_learn_from_are_dropped(take, info, row, reason):
    with pytest.raises(Dropped, match=reason):
        take(row, info)


@pytest.mark.parametrize(
    ("take", "info", "row", "message"),
    [
        (
            to_pair,
            alpaca(**RANKED),
            {"instruction": "q", "chosen": "a"},
            "column 'rejected' is missing; the row has",
        ),
        (
            to_pair,
            alpaca(**RANKED),
            {"instruction": "q", "chosen": 3, "rejected": "a"},
            "column 'chosen': expected text or a message, found int 3",
        ),
        (
            to_pair,
            alpaca(),
            {"instruction": "q", "output": "a"},
            r"'output': expected \[chosen, rejected\] \(ranking",
        ),
        (to_pair, alpaca(), {"instruction": "q", "output": ["a"]}, r"expected \[chosen, rejected\]"),
        (to_pair, alpaca(), {"instruction": "q", "output": ["a", 5]}, r"column 'output'\[1\]: expected text"),
        (
            to_pair,
            sharegpt(**RANKED),
            {
                "conversations": say(("human", "q")),
                "chosen": {"from": "human", "value": "x"},
                "rejected": "a",
            },
            "column 'chosen': expected an answer, found a message of role user",
        ),
        (
            to_pair,
            sharegpt(**RANKED),
            {
                "conversations": say(("human", "q")),
                "chosen": {"from": "function_call", "value": "f(x)"},
                "rejected": "a",
            },
            "column 'chosen': a function call is not JSON",
        ),
        (
            to_pair,
            sharegpt(**RANKED),
            {"chosen": "a", "rejected": "b"},
            r"column 'conversations' \(messages\) is miss",
        ),
        (
            to_rated,
            alpaca(kto_tag="ok"),
            {"instruction": "q", "output": "a"},
            r"column 'ok' \(kto_tag\) is missing",
        ),
        (
            to_rated,
            alpaca(kto_tag="ok"),
            {"instruction": "q", "output": "a", "ok": "good"},
            r"'ok' \(kto_tag\): expected true or false, found str 'good'",
        ),
        (
            to_rated,
            alpaca(kto_tag="ok"),
            {"instruction": "q", "output": "a", "ok": 2},
            "expected true or false",
        ),
        (to_rated, alpaca(kto_tag="ok"), {"instruction": "q", "ok": True}, "column 'output' is missing"),
        (to_prompt, alpaca(), {"instruction": "q", "output": 7}, "column 'output': expected text"),
    ],
)
def test_a_wrong_row_names_the_field(take, info, row, message):
    with pytest.raises(ValueError, match=message):
        take(row, info)


def test_data_of_another_stage_is_refused():
    with pytest.raises(ValueError, match="it holds single answers, but stage dpo needs pairs"):
        check_stage(alpaca(), "dpo")
    with pytest.raises(ValueError, match="it holds pairs of answers, but stage kto needs single answers"):
        check_stage(alpaca(**RANKED), "kto")
    with pytest.raises(ValueError, match=r'stage kto needs to know .* columns: {"kto_tag"'):
        check_stage(alpaca(), "kto")
    with pytest.raises(ValueError, match=r"columns\.rejected is given without columns\.chosen"):
        check_stage(alpaca(rejected="r"), "dpo")
    for info in (alpaca(), alpaca(**RANKED), alpaca(kto_tag="ok"), sharegpt()):
        check_stage(info, "ppo")
        check_stage(info, "grpo")
