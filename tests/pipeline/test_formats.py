"""Reading: dataset_info.json, every file type, every row format, and an error with a place for every bad
input."""

import csv
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from options.errors import UserError
from pipeline import readers
from pipeline.formats import Dropped, check_stage, is_ranked, to_conversation, to_document, to_pair, to_rated
from pipeline.readers import read_file
from pipeline.sources import (
    OPENAI_TAGS,
    SHAREGPT_TAGS,
    DatasetInfo,
    HubAccess,
    check_sha1,
    data_key,
    find_dataset,
    list_files,
    open_hub,
    parse_entry,
    read_rows,
)
from text.render import Message

DATA = Path(__file__).resolve().parents[2] / "data"
ROWS = [{"instruction": f"q{i} \u00fc", "input": "", "output": f"a{i}\n\u4f60"} for i in range(5)]


def registry(folder, entries):
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(path):
    return [row for _, row in read_file(path)]


# ------------------------------------------------------------------------------------------------------- file
# types


def test_every_file_type_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    write(tmp_path / "a.json", json.dumps(ROWS, indent=2, ensure_ascii=False))
    write(tmp_path / "b.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    write(tmp_path / "lines.json", "\n".join(json.dumps(row) for row in ROWS))
    pyarrow.csv.write_csv(table, tmp_path / "c.csv")
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    with (
        pyarrow.OSFile(str(tmp_path / "e.arrow"), "wb") as file,
        pyarrow.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    with (
        pyarrow.OSFile(str(tmp_path / "f.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    for name in ("a.json", "b.jsonl", "lines.json", "d.parquet", "e.arrow", "f.arrow"):
        assert rows_of(tmp_path / name) == ROWS, name
    of_text = datasets.load_dataset("csv", data_files=str(tmp_path / "c.csv"), split="train").to_list()
    assert rows_of(tmp_path / "c.csv") == of_text == [row | {"input": None} for row in ROWS]


def test_arrow_file_of_the_datasets_library(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert rows_of(next((tmp_path / "saved").glob("*.arrow"))) == ROWS


def test_txt_is_one_document_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n\ntwo \u2028 still two\nthree")
    places = [(place.rsplit(":", 1)[1], row["text"]) for place, row in read_file(path)]
    assert places == [("1", "one"), ("2", ""), ("3", "two \u2028 still two"), ("4", "three")]


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    for name, text in (
        ("a.csv", "x,y\n1,2\n"),
        ("b.jsonl", '{"x": "1", "y": "2"}\n'),
        ("c.json", '[{"x": "1", "y": "2"}]'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert rows_of(tmp_path / name) == [{"x": "1", "y": "2"}]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_json_array_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "READ_CHARACTERS", block)
    rows = [{"n": 123456789, "s": 'a "quoted" ]}, \\ text'}, {}, {"l": [1, [2, {"x": None}]]}]
    path = write(tmp_path / "a.json", " \n" + json.dumps(rows, indent=1) + "\n ")
    assert rows_of(path) == rows
    assert rows_of(write(tmp_path / "b.json", "[ ]")) == []


PAIR = [{"a": "1", "b": [{"c": "x"}]}, {"a": "2\n", "b": []}]
JSON_TEXTS = {
    "an object a line": "\n".join(map(json.dumps, PAIR)),
    "blank lines": "\n\n" + "\n \r\n".join(map(json.dumps, PAIR)) + "\n",
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in PAIR),
    "objects without lines": "".join(map(json.dumps, PAIR)),
    "the first on one line": json.dumps(PAIR[0]) + "\n" + json.dumps(PAIR[1], indent=1),
    "an array": json.dumps(PAIR),
    "an array over lines": json.dumps(PAIR, indent=4),
    "a byte order mark": "\ufeff" + json.dumps(PAIR),
    "a byte order mark before lines": "\ufeff" + "\n".join(map(json.dumps, PAIR)),
    "one object over lines": json.dumps(PAIR[0], indent=2),
    "one object with one list": json.dumps({"data": PAIR}, indent=1),
    "an array of texts": json.dumps(["one", "two {"]),
}


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("case", JSON_TEXTS)
def test_json_that_datasets_reads_is_read(tmp_path, monkeypatch, case, ending):
    path = write(tmp_path / f"rows.{ending}", JSON_TEXTS[case])
    theirs = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    for block in (1 << 20, 5):
        monkeypatch.setattr(readers, "READ_CHARACTERS", block)
        assert rows_of(path) == theirs.to_list()


def test_a_broken_object_is_found_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_CHARACTERS", 64)
    path = write(tmp_path / "a.jsonl", '{"a": "1"}\n{"a": 2, b}\n' + '{"a": "3"}\n' * 10_000)
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON") as error:
        rows_of(path)
    assert len(error.value.__cause__.doc) < 300
    path = write(tmp_path / "b.jsonl", '{"a": 1,\n "b": 2\n{"a": 3}')
    with pytest.raises(UserError, match=r"b\.jsonl:1: not JSON .* of line 3, one object began here"):
        rows_of(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_json_beyond_what_python_reads_is_a_message(tmp_path, text):
    with pytest.raises(UserError, match=r"a\.jsonl:1: JSON that cannot be read"):
        rows_of(write(tmp_path / "a.jsonl", text))


def test_a_value_that_arrow_holds_and_python_does_not_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    years = pyarrow.array([0, 10**14], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"a": years}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 1: a value that cannot be read"):
        rows_of(tmp_path / "a.parquet")
    raw = pyarrow.array([b"fine", b"\xed\xa0\xbd"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"a": raw}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet row 1: a value that cannot be read"):
        rows_of(tmp_path / "b.parquet")


def test_json_place_is_the_line_where_the_row_begins(tmp_path):
    path = write(tmp_path / "a.json", '[\n  {"a": 1,\n   "b": 2},\n\n  {"a": 3}\n]')
    assert [place.rsplit(":", 1)[1] for place, _ in read_file(path)] == ["2", "5"]


def test_csv_fields_may_be_long_and_hold_line_breaks(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'q,a\n"two\nlines",{long}\n')
    assert rows_of(path) == [{"q": "two\nlines", "a": long}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: expected an object .* list"),
        ("a.json", '[{"a": 1},\n {"a": }]', r"a\.json:2: not JSON"),
        ("a.json", '[{"a": 1}\n {"a": 2}]', r"a\.json:2: expected ',' or '\]'"),
        ("a.json", '[{"a": 1},\n {"a": 2}', r"a\.json:2: .*the end of the file"),
        ("a.json", '[{"a": 1}]\n]', r"a\.json:2: expected the end of the file"),
        ("a.json", "[1]", r"a\.json:1 \(row 0\): expected an object"),
        ("a.json", '"text"', r"a\.json:1: expected '\['"),
        ("a.json", "  \n", r"a\.json: the file is empty"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv:1: two columns have the name 'a'"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv:2: 1 more fields"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: the line ends before the column 'b'"),
        ("a.parquet", "no", r"a\.parquet: not a parquet file"),
        ("a.arrow", "no such thing", r"a\.arrow: not an arrow file"),
    ],
)
def test_a_broken_file_names_file_and_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        rows_of(write(tmp_path / name, text))


def test_a_table_that_is_damaged_behind_its_first_rows_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"a": [f"{i}" * 50 for i in range(3000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000, compression="snappy")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: not a parquet file"):
        rows_of(tmp_path / "a.parquet")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(b'[{"a": "\xff\xfe"}]\n')
        with pytest.raises(ValueError, match=f"{name}: not UTF-8"):
            rows_of(tmp_path / name)


# ----------------------------------------------------------------------------------------------
# dataset_info.json


def test_all_fields_of_an_entry(tmp_path):
    entry = {
        "hf_hub_url": "a/b",
        "subset": "s",
        "split": "validation",
        "folder": "f",
        "revision": "r",
        "num_samples": 7,
        "formatting": "sharegpt",
        "ranking": False,
        "file_sha1": "00",
        "columns": {"messages": "m", "system": "sys", "tools": "t"},
        "tags": {"role_tag": "who", "user_tag": "me"},
    }
    info = parse_entry("x", entry, tmp_path)
    assert (info.kind, info.location, info.subset, info.split) == ("hf_hub", "a/b", "s", "validation")
    assert (info.folder, info.revision, info.num_samples) == ("f", "r", 7)
    assert info.columns == {"messages": "m", "system": "sys", "tools": "t"}
    assert info.tags == SHAREGPT_TAGS | {"role_tag": "who", "user_tag": "me"}


def test_columns_name_all_that_is_used(tmp_path):
    # LLaMA-Factory: once `columns` is given, the default names of the others no longer apply
    info = parse_entry(
        "x", {"file_name": "a.json", "columns": {"prompt": "question", "response": "answer"}}, tmp_path
    )
    assert info.columns == {"prompt": "question", "response": "answer"}
    assert parse_entry("x", {"file_name": "a.json"}, tmp_path).columns == {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
    }


def test_hub_is_chosen_as_llama_factory_does(tmp_path, monkeypatch):
    both = {"hf_hub_url": "hf/x", "ms_hub_url": "ms/x", "file_name": "x.json"}
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    assert parse_entry("x", both, tmp_path).location == "hf/x"
    assert parse_entry("x", {"ms_hub_url": "ms/x"}, tmp_path).kind == "ms_hub"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert parse_entry("x", both, tmp_path).location == "ms/x"
    assert parse_entry("x", {"hf_hub_url": "hf/x"}, tmp_path).kind == "hf_hub"
    assert find_dataset("a/b", "ONLINE").kind == "ms_hub"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "expected an object"),
        ({}, "none of hf_hub_url, ms_hub_url and file_name"),
        ({"script_url": "x"}, "script_url: it would run Python code"),
        ({"file_name": ""}, "file_name is ''"),
        ({"file_name": "../x.json"}, "leaves the folder"),
        ({"file_name": "a/../../x.json"}, "leaves the folder"),
        ({"file_name": "/etc/passwd"}, "leaves the folder"),
        (
            {"file_name": "x.json", "formating": "alpaca"},
            "unknown field 'formating'; did you mean 'formatting'",
        ),
        ({"file_name": "x.json", "formatting": "alpaka"}, "formatting is 'alpaka'"),
        ({"file_name": "x.json", "num_samples": 0}, "num_samples is 0"),
        ({"file_name": "x.json", "num_samples": True}, "num_samples is True"),
        ({"file_name": "x.json", "subset": 3}, "subset is 3"),
        ({"file_name": "x.json", "ranking": "yes"}, "ranking is 'yes'"),
        ({"file_name": "x.json", "ranking": 1}, "ranking is 1, expected true or false"),
        ({"file_name": "x.json", "num_samples": 2.0}, "num_samples is 2.0"),
        ({"file_name": "x.json", "num_samples": "5"}, "num_samples is '5'"),
        ({"file_name": "x.json", "formatting": None}, "formatting is None"),
        ({"file_name": "x.json", "formatting": ["alpaca"]}, "formatting is"),
        ({"file_name": "x.json", "columns": []}, r"columns is \[\], expected an object"),
        ({"file_name": "x.json", "tags": False}, "tags is False, expected an object"),
        ({"file_name": "x.json", "split": 3}, "split is 3, expected text"),
        (
            {"file_name": "x.json", "split": "train[:1]"},
            r"'split': 'train\[:1\]'.* does not apply.*num_samples",
        ),
        ({"file_name": "x.json", "split": "test"}, r"'split': 'test'.* does not apply"),
        ({"file_name": "x.json", "subset": "en"}, r"'subset': 'en'.* does not apply"),
        ({"file_name": "x.json", "revision": "v1"}, r"'revision': 'v1'.* does not apply"),
        ({"ms_hub_url": "a/b", "revision": "v1"}, r"'revision': 'v1'.* does not apply"),
        ({"file_name": None}, "file_name is None, expected text"),
        ({"hf_hub_url": ["a/b"]}, "hf_hub_url is"),
        ({"file_name": "x.json", "file_sha1": 5}, "file_sha1 is 5"),
        (
            {"file_name": "x.json", "columns": {"promt": "a"}},
            "columns: unknown key 'promt'; did you mean 'prompt'",
        ),
        ({"file_name": "x.json", "columns": {"prompt": 1}}, r"columns\.prompt is 1"),
        ({"file_name": "x.json", "columns": []}, r"columns is \[\]"),
        ({"file_name": "x.json", "tags": {"rol_tag": "a"}}, "tags: unknown key 'rol_tag'"),
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_entry("mine", entry, tmp_path)
    assert "dataset 'mine'" in str(caught.value)


def test_an_unknown_name_shows_the_nearest(tmp_path):
    registry(tmp_path, {"identity": {"file_name": "a.json"}})
    with pytest.raises(ValueError, match="'identty' is not in .* did you mean 'identity'"):
        find_dataset("identty", tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        find_dataset("identty", tmp_path / "nowhere")
    (tmp_path / "dataset_info.json").write_text('{"a": \n}')
    with pytest.raises(ValueError, match=r"dataset_info\.json:2: not JSON"):
        find_dataset("a", tmp_path)


def test_the_registry_that_comes_with_the_project_is_valid():
    entries = json.loads((DATA / "dataset_info.json").read_text())
    for name in entries:
        info = find_dataset(name, DATA)
        if info.kind == "file":
            assert list(read_rows(info)), name


OPENAI, ANSWER, WORSE = (
    [{"role": role, "content": text}]
    for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
)


def test_a_path_is_a_dataset_and_its_format_is_read_off_the_first_row(tmp_path):
    cases = [
        ({"instruction": "a", "output": "b", "system": "s"}, "alpaca", {"prompt", "response", "system"}),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", {"messages"}),
        ({"messages": [{"role": "user", "content": "a"}]}, "openai", {"messages"}),
        ({"conversations": [{"role": "user", "content": "a"}]}, "openai", {"messages"}),
        ({"text": "a"}, "alpaca", {"prompt"}),
        ({"prompt": "a", "answer": "b"}, "alpaca", {"prompt", "response"}),
        ({"instruction": "a", "output": ["b", "c"]}, "alpaca", {"prompt", "response"}),
        # trl's formats of preference data
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "alpaca", {"prompt", "chosen", "rejected"}),
        ({"prompt": "a", "completion": "b", "label": True}, "alpaca", {"prompt", "response", "kto_tag"}),
        (
            {"prompt": OPENAI, "chosen": ANSWER, "rejected": WORSE},
            "openai",
            {"messages", "chosen", "rejected"},
        ),
        (
            {"chosen": OPENAI + ANSWER, "rejected": OPENAI + WORSE},
            "openai",
            {"messages", "chosen", "rejected"},
        ),
        (
            {"prompt": "a", "chosen": OPENAI + ANSWER, "rejected": OPENAI + WORSE},
            "openai",
            {"messages", "chosen", "rejected"},
        ),
        (
            {"prompt": OPENAI, "completion": ANSWER, "label": False},
            "openai",
            {"messages", "response", "kto_tag"},
        ),
    ]

    for row, formatting, columns in cases:
        path = write(tmp_path / "one.jsonl", json.dumps(row))
        info = find_dataset(str(path), tmp_path)
        assert (info.formatting, set(info.columns)) == (formatting, columns)
        assert info.ranking == isinstance(row.get("output"), list)
        if "chosen" in row or info.ranking:
            check_stage(info, "dpo")
            assert to_pair(row, info)[0].turns == [Message("user", "a")]
        if "label" in row:
            assert to_rated(row, info)[1:] == (Message("assistant", "b"), int(row["label"]))
    assert find_dataset("one.jsonl", tmp_path).location == str(
        tmp_path / "one.jsonl"
    )  # relative to dataset_dir
    write(tmp_path / "one.jsonl", json.dumps({"data": [{"instruction": "a", "output": "b"}]}))
    with pytest.raises(ValueError, match="If the rows are what 'data' holds, let the file be that list"):
        find_dataset("one.jsonl", tmp_path)
    write(tmp_path / "one.jsonl", json.dumps({"question": "a", "answer": "b"}))
    with pytest.raises(ValueError, match="columns question, answer; expected 'instruction'"):
        find_dataset("one.jsonl", tmp_path)
    write(tmp_path / "one.jsonl", "")
    with pytest.raises(ValueError, match="holds no rows"):
        find_dataset("one.jsonl", tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_columns_by_path_are_those_of_all_rows(tmp_path, ending):
    rows = [
        {"instruction": "Name a colour.", "output": "red"},
        {"instruction": "Translate:", "input": "good night", "output": "bonne nuit", "system": "Be brief."},
        {"instruction": "No answer"},
    ]
    write_rows(tmp_path / f"rows.{ending}", rows)
    info = find_dataset(f"rows.{ending}", tmp_path)
    assert info.columns == {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
    }
    found = [row for _, _, row in read_rows(info)]
    assert to_conversation(found[0], info).turns == [
        Message("user", "Name a colour."),
        Message("assistant", "red"),
    ]
    assert to_conversation(found[1], info).turns[:2] == [
        Message("system", "Be brief."),
        Message("user", "Translate:\ngood night"),
    ]
    with pytest.raises(Dropped, match="no answer"):
        to_conversation(found[2], info)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SPOKEN = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TABLES = {
    "messages": [
        {"messages": None, "label": True},
        {"messages": TALK, "label": False, "tools": [{"name": "f"}]},
    ],
    "functions": [{"messages": TALK, "functions": [{"name": "f"}]}],
    "conversations": [{"conversations": SPOKEN, "system": None}],
    "history": [{"instruction": "a", "output": "b", "history": [["c", "d"]]}],
    "pairs": [{"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [TALK[1] | {"content": "c"}]}],
    "whole pairs": [{"chosen": TALK, "rejected": [TALK[0], TALK[1] | {"content": "c"}]}],
    "completion": [{"prompt": TALK[:1], "completion": TALK[1:]}, {"prompt": TALK[:1], "completion": "b"}],
    "texts": [
        {"prompt": "[1, 2] is", "completion": '["a", "list"]'},
        {"prompt": "{}", "completion": '{"role": 1}'},
    ],
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_of_text_says_what_other_files_say(tmp_path, case):
    made = []
    for ending in ("jsonl", "csv"):
        rows = TABLES[case]
        if ending == "csv":  # an object is its JSON there, and null an empty cell
            rows = [
                {
                    name: value if isinstance(value, str | bool | None) else json.dumps(value)
                    for name, value in row.items()
                }
                for row in rows
            ]
        write_rows(tmp_path / f"rows.{ending}", rows)
        info = find_dataset(f"rows.{ending}", tmp_path)
        found = []
        for _, _, row in read_rows(info):
            try:
                found.append(to_pair(row, info) if is_ranked(info) else to_conversation(row, info))
            except Dropped as reason:
                found.append(str(reason))
        made.append(((info.formatting, info.columns, info.ranking), found))
    assert made[0] == made[1]
    assert any(not isinstance(each, str) for each in made[0][1])


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_the_first_value_of_a_column_says_what_it_is(tmp_path, ending):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for first in ({"messages": []}, {"messages": None}, {"id": 1}):
        write_rows(tmp_path / f"rows.{ending}", [first, {"messages": talk, "label": True}, {"label": False}])
        info = find_dataset(f"rows.{ending}", tmp_path)
        assert (info.formatting, info.columns) == ("openai", {"kto_tag": "label", "messages": "messages"})
        rows = [row for _, _, row in read_rows(info)]
        assert to_conversation(rows[1], info).turns == [Message("user", "a"), Message("assistant", "b")]
        for row in (rows[0], rows[2]):
            with pytest.raises(Dropped, match="no messages|no answer"):
                to_conversation(row, info)


def write_rows(path, rows):
    """As the ending says; what only some rows have is null in a table, and absent elsewhere."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        datasets.Dataset.from_list([dict.fromkeys(names) | row for row in rows]).to_parquet(str(path))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        write(path, json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))


def test_a_folder_is_read_in_name_order_and_holds_one_type(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("b", "a"):
        write(folder / f"{name}.jsonl", json.dumps({"instruction": name, "output": "x"}))
    write(folder / ".hidden", "x")
    info = find_dataset("many", tmp_path)
    assert [row["instruction"] for _, _, row in read_rows(info)] == ["a", "b"]
    write(folder / "c.csv", "x\n1\n")
    with pytest.raises(ValueError, match=r"mixes \.csv, \.jsonl"):
        list_files(info)
    write(folder / "c.bin", "x")
    with pytest.raises(ValueError, match=r"c\.bin is of no known type"):
        list_files(info)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        find_dataset("none", tmp_path)


def test_folder_field_stays_inside(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    write(tmp_path / "d" / "sub" / "x.txt", "hello")
    assert len(list_files(DatasetInfo("x", "file", str(tmp_path / "d"), folder="sub"))) == 1
    with pytest.raises(ValueError, match="leaves"):
        list_files(DatasetInfo("x", "file", str(tmp_path / "d"), folder="../.."))
    with pytest.raises(UserError, match="does not exist"):
        list_files(DatasetInfo("x", "file", str(tmp_path / "gone.json")))


def test_sha1_is_a_warning_only(tmp_path):
    path = write(tmp_path / "x.txt", "hello")
    right = hashlib.sha1(b"hello").hexdigest()
    assert check_sha1(DatasetInfo("x", "file", str(path), file_sha1=right.upper())) is None
    assert "file_sha1 says 00" in check_sha1(DatasetInfo("x", "file", str(path), file_sha1="00"))
    assert check_sha1(DatasetInfo("x", "file", str(path))) is None


def test_data_key_follows_the_bytes(tmp_path):
    path = write(tmp_path / "x.txt", "hello")
    info = DatasetInfo("x", "file", str(path))
    before = data_key(info)
    write(path, "hello")
    assert data_key(info) == before
    write(path, "hullo")
    assert data_key(info) != before


def test_hub_data_is_read_through_datasets(tmp_path, monkeypatch):
    # a folder named like an id stands for the hub: `datasets` reads both the same way
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "things").mkdir(parents=True)
    write(tmp_path / "someone" / "things" / "train.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    info = DatasetInfo("x", "hf_hub", "someone/things")
    for streaming in (False, True):
        opened = open_hub(info, HubAccess(cache_dir=str(tmp_path / "cache")), streaming)
        assert [row for _, _, row in read_rows(info, opened)] == ROWS
    bad = DatasetInfo("x", "hf_hub", "someone/things", split="test")
    with pytest.raises(
        ValueError, match=r"dataset 'x': the hub id 'someone/things' \(split 'test'\) cannot be read"
    ):
        open_hub(bad, HubAccess(cache_dir=str(tmp_path / "cache")), False)


def test_code_that_comes_with_hub_data_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "things").mkdir(parents=True)
    write(tmp_path / "someone" / "things" / "things.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    info = DatasetInfo("x", "hf_hub", "someone/things")
    with pytest.raises(ValueError, match="cannot be read"):
        list(open_hub(info, HubAccess(cache_dir=str(tmp_path / "cache")), False))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"hf_hub_url": "json", "folder": "private"},  # the name of a reader of `datasets`
        {"hf_hub_url": "parquet"},
        {"hf_hub_url": "private/rows"},  # a folder here, which `datasets` would read before it asks the hub
        {"hf_hub_url": "../private"},
        {"hf_hub_url": "{outside}"},
        {"hf_hub_url": "file://{outside}"},
        {"hf_hub_url": "hf://datasets/a/b"},
        {"hf_hub_url": "a/b/c"},
        {"ms_hub_url": "./private"},
        {"hf_hub_url": "a/b", "folder": "{outside}"},
        {"hf_hub_url": "a/b", "folder": "../../private"},
        {"hf_hub_url": "a/b", "folder": "file://{outside}"},
        {"hf_hub_url": "a/b", "subset": "../x"},
        {"hf_hub_url": "a/b", "revision": "/x"},
        {"file_name": "{outside}/rows.jsonl"},
        {"file_name": "file://{outside}/rows.jsonl"},
        {"file_name": "../private/rows/rows.jsonl"},
        {"file_name": "linked.jsonl"},
        {"file_name": "linked"},
        {"file_name": "mixed"},
        {"file_name": "mixed", "folder": ".."},
    ],
    ids=str,
)
def test_an_entry_reads_nothing_outside_its_folder(tmp_path, monkeypatch, entry):
    """A registry that came with somebody's data cannot name other files of this machine."""
    monkeypatch.chdir(tmp_path)
    outside, home = tmp_path / "private" / "rows", tmp_path / "data"
    outside.mkdir(parents=True)
    (home / "mixed").mkdir(parents=True)
    secret = write(outside / "rows.jsonl", json.dumps({"instruction": "secret", "output": "secret"}))
    (home / "linked.jsonl").symlink_to(secret)
    (home / "linked").symlink_to(outside)
    (home / "mixed" / "rows.jsonl").symlink_to(secret)
    entry = {key: value.format(outside=outside) for key, value in entry.items()}
    write(home / "dataset_info.json", json.dumps({"x": entry}))
    with pytest.raises(UserError, match="dataset 'x'"):
        list(read_rows(find_dataset("x", home)))


def test_files_of_a_snapshot_of_the_hub_are_links_and_are_read(tmp_path):
    home = tmp_path / "snapshots" / "abc"
    home.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    blob = write(tmp_path / "blobs" / "0f", json.dumps(ROWS[0]))
    (home / "rows.jsonl").symlink_to(blob)
    write(home / "dataset_info.json", json.dumps({"x": {"file_name": "rows.jsonl"}}))
    assert [row for _, _, row in read_rows(find_dataset("x", home))] == ROWS[:1]


def test_online_names_are_ids_of_a_hub_too():
    for name in ("json", "/etc/passwd", "../x/y"):
        with pytest.raises(UserError, match=re.escape(f"dataset: {name!r} (dataset_dir: ONLINE)")):
            find_dataset(name, "ONLINE")


def test_a_row_group_that_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000]}), path)
    assert rows_of(path) == [{"text": "a" * 1000}]
    monkeypatch.setattr(readers, "free_host_bytes", lambda: 10)
    with pytest.raises(UserError, match="x.parquet: a row group of .* smaller row groups"):
        rows_of(path)


@pytest.mark.parametrize("shape", ["text", "list", "objects", "map", "numbers"])
def test_rows_that_are_small_in_the_file_alone_are_refused(tmp_path, monkeypatch, shape):
    """A column of one long text, stored once; in a list one row of it is enough."""
    monkeypatch.setattr(readers, "BYTES", 2**22)
    few, count = pyarrow.array(["x" * 40_000]), 1000
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), few)
    ends = pyarrow.array([0, 0, count], pyarrow.int32())
    if shape == "numbers":
        column = pyarrow.nulls(count * 200)
        ends = pyarrow.array([0, 0, count * 200], pyarrow.int32())
    if shape == "objects":
        column = pyarrow.StructArray.from_arrays([column], names=["content"])
    if shape == "map":
        column = pyarrow.MapArray.from_arrays(ends, column.dictionary_decode(), pyarrow.nulls(count))
    elif shape != "text":
        column = pyarrow.ListArray.from_arrays(ends, column)
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 30_000
    with pytest.raises(UserError, match=r"a.parquet row 0: \d+ rows become .* leave out the column"):
        rows_of(tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    if shape != "map":  # there every text is in the file
        with pytest.raises(UserError, match=r"b.arrow row 0: \d+ rows become .* leave out the column"):
            rows_of(tmp_path / "b.arrow")


def test_columns_of_every_kind_are_as_they_were_written(tmp_path):
    pairs = pyarrow.array([[("k", "v")], None], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    columns = {"a": [1, None], "b": ["x", None], "c": [[{"k": "v", "n": [1]}], None], "d": [b"\xff", b""]}
    columns |= {
        "pairs": pairs,
        "none": pyarrow.nulls(2),
        "few": pyarrow.array(["q", "q"]).dictionary_encode(),
    }
    table = pyarrow.table(
        columns | {"two": pyarrow.array([[1, 2], [3, 4]], pyarrow.list_(pyarrow.int8(), 2))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == table.to_pylist()


def test_texts_stored_as_differences(tmp_path, monkeypatch):
    how = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 40_000] * 1000}), tmp_path / "a.parquet", **how)
    assert rows_of(tmp_path / "a.parquet") == [{"text": "x" * 40_000}] * 1000
    monkeypatch.setattr(readers, "BYTES", 2**22)
    assert len(rows_of(tmp_path / "a.parquet")) == 1000  # a few at a time


@pytest.mark.parametrize(
    ("name", "begin"), [("a.txt", "x"), ("a.csv", "t\n"), ("a.jsonl", '{"t": 1}'), ("a.json", "[")]
)
def test_a_row_that_does_not_end_is_not_read_to_its_end(tmp_path, monkeypatch, name, begin):
    monkeypatch.setattr(readers, "BYTES", 2**21)
    monkeypatch.setattr(readers, "READ_CHARACTERS", 2**12)
    (tmp_path / name).write_text(begin)
    with open(tmp_path / name, "ab") as file:
        file.truncate(2**40)  # without a byte on the disk
    with pytest.raises(UserError, match=rf"{name}:[12]: (a line|a row|not JSON|expected)"):
        rows_of(tmp_path / name)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="is no file or folder"):
        find_dataset("rows.jsonl", tmp_path)


def test_modelscope_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ValueError, match="pip install modelscope"):
        open_hub(parse_entry("x", {"ms_hub_url": "a/b"}, tmp_path), HubAccess(), False)


# ----------------------------------------------------------------------------------------------------
# conversations


def alpaca(**columns):
    default = {"prompt": "instruction", "query": "input", "response": "output"}
    return DatasetInfo("x", "file", "x.json", columns=default | columns)


def sharegpt(tags=SHAREGPT_TAGS, **columns):
    return DatasetInfo(
        "x", "file", "x", "sharegpt", columns={"messages": "conversations"} | columns, tags=tags
    )


def texts(conversation):
    return [turn[:2] for turn in conversation.turns]


def say(*turns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def test_alpaca_turns():
    info = alpaca(history="history", system="system")
    row = {
        "instruction": "i",
        "input": "q",
        "output": "o",
        "history": [["u1", "a1"], ("u2", "a2")],
        "system": "s",
    }
    assert texts(to_conversation(row, info)) == [
        ("system", "s"),
        ("user", "u1"),
        ("assistant", "a1"),
        ("user", "u2"),
        ("assistant", "a2"),
        ("user", "i\nq"),
        ("assistant", "o"),
    ]
    for empty in (
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "output": "o", "input": None},
    ):
        assert texts(to_conversation(empty, info)) == [("user", "i"), ("assistant", "o")]
    row = {"instruction": "", "input": "q", "output": "o"}
    assert texts(to_conversation(row, info))[0] == ("user", "q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "input": ""}, "column 'output' is missing; the row has instruction, input"),
        ({}, "column 'instruction' is missing; the row has nothing"),
        ({"instruction": 5, "output": "a"}, "column 'instruction': expected text, found int 5"),
        ({"instruction": "a", "output": ["b"]}, r"column 'output': expected text, found list \['b'\]"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input': expected text, found int 3"),
        (
            {"instruction": "a", "output": "b", "system": []},
            r"column 'system': expected text, found list \[\]",
        ),
        ({"instruction": "a", "output": "b", "history": "no"}, r"column 'history': expected a list of"),
        (
            {"instruction": "a", "output": "b", "history": [["a"]]},
            r"column 'history'\[0\]: expected \[user, answer\]",
        ),
        ({"instruction": "a", "output": "b", "history": [["a", None]]}, r"column 'history'\[0\]"),
    ],
)
def test_a_wrong_alpaca_row_names_the_column(row, message):
    with pytest.raises(ValueError, match=message):
        to_conversation(row, alpaca(history="history", system="system"))


def test_alpaca_rows_with_nothing_to_train_are_dropped():
    with pytest.raises(Dropped, match="no answer"):
        to_conversation({"instruction": "a", "output": None}, alpaca())
    with pytest.raises(Dropped, match="empty prompt"):
        to_conversation({"instruction": "", "input": "", "output": "b"}, alpaca())
    with pytest.raises(ValueError, match=r"columns\.response is not given"):
        to_conversation({"text": "a"}, DatasetInfo("x", "file", "x", columns={"prompt": "text"}))


def test_sharegpt_turns():
    row = say(
        ("system", "s"),
        ("human", "u"),
        ("function_call", '{"name": "f", "arguments": {}}'),
        ("observation", "r"),
        ("gpt", "a"),
    ) | {"sys": "column", "tools": '[{"name": "f"}]'}
    conversation = to_conversation(row, sharegpt(system="sys", tools="tools"))
    assert [turn.role for turn in conversation.turns] == [
        "system",
        "user",
        "function",
        "observation",
        "assistant",
    ]
    assert conversation.turns[0] == Message("system", "s")  # the message beats the column
    assert conversation.tools == ({"type": "function", "function": {"name": "f"}},)
    row = say(("human", "u"), ("gpt", "a"), ("human", "thanks")) | {"sys": "column"}
    conversation = to_conversation(row, sharegpt(system="sys"))
    assert texts(conversation) == [("system", "column"), ("user", "u"), ("assistant", "a")]
    assert conversation.notes == ("odd tail cut",)


def test_sharegpt_rows_with_nothing_to_train_are_dropped():
    for row in (say(), say(("human", "u")), say(("system", "s"))):
        with pytest.raises(Dropped, match="no answer"):
            to_conversation(row, sharegpt())
    for row in (say(("gpt", "a"), ("human", "u")), say(("human", "u"), ("human", "v"), ("gpt", "a"))):
        with pytest.raises(Dropped, match="roles do not alternate"):
            to_conversation(row, sharegpt())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"column 'conversations' \(messages\) is missing; the row has messages"),
        ({"conversations": "x"}, "expected a list of messages, found str 'x'"),
        ({"conversations": ["x"]}, r"column 'conversations'\[0\]: expected an object"),
        ({"conversations": [{"role": "user"}]}, r"\[0\]: no 'from' \(role_tag\); the message has role"),
        (say(("human", "a"), ("bing", "b")), r"\[1\]: role 'bing' is none of 'human', 'gpt'"),
        (say(("human", 3), ("gpt", "b")), r"\[0\]\.value: expected text, found int 3"),
        ({"conversations": [{"from": "human", "content": "a"}]}, r"\[0\]: no 'value' \(content_tag\)"),
        (say(("human", "a"), ("function_call", "f(x)")), r"\[1\]: a function call is not JSON"),
        (
            say(("human", "a"), ("function_call", "[1]")),
            r"\[1\]: a function call is not JSON of 'name' and 'arguments': str '\[1\]'",
        ),
        (say(("human", "a"), ("gpt", "b")) | {"tools": "{"}, r"column 'tools' \(tools\): not JSON"),
        (say(("human", "a"), ("gpt", "b")) | {"tools": '{"a": 1}'}, "expected a list of objects"),
        (
            say(("human", "a"), ("gpt", "b")) | {"tools": '[{"a": 1}]'},
            r"\[0\]: expected an object with a 'name'",
        ),
    ],
)
def test_a_wrong_sharegpt_row_names_the_message(row, message):
    with pytest.raises(ValueError, match=message):
        to_conversation(row, sharegpt(tools="tools"))


def test_openai_messages():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "conversations": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "r1"},
            {"role": "tool", "content": "r2"},
            {"role": "assistant", "content": "done"},
        ]
    }
    turns = to_conversation(row, sharegpt(OPENAI_TAGS)).turns
    roles = ["system", "user", "function", "observation", "observation", "assistant"]
    assert [turn.role for turn in turns] == roles
    assert turns[1].content == "ab"
    assert turns[2].more == {"tool_calls": [call, call], "content": None}
    assert [turn.content for turn in turns[3:5]] == ["r1", "r2"]
    assert call["function"]["arguments"] == '{"x": 1}'  # the row itself is left alone
    picture = {"conversations": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}
    with pytest.raises(ValueError, match="a part of the content is not text"):
        to_conversation(picture, sharegpt(OPENAI_TAGS))


def test_documents():
    assert to_document({"text": "t"}, alpaca()) == "t"
    assert to_document({"instruction": "i", "text": "t"}, alpaca()) == "i"
    assert to_document({"body": "b"}, alpaca(prompt="body")) == "b"
    with pytest.raises(Dropped, match="empty text"):
        to_document({"body": " \n"}, alpaca(prompt="body"))
    with pytest.raises(ValueError, match="column 'body' is missing"):
        to_document({"text": "t"}, alpaca(prompt="body"))


def test_data_of_later_stages_is_refused():
    with pytest.raises(ValueError, match="it holds pairs of answers, but stage sft needs single answers"):
        check_stage(DatasetInfo("x", "file", "x", ranking=True, columns={}), "sft")
    for column in ("images", "videos", "audios"):
        with pytest.raises(ValueError, match=rf"columns\.{column}"):
            check_stage(alpaca(**{column: "c"}), "sft")
    with pytest.raises(ValueError, match="stage pt reads one text column"):
        check_stage(sharegpt(), "pt")
    check_stage(sharegpt(), "sft")
