"""Two processes over gloo give the gradients and the weights of one."""

import os
import subprocess
import sys
import time

import pytest
import torch
from tiny_runs import ROOT, assert_same_weights, fork_ranks, free_port, start_ranks, tiny_runs

import parallel.world
import train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("parallel")) as made:
        yield made


SGD = {"optim": "sgd", "learning_rate": 0.3, "num_train_epochs": 3}
METHODS = {
    "full": {"finetuning_type": "full", **SGD},
    "lora": {"use_dora": True, "gradient_checkpointing": True, **SGD},
    "packing": {"packing": True, "cutoff_len": 64, "finetuning_type": "full", **SGD},
    "streaming": {"streaming": True, "buffer_size": 5, **SGD, "num_train_epochs": None, "max_steps": 5},
}


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_the_weights_of_one_process(tiny, method):
    """19 rows in groups of 8: in the last group of an epoch the second rank has one row and one empty
    batch."""
    keys = METHODS[method] | {"val_size": 0 if method == "streaming" else 4, "do_eval": method != "streaming"}
    keys |= {"do_train": True, "logging_steps": 2}
    one = keys | {"per_device_train_batch_size": 8}
    two = keys | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert tiny.train(f"{method}-1", **one) == 0
    ranks = start_ranks(tiny.words(f"{method}-2", **two), tiny.folder / method)
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.text() for rank in ranks)
    assert tiny.losses(f"{method}-2") == pytest.approx(tiny.losses(f"{method}-1"), abs=3e-5)
    assert_same_weights(tiny.weights(f"{method}-2"), tiny.weights(f"{method}-1"), tolerance=3e-6)
    seen = [tiny.results(f"{method}-{n}") for n in (1, 2)]
    assert seen[0]["train_loss"] == pytest.approx(seen[1]["train_loss"], abs=3e-5)
    if keys["do_eval"]:
        assert seen[0]["eval_loss"] == pytest.approx(seen[1]["eval_loss"], abs=3e-5)
    assert ranks[1].text() == ""  # only rank 0 speaks


def train_with_a_bad_loss(words: list[str], step: int) -> int:
    """In a child: the last rank's loss of this update is not a number."""
    plain, calls = train.update, []

    def update(model, optimizer, stage, *others):
        calls.append(1)
        stage.__dict__.pop("loss", None)
        if len(calls) == step and os.environ["RANK"] == "1":
            loss = stage.loss
            stage.loss = lambda *inputs: [loss(*inputs)[0] * torch.nan, loss(*inputs)[1]]
        return plain(model, optimizer, stage, *others)

    train.update = update
    return train.main(words)


@pytest.mark.parametrize("fp16", [False, True])
def test_a_bad_loss_on_one_rank_stops_all_and_names_its_rows(tiny, fp16):
    keys = {"fp16": fp16, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 2}
    words = tiny.words(f"bad-{fp16}", **keys)
    ranks = fork_ranks(train_with_a_bad_loss, (words, 2), tiny.folder / f"bad-output-{fp16}", 2)
    assert [rank.wait(100) for rank in ranks] == [1, 1]
    for rank in ranks:  # all say the same
        assert "finite number at step 2; rows of that update: rank 1: " in rank.text(), rank.text()
        assert "rank 0: " not in rank.text()
    assert not tiny.checkpoints(f"bad-{fp16}")


def test_bad_gradients_that_no_loss_has_shown_name_the_rows_of_all(tiny):
    keys = {"learning_rate": 1e30, "max_grad_norm": 0, "save_strategy": "steps", "save_steps": 4}
    ranks = start_ranks(tiny.words("bad", **keys), tiny.folder / "bad-output")
    assert [rank.wait(100) for rank in ranks] == [1, 1]
    text = "".join(rank.text() for rank in ranks)
    assert "at step 2; rows of that update: rank 0: " in text and "; rank 1: " in text, text
    assert not tiny.checkpoints("bad")


def test_torchrun_trains_and_a_signal_to_it_leaves_a_checkpoint(tiny):
    log = tiny.folder / "torchrun/trainer_log.jsonl"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    words = tiny.words("torchrun", num_train_epochs=2000, per_device_train_batch_size=1)
    process = subprocess.Popen([*command, str(ROOT / "train.py"), *words], stdout=-1, stderr=-2, text=True)
    for _ in range(600):
        if log.exists() and len(tiny.log("torchrun")) > 3:
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.terminate()
    text, _ = process.communicate(timeout=60)
    assert len(tiny.checkpoints("torchrun")) == 1 and "SIGTERM: stopped after step" in text, text


def train_elsewhere(words: list[str], folder) -> int:
    """In a child: as on a node with a disk of its own."""
    os.chdir(folder / os.environ["RANK"])
    return train.main(words)


def test_ranks_without_a_common_disk_are_told_so_at_the_start(tiny, tmp_path):
    words = tiny.words("unused", output_dir="run", save_strategy="steps", save_steps=2)
    for rank in range(2):
        (tmp_path / f"{rank}/run").mkdir(parents=True)
    children = fork_ranks(train_elsewhere, (words, tmp_path), tmp_path / "output", 2)
    assert [child.wait() for child in children] == [2, 2]
    for child in children:
        assert (
            "output_dir: run: what rank 0 on " in child.text() and "is not seen by rank 1 on" in child.text()
        )
        assert "trainable" not in child.text()
    assert not list(tmp_path.glob("*/run/*")) and not list(tmp_path.glob("*/run/.*"))


def test_one_process_needs_no_group():
    world = parallel.world.start("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.max_over_ranks(3, 0) == [3, 0] and world.any(True) and not world.any(False)
    assert world.sum(torch.ones(2)).tolist() == [1, 1]
    parallel.world.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device: cuda asked for, but torch sees no GPU"):
        parallel.world.start("cuda")
