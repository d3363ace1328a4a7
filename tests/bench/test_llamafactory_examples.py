"""bench/llamafactory_examples.py counts files of text and names why one is refused."""

import json

import pytest

from bench import llamafactory_examples as examples

TRAINING = "stage: sft\nfinetuning_type: lora\ndataset: d\ntemplate: llama3\noutput_dir: o\n"


@pytest.fixture
def folder(tmp_path):
    files = {
        "train_lora/good.yaml": f"model_name_or_path: a/b\n{TRAINING}",
        "train_lora/bad.yaml": f"model_name_or_path: a/b\nno_such_key: 1\n{TRAINING}",
        "train_lora/picture.yaml": f"model_name_or_path: a/b-VL-4B\n{TRAINING}",
        "extras/tokens.yaml": '"<a>": a word\n',  # read by another file: no model
        "merge_lora/good.yaml": "model_name_or_path: a/b\nexport_dir: c\n",
        "inference/good.yaml": "model_name_or_path: a/b\ntemplate: llama3\ninfer_backend: huggingface\n",
        "deepspeed/other.yaml": "model_name_or_path: a/b\n",
    }
    for name, text in files.items():
        path = tmp_path / "examples" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "examples"


def test_each_file_is_read_by_its_program_and_the_first_reason_is_given(folder, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert examples.main([f"folder={folder}", "revision=v1", f"out={out}"]) == 0
    report = json.loads(out.read_text())
    refused = report["files"].pop("train_lora/bad.yaml")
    assert "no_such_key" in refused and str(tmp_path) not in refused
    good = ["inference/good.yaml", "merge_lora/good.yaml", "train_lora/good.yaml"]
    assert report["files"] == dict.fromkeys(good)
    assert (report["accepted"], report["total"], report["revision"]) == (3, 4, "v1")
    assert "3 of 4 files are accepted" in capsys.readouterr().out


def test_a_folder_without_examples_is_refused(tmp_path):
    for words in ([], [f"folder={tmp_path}"]):
        with pytest.raises(SystemExit, match="no example"):
            examples.main(words)
