"""One reader of JSON: the same answer for the same fault, whichever file it is in."""

import json

import pytest
from tiny_tokenizers import make_tokenizer

from checkpoints.peft import ADAPTER_CONFIG, read_adapter_config
from checkpoints.safetensors_files import read_json
from options import json_reader
from options.config import load
from options.errors import UserError
from pipeline.formats import to_conversation
from pipeline.readers import read_file
from pipeline.sources import SHAREGPT_TAGS, DatasetInfo, read_dataset_info
from templates import get_template
from text.tokenizer import Tokenizer
from training.options import OptimOptions
from training.run_folder import read_history

FAULTS = {
    '{"a": 1, "b": {"c": 1, "c": 2}}': "'c' is there twice",
    '{"a": NaN}': "a is nan, expected a number",
    '{"b": {"c": [1, NaN]}}': "c is nan, expected a number",
    "[1]": "found a list, expected a JSON object",
    "null": "found null, expected a JSON object",
    "3": "found a number, expected a JSON object",
    '"a"': "found a text, expected a JSON object",
    '{"a": 1,\n "b": ': ":2: not JSON",
    "": "empty",
    " \n": "empty",
    '{"a": 1} {"b": 2}': "not JSON (Extra data",
    '{"a": ' + "[" * 100_000: "nested too deep",
    '{"a": ' + "7" * 5000 + "}": "a number of 5000 digits",
    b'{"a": "\xff"}': "not UTF-8 text",
    '{"a": 1}'.encode("utf-16"): "not UTF-8 text",
    '{"b": {"c": [[1], [[NaN]]]}}': "c is nan, expected a number",
    '{"b": ["\\ud83d"]}': "half a character, '\\ud83d' (a lone surrogate)",
    '{"\\ude00": 1}': "half a character",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_one_line_with_the_file_and_the_way_out(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        json_reader.read(path, way_out="fetch it again")
    message = str(caught.value)
    assert message.startswith(str(path)) and FAULTS[text] in message and message.endswith("; fetch it again")
    assert len(message.splitlines()) == 1


def test_a_byte_order_mark_and_what_json_allows_are_read(tmp_path):
    value = {"a": [1, -2.5, 1e-7, None, True], "b": {"c": "\u00e9\U0001f600"}, "d": float("inf")}
    value |= {"e": int("7" * 308), "f": [[]] * 50}
    path = tmp_path / "some.json"
    for prefix in ("", "\ufeff"):
        path.write_text(prefix + json.dumps(value), encoding="utf-8")
        assert json_reader.read(path) == value
    path.write_text('[{"a": NaN}]')
    assert json_reader.read(path, expected=None, nan=True)[0]["a"] != 0
    assert json_reader.parse("[1]", "here", expected=list) == [1]


def readers(folder):
    """Who reads a JSON file: (its path, what reads it)."""
    model = make_tokenizer(folder / "model", "chatml")
    adapter, run = folder / "adapter", folder / "run"
    adapter.mkdir()
    run.mkdir()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        yield model / name, lambda: Tokenizer.from_folder(model)
    yield folder / "dataset_info.json", lambda: read_dataset_info(folder)
    yield folder / "config.json", lambda: read_json(folder / "config.json")
    yield adapter / ADAPTER_CONFIG, lambda: read_adapter_config(adapter)
    yield run / "trainer_state.json", lambda: read_history(run)


@pytest.mark.parametrize("fault", ['{"r": 1, "r": 2}', "[1, 2]", '{"a": ', "", '\ufeff{"a": '])
def test_every_file_is_read_by_it(tmp_path, fault):
    for path, read in readers(tmp_path):
        before = path.read_bytes() if path.exists() else None
        path.write_text(fault, encoding="utf-8")
        with pytest.raises(UserError, match=path.name):
            read()
        path.unlink() if before is None else path.write_bytes(before)


def test_a_byte_order_mark_is_passed_over_in_every_file(tmp_path):
    for path, read in readers(tmp_path):
        text = (
            path.read_text(encoding="utf-8") if path.exists() else '{"log_history": [], "peft_type": "LORA"}'
        )
        path.write_text("\ufeff" + text, encoding="utf-8")
        read()
        path.write_text(text, encoding="utf-8")


def test_json_inside_an_option_too():
    for text in ('{"num_cycles": 1, "num_cycles": 2}', "[1]", "{", '{"num_cycles": NaN}'):
        with pytest.raises(UserError, match="^lr_scheduler_kwargs: .*write "):
            OptimOptions(lr_scheduler_type="cosine", lr_scheduler_kwargs=text)


FAULTY = {
    "duplicate": ('{"name": "f", "arguments": {"a": 1, "a": 2}}', "'a' is there twice"),
    "nan": ('{"name": "f", "arguments": {"a": NaN}}', "a is nan"),
    "deep": ('{"name": "f", "arguments": ' + "[" * 100_000, "nested too deep"),
    "digits": ('{"name": "f", "arguments": {"a": ' + "7" * 5000 + "}}", "a number of 5000 digits"),
    "surrogate": ('{"name": "f", "arguments": {"a": "\\ud83d"}}', "half a character"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_json_in_texts_of_rows_is_read_by_it(tmp_path, fault):
    """In the definitions of tools, in a call of a message and its arguments, in a function turn."""
    text, said = FAULTY[fault]
    many = "[" + text + ("" if fault == "deep" else "]")
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    function = [{"from": "human", "value": "a"}, {"from": "function_call", "value": text}]
    usual = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    template = get_template("chatml")
    for row in (
        {"conversations": usual, "tools": many},
        {"conversations": [usual[0], {"from": "gpt", "value": "", "tool_calls": [call]}]},
        {"conversations": [usual[0], {"from": "gpt", "value": "", "tool_calls": many}]},
        {"conversations": function},
    ):
        columns = {"messages": "conversations", "tools": "tools"}
        info = DatasetInfo("a", "file", "a.json", "sharegpt", columns, SHAREGPT_TAGS)
        with pytest.raises(UserError, match=said):
            found = to_conversation(row, info)
            template.render(found.turns, None, None, tools=found.tools)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        ('{"a": ' + "7" * 5000 + "}", "a number of 5000 digits"),
        ('{"a": ' + "[" * 100_000, "recursion"),
    ],
)
def test_files_of_rows_are_read_by_it(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": NaN}\n' + line + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{said}"):
        list(read_file(path))


def test_a_value_of_an_option_is_text_where_it_is_no_json():
    with pytest.raises(UserError, match="^lr_scheduler_kwargs: "):
        load(
            [f"lr_scheduler_kwargs={{num_cycles: {'7' * 5000}}}"],
            [OptimOptions],
            program="a",
            description="b",
        )
