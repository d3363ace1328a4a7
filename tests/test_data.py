"""From files to examples: trained tokens, cutting, report, cache, splits, streams, tokenized_path,
preview."""

import errno
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizers import make_tokenizer

import data
from data import DataOptions, TokenizedDataSaved, load_datasets
from options.atomic import locked
from options.errors import StopRun, UserError
from pipeline import encoding, store, tokenise
from pipeline.batch import ANSWER, ROLES
from pipeline.encoding import EncodeOptions
from pipeline.mixing import interleave
from pipeline.preview import token_table
from pipeline.report import describe_example
from pipeline.store import ExampleStore, StoreWriter, TokenArrays
from pipeline.tokenise import code_version, template_key
from templates import get_template
from text.render import Message, encode_dialogue
from text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
CHATML = get_template("chatml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return Tokenizer.from_folder(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama3"))


def put(home, name, rows, **entry):
    """Write rows as a .jsonl file and enter it into dataset_info.json."""
    (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = home / "dataset_info.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: {"file_name": f"{name}.jsonl"} | entry}))


def questions(count, start=0):
    return [{"instruction": f"question {i}?", "output": f"answer {i}."} for i in range(start, start + count)]


def load(home, tokenizer, *names, stage="sft", template=CHATML, seed=1, **options):
    settings = DataOptions(dataset=names, dataset_dir=str(home), **options)
    return load_datasets(
        settings, template if stage == "sft" else None, tokenizer, stage, seed=seed, is_main=False
    )


def everything(store):
    return [
        (store.example(i).tokens.tolist(), store.example(i).trained.tolist(), store.example(i).source)
        for i in range(len(store))
    ]


# ---------------------------------------------------------------------------------------------------- trained
# tokens


def test_the_answers_and_nothing_else_are_trained(home, tokenizer):
    turns = [("human", "a?"), ("gpt", "b."), ("human", "c?"), ("gpt", "d.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    put(home, "talk", [row], formatting="sharegpt")
    example = load(home, tokenizer, "talk").train.example(0)
    whole = tokenizer.decode(example.tokens.tolist(), skip_special=False)
    assert whole == (
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb.<|im_end|>\n"
        "<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\nd.<|im_end|>\n"
    )
    trained = tokenizer.decode(example.tokens[example.trained].tolist(), skip_special=False)
    assert trained == "b.<|im_end|>d.<|im_end|>"
    assert describe_example(example, tokenizer).count("<|im_end|>+}") == 2
    assert "assistant\n{+b.<|im_end|>+}\n<|im_start|>user" in describe_example(example, tokenizer)
    roles = [ROLES[role % ANSWER] for role in example.roles]
    assert set(zip(roles, example.turns.tolist())) == {
        ("user", 0),
        ("assistant", 1),
        ("user", 2),
        ("assistant", 3),
    }


def test_mask_history_and_train_on_prompt(home, tokenizer):
    row = {"instruction": "c?", "output": "d.", "history": [["a?", "b."]]}
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    put(home, "talk", [row], columns=columns)
    last = load(home, tokenizer, "talk", mask_history=True).first_example()
    assert tokenizer.decode(last.tokens[last.trained].tolist(), skip_special=False) == "d.<|im_end|>"
    whole = load(home, tokenizer, "talk", train_on_prompt=True).train.example(0)
    assert whole.trained.tolist() == [False] + [True] * (len(whole) - 1)  # nothing predicts the first token


def test_tools_reach_the_prompt(home, tokenizer):
    turns = [
        ("human", "w?"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "7"),
        ("gpt", "7."),
    ]
    row = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "tools": '[{"name": "f"}]',
    }
    columns = {"messages": "conversations", "tools": "tools"}
    put(home, "talk", [row], formatting="sharegpt", columns=columns)
    example = load(home, tokenizer, "talk", template=get_template("qwen")).train.example(0)
    text = tokenizer.decode(example.tokens.tolist(), skip_special=False)
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in text
    trained = tokenizer.decode(example.tokens[example.trained].tolist(), skip_special=False)
    assert trained == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>7.<|im_end|>'


def test_every_segment_of_a_packed_batch_leads_back_to_its_row(home, tokenizer):
    rows = questions(40)
    put(home, "one", rows[:25])
    put(home, "two", rows[25:])
    prepared = load(home, tokenizer, "one", "two", packing=True, cutoff_len=120)
    options = DataOptions(packing=True, cutoff_len=120)
    loader = prepared.train_loader(options, rows_per_batch=2, seed=0)
    seen = set()
    for batch in itertools.islice(loader.batches(), loader.batches_per_epoch):
        for (k, row), start, end in zip(batch.sources, batch.borders, batch.borders[1:]):
            source = rows[row + 25 * k]
            messages = [Message("user", source["instruction"]), Message("assistant", source["output"])]
            ids = encode_dialogue(
                tokenizer, CHATML.render(messages, tokenizer.bos_token, tokenizer.eos_token)
            ).ids
            assert batch.tokens[start:end].tolist() == ids
            seen.add((k, row))
    assert seen == {(0, i) for i in range(25)} | {(1, i) for i in range(15)}


# ------------------------------------------------------------------------------------------------------
# pretraining


def test_documents_end_with_eos_and_are_cut_without_loss(home, llama3):
    texts = ["Hello, who are you? " * 9, "x", "two\nlines"]
    put(home, "docs", [{"text": text} for text in texts], columns={"prompt": "text"})
    prepared = load(home, llama3, "docs", stage="pt", cutoff_len=16)
    assert prepared.packing
    for row, text in enumerate(texts):
        parts = [
            e for e in (prepared.train.example(i) for i in range(len(prepared.train))) if e.source[1] == row
        ]
        ids = [int(token) for part in parts for token in part.tokens]
        assert ids == [llama3.bos_id, *llama3.encode(text), llama3.eos_id]  # bos: this tokenizer adds it
        assert all(2 <= len(part) <= 16 for part in parts)
        assert all(part.trained.tolist() == [False] + [True] * (len(part) - 1) for part in parts)


def test_no_bos_where_the_tokenizer_adds_none(home, tokenizer):
    put(home, "docs", [{"text": "Hello"}], columns={"prompt": "text"})
    store = load(home, tokenizer, "docs", stage="pt").train
    assert store.example(0).tokens.tolist() == [*tokenizer.encode("Hello"), tokenizer.eos_id]


@pytest.mark.parametrize("strategy", ["ratio", "drop", "left", "right"])
def test_the_report_adds_up_for_every_strategy(home, tokenizer, strategy):
    long = {"instruction": "Hello, who are you? " * 20, "output": "I am Anvil. " * 20}
    rows = [
        *questions(7),
        long,
        {"instruction": "", "input": "", "output": "x"},
        {"instruction": "a", "output": None},
    ]
    put(home, "mixed", rows)
    prepared = load(home, tokenizer, "mixed", truncation_strategy=strategy, cutoff_len=64)
    tally, store = prepared.report.datasets[0].tally, prepared.train
    assert tally.read == len(rows) == tally.used + sum(tally.dropped.values())
    assert tally.dropped["empty prompt"] == tally.dropped["no answer"] == 1
    assert tally.examples == len(store) and tally.tokens == store.lengths.sum()
    assert tally.tokens_trained == sum(int(store.example(i).trained.sum()) for i in range(len(store)))
    assert tally.longest == store.lengths.max() <= 64
    alone = (
        load(home, tokenizer, "mixed", truncation_strategy=strategy, cutoff_len=4096).report.datasets[0].tally
    )
    if strategy == "drop":
        assert tally.dropped["longer than cutoff_len"] == 1 and tally.cut == 0
    elif strategy == "right":
        assert tally.dropped["no trained token"] == 1  # its prompt alone is longer than 64
    else:
        assert tally.cut == 1 and tally.tokens + tally.tokens_cut == alone.tokens
    text = str(prepared.report)
    assert "no answer (first: " in text and "mixed.jsonl:10" in text
    header, numbers = text.splitlines()[:2]
    assert len(header) == len(numbers) and numbers.split()[1] == "10"


def test_a_set_without_any_trained_token_is_refused_with_the_report(home, tokenizer):
    put(home, "none", [{"instruction": "a", "output": None}] * 3)
    for keys in ({}, {"val_size": 0.05}):
        with pytest.raises(
            ValueError, match=r"^dataset: no row can be trained on(.|\n)*dropped 3: no answer"
        ):
            load(home, tokenizer, "none", **keys)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_bad_row_names_data_set_file_line_row_and_column(home, tokenizer, workers, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 2)
    monkeypatch.setattr(encoding, "PARALLEL_CHUNKS", 2)
    put(home, "bad", [*questions(8), {"instruction": "a", "output": 5}])
    with pytest.raises(
        ValueError,
        match=r"dataset 'bad': .*bad\.jsonl:9 \(row 8\): column 'output': expected text, found int 5",
    ):
        load(home, tokenizer, "bad", preprocessing_num_workers=workers)
    assert not list((home / "cache").rglob("*.partial"))


# ------------------------------------------------------------------------------------------------------------
# cache


def count_encoding(monkeypatch):
    """How many rows are tokenised from here on."""
    seen = []
    original = encoding.ChunkEncoder.encode
    monkeypatch.setattr(
        encoding.ChunkEncoder,
        "encode",
        lambda self, row, tally: seen.append(row[0]) or original(self, row, tally),
    )
    return seen


def test_the_cache_is_used_until_something_that_counts_changes(home, tokenizer, llama3, monkeypatch):
    put(home, "a", questions(5))
    seen = count_encoding(monkeypatch)

    def tokenised(**options):
        seen.clear()
        load(home, options.pop("tokenizer", tokenizer), "a", **options)
        return len(seen)

    assert tokenised() == 5
    assert tokenised() == 0
    assert tokenised(seed=7, packing=True, val_size=1) == 0  # order is not part of the tokens
    assert tokenised(overwrite_cache=True) == 0  # not the main process: that one overwrites
    assert tokenised(cutoff_len=100) == 5
    assert tokenised(mask_history=True) == 5
    assert tokenised(template=get_template("alpaca")) == 5
    assert tokenised(template=get_template("chatml", default_system="Be kind.")) == 5
    assert tokenised(tokenizer=llama3) == 5
    assert tokenised(max_samples=3) == 3
    put(home, "a", questions(5), columns={"prompt": "instruction", "response": "output"})
    assert tokenised() == 5
    put(home, "a", questions(4), columns={"prompt": "instruction", "response": "output"})
    assert tokenised() == 4
    assert tokenised() == 0
    options = DataOptions(dataset=("a",), dataset_dir=str(home), overwrite_cache=True)
    load_datasets(options, CHATML, tokenizer, "sft", seed=1)
    assert len(seen) == 4


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no meta", "bad meta", "other version"])
def test_a_damaged_cache_is_found_and_made_again(home, tokenizer, monkeypatch, damage, capsys):
    put(home, "a", questions(5))
    before = everything(load(home, tokenizer, "a").train)
    path = next((home / "cache").rglob("tokens.i32"))
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-4])
    elif damage == "flip":
        path.write_bytes(content[:8] + b"\x01" + content[9:])
    elif damage == "remove":
        path.unlink()
    elif damage == "no meta":
        (path.parent / "meta.json").unlink()
    elif damage == "other version":
        meta = json.loads((path.parent / "meta.json").read_text())
        del meta["sizes"]["asked"]
        (path.parent / "meta.json").write_text(json.dumps(meta))
    else:
        (path.parent / "meta.json").write_text("{")
    seen = count_encoding(monkeypatch)
    assert everything(load(home, tokenizer, "a").train) == before
    assert len(seen) == 5 and "tokenising again" in capsys.readouterr().out


def test_a_killed_tokenisation_goes_on_where_it_stopped(home, tokenizer, monkeypatch):
    put(home, "a", questions(20))
    whole = everything(load(home, tokenizer, "a", max_samples=20).train)
    for folder in (home / "cache").rglob("tokens.i32"):
        folder.unlink()
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 3)
    original, calls = StoreWriter.append, []

    def stop(self, chunk):
        if len(calls) == 4:
            self.files["tokens"].write(b"half a chunk")  # what a kill in the middle of a write leaves
            self.files["tokens"].flush()
            raise KeyboardInterrupt
        calls.append(chunk)
        original(self, chunk)

    monkeypatch.setattr(StoreWriter, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        load(home, tokenizer, "a")
    monkeypatch.setattr(StoreWriter, "append", original)
    seen = count_encoding(monkeypatch)
    prepared = load(home, tokenizer, "a")
    assert everything(prepared.train) == whole
    assert seen == list(range(12, 20))
    assert prepared.report.datasets[0].tally.read == 20


def test_a_partial_folder_that_does_not_fit_together_is_begun_again(home, tokenizer):
    put(home, "a", questions(6))
    before = everything(load(home, tokenizer, "a").train)
    done = next((home / "cache").rglob("meta.json")).parent
    os.rename(done, done.with_name(done.name + ".partial"))
    partial = done.with_name(done.name + ".partial")
    os.rename(partial / "meta.json", partial / "progress.json")
    (partial / "rows.i64").write_bytes(b"")
    assert everything(load(home, tokenizer, "a").train) == before


def test_who_wants_what_another_process_tokenises_waits_for_it(home, tokenizer):
    put(home, "a", questions(5))
    load(home, tokenizer, "a")
    lock = next((home / "cache").rglob("*.lock"))
    with ThreadPoolExecutor(1) as pool, locked(lock.with_suffix("")):
        waiting = pool.submit(load, home, tokenizer, "a")
        time.sleep(0.3)
        assert not waiting.done()
    # leaving the block lets go of the lock first, then waits for the thread
    assert len(waiting.result(timeout=30).train) == 5


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_any_number_of_workers_gives_the_same_ids(home, tokenizer, monkeypatch, method):
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 10)
    monkeypatch.setattr(encoding, "PARALLEL_CHUNKS", 2)
    monkeypatch.setattr(encoding, "_context", lambda: multiprocessing.get_context(method))
    put(home, "a", [*questions(55), {"instruction": "a", "output": None}, *questions(30, 60)])
    one = load(home, tokenizer, "a", cutoff_len=60)
    for path in (home / "cache").rglob("meta.json"):
        path.unlink()
    two = load(home, tokenizer, "a", cutoff_len=60, preprocessing_num_workers=2)
    assert everything(one.train) == everything(two.train)
    assert str(one.report) == str(two.report)


def test_a_process_with_threads_is_not_forked():
    assert encoding._context().get_start_method() in ("fork", "spawn")
    import threading

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert encoding._context().get_start_method() == "spawn"
    finally:
        stop.set()
        thread.join()


def test_encoders_can_be_sent_to_workers(tokenizer):
    jinja = get_template(None, "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    for template in (CHATML, jinja):
        encoder = encoding.ChunkEncoder(None, 0, template, tokenizer, EncodeOptions("sft", 10))
        assert pickle.loads(pickle.dumps(encoder)).options == encoder.options


def test_a_script_without_guard_is_told_so(tmp_path, folder):
    rows = "\n".join(json.dumps(row) for row in questions(600))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "script.py").write_text(
        f"import sys, threading; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import data, templates\nfrom pipeline import encoding\nfrom text import tokenizer\n"
        "encoding.PARALLEL_CHUNKS = 1\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"  # so that it spawns
        f"options = data.DataOptions(dataset=({str(tmp_path / 'a.jsonl')!r},), preprocessing_num_workers=2)\n"
        f"tok = tokenizer.Tokenizer.from_folder({str(folder)!r})\n"
        "template = templates.get_template('chatml')\n"
        f"data.load_datasets(options, template, tok, 'sft', seed=1, cache_dir={str(tmp_path)!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode != 0
    assert "put the code of your script under `if __name__ == '__main__':`" in result.stderr


def test_the_cache_is_keyed_by_the_text_of_the_template(home, tokenizer):
    """Not by what it makes of some dialogue: trim changes only rows with spaces, tools those with tools."""
    keys = [template_key(get_template(name)) for name in ("chatml", "qwen", "llama3", "alpaca")]
    assert len(set(keys)) == 4
    chatml = get_template("chatml")
    assert template_key(chatml) == keys[0]
    assert template_key(replace(chatml, tools="qwen")) != keys[0] != template_key(replace(chatml, trim=True))
    plain = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant{% endif %}"
    put(home, "spaces", [{"instruction": "  Keep my spaces  ", "output": "  yes  "}])
    kept, trimmed = (
        load(home, tokenizer, "spaces", template=get_template(None, source)).train.example(0).tokens.tolist()
        for source in (plain, plain.replace("m.content", "(m.content | trim)"))
    )
    assert tokenizer.decode(kept) == "user  Keep my spaces  assistant  yes  "
    assert tokenizer.decode(trimmed) == "userKeep my spacesassistantyes"


def test_a_date_of_the_cache_is_told_on_another_day(home, tokenizer, monkeypatch):
    put(home, "a", questions(3))
    source = "{{ strftime_now('%d %b %Y') }}" + CHATML.to_jinja()
    prepared = load(home, tokenizer, "a", template=get_template(None, source))
    assert "writes a date" not in str(prepared.report)
    (meta,) = (home / "cache").rglob("meta.json")
    os.utime(meta, (0, 86_400 * 365.5))
    again = load(home, tokenizer, "a", template=get_template(None, source))
    assert "the template writes a date, here 1971-01-01; overwrite_cache=true" in str(again.report)
    assert again.train.digest() == prepared.train.digest()  # a run of yesterday goes on
    plain = load(home, tokenizer, "a", template=get_template(None, CHATML.to_jinja()))
    assert "writes a date" not in str(plain.report)


def test_the_cache_is_keyed_by_the_programs(home, tokenizer, monkeypatch):
    put(home, "a", questions(3))
    load(home, tokenizer, "a")
    seen = count_encoding(monkeypatch)
    load(home, tokenizer, "a")
    assert not seen
    monkeypatch.setattr(tokenise, "code_version", lambda: "another")
    load(home, tokenizer, "a")
    assert seen


def test_the_version_of_the_code_is_that_of_the_files_that_make_tokens(tmp_path, monkeypatch):
    rooms = {name: shutil.copytree(REPOSITORY / name, tmp_path / name) for name in ("pipeline", "text")}
    monkeypatch.setattr(tokenise, "__file__", str(rooms["pipeline"] / "tokenise.py"))
    monkeypatch.setattr(tokenise.render, "__file__", str(rooms["text"] / "render.py"))
    found = [code_version.__wrapped__()]
    for path in (rooms["pipeline"] / "formats.py", rooms["text"] / "tools.py"):
        path.write_text(path.read_text() + "\n# changed\n")
        found.append(code_version.__wrapped__())
    assert len(set(found)) == 3


# --------------------------------------------------------------------------------------- several data sets,
# splits


def sources(store):
    return [tuple(int(n) for n in pair) for pair in store.sources]


def test_several_data_sets_follow_each_other_or_take_turns(home, tokenizer):
    put(home, "a", questions(2))
    put(home, "b", questions(3, 10))
    assert sources(load(home, tokenizer, "a", "b").train) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    under = load(home, tokenizer, "a", "b", mix_strategy="interleave_under").train
    assert sources(under) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    over = load(home, tokenizer, "a", "b", mix_strategy="interleave_over").train
    assert sources(over) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 2)]
    drawn = load(home, tokenizer, "a", "b", mix_strategy="interleave_over", interleave_probs=(0.1, 0.9)).train
    assert {(0, 1), (1, 2)} <= set(sources(drawn))
    assert over.datasets == ["a", "b"]


def test_max_samples_and_num_samples(home, tokenizer):
    put(home, "a", questions(10))
    prepared = load(home, tokenizer, "a", max_samples=4)
    assert sources(prepared.train) == [(0, i) for i in range(4)]
    put(home, "a", questions(10), num_samples=3)
    prepared = load(home, tokenizer, "a")
    entry = prepared.report.datasets[0]
    assert len(set(sources(prepared.train))) == len(prepared.train) == 3
    assert (entry.rows, entry.tally.read, entry.left_out, entry.repeated) == (10, 3, 7, 0)
    put(home, "a", questions(10), num_samples=25)
    prepared = load(home, tokenizer, "a")
    entry = prepared.report.datasets[0]
    assert len(prepared.train) == 25 and len(set(sources(prepared.train))) == 10
    assert (entry.rows, entry.left_out, entry.repeated) == (10, 0, 15)
    for i in range(25):
        example = prepared.train.example(i)
        assert f"question {example.source[1]}?" in tokenizer.decode(example.tokens.tolist())


def test_validation_rows_are_not_trained(home, tokenizer):
    put(home, "a", questions(20), num_samples=50)
    put(home, "b", questions(20))
    for size, count in ((0.25, 10), (3, 3)):
        prepared = load(home, tokenizer, "a", "b", val_size=size)
        train, validation = prepared.train, prepared.eval["validation"]
        assert len(validation) == len(set(sources(validation))) == count  # a repeated row is evaluated once
        assert not set(sources(train)) & set(sources(validation))
        assert len(set(sources(train))) == 40 - count
    again = load(home, tokenizer, "a", "b", val_size=3).eval["validation"]
    assert sources(again) == sources(validation)
    assert sources(load(home, tokenizer, "a", "b", val_size=3, seed=2).eval["validation"]) != sources(
        validation
    )
    assert sources(
        load(home, tokenizer, "a", "b", val_size=3, data_seed=1, seed=9).eval["validation"]
    ) == sources(validation)


def test_each_evaluation_set_stands_alone(home, tokenizer):
    for name in ("a", "b", "c"):
        put(home, name, questions(4))
    prepared = load(home, tokenizer, "a", eval_dataset=("b", "c"), packing=True, cutoff_len=100)
    assert list(prepared.eval) == ["b", "c"]
    loaders = prepared.eval_loaders(DataOptions(cutoff_len=100), rows_per_batch=2)
    for loader in loaders.values():
        seen = [s for b in itertools.islice(loader.batches(), loader.batches_per_epoch) for s in b.sources]
        assert sorted(seen) == [(0, i) for i in range(4)]
    only = load_datasets(
        DataOptions(eval_dataset=("b",), dataset_dir=str(home)),
        CHATML,
        tokenizer,
        "sft",
        seed=1,
        is_main=False,
    )
    assert only.train is None and "b (eval)" in str(only.report)
    with pytest.raises(ValueError, match="no training set"):
        only.train_loader(DataOptions(), rows_per_batch=1, seed=1)


def test_warnings_of_a_data_set_are_in_the_report(home, tokenizer):
    put(home, "a", questions(2), file_sha1="0" * 40)
    assert "file_sha1 says 000" in str(load(home, tokenizer, "a").report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff_len": 0}, "cutoff_len is 0, expected at least 1"),
        ({"cutoff_len": 1}, "cutoff_len is 1; one token trains nothing"),
        (
            {"cutoff_len": 4, "reserved_label_len": 4},
            "reserved_label_len is 4, expected less than cutoff_len",
        ),
        ({"val_size": -0.1}, "val_size is -0.1"),
        ({"val_size": 1.5}, "val_size is 1.5, expected a share below 1 or a whole number"),
        ({"max_samples": 0}, "max_samples is 0"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers is 0"),
        ({"interleave_probs": (1.0,)}, "interleave_probs needs mix_strategy"),
        ({"interleave_probs": (1.0,), "mix_strategy": "interleave_over"}, "1 numbers for 2 data sets"),
        ({"interleave_probs": (0.4, 0.4), "mix_strategy": "interleave_over"}, "above 0 that sum to 1"),
        ({"interleave_probs": (0.0, 1.0), "mix_strategy": "interleave_over"}, "above 0 that sum to 1"),
        ({"streaming": True, "tokenized_path": "x"}, "tokenized_path cannot be combined with streaming"),
        ({"mask_history": True, "train_on_prompt": True}, "mask_history"),
        ({"packing": True, "group_by_length": True}, "group_by_length"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(dataset=("a", "b"), **options)


def test_loading_refuses_what_cannot_work(home, tokenizer):
    put(home, "a", questions(2))
    with pytest.raises(ValueError, match="dataset: none is named"):
        load(home, tokenizer)
    with pytest.raises(ValueError, match=r"val_size: 2 of the rows that are used \(2\) leaves none"):
        load(home, tokenizer, "a", val_size=2)
    with pytest.raises(ValueError, match="group_by_length: stage pt packs rows"):
        load(home, tokenizer, "a", stage="pt", group_by_length=True)
    with pytest.raises(ValueError, match="max_samples: it is for data sets that are read whole"):
        load(home, tokenizer, "a", streaming=True, max_samples=2)
    with pytest.raises(ValueError, match="val_size: a share of a stream is unknown; give a number of rows"):
        load(home, tokenizer, "a", streaming=True, val_size=0.5)
    put(home, "none", [{"instruction": "a", "output": None}])
    with pytest.raises(ValueError, match="dataset 'none' gives no example"):
        load(home, tokenizer, "a", "none", mix_strategy="interleave_over")
    with pytest.raises(ValueError, match="no row of 'none' can be evaluated on"):
        load(home, tokenizer, "a", eval_dataset=("none",))
    (home / "file").write_text("")
    options = DataOptions(dataset=("a",), dataset_dir=str(home))
    with pytest.raises(ValueError, match="cache_dir: .* cannot be made"):
        load_datasets(options, CHATML, tokenizer, "sft", seed=1, cache_dir=home / "file")


# --------------------------------------------------------------------------------------------------------
# streaming


def streamed(home, tokenizer, *names, count=20, start=0, **options):
    options = {"streaming": True, "buffer_size": 4} | options
    prepared = load(home, tokenizer, *names, **options)
    loader = prepared.train_loader(DataOptions(dataset=names, **options), rows_per_batch=2, seed=1)
    return prepared, [batch.sources for batch in itertools.islice(loader.batches(start), count)]


def test_streaming_stores_nothing_and_resumes(home, tokenizer):
    put(home, "a", [*questions(7), {"instruction": "a", "output": None}])
    prepared, batches = streamed(home, tokenizer, "a", count=20)
    assert not (home / "cache").exists()
    tally = prepared.report.datasets[0].tally  # grows while rows are read
    assert tally.read == tally.used + tally.dropped["no answer"] and tally.dropped["no answer"] >= 5
    assert "a (streamed so far)" in str(prepared.report)
    assert sorted(row for batch in batches[:7] for _, row in batch) == sorted([*range(7)] * 2)
    for start in (3, 11):
        assert streamed(home, tokenizer, "a", start=start, count=20 - start)[1] == batches[start:]


STREAMED = {"streaming": True, "buffer_size": 4, "mix_strategy": "interleave_over"}
STREAMED |= {"interleave_probs": (0.7, 0.3)}


def share(home, tokenizer, ranks, states=(), workers=1, **options):
    """One loader for each rank over the sets a and b, six rows an update, going on from these states."""
    options = {"dataset": ("a", "b"), "dataset_dir": str(home)} | STREAMED | options
    options = DataOptions(**options, preprocessing_num_workers=workers)
    for rank in range(ranks):
        prepared = load_datasets(options, CHATML, tokenizer, "sft", seed=1, cache_dir=home / "cache")
        place = {"rows_per_batch": 6 // ranks, "rows_per_update": 6, "rank": rank, "world": ranks}
        loader = prepared.train_loader(options, seed=1, **place)
        loader.restore(*states)
        yield loader


def updates(loaders, start, count):
    """Sources and ids of the segments of some updates over all ranks."""
    drawn = [[] for _ in range(count)]
    for loader in loaders:
        for number, batch in enumerate(itertools.islice(loader.batches(start), count)):
            spans = zip(batch.sources, batch.borders, batch.borders[1:])
            drawn[number] += [(source, tuple(batch.tokens[a:b].tolist())) for source, a, b in spans]
    return list(map(sorted, drawn))


@pytest.mark.parametrize("way", [{}, {"packing": True, "cutoff_len": 100}])
def test_ranks_and_workers_share_a_stream_and_go_on_in_mid_file(home, tokenizer, monkeypatch, way):
    """Without overlap or loss, on the same and on other numbers of ranks and workers, as if never stopped."""
    for name in ("FEWEST_ROWS", "MOST_ROWS"):
        monkeypatch.setattr(f"pipeline.streaming.{name}", 2)
    monkeypatch.setattr(encoding, "_context", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(encoding, "STREAM_ROWS", 3)
    put(home, "a", [*questions(40), {"instruction": "a", "output": None}, *questions(11)])
    put(home, "b", questions(31))
    stop = 7
    whole = updates(share(home, tokenizer, 1, **way), 0, stop + 9)
    if not way:
        once = list(share(home, tokenizer, 2, mix_strategy="concat", interleave_probs=()))
        found = [source for update in updates(once, 0, 13) for source, _ in update]
        assert len(set(found)) == len(found) == 78  # of 82
    for ranks, workers in ((1, 2), (2, 1), (3, 2)):
        loaders = list(share(home, tokenizer, ranks, workers=workers, **way))
        assert updates(loaders, 0, stop + 2) == whole[: stop + 2]
        states = [loader.state(stop) for loader in loaders]
        assert min(mark[1] for state in states for mark in state["marks"].values()) > 18  # positions
        for again, others in ((1, 1), (2, 2), (3, 1)):
            later = share(home, tokenizer, again, states, others, **way)
            assert updates(later, stop, 9) == whole[stop:]


def test_a_stream_whose_files_have_changed_where_they_were_read_is_refused(home, tokenizer):
    put(home, "a", questions(60))
    put(home, "b", questions(60))
    loaders = list(share(home, tokenizer, 2))
    whole = updates(loaders, 0, 8)
    states = [loader.state(6) for loader in loaders]
    for name in ("a", "b"):
        path = home / f"{name}.jsonl"
        text = path.read_text()
        path.write_text(text.replace("question", "Question", 1))
        with pytest.raises(UserError, match=f"dataset: {home}/.*jsonl:[0-9]+, or a row before it, is not"):
            updates(share(home, tokenizer, 1, states), 6, 1)
        path.write_text(text[:-20].replace("question 55", "Question 55"))  # what is to come
        assert path.read_text() != text
        assert updates(share(home, tokenizer, 1, states), 6, 2) == whole[6:]
        path.write_text(text)
    with pytest.raises(UserError, match="stream is of an older version"):
        list(share(home, tokenizer, 1, [{"batches": 3, "digest": 1}]))


def test_a_row_of_a_stream_that_a_worker_cannot_read_is_named_when_it_comes(home, tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_context", lambda: multiprocessing.get_context("fork"))
    put(home, "a", [*questions(9), {"instruction": 7, "output": "b"}])
    put(home, "b", questions(1))
    for workers in (1, 2):
        how = {"mix_strategy": "concat", "interleave_probs": (), "buffer_size": 1}
        (loader,) = share(home, tokenizer, 1, workers=workers, **how)
        batches = loader.batches()
        next(batches)
        with pytest.raises(UserError, match=r"dataset 'a': .*a.jsonl:10 \(row 9\)"):
            next(batches)


def test_streamed_tokens_are_those_of_the_stored_set(home, tokenizer):
    put(home, "a", questions(6))
    stored = {source: ids for ids, _, source in everything(load(home, tokenizer, "a").train)}
    prepared = load(home, tokenizer, "a", streaming=True)
    batch = next(prepared.train_loader(DataOptions(streaming=True), rows_per_batch=6, seed=1).batches())
    assert prepared.first_example().tokens.tolist() == stored[(0, 0)]
    for source, start, end in zip(batch.sources, batch.borders, batch.borders[1:]):
        assert batch.tokens[start:end].tolist() == stored[source]


@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize("probabilities", [(), (0.7, 0.3)])
def test_a_stream_interleaves_as_stored_data_does(home, tokenizer, strategy, probabilities):
    put(home, "a", questions(3))
    put(home, "b", questions(5))
    how = {"mix_strategy": strategy, "interleave_probs": probabilities}
    stream = load(home, tokenizer, "a", "b", streaming=True, **how).train
    stored = interleave([3, 5], probabilities, strategy == "interleave_under", [1, 0])
    assert [(k, row[0]) for k, row in stream.rows(0)] == [tuple(pair) for pair in stored.tolist()]


def test_validation_rows_of_a_stream_are_never_trained(home, tokenizer):
    put(home, "a", questions(6))
    put(home, "b", questions(6))
    prepared, batches = streamed(
        home, tokenizer, "a", "b", val_size=4, mix_strategy="interleave_over", count=40
    )
    held = set(sources(prepared.eval["validation"]))
    assert len(held) == 4 and {k for k, _ in held} == {0, 1}
    trained = {source for batch in batches for source in batch}
    assert not trained & held and len(trained) == 8
    _, packed = streamed(home, tokenizer, "a", packing=True, cutoff_len=100, count=10)
    assert max(len(batch) for batch in packed) > 2


def test_an_empty_set_cannot_be_interleaved_in_a_stream(home, tokenizer):
    put(home, "a", questions(2))
    put(home, "b", [])
    with pytest.raises(ValueError, match="dataset 'b' holds no rows"):
        streamed(home, tokenizer, "b", "a", mix_strategy="interleave_over")


# ---------------------------------------------------------------------------------------------------
# tokenized_path


def test_tokenized_path_saves_stops_and_is_loaded(home, tokenizer, monkeypatch):
    put(home, "a", questions(9))
    put(home, "b", questions(4))
    path = home / "ready"
    options = DataOptions(dataset=("a", "b"), dataset_dir=str(home), tokenized_path=str(path), val_size=3)
    with pytest.raises(TokenizedDataSaved, match="run the same command again to train on it"):
        load_datasets(options, CHATML, tokenizer, "sft", seed=1)
    direct = load(home, tokenizer, "a", "b", val_size=3)
    seen = count_encoding(monkeypatch)
    for name in ("a", "b"):
        (home / f"{name}.jsonl").unlink()  # not needed any more
    loaded = load_datasets(options, CHATML, tokenizer, "sft", seed=1)
    assert not seen and everything(loaded.train) == everything(direct.train)
    assert everything(loaded.eval["validation"]) == everything(direct.eval["validation"])
    note = f"note: tokenized_path: {path} exists, so these are not used: dataset, dataset_dir, val_size"
    assert str(loaded.report) == f"{direct.report}\n{note}" and loaded.train.datasets == ["a", "b"]
    monkeypatch.setattr(tokenise, "code_version", lambda: "another")
    assert "was made by another version of this project" in str(
        load_datasets(options, CHATML, tokenizer, "sft", seed=1).report
    )


def test_a_damaged_tokenized_path_is_named(home, tokenizer):
    put(home, "a", questions(3))
    saved = home / "saved"
    options = DataOptions(dataset=("a",), dataset_dir=str(home), tokenized_path=str(saved))
    with pytest.raises(TokenizedDataSaved):
        load_datasets(options, CHATML, tokenizer, "sft", seed=1)
    (saved / "index-0.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="index-0.npy: missing or damaged"):
        load(home, tokenizer, "a", tokenized_path=str(saved))


def test_tokenized_path_of_other_making_is_refused(home, tokenizer, llama3):
    put(home, "a", questions(9))
    path = home / "ready"

    def run(tokenizer=tokenizer, template=CHATML, **options):
        options = DataOptions(dataset=("a",), dataset_dir=str(home), tokenized_path=str(path), **options)
        return load_datasets(options, template, tokenizer, "sft", seed=1)

    path.mkdir()
    with pytest.raises(ValueError, match="holds no tokenised data"):
        run()
    path.rmdir()
    with pytest.raises(TokenizedDataSaved):
        run()
    with pytest.raises(ValueError, match="made with another template"):
        run(template=get_template("alpaca"))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        run(tokenizer=llama3)
    with pytest.raises(ValueError, match="made with another options"):
        run(cutoff_len=77)
    tokens = next(path.rglob("tokens.i32"))
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens\.i32: \d+ bytes, expected"):
        run()


# ------------------------------------------------------------------------------------------------------------
# store


def test_an_empty_store_can_be_written_and_read(tmp_path):
    writer = StoreWriter(tmp_path / "s")
    writer.append(store.TokenArrays.join([], store.Tally(read=3, dropped={"no answer": 3})))
    writer.finish()
    files = TokenArrays.open(tmp_path / "s")
    assert len(files) == 0 and files.tally.dropped == {"no answer": 3}
    assert len(ExampleStore([files], ["a"])) == 0


def test_a_writer_removes_what_a_killed_one_left_half_written(tmp_path):
    partial = tmp_path / "s.partial"
    partial.mkdir()
    (partial / ".tmp-7-progress.json").write_text('{"si')
    writer = StoreWriter(tmp_path / "s")
    writer.append(store.TokenArrays.join([], store.Tally(read=1, dropped={"no answer": 1})))
    writer.finish()
    assert not list((tmp_path / "s").glob(".tmp-*")) and not partial.exists()


def test_tokenising_is_fast_enough(tokenizer, home):
    rows = [{"instruction": "Hello, who are you? " * 2, "output": "I am Anvil. " * 8}] * 600
    put(home, "a", rows)
    begin = time.perf_counter()
    load(home, tokenizer, "a")
    assert (
        len(rows) / (time.perf_counter() - begin) > 400
    )  # rows a second; about ten times that on an idle core


# ----------------------------------------------------------------------------------------------------------
# preview


def test_the_table_says_why_each_token_is_trained_or_not(home, tokenizer):
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    put(home, "talk", [{"instruction": "c?", "output": "d.", "history": [["a?", "b."]]}], columns=columns)
    prepared = load(home, tokenizer, "talk", mask_history=True)
    batch = prepared.train_loader(DataOptions(), rows_per_batch=1, seed=1).batch(0)
    lines = list(token_table(batch, tokenizer, ["talk"], {(0, 0): "file:1"}, colour=False))
    tokens = lines[3:]
    assert len(tokens) == len(batch.tokens)
    assert "data set talk, row 0 (file:1)" in lines[2] and "\033" not in "".join(lines)
    assert "first token" in tokens[0]
    assert sum(" train " in line for line in tokens) == len(batch.label_rows)
    assert any("'b'" in line and "masked by mask_history" in line for line in tokens)
    assert any("'d'" in line and "turn 3" in line and line.endswith("answer") for line in tokens)
    assert any("'a'" in line and line.endswith("prompt") for line in tokens)
    coloured = list(token_table(batch, tokenizer, ["talk"], {}, colour=True))
    assert sum("\033[32m" in line for line in coloured) == len(batch.label_rows)


def preview(home, *words):
    command = [sys.executable, str(REPOSITORY / "data.py"), "preview", *map(str, words)]
    environment = os.environ | {"XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=home, capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.fixture
def run_file(home, folder):
    put(home, "a", questions(9))
    path = home / "run.yaml"
    path.write_text(
        f"model_name_or_path: {folder}\ndataset: a\ndataset_dir: {home}\ntemplate: chatml\nstage: sft\n"
        "learning_rate: 1.0e-4\nlora_rank: 8\noutput_dir: out\nper_device_train_batch_size: 2\nbf16: true\n"
    )
    return str(path)


def test_preview_command(home, run_file):
    result = preview(home, run_file, "--index", "1", "packing=true", "cutoff_len=64")
    assert result.returncode == 0, result.stderr
    assert "batch 1 (of " in result.stdout and "a.jsonl:" in result.stdout and "\033" not in result.stdout
    assert result.stdout.count("segment ") > 2
    wrong = preview(home, run_file, "indx=1")
    assert wrong.returncode == 2 and "indx" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=b"], "'b' is not in"),
        (["index=-1"], "index is -1"),
        (["model_name_or_path=no/such"], "no folder no/such here, and it could not be fetched"),
        (["dataset="], "none is named"),
        (["template=chatlm"], "chatml"),
    ],
)
def test_preview_mistakes_are_messages(run_file, words, message, capsys):
    assert data.main(["preview", run_file, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("data.py preview: ") and error.count("\n") == 1


def test_a_bug_is_not_taken_for_the_users_mistake(run_file, monkeypatch):
    def broken(*_):
        raise ValueError("need at least one array to stack")

    monkeypatch.setattr(encoding.ChunkEncoder, "_dialogue", broken)
    with pytest.raises(ValueError, match="^need at least one array") as raised:
        data.main(["preview", run_file])
    assert not isinstance(raised.value, UserError)


def test_preview_takes_the_words_of_a_training_as_they_are(run_file, capsys):
    more = ["learning_rate=1e-4", "--bf16", "--lora_r", "4", "output_dir=x", "bits=4", "index=1"]
    for words in ([run_file], ["torchrun", "--nproc_per_node", "2", "train.py", run_file]):
        assert data.main(["preview", *words, *more]) == 0
        shown = capsys.readouterr().out
        assert "batch 1" in shown
    assert data.main(["preview", run_file, *more, "indx=1"]) == 2
    assert "indx=1 (command line): unknown key; did you mean index?" in capsys.readouterr().err


def test_preview_shows_what_training_gets(run_file, home, tokenizer, capsys):
    assert data.main(["preview", run_file, "index=2", "seed=5"]) == 0
    shown = capsys.readouterr().out
    prepared = load(home, tokenizer, "a", seed=5)
    batch = prepared.train_loader(DataOptions(), rows_per_batch=2, seed=5).batch(2)
    for _, row in batch.sources:
        assert f"data set a, row {row} ({home / 'a.jsonl'}:{row + 1})" in shown
    assert data.main(["preview", run_file, "streaming=true", "seed=5"]) == 0
    assert "batch 0:" in capsys.readouterr().out
    assert data.main([]) == 2
    with pytest.raises(SystemExit) as ended:
        data.main(["preview", "--help"])
    assert ended.value.code == 0 and "which batch" in capsys.readouterr().out


def test_a_full_cache_is_told_by_its_key_and_nothing_half_written_stays(
    home, tokenizer, tmp_path, monkeypatch
):
    def full(writer, chunk):
        (writer.partial / "tokens.i32").write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, "No space left")

    put(home, "a", questions(3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.store.StoreWriter.append", full)
    with pytest.raises(StopRun, match="cache_dir: .*No space left.*make room"):
        load(home, tokenizer, "a")
    assert not list((tmp_path / "cache").rglob("*.partial"))
