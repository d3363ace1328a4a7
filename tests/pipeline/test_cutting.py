"""Examples longer than cutoff_len: LLaMA-Factory's lengths, cuts inside texts alone, what is said of them."""

import json
import re
from copy import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import put
from tiny_tokenizers import make_tokenizer

from data import DataOptions, load_datasets
from pipeline.batch import ROLES
from pipeline.cutting import by_rank, keep_answer, keep_side, keep_turns, pieces, ratio_lengths, texts_within
from pipeline.formats import Dropped
from templates import TEMPLATES, get_template
from text.jinja_template import JinjaTemplate
from text.render import Message
from text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
JINJA = sorted(path.stem for path in (REPOSITORY / "tests/fixtures/templates").glob("*.jinja"))
RANKED = {"columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}, "ranking": True}
TALK = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
TALK |= {"tags": dict(zip(("role_tag", "content_tag", "user_tag", "assistant_tag"), ("role", "content")))}
TALK["tags"] |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
PREFIX, USER, ANSWER = ROLES.index("prefix"), ROLES.index("user"), ROLES.index("assistant")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    @cache
    def made(kind):
        return Tokenizer.from_folder(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), kind))

    return made


def template_of(name: str):
    """A built-in one, or "jinja <name>" of the published ones."""
    kind, _, published = name.rpartition(" ")
    if not kind:
        return get_template(name)
    return JinjaTemplate((REPOSITORY / f"tests/fixtures/templates/{published}.jinja").read_text())


def own_parts(template, tokenizer, messages: list[Message]) -> list[str]:
    """What the template writes around the texts of these messages."""
    marks = [f"@{i}@" for i in range(len(messages))]
    named = [message._replace(content=mark) for message, mark in zip(messages, marks)]
    spans = template.render(named, tokenizer.bos_token, tokenizer.eos_token)
    return re.split("|".join(marks), "".join(span.text for span in spans))


def load(home, tokenizer, template, *names, stage="sft", **options):
    settings = DataOptions(dataset=names, dataset_dir=str(home), **options)
    return load_datasets(settings, template, tokenizer, stage, seed=1, is_main=False)


def decoded(example, tokenizer) -> list[str]:
    """The text of each segment."""
    return [tokenizer.decode(example.tokens[span], skip_special=False) for span in example.segments]


def texts_kept(text: str, template, tokenizer, messages: list[Message]) -> list[str]:
    """What stays of each message's text, if `text` is the dialogue with texts cut at their ends: all that the
    template writes is there."""
    own = own_parts(template, tokenizer, messages)
    found = re.fullmatch("(.*?)".join(map(re.escape, own)), text, re.DOTALL)
    assert found, f"{text!r} is not {own!r} with texts in it"
    for kept, message in zip(found.groups(), messages):
        kept = kept.rstrip("\ufffd")  # half a character
        assert kept.strip() and message.content.strip().startswith(kept.strip()), (kept, message)
    return list(found.groups())


# ------------------------------------------------------------------------------------------------------------
# lengths


@pytest.mark.parametrize(
    ("source", "target", "budget", "kept"),
    [
        (300, 10, 100, (90, 10)),  # the answer takes less than half: it stays whole
        (10, 300, 100, (10, 90)),  # the prompt does
        (60, 40, 50, (30, 20)),  # both shrink alike
        (50, 49, 99, (50, 49)),
        (200, 50, 100, (80, 20)),
        (49, 1000, 100, (49, 51)),
        (50, 1000, 100, (5, 95)),
        (0, 30, 10, (0, 10)),
    ],
)
def test_lengths_are_llama_factorys(source, target, budget, kept):
    """infer_seqlen of LLaMA-Factory 0.9.5 gives these."""
    texts = np.arange(source), [np.arange(target)]
    assert ratio_lengths(*texts, budget, 1) == kept


@given(
    *(st.lists(st.integers(-1, 9), min_size=1, max_size=60) for _ in range(2)),
    st.integers(2, 80),
    st.integers(1, 9),
)
def test_the_templates_own_tokens_and_one_of_each_text_always_stay(source, target, budget, reserved):
    source, target = np.array(source), np.array(target)
    needed = int((source <= 0).sum()) + max(int((target <= 0).sum()), min(reserved, len(target)))
    kept = ratio_lengths(source, [target], budget, reserved)
    if needed > budget:
        assert kept is None
        return
    assert sum(kept) == min(budget, len(source) + len(target))
    for ranks, length in zip((source, target), kept):
        keep = by_rank(ranks, length)
        assert keep.sum() == length and keep[ranks <= 0].all()
        assert ranks[keep].max(initial=-1) <= ranks[~keep].min(initial=99)  # none before an earlier one


def test_the_longest_text_gives_way_first():
    ranks = np.array([-1, *range(8), -1, *range(3), -1])  # two texts, of 8 and 3 tokens
    assert np.flatnonzero(by_rank(ranks, 8)).tolist() == [0, 1, 2, 3, 9, 10, 11, 13]
    assert np.flatnonzero(by_rank(ranks, 10)).tolist() == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13]


def conversation(*lengths: int):
    """messages and parts of keep_turns: a bos, then messages of a header, so many text tokens and an end."""
    messages = [Message(("user", "assistant")[i % 2], "x") for i in range(len(lengths))]
    produced, turns, roles, ranks = [False], [-1], [PREFIX], [-1]
    for turn, length in enumerate(lengths):
        answer = turn % 2 == 1
        produced += [False, *[answer] * (length + 1)]
        turns += [turn] * (length + 2)
        roles += [ANSWER if answer else USER] * (length + 2)
        ranks += [-1, *range(length), -1]
    return messages, [np.array(part) for part in (produced, turns, roles, ranks)]


def test_turn_by_turn_and_the_only_trained_turn_first():
    messages, parts = conversation(4, 6, 10, 10, 5, 5)
    produced, turns, _, ranks = parts

    def kept(trained, budget):
        keep = keep_turns(messages, parts, trained, budget, 1)
        own = [int((keep & (turns == turn) & (ranks < 0)).sum()) for turn in range(-1, 6)]
        return own, [int((keep & (turns == turn) & (ranks >= 0)).sum()) for turn in range(6)]

    # the first pair takes 15 of 33; of the second, 13 prompt tokens (with the answer's header) and 11 answer
    # tokens, 18 stay: int(18 * 11 / 24) = 8 of the answer
    assert kept(produced, 33) == ([1, 2, 2, 2, 2, 0, 0], [4, 6, 7, 7, 0, 0])
    assert kept(produced, 17) == ([1, 2, 2, 0, 0, 0, 0], [4, 6, 0, 0, 0, 0])  # 2 are no room for a turn
    last = produced & (turns == 5)
    assert kept(last, 33) == ([1, 0, 0, 2, 2, 2, 2], [0, 0, 7, 7, 5, 5])
    assert kept(last, 15) == ([1, 0, 0, 0, 0, 2, 2], [0, 0, 0, 0, 5, 5])
    with pytest.raises(Dropped, match="no room for the template's own tokens") as reason:
        keep_turns(messages, parts, produced, 6, 1)
    assert reason.value.detail == "which needs 7 tokens"
    assert keep_turns(messages, parts, produced, 7, 1).sum() == 7


def test_left_keeps_the_bos_alone_and_right_the_start():
    roles = np.array([PREFIX, *[ROLES.index("system")] * 5, USER, ANSWER, ANSWER, ANSWER])
    assert np.flatnonzero(keep_side(roles, 4, "left")).tolist() == [0, 7, 8, 9]
    assert np.flatnonzero(keep_side(roles, 4, "right")).tolist() == [0, 1, 2, 3]
    with pytest.raises(Dropped, match="longer than cutoff_len"):
        keep_side(roles, 4, "drop")


@given(st.integers(2, 400), st.integers(2, 50))
def test_pieces_join_to_the_document(length, capacity):
    parts = pieces(length, capacity)
    assert [place for a, b in parts for place in range(a, b)] == list(range(length))
    assert all(0 < b - a <= capacity for a, b in parts)
    assert all(b - a > 1 for a, b in parts) or capacity == 2  # a piece of one token could train nothing


def cut(prompt, answers, cutoff_len, strategy, prefix=0):
    """Which places of prompt + answer stay, by name: p0, p1, ... of the prompt, a0, a1, ... of the answer."""
    longest = prompt + max(answers)
    names = [f"p{i}" for i in range(prompt)]
    kept = []
    for answer in answers:
        keep = keep_answer(prompt + answer, prompt, prefix, longest, cutoff_len, strategy)
        kept.append(" ".join(np.array([*names, *(f"a{i}" for i in range(answer))])[keep]))
    return kept


@pytest.mark.parametrize(
    ("strategy", "prompt", "answers", "cutoff_len", "kept"),
    [
        ("right", 4, (2, 4), 6, ["p0 p1 p2 p3 a0 a1", "p0 p1 p2 p3 a0 a1"]),
        ("right", 4, (1, 9), 5, ["p0 p1 p2 p3 a0", "p0 p1 p2 p3 a0"]),
        ("left", 4, (1, 3), 5, ["p0 p3 a0", "p0 p3 a0 a1 a2"]),  # p0 is the bos
        ("left", 4, (1, 5), 5, ["p0 a0", "p0 a1 a2 a3 a4"]),  # the longer answer alone is too long
    ],
)
def test_cutting_answers_by_hand(strategy, prompt, answers, cutoff_len, kept):
    assert cut(prompt, answers, cutoff_len, strategy, prefix=1) == kept


@given(
    st.integers(1, 40),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(2, 60),
    st.sampled_from(["left", "right"]),
    st.integers(0, 1),
)
def test_cutting_keeps_the_same_prompt_and_never_more_than_fits(
    prompt, answers, cutoff_len, strategy, prefix
):
    if prompt + max(answers) <= cutoff_len:
        return
    try:
        kept = [text.split() for text in cut(prompt, answers, cutoff_len, strategy, prefix)]
    except Dropped:
        assert strategy == "right" and prompt >= cutoff_len
        return
    prompts = [[name for name in half if name[0] == "p"] for half in kept]
    assert prompts[0] == prompts[1]
    for half in kept:
        assert len(half) <= cutoff_len and half[-1][0] == "a"
    if max(answers) < cutoff_len - prefix:
        assert max(map(len, kept)) == cutoff_len  # nothing more is lost than must be


# ------------------------------------------------------------------------------------------------------------
# rows


@pytest.mark.parametrize("cutoff_len", [128, 256])
@pytest.mark.parametrize("name", ["chatml", "qwen", "llama3", "smollm2", "qwen3", "vicuna", "jinja smollm2"])
def test_no_row_of_alpaca_loses_a_header_or_an_end(home, tokenizers, name, cutoff_len):
    tokenizer = tokenizers("llama3" if name == "llama3" else "chatml")
    template = template_of(name)
    rows = json.loads((REPOSITORY / "data/alpaca_en_demo.json").read_text(encoding="utf-8"))[:30]
    put(home, "alpaca", rows)
    prepared = load(home, tokenizer, template, "alpaca", cutoff_len=cutoff_len)
    tally, store = prepared.report.datasets[0].tally, prepared.train
    assert tally.cut > 5 and not tally.dropped and len(store) == len(rows)
    shorter = 0
    for i, row in enumerate(rows):
        example = store.example(i)
        assert len(example) <= cutoff_len
        asked = "\n".join(text for text in (row["instruction"], row["input"]) if text)
        messages = [Message("user", asked), Message("assistant", row["output"])]
        (text,) = decoded(example, tokenizer)
        kept = texts_kept(text, template, tokenizer, messages)
        shorter += len(kept[0].strip()) < len(asked.strip())
    assert tally.notes.get("cut in the prompt", 0) == shorter
    said = f"alpaca: {shorter} rows: cut in the prompt (first: " in str(prepared.report)
    assert said == (shorter > 0)


def long_talk(words: int = 25, turns: int = 3) -> list[Message]:
    texts = [
        f"{'ask' if i % 2 == 0 else 'say'} {i} " + "Hello you are " * (words + 7 * i)
        for i in range(2 * turns)
    ]
    return [Message(("user", "assistant")[i % 2], text.strip()) for i, text in enumerate(texts)]


def as_row(messages: list[Message]) -> dict:
    return {"messages": [message._asdict() for message in messages]}


BARE = ("empty", "vanilla", "fewshot")  # write nothing between texts


@pytest.mark.parametrize("name", [*(f"jinja {name}" for name in JINJA), *sorted(set(TEMPLATES) - set(BARE))])
def test_every_template_keeps_what_it_writes(home, tokenizers, name):
    """Of several turns as many as have room, each whole but for its texts."""
    template = template_of(name)
    tokenizer, messages = tokenizers("llama3" if "llama3" in name else "chatml"), long_talk()
    put(home, "talk", [as_row(messages)], **TALK)
    whole = len(load(home, tokenizer, template, "talk", cutoff_len=9999).train.example(0))
    for cutoff_len, several in ((whole - 1, False), (whole // 3, True)):
        for keys in ({}, {"train_on_prompt": True}, {"mask_history": True})[: 3 if several else 1]:
            prepared = load(home, tokenizer, template, "talk", cutoff_len=cutoff_len, **keys)
            example = prepared.train.example(0)
            assert cutoff_len - 12 <= len(example) <= cutoff_len and example.trained.any()
            turns = sorted(set(example.turns.tolist()) - {-1})
            left = messages[turns[0] // 2 * 2 : turns[-1] + 1]
            (text,) = decoded(example, tokenizer)
            # one token of the space that ends an answer and the bracket of the next turn
            text = text.removesuffix("[") if "v01" in name else text
            last_first = keys.get("mask_history") or (name == "jinja qwen3" and not keys)
            if last_first:  # without the first turn there is no system text
                header, end = map(re.escape, own_parts(template, tokenizer, messages)[-2:])
                assert re.search(f"{header}say 5 .*{end}$", text, re.DOTALL) and text.count("say 5") == 1
            elif not getattr(template, "thinking", "qwen3" in name):  # which write the last answer otherwise
                texts_kept(text, template, tokenizer, left)


def test_the_last_turn_with_mask_history(home, tokenizers):
    tokenizer, template, messages = tokenizers("llama3"), get_template("llama3"), long_talk()
    put(home, "talk", [as_row(messages)], **TALK)
    prepared = load(home, tokenizer, template, "talk", cutoff_len=60, mask_history=True)
    (text,) = decoded(prepared.train.example(0), tokenizer)
    assert text.startswith("<|begin_of_text|>")
    texts_kept(text, template, tokenizer, messages[-2:])
    assert "1 rows: cut in the prompt" in str(prepared.report)


@pytest.mark.parametrize("strategy", ["ratio", "left"])
def test_a_long_system_text_never_takes_the_question(home, tokenizers, strategy):
    tokenizer, template = tokenizers("chatml"), get_template("chatml", None, "Hello who are you? " * 90)
    put(home, "short", [{"instruction": "What is it?", "output": "I am Anvil. " * 4}])
    (text,) = decoded(
        load(home, tokenizer, template, "short", cutoff_len=64, truncation_strategy=strategy).train.example(
            0
        ),
        tokenizer,
    )
    assert text.endswith(f"What is it?<|im_end|>\n<|im_start|>assistant\n{'I am Anvil. ' * 4}<|im_end|>\n")
    assert text.startswith("<|im_start|>system\nHello who") == (strategy == "ratio")


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("stage", ["dpo", "rm", "kto"])
def test_pairs_and_rated_answers_keep_what_the_template_writes(home, tokenizers, stage, name):
    tokenizer, template = tokenizers("llama3" if name == "llama3" else "chatml"), get_template(name)
    words = [(60, 90, 5), (5, 90, 60), (90, 5, 4), (70, 70, 70)]
    texts = [[f"{kind} " + "Hello you " * n for kind, n in zip("qcr", row)] for row in words]
    rows = [dict(zip(("instruction", "chosen", "rejected"), row)) for row in texts]
    if stage == "kto":
        rows = [{"instruction": a, "output": b, "ok": i % 2 > 0} for i, (a, b, _) in enumerate(texts)]
        put(home, "rows", rows, columns={"prompt": "instruction", "response": "output", "kto_tag": "ok"})
    else:
        put(home, "rows", rows, **RANKED)
    prepared = load(home, tokenizer, template, "rows", stage=stage, cutoff_len=48)
    assert len(prepared.train) == 4
    for i, row in enumerate(texts):
        kept = [
            texts_kept(text, template, tokenizer, [Message("user", row[0]), Message("assistant", answer)])
            for text, answer in zip(decoded(prepared.train.example(i), tokenizer), row[1:])
        ]
        assert len({prompt for prompt, _ in kept}) == 1  # both answers to the same prompt


def test_packed_rows_are_made_of_examples_that_fit(home, tokenizers):
    tokenizer, template = tokenizers("chatml"), get_template("chatml")
    put(home, "long", [{"instruction": "Hello " * n, "output": "you " * (90 - n)} for n in range(1, 90, 11)])
    prepared = load(home, tokenizer, template, "long", cutoff_len=48, packing=True)
    loader = prepared.train_loader(DataOptions(packing=True, cutoff_len=48), rows_per_batch=2, seed=1)
    batch = loader.batch(0)
    assert all(length <= 48 for length in np.diff(batch.borders))
    ends = batch.labels[batch.cu_seqlens[1 : len(batch.sources) + 1].long() - 3]
    assert set(ends.tolist()) == {tokenizer.token_id("<|im_end|>")}


def test_a_thought_is_cut_inside(home, tokenizers):
    tokenizer, template = tokenizers("chatml"), get_template("qwen3")
    answer = "<think>\n" + "Hello who are you? " * 40 + "\n</think>\n\nI am Anvil."
    put(home, "thoughts", [{"instruction": "What?", "output": answer}])
    (text,) = decoded(load(home, tokenizer, template, "thoughts", cutoff_len=64).train.example(0), tokenizer)
    assert re.fullmatch(
        r".*assistant\n<think>\nHello who[^<]*\n</think>\n\nI am Anvil.<\|im_end\|>\n", text, re.DOTALL
    )


def test_a_call_is_never_cut_and_a_row_without_room_is_named(home, tokenizers):
    tokenizer, template = tokenizers("chatml"), get_template("qwen")
    call = json.dumps({"name": "f", "arguments": {"text": "Hello " * 60}})
    talk = [("human", "Hello " * 60), ("function_call", call), ("observation", "7"), ("gpt", "7.")]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in talk]}]
    rows.append({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b " * 99}]})
    put(home, "calls", rows, formatting="sharegpt")
    report = str(load(home, tokenizer, template, "calls", cutoff_len=64).report)
    (needed,) = re.findall(
        r"own tokens and one of each text \(first: .*calls.jsonl:1 \(row 0\), which needs (\d+) tokens\)",
        report,
    )
    prepared = load(home, tokenizer, template, "calls", cutoff_len=int(needed))
    assert len(prepared.train) == 2 and call in decoded(prepared.train.example(0), tokenizer)[0]
    less = load(home, tokenizer, template, "calls", cutoff_len=int(needed) - 1)
    assert len(less.train) == 1 and less.report.datasets[0].tally.read == 2


def test_a_text_that_the_template_changes_is_not_cut():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
    changed = JinjaTemplate(source + "{% if add_generation_prompt %}<assistant>{% endif %}")

    def render(messages):
        return "".join(span.text for span in changed.render(messages, None, None))

    messages = [Message("user", "abc"), Message("assistant", "12 \n")]
    whole = "<user>ABC<assistant>12 \n"
    assert render(messages) == whole
    # upper changes neither the marks nor what is upper already
    found = texts_within(render, messages, whole)
    assert [whole[a:b] for a, b in zip(found[::2], found[1::2])] == ["ABC", "12 \n"]
    shout = JinjaTemplate(
        source.replace("| upper", "[:3]") + "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def cut_short(messages):
        return "".join(span.text for span in shout.render(messages, None, None))

    assert texts_within(cut_short, messages, cut_short(messages)) == []


CHATML_JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("keys", [{"mask_history": True}, {"truncation_strategy": "left"}], ids=str)
def test_a_bos_that_opens_every_header_is_no_prefix(home, tokenizers, keys):
    """SmolLM2 names <|im_start|> as its bos: kept alone it would be a header without its role."""
    template, tokenizer = JinjaTemplate(CHATML_JINJA), copy(tokenizers("chatml"))
    tokenizer.bos_token = "<|im_start|>"
    put(home, "talk", [as_row(long_talk(8))], **TALK)
    (text,) = decoded(
        load(home, tokenizer, template, "talk", cutoff_len=40, **keys).train.example(0), tokenizer
    )
    assert re.match("<.im_start.>(user|assistant)\n" if "mask_history" in keys else "[^<]", text), text


def test_the_bos_stays_where_answers_are_marked(home, tokenizers):
    answer = "<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    each = "{% for m in messages %}"
    source = "{{ bos_token }}" + CHATML_JINJA.replace("{% endfor %}", "{% endif %}{% endfor %}")
    source = source.replace(each, f"{each}{{% if m.role == 'assistant' %}}{answer}{{% else %}}")
    tokenizer = tokenizers("llama3")
    put(home, "talk", [as_row(long_talk(8))], **TALK)
    for keys in ({"mask_history": True}, {"truncation_strategy": "left"}):
        example = load(home, tokenizer, JinjaTemplate(source), "talk", cutoff_len=50, **keys).train.example(0)
        assert example.tokens[0] == tokenizer.bos_id and example.roles[0] == PREFIX


def test_thoughts_and_parts_of_a_message_are_texts_too(home, tokenizers):
    tokenizer, long = tokenizers("chatml"), "Hello you are " * 30
    thought = {"role": "assistant", "reasoning_content": long, "content": "I am Anvil."}
    parts = {"role": "user", "content": [{"type": "text", "text": long}]}
    put(home, "thought", [{"messages": [{"role": "user", "content": "What?"}, thought]}], **TALK)
    put(home, "parts", [{"messages": [parts, {"role": "assistant", "content": "I am Anvil."}]}], **TALK)
    reader = JinjaTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for name, template, found in (
        ("thought", get_template("qwen3"), r"assistant\n<think>\nHello [^<]*\n</think>\n\nI am Anvil\."),
        ("parts", reader, r"user\nHello [^<]*<\|im_end\|>\n<\|im_start\|>assistant\nI am Anvil\."),
    ):
        (text,) = decoded(load(home, tokenizer, template, name, cutoff_len=48).train.example(0), tokenizer)
        assert re.search(rf"<\|im_start\|>{found}<\|im_end\|>\n$", text), text
