"""Ranks that save beside the training leave the files of those that save at once, and lose nothing when they
are killed."""

import signal

import pytest
import torch
from stage_runs import METHODS, stage_keys, write_stage_data
from tiny_runs import (
    assert_same_checkpoint,
    assert_same_weights,
    fork_ranks,
    start_ranks_in_turn,
    tiny_runs,
    train_slowly,
    wait_for_all,
)

from parallel.world import World
from training import run_folder

FSDP, DDP, TP = {"parallel": "fsdp"}, {"parallel": "ddp"}, {"tp_size": 2}
HSDP = {"parallel": "hsdp", "dp_shard_size": 2}
# ranks -> name -> stage, method, keys
RUNS = {
    2: {
        "full-fsdp": ("sft", "full", FSDP),
        "full-ddp": ("sft", "full", DDP),
        "freeze-fsdp": ("sft", "freeze", FSDP),
        "lora-ddp": ("sft", "lora", DDP | {"lora_dropout": 0.1}),
        "qlora-fsdp": ("sft", "qlora", FSDP | {"additional_target": "embed_tokens"}),
        "rm-full-fsdp": ("rm", "full", FSDP),
        "ppo-lora-fsdp": ("ppo", "lora", FSDP),
        "full-tp": ("sft", "full", TP),
        "8bit-ddp": ("sft", "full", DDP | {"optim": "adamw_8bit"}),
        "adafactor-fsdp": ("sft", "full", FSDP | {"optim": "adafactor"}),
    },
    4: {"full-hsdp": ("sft", "full", HSDP), "full-tp-fsdp": ("sft", "full", FSDP | TP)},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("saving-ranks")) as made:
        write_stage_data(made, 11)
        yield made


@pytest.mark.parametrize("ranks", RUNS)
def test_the_files_are_those_of_saving_at_once(tiny, ranks):
    lasting = {"num_train_epochs": None, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    words = []
    for name, (stage, method, keys) in RUNS[ranks].items():
        for beside in (False, True):
            keys = METHODS[method] | lasting | keys | {"async_save": beside, "overwrite_cache": True}
            words.append(tiny.words(f"{name}-{beside}", **stage_keys(tiny, stage, **keys)))
    wait_for_all(start_ranks_in_turn(words, tiny.folder / f"files-{ranks}", ranks), 900)
    for name in RUNS[ranks]:
        assert tiny.checkpoints(f"{name}-True") == tiny.checkpoints(f"{name}-False") == [1, 2]
        for step in (1, 2):
            sides = (tiny.folder / f"{name}-{beside}" / f"checkpoint-{step}" for beside in (True, False))
            assert_same_checkpoint(*sides)
        assert_same_weights(tiny.weights(f"{name}-True"), tiny.weights(f"{name}-False"))


def test_a_rank_that_is_killed_while_threads_write_is_named_and_costs_nothing_but_that(tiny):
    keys = FSDP | {"finetuning_type": "full", "max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    folder, words = tiny.folder / "killed", tiny.words("killed", **keys, async_save=True)
    ranks = fork_ranks(train_slowly, (words,), tiny.folder / "killed-said", 2)
    ranks[1].wait_for(lambda: tiny.checkpoints("killed"))
    ranks[1].wait_for(lambda: list(folder.glob(".tmp-checkpoint-*/training_state.pt")))
    ranks[1].signal(signal.SIGKILL)
    status, text = ranks[0].wait(120), ranks[0].text()
    assert status == 1 and "rank 1 on " in text and "is gone after step" in text, text
    assert f"continues from {folder}/checkpoint-" in text and "Traceback" not in text, text
    for path in run_folder.list_checkpoints(folder):
        run_folder.check_files(path, World(0, 1, 0, torch.device("cpu")))
    calm = tiny.words("calm", **keys)
    wait_for_all(start_ranks_in_turn([words, calm], tiny.folder / "again-said", 2), 300)
    assert not list(folder.glob(".tmp-*"))
    assert tiny.losses("killed") == tiny.losses("calm")
    assert_same_weights(tiny.weights("killed"), tiny.weights("calm"))
