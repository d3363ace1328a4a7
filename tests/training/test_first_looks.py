"""What is refused, or said, before a row or a weight is read."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from tiny_runs import make_rows, tiny_runs
from tiny_tokenizers import make_tokenizer
from torch import nn

from checkpoints.peft import ADAPTER_CONFIG, read_adapter_config
from options.errors import UserError
from pipeline.sources import parse_entry
from templates import TEMPLATES, marks_split_up
from text.jinja_template import JinjaTemplate
from text.tokenizer import Tokenizer
from training import setup
from training.optimizers import make_optimizer
from training.options import OptimOptions
from training.run_folder import refuse_foreign


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("first")) as made:
        yield made


def nothing_is_read(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("the data is read")

    monkeypatch.setattr(setup, "load_datasets", read)


# Names of modules


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_target": "q_prj"}, "lora_target: no linear is called 'q_prj'; this model has"),
        ({"additional_target": "embeddings"}, "additional_target: no module is called 'embeddings'"),
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "mlq"},
            "name_module_trainable: no module",
        ),
        ({"finetuning_type": "freeze", "freeze_extra_modules": "nrm"}, "freeze_extra_modules: no module"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 9}, "num_layer_trainable: 9"),
        ({"stage": "rm", "lora_target": "v_head"}, "lora_target: no linear is called 'v_head'"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_before_the_data_is_read(
    tiny, keys, message, monkeypatch, capsys
):
    nothing_is_read(monkeypatch)
    assert tiny.train("names", **keys) == 2
    assert message in capsys.readouterr().err


# output_dir


def test_only_a_new_an_empty_or_a_runs_folder_is_written_into(tiny, tmp_path, monkeypatch, capsys):
    nothing_is_read(monkeypatch)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("words")
    for folder, why in (
        ("/", "root of the disk"),
        (str(Path.home()), "home folder"),
        (foreign, "chapter.txt"),
    ):
        for more in ({}, {"overwrite_output_dir": True}, {"do_eval": True}):
            assert (
                tiny.train("x", **{"output_dir": folder, "eval_dataset": tiny.folder / "few.json", **more})
                == 2
            )
            message = capsys.readouterr().err
            assert "output_dir: " in message and why in message and "name a new or an empty folder" in message
    assert os.listdir(foreign) == ["chapter.txt"]


def test_a_file_as_output_dir_is_told_with_a_way_out(tiny, capsys):
    for name in ("text.txt", "text.txt/below"):
        assert tiny.train(name) == 2
        message = capsys.readouterr().err
        assert f"{tiny.folder / 'text.txt'} is a file; name another folder" in message


def test_folders_of_runs_and_what_a_run_names_are_its_own(tmp_path):
    for number, names in enumerate([
        [], ["run_config.yaml", "notes.txt"], ["trainer_log.jsonl", "model-00001-of-00002.safetensors"],
        ["checkpoint-7", "more"], [".gitkeep", "train.log", "nohup.out"], ["runs", "wandb"],
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        refuse_foreign(folder, set())
    refuse_foreign(tmp_path / "new", set())
    mixed = tmp_path / "mixed"
    (mixed / "tokens").mkdir(parents=True)
    (mixed / "sft.yaml").touch()
    with pytest.raises(UserError, match=r"holds sft.yaml, tokens and no earlier run"):
        refuse_foreign(mixed, set())
    refuse_foreign(mixed, {mixed / "sft.yaml", mixed / "tokens" / "train"})
    refuse_foreign(mixed, {mixed})  # an adapter that trains on in place
    (tmp_path / "1" / "adapter_config.json").mkdir()
    with pytest.raises(UserError, match=r"1/adapter_config.json is a folder where a run writes files"):
        refuse_foreign(tmp_path / "1", set())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    with pytest.raises(UserError, match="holds model.safetensors"):
        refuse_foreign(tmp_path / "model", set())


def test_a_run_may_lie_where_its_own_files_lie_and_runs_again(tiny):
    home = tiny.folder / "own"
    home.mkdir()
    (home / "rows.json").write_text(json.dumps(make_rows(4)))
    (home / "run.yaml").write_text("lora_rank: 2\n")
    keys = {"dataset": home / "rows.json", "config": home / "run.yaml", "max_steps": 1}
    assert tiny.train("own", **keys) == 0
    assert tiny.train("own", **keys, overwrite_output_dir=True) == 0


# Other first looks


def test_a_run_that_is_asked_for_nothing_says_so(tiny, monkeypatch, capsys):
    nothing_is_read(monkeypatch)
    assert tiny.train("idle", do_train=False) == 2
    assert "do_train: false, and neither do_eval nor do_predict is set" in capsys.readouterr().err


def test_tf32_is_turned_on_and_off(tiny):
    for tf32 in (True, False):
        assert tiny.train("tf32", tf32=tf32, max_steps=1, overwrite_output_dir=True) == 0
        assert torch.backends.cuda.matmul.allow_tf32 is tf32


def test_tokenised_data_without_an_evaluation_set_is_told_as_that(tiny, capsys):
    saved = tiny.folder / "tokens"
    assert tiny.train("tokens_made", tokenized_path=saved) == 0
    assert tiny.train("no_eval", tokenized_path=saved, evaluation_strategy="epoch") == 2
    message = capsys.readouterr().err
    assert f"tokenized_path: the tokenised data has no evaluation set; make {saved} anew" in message


def test_marks_of_a_template_that_the_tokenizer_splits_are_named(tmp_path, tiny, capsys):
    chatml, llama3 = (
        Tokenizer.from_folder(make_tokenizer(tmp_path / kind, kind)) for kind in ("chatml", "llama3")
    )
    assert marks_split_up(TEMPLATES["chatml"], chatml) == marks_split_up(TEMPLATES["llama3"], llama3) == []
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert marks_split_up(TEMPLATES["llama3"], chatml) == names
    for name in ("alpaca", "vicuna", "default", "zephyr", "empty"):  # whose marks are plain text everywhere
        assert marks_split_up(TEMPLATES[name], chatml) == []
    assert marks_split_up(JinjaTemplate("{{ messages[0].content }}<|eot_id|>", None), chatml) == []
    assert tiny.train("marks", template="llama3", max_steps=1) == 0
    told = capsys.readouterr().out
    assert "note: template llama3: <|start_header_id|>" in told and "split into letters" in told


def test_bitsandbytes_advice_on_a_package_that_a_room_hides_stays_out_of_the_log(caplog):
    pytest.importorskip("bitsandbytes")
    make_optimizer(nn.Linear(4, 4), OptimOptions(optim="adamw_8bit"))
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Please make sure you already `pip install kernels` and the kernels >= %s", "0.11.1")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("key", ["om_hub_url", "cloud_file_name"])
def test_a_source_that_is_known_and_not_read_is_told_as_that(key):
    with pytest.raises(UserError, match=f"{key}: .*download the data once and give file_name"):
        parse_entry("d", {key: "x/y"}, "data")
    assert parse_entry("d", {key: "x/y", "hf_hub_url": "a/b"}, "data").location == "a/b"


def test_an_adapter_with_a_score_head_is_refused_for_that(tmp_path):
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="task_type SEQ_CLS: it ends in a score head.*stage=rm"):
        read_adapter_config(tmp_path)
