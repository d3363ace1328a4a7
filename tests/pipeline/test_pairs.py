"""Rows of preference and prompt stages -> examples: tokens against transformers and trl, cutting, what is
dropped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data import CHATML, put
from tiny_runs import assert_same_weights, tiny_runs
from tiny_tokenizers import make_tokenizer

import data
from data import DataOptions, TokenizedDataSaved, load_datasets
from pipeline.batch import ANSWER, ROLES, collate
from pipeline.report import describe_example
from templates import get_template
from tests.pipeline.test_pair_formats import CALL, RANKED, say
from text.render import Message, encode_dialogue
from text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


def load(home, tokenizer, *names, stage="dpo", template=CHATML, is_main=False, **options):
    settings = DataOptions(dataset=names, dataset_dir=str(home), **options)
    return load_datasets(settings, template, tokenizer, stage, seed=1, is_main=is_main)


# -----------------------------------------------------------------------------------------------------------
# tokens


def texts_of(example, tokenizer):
    """(text, trained text) of each segment."""
    return [
        (
            tokenizer.decode(example.tokens[span].tolist(), skip_special=False),
            tokenizer.decode(example.tokens[span][example.trained[span]].tolist(), skip_special=False),
        )
        for span in example.segments
    ]


def test_prompts_are_those_of_chat_with_the_label_behind(home, tokenizer):
    rows = [{"instruction": "2 + 2?", "output": "four"}, {"instruction": "and you?", "output": None}]
    put(home, "sums", rows)
    store = load(home, tokenizer, "sums", stage="ppo").train
    for i, row in enumerate(rows):
        example = store.example(i)
        spans = CHATML.render([Message("user", row["instruction"])], None, "</s>", generation_prompt=True)
        prompt = encode_dialogue(tokenizer, spans).ids
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert not example.trained[: len(prompt)].any() and example.trained[len(prompt) :].all()
        assert tokenizer.decode(example.tokens[len(prompt) :].tolist()) == (row["output"] or "")
    assert ROLES[store.example(0).roles[-1] - ANSWER] == "assistant"


def test_a_prompt_longer_than_cutoff_len_is_dropped_and_counted(home, tokenizer):
    put(
        home,
        "some",
        [{"instruction": "a", "output": "b " * 60}, {"instruction": "long " * 50, "output": "b"}],
    )
    prepared = load(home, tokenizer, "some", stage="grpo", cutoff_len=40)
    assert len(prepared.train) == 1
    assert "dropped 1: prompt longer than cutoff_len (first: " in str(prepared.report)
    assert "1 rows: label cut to cutoff_len tokens" in str(prepared.report)
    assert int(prepared.train.example(0).trained.sum()) == 40


def test_the_label_of_a_call_is_what_the_template_writes(home, tokenizer):
    row = {"conversations": say(("human", "q"), ("function_call", CALL)), "tools": '[{"name": "f"}]'}
    put(home, "calls", [row], formatting="sharegpt", columns={"messages": "conversations", "tools": "tools"})
    example = load(home, tokenizer, "calls", stage="ppo", template=get_template("qwen")).train.example(0)
    ((text, label),) = texts_of(example, tokenizer)
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in text
    assert label == f"<tool_call>\n{CALL}\n</tool_call>"


def test_rated_rows_have_one_segment_a_tag_and_one_trained_answer(home, tokenizer):
    turns = (("human", "a?"), ("gpt", "b."), ("human", "c?"))
    rows = [
        {"conversations": say(*turns, ("gpt", text)), "ok": ok} for text, ok in (("d.", True), ("e.", False))
    ]
    put(home, "votes", rows, formatting="sharegpt", columns={"messages": "conversations", "kto_tag": "ok"})
    store = load(home, tokenizer, "votes", stage="kto").train
    assert [store.example(i).tag for i in range(2)] == [1, 0]
    for i, answer in enumerate(("d.", "e.")):
        ((text, trained),) = texts_of(store.example(i), tokenizer)
        assert trained == f"{answer}<|im_end|>"
        assert text.endswith(f"c?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
    assert np.array_equal(store.parts[0].tags, [1, 0])


# the template, its jinja twin in tests/fixtures, and the kind of tokenizer it belongs to
ORACLES = [
    ("qwen", "qwen25", "chatml"),
    ("qwen3", "qwen3", "chatml"),
    ("llama3", "llama3", "llama3"),
    ("zephyr", "zephyr", "metaspace"),
    ("mistral", "mistral", "llama2"),
]


@pytest.mark.parametrize(("name", "jinja", "kind"), ORACLES)
@pytest.mark.parametrize("own", [True, False], ids=["built in", "jinja"])
def test_the_tokens_of_a_pair_are_those_of_trl(home, tmp_path_factory, name, jinja, kind, own):
    """Earlier thoughts, a system text, several turns; trl 1.16's data preparation with transformers'
    tokenizer."""
    transformers = pytest.importorskip("transformers")
    from trl.data_utils import apply_chat_template

    folder = make_tokenizer(tmp_path_factory.mktemp(kind), kind)
    source = (
        (Path(__file__).parents[1] / "fixtures" / "templates" / f"{jinja}.jinja").read_text().rstrip("\n")
    )
    mine, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = source
    earlier = "<think>\nhm\n</think>\n\nyes." if name == "qwen3" else "yes."
    texts = [("system", "Be brief."), ("user", "Are you?"), ("assistant", earlier), ("user", "Who, then?")]
    prompt = [{"role": role, "content": text} for role, text in texts]
    answers = {
        key: [{"role": "assistant", "content": text}]
        for key, text in (("chosen", "I am Anvil,\nan assistant."), ("rejected", "Nobody."))
    }
    put(
        home,
        "chat",
        [{"messages": prompt, **answers}],
        formatting="openai",
        columns={"messages": "messages"} | RANKED,
    )
    template = get_template(name) if own else get_template(None, source)
    example = load(home, mine, "chat", template=template).train.example(0)
    expected = apply_chat_template({"prompt": prompt, **answers}, theirs)
    whole = {key: theirs.apply_chat_template(prompt + answers[key], return_dict=False) for key in answers}
    for span, (text, trained), key in zip(example.segments, texts_of(example, mine), answers):
        assert example.tokens[span].tolist() == whole[key]
        assert text == theirs.decode(whole[key])
        assert trained.strip() == expected[key].strip()
        assert text[: text.rindex(trained)].rstrip().endswith(expected["prompt"].rstrip()[-12:])
    # and what generation is given is the prompt of both
    asked = load(home, mine, "chat", template=template, stage="grpo").train.example(0)
    ids = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    start = int(np.argmax(example.trained))
    if name != "mistral":  # its tokens of prompt and answer meet in a space
        assert asked.tokens[: len(ids)].tolist() == ids == example.tokens[:start].tolist()
    assert mine.decode(asked.tokens[asked.trained].tolist()).strip() == "I am Anvil,\nan assistant."


@pytest.mark.parametrize("thinking", [True, False])
def test_pairs_with_tools_calls_and_the_thinking_switch(home, tmp_path_factory, thinking):
    """Chosen is a call of a tool, rejected a text; the mask begins where generation would."""
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer(tmp_path_factory.mktemp("tools"), "chatml")
    source = (REPOSITORY / "tests" / "fixtures" / "templates" / "qwen3.jinja").read_text().rstrip("\n")
    mine, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    prompt = [{"role": "user", "content": "Add."}]
    answers = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": json.loads(CALL)}],
        },
        {"role": "assistant", "content": "No."},
    ]
    row = {"messages": prompt, "chosen": answers[0], "rejected": answers[1], "tools": json.dumps(tools)}
    put(
        home, "calls", [row], formatting="openai", columns={"messages": "messages", "tools": "tools"} | RANKED
    )
    options = {"chat_template": source, "tools": tools, "enable_thinking": thinking, "return_dict": False}
    asked = theirs.apply_chat_template(prompt, add_generation_prompt=True, **options)
    settings = DataOptions(dataset=("calls",), dataset_dir=str(home))
    for template in (get_template("qwen3"), get_template(None, source)):
        prepared = load_datasets(settings, template, mine, "rm", seed=1, enable_thinking=thinking)
        example = prepared.train.example(0)
        for span, answer in zip(example.segments, answers):
            ids, trained = example.tokens[span], example.trained[span]
            whole = theirs.apply_chat_template([*prompt, answer], **options)
            assert mine.decode(ids.tolist(), skip_special=False) == theirs.decode(whole)
            # without thinking the border lies between "\n\n" and "<": training keeps the token that
            # generation is given
            assert ids.tolist() == whole or not thinking
            assert ids[: int(np.argmax(trained))].tolist() == asked
            assert mine.decode(ids[trained].tolist(), skip_special=False).endswith("<|im_end|>")


# ----------------------------------------------------------------------------------------------------------
# cutting


@pytest.mark.parametrize("strategy", ["ratio", "drop", "left", "right"])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_report_adds_up_for_every_strategy(home, tokenizer, strategy, stage):
    lengths = [(3 * i + 1, i + 1, 2 * i + 1) for i in range(9)]
    rows = [{"instruction": "w " * a, "chosen": "c " * b, "rejected": "d " * c} for a, b, c in lengths]
    if stage == "kto":
        rows = [
            {"instruction": r["instruction"], "output": r["chosen"], "ok": i % 3 > 0}
            for i, r in enumerate(rows)
        ]
        put(home, "rows", rows, columns={"prompt": "instruction", "response": "output", "kto_tag": "ok"})
    else:
        put(home, "rows", rows, columns={"prompt": "instruction"} | RANKED)
    prepared = load(home, tokenizer, "rows", stage=stage, cutoff_len=33, truncation_strategy=strategy)
    store, tally = prepared.train, prepared.report.datasets[0].tally
    examples = [store.example(i) for i in range(len(store))]
    assert tally.read == 9 == tally.used + sum(tally.dropped.values())
    assert tally.examples == len(store) and tally.tokens == sum(map(len, examples))
    assert tally.tokens_trained == sum(int(example.trained.sum()) for example in examples)
    for example in examples:
        for span in example.segments:
            assert (
                span.stop - span.start <= 33 and example.trained[span].any() and not example.trained[span][0]
            )
    whole = load(home, tokenizer, "rows", stage=stage, cutoff_len=2000)
    lost = sum(len(whole.train.example(int(row))) for row in store.sources[:, 1]) - tally.tokens
    assert lost == tally.tokens_cut and (tally.cut > 0) == (strategy != "drop")
    assert ("longer than cutoff_len" in tally.dropped) == (strategy == "drop")
    assert ("pairs" if stage == "dpo" else "answers") in str(prepared.report).splitlines()[0]
    if stage == "kto":
        good = sum(example.tag for example in examples)
        assert f"rows: {good} desirable and {len(examples) - good} undesirable answers" in str(
            prepared.report
        )


def test_what_cannot_be_learned_from_is_counted(home, tokenizer):
    pairs = [("a", "a"), ("a", ""), ("b", "a"), ("long " * 30 + "x", "long " * 30 + "y"), (None, "a")]
    put(home, "pairs", [{"instruction": "q", "output": list(pair)} for pair in pairs], ranking=True)
    prepared = load(home, tokenizer, "pairs", cutoff_len=30)
    assert len(prepared.train) == 1
    for reason in (
        "identical answers (first:",
        "empty rejected answer",
        "identical answers after cutting",
        "empty chosen answer",
    ):
        assert f"dropped 1: {reason}" in str(prepared.report)
    put(
        home,
        "votes",
        [{"instruction": "q", "output": "a", "ok": True}] * 2,
        columns={"prompt": "instruction", "response": "output", "kto_tag": "ok"},
    )
    assert "all answers have the same kto_tag" in str(load(home, tokenizer, "votes", stage="kto").report)
    assert "columns.kto_tag is not used" in str(load(home, tokenizer, "votes", stage="sft").report)


def test_a_bad_row_names_file_row_and_field(home, tokenizer):
    put(
        home,
        "pairs",
        [{"instruction": "q", "output": ["a", "b"]}, {"instruction": "q", "output": "a"}],
        ranking=True,
    )
    with pytest.raises(
        ValueError, match=r"'pairs': .*pairs.jsonl:2 \(row 1\): column 'output': expected \[chosen"
    ):
        load(home, tokenizer, "pairs")


# ----------------------------------------------------------------------------------------------------------
# batches


def many_pairs(count):
    answers = [[f"c {i}", f"r {i} " * (i % 5)] for i in range(count)]
    return [{"instruction": "w " * (i % 7), "input": "q", "output": pair} for i, pair in enumerate(answers)]


def pairs_of(batch):
    """((chosen tokens, labels), (rejected ...)) of each pair of a batch."""
    cut = [slice(start, end) for start, end in zip(batch.borders, batch.borders[1:])]
    halves = [(tuple(batch.tokens[span].tolist()), tuple(batch.labels[span].tolist())) for span in cut]
    assert batch.sources[: batch.pairs] == batch.sources[batch.pairs :]
    return [
        (source, *pair) for source, *pair in zip(batch.sources, halves[: batch.pairs], halves[batch.pairs :])
    ]


WAYS = {
    "plain": {},
    "packed": {"packing": True, "cutoff_len": 40},
    "grouped": {"group_by_length": True},
    "streamed": {"streaming": True},
    "streamed, packed": {"streaming": True, "packing": True, "cutoff_len": 40},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_pairs(home, tokenizer, way):
    put(home, "pairs", many_pairs(41), ranking=True)
    options = DataOptions(dataset=("pairs",), dataset_dir=str(home), **WAYS[way])
    prepared = load_datasets(options, CHATML, tokenizer, "dpo", seed=1, is_main=False)
    loader = prepared.train_loader(options, rows_per_batch=2, seed=1)
    store = load(home, tokenizer, "pairs").train
    wanted = {pair for i in range(len(store)) for pair in pairs_of(collate([store.example(i)]))}
    found, most = [], loader.most_tokens()
    for batch in loader.batches():
        assert len(batch) == batch.pairs <= 2 * 8 and len(batch.tokens) <= most
        if "packing" in WAYS[way]:
            assert len(batch.tokens) <= 2 * 80 and len(batch) >= 2
        found += pairs_of(batch)
        if len(found) >= len(wanted):
            break
    assert set(found) <= wanted
    assert "streamed" in way or set(found) == wanted  # a batch of a stream may reach into the next pass
    assert len(wanted) == 41 - 8 - 1  # i % 5 == 0 leaves an empty answer; the 9 of them are dropped


def test_pairs_are_split_off_chosen_and_saved(home, tokenizer):
    put(home, "pairs", many_pairs(30), ranking=True, num_samples=18)
    prepared = load(home, tokenizer, "pairs", val_size=5)
    train, validation = prepared.train, prepared.eval["validation"]
    assert len(validation) == 5 and not set(map(tuple, train.sources)) & set(map(tuple, validation.sources))
    saved = str(home / "saved")
    with pytest.raises(TokenizedDataSaved):
        load(home, tokenizer, "pairs", val_size=5, tokenized_path=saved, is_main=True)
    again = load(home, tokenizer, "pairs", val_size=5, tokenized_path=saved)
    for mine, theirs in ((train, again.train), (validation, again.eval["validation"])):
        assert [mine.example(i).split for i in range(len(mine))] == [
            theirs.example(i).split for i in range(len(mine))
        ]
        assert np.array_equal(mine.sources, theirs.sources)
    with pytest.raises(
        ValueError, match="another options .{'kind': 'pair'}, now {'kind': 'prompt'}.\\. Give"
    ):
        load(home, tokenizer, "pairs", stage="ppo", val_size=5, tokenized_path=saved)


# ---------------------------------------------------------------------------------------- evaluation sets as
# prompts


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_rows_can_be_had_as_prompts(home, tokenizer, streaming):
    rows = [{"instruction": f"q{i}", "output": f"a{i}" if i % 4 else None} for i in range(20)]
    for row in (1, 2, 9):  # these are cut as dialogues, and so they are no prompts
        rows[row]["instruction"] = "long " * 70
    put(home, "rows", rows)
    put(home, "more", rows[:7])
    settings = {"dataset_dir": str(home), "streaming": streaming, "cutoff_len": 60}

    def prompts_of(**options):
        given = DataOptions(**settings, **options)
        prepared = load_datasets(given, CHATML, tokenizer, "sft", seed=1, is_main=False, prompts=True)
        asked = {}
        for name, store in prepared.prompts.items():
            examples = [store.example(i) for i in range(len(store))]
            labels = [tokenizer.decode(example.tokens[example.trained].tolist()) for example in examples]
            texts = [tokenizer.decode(example.tokens[~example.trained].tolist()) for example in examples]
            assert all(text.endswith("assistant\n") for text in texts)
            asked[name] = [(example.source[1], label) for example, label in zip(examples, labels)]
        return prepared, asked

    prepared, asked = prompts_of(dataset=("rows",), val_size=12)
    held = [row for row in prepared.eval["validation"].sources[:, 1].tolist() if row not in (1, 2, 9)]
    assert len(held) < len(prepared.eval["validation"])
    assert [row for row, _ in asked["validation"] if row in held] == held  # the same rows in the same order
    assert all(label == (rows[row]["output"] or "") for row, label in asked["validation"])
    assert "validation (prompts)" in str(prepared.report) or "rows (prompts)" in str(prepared.report)
    prepared, asked = prompts_of(dataset=("rows",), eval_dataset=("more",))
    assert asked == {
        "more": [(i, rows[i]["output"] or "") for i in (0, 3, 4, 5, 6)]
    }  # those without an answer too
    assert len(prepared.eval["more"]) == 5
    put(home, "bare", [{"instruction": "q", "output": None}])
    prepared, asked = prompts_of(eval_dataset=("bare",))
    assert (
        asked == {"bare": [(0, "")]} and not prepared.eval
    )  # nothing to compare with, but something to answer
    with pytest.raises(ValueError, match="no row of 'bare' can be evaluated on"):
        load_datasets(DataOptions(eval_dataset=("bare",), **settings), CHATML, tokenizer, "sft", seed=1)
    put(home, "long", [{"instruction": "q " * 90, "output": "a"}])
    with pytest.raises(
        ValueError, match="no row of 'long' can be evaluated on(.|\n)*prompt longer than cutoff_len"
    ):
        prompts_of(eval_dataset=("long",))


def test_saved_data_holds_its_prompts_or_says_so(home, tokenizer):
    put(home, "rows", [{"instruction": f"q{i}", "output": "a"} for i in range(9)])
    given = DataOptions(
        dataset=("rows",), dataset_dir=str(home), val_size=3, tokenized_path=str(home / "with")
    )
    without = replace(given, tokenized_path=str(home / "without"))
    for options, prompts in ((given, True), (without, False)):
        with pytest.raises(TokenizedDataSaved):
            load_datasets(options, CHATML, tokenizer, "sft", seed=1, prompts=prompts)
    prepared = load_datasets(given, CHATML, tokenizer, "sft", seed=1, prompts=True)
    assert set(prepared.eval) == set(prepared.prompts) == {"validation"}
    assert np.array_equal(prepared.prompts["validation"].sources, prepared.eval["validation"].sources)
    assert not load_datasets(given, CHATML, tokenizer, "sft", seed=1).prompts
    with pytest.raises(ValueError, match="tokenized_path: .* holds no prompts to generate from"):
        load_datasets(without, CHATML, tokenizer, "sft", seed=1, prompts=True)
    with pytest.raises(ValueError, match="template: generating from prompts needs one, also in stage pt"):
        load_datasets(given, None, tokenizer, "pt", seed=1, prompts=True)


# ----------------------------------------------------------------------------------------------- what a
# person sees


def test_the_first_example_shows_both_answers(home, tokenizer):
    put(home, "pairs", [{"instruction": "q", "output": ["c", "r"]}], ranking=True)
    prepared = load(home, tokenizer, "pairs")
    shown = describe_example(prepared.first_example(), tokenizer, prepared.kind)
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert shown.endswith(f"chosen:\n{asked}{{+c<|im_end|>+}}\n\nrejected:\n{asked}{{+r<|im_end|>+}}\n")
    prepared = load(home, tokenizer, "pairs", stage="ppo")
    shown = describe_example(prepared.first_example(), tokenizer, prepared.kind)
    assert shown.endswith(f"{asked}{{=c=}}") and "the model never reads it" in shown


@pytest.mark.parametrize(
    ("stage", "name", "shown"),
    [
        (
            "dpo",
            "tiny_dpo",
            ["(5 pairs)", "segment 0, chosen: ", "segment 5, rejected: ", "identical answers"],
        ),
        (
            "kto",
            "tiny_kto",
            [", desirable: ", ", undesirable: ", "3 desirable and 2 undesirable", "empty answer"],
        ),
        ("grpo", "additions", ["prompts", " label ", "rewards compare with it"]),
    ],
)
def test_preview_of_every_kind(home, folder, capsys, stage, name, shown):
    words = [
        f"model_name_or_path={folder}",
        f"dataset={name}",
        f"dataset_dir={REPOSITORY / 'data'}",
        f"stage={stage}",
    ]
    assert data.main(["preview", *words, "template=chatml", "cutoff_len=128"]) == 0
    text = capsys.readouterr().out
    assert [part for part in shown if part not in text] == []


def test_the_additions_are_right():
    rows = [json.loads(line) for line in (REPOSITORY / "data" / "additions.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 400
    for row in rows:
        left, right = row["prompt"].removesuffix("=").split("+")
        assert (
            10 <= int(left) <= 99 and 10 <= int(right) <= 99 and int(row["answer"]) == int(left) + int(right)
        )


# ----------------------------------------------------------------------------------------------- through
# train.py


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("runs")) as made:
        yield made


def run_on(tiny, name, dataset, **keys):
    chosen = {"stage": "dpo", "dataset": dataset, "dataset_dir": REPOSITORY / "data", "num_train_epochs": 1}
    return tiny.train(name, **chosen | keys)


@pytest.mark.parametrize(
    "keys", [{}, {"packing": True}, {"streaming": True, "max_steps": 3, "buffer_size": 4, "packing": True}]
)
def test_pairs_train_however_they_are_read(tiny, capsys, keys):
    name = "-".join(["dpo", *keys])
    assert run_on(tiny, name, "tiny_dpo", per_device_train_batch_size=2, **keys) == 0
    shown = capsys.readouterr().out
    assert (
        "the first example: " in shown and "chosen:\n<|im_start|>user" in shown and "\nrejected:\n" in shown
    )
    if "streaming" not in keys:
        assert "dropped 1: identical answers" in shown
    assert all("rewards/margins" in entry for entry in tiny.log(name) if "loss" in entry)


def test_saved_pairs_train_as_those_just_read(tiny, capsys):
    saved = tiny.folder / "saved pairs"
    assert run_on(tiny, "saved", "tiny_dpo", tokenized_path=saved) == 0  # tokenises and stops
    assert "The tokenised data is in" in capsys.readouterr().out
    assert run_on(tiny, "saved", "tiny_dpo", tokenized_path=saved) == 0
    assert run_on(tiny, "read", "tiny_dpo") == 0
    assert_same_weights(tiny.weights("saved"), tiny.weights("read"))


@pytest.mark.parametrize(
    ("dataset", "keys", "message"),
    [
        ("tiny_alpaca", {}, "it holds single answers, but stage dpo needs pairs (ranking: true)"),
        ("tiny_dpo", {"stage": "sft"}, "it holds pairs of answers, but stage sft needs single answers"),
        (
            "tiny_dpo",
            {"train_on_prompt": True},
            "this stage trains on the answers only; drop train_on_prompt",
        ),
        ("tiny_dpo", {"mask_history": True}, "drop mask_history"),
        ("tiny_dpo", {"cutoff_len": 4, "truncation_strategy": "right"}, "prompt longer than cutoff_len"),
    ],
)
def test_mistakes_are_messages(tiny, capsys, dataset, keys, message):
    assert run_on(tiny, "wrong", dataset, **keys) == 2
    assert message in "".join(capsys.readouterr())
