"""When one rank of a run fails: all end and say which and why, and the next start goes on."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from stage_runs import stage_keys, write_stage_data
from tiny_runs import ROOT, assert_same_weights, fork, fork_ranks, free_port, meeting, start_ranks, tiny_runs

import train
from training import run, run_folder

LONG = {"num_train_epochs": 900, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("failures")) as made:
        write_stage_data(made)
        yield made


def ended(ranks, seconds: float = 120) -> tuple[list[int], list[str]]:
    return [rank.wait(seconds) for rank in ranks], [rank.text() for rank in ranks]


def train_with_little_room(words: list[str], full: int, limit: int) -> int:
    """In a child: rank `full` has a disk that takes files up to this size."""
    if os.environ["RANK"] == str(full):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return train.main(words)


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize(
    ("full", "what"), [(0, "weights"), (0, "optimizer"), (1, "random state"), (1, "optimizer")]
)
def test_a_disk_that_is_full_for_one_rank_ends_all_and_leaves_nothing_half_written(tiny, full, what, beside):
    weights = (tiny.model / "model.safetensors").stat().st_size  # the state of half of them is longer
    limit = {"random state": 2_000, "weights": weights - 9_000, "optimizer": weights + 600}[what]
    name = f"full-{full}-{limit}-{beside}"
    keys = {"finetuning_type": "full", "parallel": "fsdp", "max_steps": 2, "save_strategy": "steps"}
    words = tiny.words(name, **keys, save_steps=1, logging_steps=9, async_save=beside)
    ranks = fork_ranks(train_with_little_room, (words, full, limit), tiny.folder / f"{name}-said", 2)
    statuses, texts = ended(ranks)
    assert statuses == [1, 1], texts
    assert f"output_dir: {tiny.folder / name}/checkpoint-1 could not be written" in texts[0], texts
    assert "could not be written" in texts[1] and "Traceback" not in "".join(texts)
    assert not list((tiny.folder / name).glob("*checkpoint-*"))


def die_while_saving(words: list[str]) -> int:
    """In a child: rank 1 is killed in the middle of the second checkpoint, while rank 0 writes weights."""
    trained, times = run.trained, []

    def trained_or_not(*given):
        write = trained(*given)

        def write_or_die(*place):
            times.append(1)
            if os.environ["RANK"] == "1" and len(times) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*place)

        return write_or_die

    run.trained = trained_or_not
    return train.main(words)


def test_a_rank_that_dies_in_a_checkpoint_is_named_and_the_one_before_goes_on(tiny):
    keys = {"finetuning_type": "full", "parallel": "fsdp", "save_strategy": "steps", "save_steps": 2}
    words = tiny.words("died", **keys, max_steps=5, num_train_epochs=None)
    ranks = fork_ranks(die_while_saving, (words,), tiny.folder / "died-said", 2)
    statuses, texts = ended(ranks)
    assert statuses == [1, -9], texts
    assert "rank 1 on " in texts[0] and "is gone after step 4" in texts[0], texts
    assert f"continues from {tiny.folder}/died/checkpoint-2" in texts[0] and "Traceback" not in texts[0]
    assert tiny.checkpoints("died") == [2]
    statuses, texts = ended(start_ranks(words, tiny.folder / "died-again"))
    assert statuses == [0, 0] and "resuming" in texts[0] and tiny.checkpoints("died") == [2, 4, 5], texts
    assert not list((tiny.folder / "died").glob(f"{run_folder.TEMPORARY}*"))


def test_all_ranks_killed_in_a_checkpoint_go_on_from_the_one_before(tiny):
    keys = LONG | {"parallel": "fsdp", "finetuning_type": "full", "lr_scheduler_type": "constant"}
    words = tiny.words("killed", **keys)
    ranks = start_ranks(words, tiny.folder / "killed-said")

    def half_written() -> bool:
        written = [
            path.stem for path in (tiny.folder / "killed").glob(f"{run_folder.TEMPORARY}checkpoint-*/*")
        ]
        return bool(tiny.checkpoints("killed") and written)

    ranks[0].wait_for(half_written, 120)
    for rank in ranks:
        rank.signal(signal.SIGKILL)
    assert ended(ranks)[0] == [-9, -9]
    last = tiny.checkpoints("killed")[-1]
    words = tiny.words("killed", **keys | {"max_steps": last + 2, "num_train_epochs": None})
    statuses, texts = ended(start_ranks(words, tiny.folder / "killed-again"))
    assert statuses == [0, 0] and f"checkpoint-{last} at step {last}" in texts[0], texts


def with_a_bad_row(words: list[str]) -> int:
    """In a child: the loss of rank 1 is no number in the second update."""
    plain, updates = train.update, []

    def update(model, optimizer, stage, group, scaler, world, limit):
        updates.append(1)
        if world.rank == 1 and len(updates) == 2:
            loss = type(stage).loss
            stage.loss = lambda *row: (loss(stage, *row)[0] * float("nan"), {})
        return plain(model, optimizer, stage, group, scaler, world, limit)

    train.update = update
    return train.main(words)


def test_a_loss_that_is_no_number_on_one_rank_is_told_with_its_rows_alone(tiny):
    keys = {"parallel": "fsdp", "finetuning_type": "full", "per_device_train_batch_size": 2}
    words = tiny.words("nan", **keys, max_steps=4, num_train_epochs=None, logging_steps=3)
    statuses, texts = ended(fork_ranks(with_a_bad_row, (words,), tiny.folder / "nan-said", 2))
    assert statuses == [1, 1], texts
    for text in texts:
        assert "at step 2; rows of that update: rank 1: rows row " in text.replace(str(tiny.data), "rows"), (
            text
        )
        assert "rank 0: " not in text and "Traceback" not in text


def test_ranks_that_never_come_and_addresses_that_are_none_are_named(tiny):
    words = tiny.words("alone", **LONG, ddp_timeout=2)
    held = {"MASTER_PORT": meeting(), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    starts = {"absent": {"RANK": "0", **held}, "nobody": {"RANK": "1", "MASTER_PORT": free_port()}}
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    ranks = {
        name: fork(train.main, (words,), tiny.folder / f"{name}-said", world | start)
        for name, start in starts.items()
    }
    statuses, (absent, nobody) = ended(list(ranks.values()))
    assert statuses == [1, 1], (absent, nobody)
    assert "rank 0 of 2 did not meet the others at 127.0.0.1:" in absent and "(rank 1 did not come)" in absent
    assert f"rank 1 of 2 did not meet the others at 127.0.0.1:{starts['nobody']['MASTER_PORT']} " in nobody
    assert "ddp_timeout" in absent + nobody and "Traceback" not in absent + nobody


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_stands_still_is_named_after_ddp_timeout(tiny, size):
    """On four ranks in groups of a mesh, where torch's own patience would be half an hour."""
    keys = LONG if size == 2 else LONG | {"parallel": "hsdp", "dp_shard_size": 2}
    words = tiny.words(f"still-{size}", **keys, ddp_timeout=5)
    ranks = start_ranks(words, tiny.folder / f"still-said-{size}", size)
    ranks[1].wait_for(lambda: tiny.checkpoints(f"still-{size}"))
    ranks[1].signal(signal.SIGSTOP)
    status = ranks[0].wait(120)
    ranks[1].signal(signal.SIGKILL)
    text = ranks[0].text()
    assert status == 1 and "rank 1 on " in text and "is stopped (SIGSTOP) after step " in text, text
    assert f"continues from {tiny.folder}/still-{size}/checkpoint-" in text and "Traceback" not in text


REWARD = """import os


def letters(completions, **others):
    with open(os.path.join(os.path.dirname(__file__), "calls-" + os.environ["RANK"]), "a") as calls:
        calls.write("1")
        if os.environ["RANK"] == "1" and calls.tell() == 2:
            raise ValueError("the judge is away")
    return [text.count("e") - len(text) / 20 for text in completions]
"""


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_reward_that_fails_on_one_rank_leaves_a_checkpoint_on_all(tiny, stage):
    folder = tiny.folder / f"reward-{stage}"
    folder.mkdir()
    (folder / "rewards.py").write_text(REWARD)
    keys = stage_keys(tiny, stage, max_steps=8, num_train_epochs=None, save_strategy="steps", save_steps=99)
    words = tiny.words(f"judged-{stage}", **keys | {"reward_file": folder / "rewards.py"})
    statuses, texts = ended(start_ranks(words, folder / "said"))
    assert statuses == [1, 1], texts
    (step,) = tiny.checkpoints(f"judged-{stage}")
    for text in texts:
        assert (
            "the judge is away" in text
            and f"continues from {tiny.folder}/judged-{stage}/checkpoint-{step}" in text
        )
    statuses, texts = ended(start_ranks(words, folder / "again"))
    assert statuses == [0, 0] and "resuming" in texts[0], texts


def torchrun(tiny, name: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    command += [f"--master_port={free_port()}", str(ROOT / "train.py"), *words]
    return subprocess.Popen(command, stdout=-1, stderr=-2, text=True)


def ranks_of(launcher: int) -> list[int]:
    found = subprocess.run(
        ["ps", "--ppid", str(launcher), "-o", "pid="], capture_output=True, text=True
    ).stdout
    return sorted(map(int, found.split()))


def test_torchrun_starts_a_run_again_that_goes_on_even_if_it_overwrites(tiny):
    keys = {"lora_dropout": 0.2, "per_device_train_batch_size": 1, "save_steps": 2, "save_strategy": "steps"}
    keys |= {"max_steps": 40, "num_train_epochs": None}
    assert tiny.train("again", max_steps=1, save_strategy="steps", save_steps=1) == 0  # what is overwritten
    process = torchrun(tiny, "again", *tiny.words("again", **keys, overwrite_output_dir=True))
    end = time.monotonic() + 120
    while not {2, 4, 6}.intersection(tiny.checkpoints("again")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "is gone after step" in text and "resuming" in text, text
    assert text.count("removed 1 checkpoints of the earlier run") == 1
    statuses, texts = ended(start_ranks(tiny.words("calm", **keys), tiny.folder / "calm-said"))
    assert statuses == [0, 0], texts
    assert tiny.losses("again") == tiny.losses("calm")
    assert_same_weights(tiny.weights("again"), tiny.weights("calm"))


def test_a_preempted_run_ends_with_0_when_asked(tiny):
    ranks = start_ranks(tiny.words("taken", **LONG, enable_jit_checkpoint=True), tiny.folder / "taken-said")
    ranks[1].wait_for(lambda: tiny.checkpoints("taken"))
    ranks[1].signal(signal.SIGTERM)
    statuses, texts = ended(ranks)
    assert statuses == [0, 0] and "SIGTERM: stopped after step" in texts[0], texts
    assert not (tiny.folder / "taken" / run_folder.RESULTS).exists()
