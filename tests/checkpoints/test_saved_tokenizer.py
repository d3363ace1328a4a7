"""What is saved stops in other programs too: eos and stop ids in every file, one chat template, and
tokenizers with more tokens than the model has rows. transformers is the oracle."""

import json
import os
import shutil

import pytest
import transformers
from tiny_runs import tiny_runs

import chat
import export
from checkpoints.gguf.read import open_gguf
from options.errors import UserError
from templates import get_template
from text.tokenizer import Tokenizer, as_ids

OLD = "{% for m in messages %}OLD {{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("saved")) as tiny:
        yield tiny


@pytest.fixture(scope="module")
def base(tiny):
    """A model whose texts end at <|endoftext|>, as those of base models do, with a template of its own."""
    folder = tiny.make_model("base", seed=2)
    old = Tokenizer.from_folder(folder).token_id("<|endoftext|>")
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>", chat_template=OLD)
    edit(folder / "special_tokens_map.json", eos_token="<|endoftext|>")
    edit(folder / "config.json", eos_token_id=old)
    edit(folder / "generation_config.json", eos_token_id=old, max_length=99)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps((read(path) if path.exists() else {}) | changes))


def read(path):
    return json.loads(path.read_text())


def ends(folder):
    """(eos of the tokenizer, ids of generation_config.json, ids of config.json or None)."""
    eos = transformers.AutoTokenizer.from_pretrained(folder).eos_token
    config = folder / "config.json"
    config = as_ids(read(config).get("eos_token_id")) if config.exists() else None
    return eos, as_ids(read(folder / "generation_config.json")["eos_token_id"]), config


def exported(tiny, name, source, **keys):
    folder = tiny.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    keys = {"model_name_or_path": source, "export_dir": folder} | keys
    assert export.main([f"{key}={value}" for key, value in keys.items()]) == 0
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_saves_the_ends_of_its_template_in_every_file(tiny, base, kind, capsys):
    name, tokenizer = f"ended {kind}", Tokenizer.from_folder(base)
    end, old, start = map(tokenizer.token_id, ("<|im_end|>", "<|endoftext|>", "<|im_start|>"))
    keys = {"finetuning_type": kind, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    assert tiny.train(name, model_name_or_path=base, **keys) == 0
    expected = ("<|im_end|>", [end, old, start])
    result = tiny.folder / name
    for folder in (result, result / "checkpoint-1"):
        assert ends(folder) == (*expected, expected[1] if kind == "full" else None)
        assert Tokenizer.from_folder(folder, base).stop_ids == (end, old, start)
        templates = (folder / "chat_template.jinja").read_text(), read(folder / "tokenizer_config.json")
        assert templates[0] == templates[1]["chat_template"] == get_template("chatml").to_jinja()
    if kind == "full":
        assert read(result / "generation_config.json")["max_length"] == 99
    merged = exported(tiny, f"merged {kind}", result)
    assert ends(merged) == (*expected, expected[1])
    assert read(merged / "tokenizer_config.json")["chat_template"] == templates[0]
    metadata = open_gguf(exported(tiny, f"gguf {kind}", result, export_gguf_type="F16") / "model-F16.gguf")[1]
    found = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert found == [end, old, start]
    assert "<|im_end|>" in metadata["tokenizer.chat_template"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# template of the run, the base's own, its generation_config -> tokens that end a text, eos first
CASES = {
    "its answers end with eos": ("vicuna", None, ["<|endoftext|>"], ["<|endoftext|>"]),
    "its end is text": ("alpaca", None, ["<|endoftext|>"], ["<|endoftext|>"]),
    "nothing ends its answers": ("empty", None, ["<|endoftext|>"], ["<|endoftext|>"]),
    "its end is no token here": ("llama3", None, ["<|endoftext|>"], ["<|endoftext|>"]),
    "the checkpoint's own": (None, CHATML, ["<|endoftext|>"], ["<|im_end|>", "<|endoftext|>"]),
    "two ids before": (
        "chatml",
        None,
        ["<|endoftext|>", "<think>"],
        ["<|im_end|>", "<|endoftext|>", "<think>", "<|im_start|>"],
    ),
    "an end that is no special token": (
        None,
        CHATML.replace("<|im_end|>", "</think>"),
        ["<|endoftext|>"],
        ["</think>", "<|endoftext|>"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ends_of_other_templates(tiny, base, case):
    template, own, before, after = CASES[case]
    folder, name = shutil.copytree(base, tiny.folder / f"base of {case}"), f"run of {case}"
    tokenizer = Tokenizer.from_folder(folder)
    edit(folder / "generation_config.json", eos_token_id=[tokenizer.token_id(word) for word in before])
    edit(folder / "tokenizer_config.json", chat_template=own or OLD)
    assert (
        tiny.train(name, model_name_or_path=folder, template=template, max_steps=1, finetuning_type="full")
        == 0
    )
    ids = [tokenizer.token_id(word) for word in after]
    assert ends(tiny.folder / name) == (after[0], ids, ids)


def test_named_templates_stay_with_a_run_that_used_them_and_go_with_one_that_did_not(tiny, base):
    folder = shutil.copytree(base, tiny.folder / "base with tool_use")
    named = "additional_chat_templates/tool_use.jinja"
    (folder / named).parent.mkdir()
    (folder / named).write_text(CHATML)
    (folder / "chat_template.jinja").write_text(CHATML)
    keys = {"model_name_or_path": folder, "max_steps": 1, "overwrite_output_dir": True}
    for template, kept in ((None, True), (None, True), ("chatml", False)):
        assert tiny.train("named", template=template, **keys) == 0
        assert (tiny.folder / "named" / named).exists() == kept


def test_a_template_that_the_checkpoint_has_by_name_is_chosen_in_training_chat_and_export(tiny, base):
    folder = shutil.copytree(base, tiny.folder / "base with rag")
    rag = CHATML.replace("<|im_start|>", "<|im_start|>R ")
    both = [{"name": "default", "template": OLD}, {"name": "rag", "template": rag}]
    edit(folder / "tokenizer_config.json", chat_template=both)
    for kind in ("lora", "full"):
        run = tiny.folder / f"rag {kind}"
        keys = {"model_name_or_path": folder, "template": "rag", "finetuning_type": kind, "max_steps": 1}
        assert tiny.train(run.name, **keys) == 0
        words = [f"model_name_or_path={run}", "max_new_tokens=2", "device=cpu", "prompt=Hello"]
        assert chat.main(words) == 0
        merged = exported(tiny, f"merged rag {kind}", run)
        assert transformers.AutoTokenizer.from_pretrained(merged).chat_template == rag
        assert ends(merged)[0] == "<|im_end|>"
        path = exported(tiny, f"gguf rag {kind}", run, export_gguf_type="F16") / "model-F16.gguf"
        assert open_gguf(path)[1]["tokenizer.chat_template"] == rag
    chosen = exported(tiny, "chosen rag", folder, template="rag")
    assert transformers.AutoTokenizer.from_pretrained(chosen).chat_template == rag


@pytest.mark.parametrize("anew", [False, True])
def test_an_adapter_is_continued_with_the_tokenizer_that_it_was_saved_with(tiny, base, capsys, anew):
    """As chat.py and export.py read it, and peft's users: its tokens and its template were trained."""
    adapter, name = tiny.folder / f"continued {anew}", f"goes on {anew}"
    assert tiny.train(adapter.name, model_name_or_path=base, max_steps=1) == 0
    edit(adapter / "tokenizer.json", added_tokens=[*read(adapter / "tokenizer.json")["added_tokens"], {
        "id": 700, "content": "<|mine|>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True}])  # fmt: skip
    capsys.readouterr()
    keys = {"adapter_name_or_path": adapter, "create_new_adapter": anew, "template": None}
    assert tiny.train(name, model_name_or_path=base, max_steps=1, **keys) == 0
    assert f"note: tokens and chat template are those saved with {adapter}" in capsys.readouterr().out
    there = transformers.AutoTokenizer.from_pretrained(tiny.folder / name)
    before = transformers.AutoTokenizer.from_pretrained(adapter)
    assert there.get_vocab() == before.get_vocab() and "<|mine|>" in there.get_vocab()
    assert there.chat_template == before.chat_template != OLD
    assert ends(tiny.folder / name)[0] == ends(adapter)[0] == "<|im_end|>"
    (adapter / "tokenizer.json").unlink()  # as peft alone saves it
    assert (
        tiny.train(f"{name} without", model_name_or_path=base, max_steps=1, **(keys | {"template": "chatml"}))
        == 0
    )
    assert (
        "<|mine|>"
        not in transformers.AutoTokenizer.from_pretrained(tiny.folder / f"{name} without").get_vocab()
    )


def test_the_tokenizer_of_an_adapter_is_exported_without_files_of_the_base(tiny, base):
    """As peft folders of older transformers are: the template stands in tokenizer_config.json alone."""
    folder = shutil.copytree(base, tiny.folder / "base with a file")
    (folder / "chat_template.jinja").write_text(OLD)
    edit(folder / "generation_config.json", temperature=0.5)
    adapter = tiny.folder / "older adapter"
    assert tiny.train(adapter.name, model_name_or_path=folder, max_steps=1) == 0
    for name in ("chat_template.jinja", "run_config.yaml", "special_tokens_map.json"):
        (adapter / name).unlink()
    edit(adapter / "tokenizer_config.json", chat_template=CHATML)
    merged = exported(tiny, "merged older", adapter)
    assert transformers.AutoTokenizer.from_pretrained(merged).chat_template == CHATML
    assert not (merged / "special_tokens_map.json").exists()
    assert read(merged / "generation_config.json")["temperature"] == 0.5


def test_plain_text_and_plain_conversion_change_nothing(tiny, base):
    keys = {"stage": "pt", "dataset": tiny.folder / "text.txt", "template": None, "finetuning_type": "full"}
    assert tiny.train("plain", model_name_or_path=base, max_steps=1, **keys) == 0
    for folder in (tiny.folder / "plain", exported(tiny, "converted", base)):
        assert ends(folder) == ends(base)
        assert read(folder / "tokenizer_config.json") == read(base / "tokenizer_config.json")


def test_more_tokens_than_rows_serve_as_long_as_these_never_occur(tiny, capsys):
    """transformers generates with such a folder; so do training, chat, export, and what export wrote as GGUF
    comes back."""
    tokenizer = Tokenizer.from_folder(tiny.model)
    rows = tokenizer.vocab_size
    folder = tiny.make_model("surplus", seed=1, vocab_size=rows)
    pad = {"content": "[PAD]", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    edit(folder / "tokenizer_config.json", added_tokens_decoder={str(rows): pad}, pad_token="[PAD]")
    for kind in ("full", "lora"):
        name = f"surplus {kind}"
        assert tiny.train(name, model_name_or_path=folder, finetuning_type=kind, max_steps=1) == 0
        assert "1 tokens more than the model has rows" in capsys.readouterr().out
        words = [f"model_name_or_path={tiny.folder / name}", "max_new_tokens=3", "device=cpu"]
        assert chat.main([*words, "prompt=Hello"]) == 0
        assert "1 tokens more than the model has rows" in capsys.readouterr().err
        assert chat.main([*words, "prompt=Hello [PAD]"]) == 2
        assert f"holds '[PAD]', which is token {rows}" in capsys.readouterr().err
        merged = exported(tiny, f"merged {name}", tiny.folder / name)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
        assert len(transformers.AutoTokenizer.from_pretrained(merged)) == rows + 1 > theirs.vocab_size
        path = exported(tiny, f"gguf {name}", merged, export_gguf_type="F16") / "model-F16.gguf"
        metadata = open_gguf(path)[1]
        assert len(metadata["tokenizer.ggml.tokens"]) == rows > metadata["tokenizer.ggml.padding_token_id"]
        back = exported(tiny, f"back {name}", path)
        text = "Hello, who are you?"
        assert Tokenizer.from_folder(back).encode(text) == tokenizer.encode(text)
    (tiny.folder / "padded.json").write_text(json.dumps([{"instruction": "a", "output": "b [PAD]"}] * 3))
    for streamed in (False, True):
        keys = {"dataset": tiny.folder / "padded.json", "streaming": streamed, "max_steps": 1}
        assert tiny.train("refused", model_name_or_path=folder, **keys) == 2
        found = capsys.readouterr().err
        assert "padded.json:1 (row 0): the text holds '[PAD]'" in found and f"vocab_size {rows}" in found


SPECIAL = {"content": "zz", "special": "false"}
WRONG_FILES = {
    "a name of a template": ("tokenizer_config.json", {"chat_template": [{"name": 5, "template": "x"}]}),
    "names": ("tokenizer_config.json", {"chat_template": [{"name": ["a"], "template": "x"}]}),
    "no template": ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}),
    "extra tokens": ("tokenizer_config.json", {"extra_special_tokens": 5}),
    "additional tokens": ("tokenizer_config.json", {"additional_special_tokens": "<a>"}),
    "a flag": ("tokenizer_config.json", {"added_tokens_decoder": {"720": SPECIAL}}),
    "an id": ("added_tokens.json", {"zz": "5"}),
    "a list of ids": ("added_tokens.json", {"zz": [5]}),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_file_of_the_tokenizer_with_a_wrong_value_is_named(tiny, tmp_path, case):
    name, values = WRONG_FILES[case]
    folder = shutil.copytree(tiny.model, tmp_path / "wrong")
    (folder / name).write_text(json.dumps(values))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match=str(folder)) as told:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(told.value)


def test_what_is_no_file_is_no_template(tiny, tmp_path):
    """A folder or a pipe of that name, as transformers has it."""
    folder = shutil.copytree(tiny.model, tmp_path / "folders")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", chat_template=CHATML)
    (folder / "chat_template.jinja").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").mkdir(parents=True)
    os.mkfifo(folder / "additional_chat_templates" / "b.jinja")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template == CHATML
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").chat_template == CHATML


WRONG_RUNS = [
    "template: [x]",
    "default_system: 5",
    "rope_scaling: yarn\ncutoff_len: abc",
    "enable_thinking: maybe",
]
WRONG_RUNS += ["adapter_name_or_path: [5, {a: b}]", "adapter_name_or_path: {a: b}", "quantization_bit: four"]


def test_what_a_run_says_of_itself_is_checked(tiny, tmp_path, capsys):
    """run_config.yaml, changed by hand; and one that names its own folder as what it was trained on."""
    assert tiny.train("told", max_steps=1) == 0
    run = shutil.copytree(tiny.folder / "told", tmp_path / "run")
    words = [f"model_name_or_path={run}", "max_new_tokens=1", "device=cpu", "prompt=Hello"]
    for text in WRONG_RUNS:
        (run / "run_config.yaml").write_text(f"{text}\n")
        capsys.readouterr()
        assert chat.main(words) == 2
        told = capsys.readouterr().err
        assert f"{run / 'run_config.yaml'}: " in told and "remove it and give template" in told
    (run / "run_config.yaml").write_text(f"create_new_adapter: true\nadapter_name_or_path: {run}\n")
    assert chat.main([*words, "template=chatml"]) == 0
    assert f"{run} + {run}" not in capsys.readouterr().err
    edit(run / "adapter_config.json", task_type=["x"])
    assert chat.main([*words, "template=chatml"]) == 0
