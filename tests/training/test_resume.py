"""A run that was stopped, killed or broken off, and resumed, ends with the bits of one that never stopped."""

import json
import random
import shutil
import signal
import socket
import time

import pytest
import torch
from tiny_runs import assert_same_weights, fork, start_ranks, tiny_runs

import train
from checkpoints import huggingface
from pipeline import prefetch
from training import run_folder

LONG = {
    "num_train_epochs": 8,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 3,
}  # 56 updates
NOISY = {"lora_dropout": 0.2, "neftune_noise_alpha": 5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("resume")) as made:
        yield made


def halves(tiny, name: str, stop: int, **keys) -> None:
    """Train at once as <name>-whole, and in two processes' worth of calls as <name>-parts; then compare."""
    keys = {"save_strategy": "steps", "save_steps": stop, "logging_steps": 2, **keys}
    assert tiny.train(f"{name}-whole", **keys) == 0
    folder = tiny.folder / f"{name}-parts"
    shutil.copytree(tiny.folder / f"{name}-whole", folder)
    for path in folder.iterdir():  # as if the process had died just after this checkpoint
        if path.name != f"checkpoint-{stop}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = (tiny.folder / f"{name}-whole" / "trainer_log.jsonl").read_text()
    (folder / "trainer_log.jsonl").write_text(log + '{"current_steps": 99')  # and in the middle of a line
    torch.manual_seed(0)
    assert tiny.train(f"{name}-parts", **keys) == 0
    assert_equal_runs(tiny, f"{name}-whole", f"{name}-parts")


def assert_equal_runs(tiny, whole: str, parts: str) -> None:
    assert tiny.losses(whole) == tiny.losses(parts)
    assert [entry["current_steps"] for entry in tiny.log(whole)] == [
        e["current_steps"] for e in tiny.log(parts)
    ]
    assert_same_weights(tiny.weights(whole), tiny.weights(parts))
    assert tiny.results(whole)["train_loss"] == tiny.results(parts)["train_loss"]
    last = max(tiny.checkpoints(whole))
    states = [
        run_folder.read_state(tiny.folder / name / f"checkpoint-{last}" / run_folder.STATE_FILE)
        for name in (whole, parts)
    ]
    assert states[0]["scaler"] == states[1]["scaler"]
    optimizers = [state["optimizer"]["state"] for state in states]
    assert optimizers[0].keys() == optimizers[1].keys()
    for index in optimizers[0]:
        assert_equal_states(optimizers[0][index], optimizers[1][index])


def assert_equal_states(mine: dict, other: dict) -> None:
    """bitsandbytes has a dict within the dict, and counts steps without a tensor."""
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        if isinstance(value, dict):
            assert_equal_states(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["mid-epoch", "epoch border", "between log lines"])
def test_lora_with_dropout_noise_and_accumulation_resumes_exactly(tiny, stop):
    halves(tiny, f"noisy{stop}", stop, gradient_accumulation_steps=2, per_device_train_batch_size=2, **NOISY)


@pytest.mark.parametrize(
    "keys",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "num_layer_trainable": 1},
        {"use_dora": True, **NOISY},
        {"packing": True, "cutoff_len": 64, "per_device_train_batch_size": 1},
        {"group_by_length": True},
        {"streaming": True, "max_steps": 8, "buffer_size": 7},
        {"fp16": True, **NOISY},
        {"bf16": True, "finetuning_type": "full"},
        {"pure_bf16": True},
        {"optim": "adafactor"},
        {
            "optim": "adamw_8bit",
            "finetuning_type": "full",
        },  # the head is large enough for 8 bits, the rest is not
        {"optim": "lion_8bit", "finetuning_type": "full", "learning_rate": 1e-3},
        {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2, "max_steps": 9},
    ],
    ids=lambda keys: "-".join(keys)[:40],
)
def test_every_kind_of_run_resumes_exactly(tiny, keys):
    name = "-".join(f"{key}={keys[key]}" for key in keys)[:40]
    halves(tiny, name, stop=4, **keys)
    if str(keys.get("optim")).endswith("8bit"):
        last = tiny.folder / f"{name}-parts" / f"checkpoint-{max(tiny.checkpoints(f'{name}-parts'))}"
        states = run_folder.read_state(last / run_folder.STATE_FILE)["optimizer"]["state"].values()
        kinds = {tensor.dtype for state in states for each in state.values() if isinstance(each, dict)
                 for name, tensor in each.items() if name == "state1"}  # fmt: skip
        assert kinds == {torch.uint8, torch.float32}


def test_a_resumed_run_remembers_the_best_and_the_evaluations_without_gain(tiny):
    keys = {"val_size": 4, "evaluation_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    halves(tiny, "best", stop=2, load_best_model_at_end=True, max_steps=8, **keys)
    states = [
        json.loads((tiny.folder / n / "trainer_state.json").read_text()) for n in ("best-whole", "best-parts")
    ]
    assert states[0]["best_metric"] == states[1]["best_metric"]
    names = [entry["best_model_checkpoint"].rpartition("/")[2] for entry in states]
    assert names[0] == names[1]
    entries = [
        [(e["step"], e.get("loss"), e.get("eval_loss")) for e in state["log_history"]] for state in states
    ]
    assert entries[0] == entries[1]


@pytest.fixture(scope="module")
def long_run(tiny):
    """The uninterrupted run that the interrupted ones are compared with."""
    assert tiny.train("long", save_strategy="steps", save_steps=40, **LONG, **NOISY) == 0
    return "long"


def train_with_a_thread(words: list[str]) -> int:
    """As on a GPU, where the next batches are prepared by a thread."""
    train.ahead = lambda items, depth: prefetch.ahead(items, 4)
    return train.main(words)


@pytest.mark.parametrize("threaded", [False, True], ids=["", "with a thread"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_complete_checkpoint_and_the_status_of_the_signal(tiny, long_run, number, threaded):
    name = f"signal{int(number)}{threaded}"
    keys = {"save_strategy": "steps", "save_steps": 40, **LONG, **NOISY}
    start = train_with_a_thread if threaded else train.main
    environment = {"XDG_CACHE_HOME": str(tiny.folder / "cache")}
    child = fork(start, (tiny.words(name, **keys),), tiny.folder / f"{name}.txt", environment)
    log = tiny.folder / name / "trainer_log.jsonl"
    child.wait_for(lambda: log.exists() and log.read_text().count("\n") >= 5)
    child.signal(number)
    assert child.wait() == 128 + number
    assert f"{number.name}: stopped after step" in child.text()
    (stopped,) = tiny.checkpoints(name)
    assert 5 <= stopped < 56 and stopped == len(tiny.log(name))
    assert tiny.train(name, **keys) == 0
    assert_equal_runs(tiny, long_run, name)


def test_touching_save_makes_a_checkpoint_that_resumes_exactly(tiny, long_run):
    keys = {"save_strategy": "no", "logging_steps": 10, **LONG, **NOISY}
    folder = tiny.folder / "asked"
    child = tiny.child("asked", **keys)
    child.wait_for(lambda: (folder / "trainer_log.jsonl").exists())
    (folder / "SAVE").touch()
    child.wait_for(lambda: tiny.checkpoints("asked"))
    child.signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "SAVE").exists()
    assert tiny.train("asked", **keys) == 0
    assert_same_weights(tiny.weights(long_run), tiny.weights("asked"))
    assert tiny.results(long_run)["train_loss"] == pytest.approx(
        tiny.results("asked")["train_loss"], abs=1e-12
    )


def test_kill_9_at_random_moments_changes_nothing(tiny, long_run):
    keys = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2, **LONG, **NOISY}
    moments = random.Random()
    folder, in_writing = tiny.folder / "killed", 0
    for attempt in range(9):
        child = tiny.child("killed", **keys)
        if attempt % 3 == 2:  # while a checkpoint is being written
            child.wait_for(lambda: list(folder.glob(".tmp-checkpoint-*")))
        elif attempt % 3 == 1:
            time.sleep(moments.uniform(0.1, 0.9))
        else:
            child.wait_for(lambda: (folder / "trainer_log.jsonl").exists())
            time.sleep(moments.uniform(0, 0.2))
        child.signal(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:
            break  # it was faster
        in_writing += bool(list(folder.glob(".tmp-*")))
        for path in run_folder.list_checkpoints(folder):
            run_folder.read_state(path / run_folder.STATE_FILE)
            huggingface.read_adapter_tensors(path)
    assert in_writing
    assert tiny.child("killed", **keys).wait() == 0
    assert not list(folder.glob(".tmp-*"))
    assert tiny.losses("killed") == tiny.losses(long_run)
    assert_same_weights(tiny.weights("killed"), tiny.weights(long_run))
    assert tiny.checkpoints("killed") == [52, 56]


def test_two_processes_resume_exactly(tiny):
    keys = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "logging_steps": 2, **NOISY}
    keys |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    for name, last in (("ranks-whole", 7), ("ranks-parts", 7)):
        if name == "ranks-parts":
            shutil.copytree(
                tiny.folder / "ranks-whole/checkpoint-3", tiny.folder / "ranks-parts/checkpoint-3"
            )
        words = tiny.words(name, **keys)
        statuses = [child.wait() for child in start_ranks(words, tiny.folder / f"{name}.txt")]
        assert statuses == [0, 0], [path.read_text() for path in tiny.folder.glob(f"{name}.[01]")]
        assert max(tiny.checkpoints(name)) == last
    assert "resuming" in (tiny.folder / "ranks-parts.0").read_text()
    states = [
        run_folder.read_state(tiny.folder / f"ranks-whole/checkpoint-3/rank_state_{rank}.pt")
        for rank in range(2)
    ]
    assert not torch.equal(
        states[0]["random"]["cpu"], states[1]["random"]["cpu"]
    )  # ranks draw dropout of their own
    # the log of the second run has no line for step 2, which was not copied along
    whole = tiny.losses("ranks-whole")
    assert tiny.losses("ranks-parts") == {step: loss for step, loss in whole.items() if step > 3}
    assert_same_weights(tiny.weights("ranks-whole"), tiny.weights("ranks-parts"))


@pytest.mark.parametrize("killed", [1, 0])  # rank 0 takes the store of the process group with it
def test_a_rank_that_is_killed_is_named_by_the_others(tiny, killed):
    name = f"dead-{killed}"
    words = tiny.words(name, save_strategy="steps", save_steps=1, num_train_epochs=900)
    ranks = start_ranks(words, tiny.folder / f"{name}.txt")
    ranks[killed].wait_for(lambda: tiny.checkpoints(name))
    ranks[killed].signal(signal.SIGKILL)
    assert ranks[1 - killed].wait() == 1
    text, last = ranks[1 - killed].text(), max(tiny.checkpoints(name))
    gone = f"rank {killed} on {socket.gethostname()} is gone; the same command continues from "
    assert f"{gone}{tiny.folder / name}/checkpoint-{last}\n" in text and "Traceback" not in text


# What may be resumed, and what is said when it may not


@pytest.fixture(scope="module")
def saved(tiny):
    """A run with checkpoints 2, 4, 6, 8, 10 that is finished."""
    assert tiny.train("saved", save_strategy="steps", save_steps=2) == 0
    assert tiny.checkpoints("saved") == [2, 4, 6, 8, 10]
    return tiny.folder / "saved"


@pytest.fixture
def copied(tiny, saved, tmp_path):
    """The same without its results, as if it had been killed after the last huggingface."""
    folder = shutil.copytree(saved, tmp_path / "copied")
    (folder / "train_results.json").unlink()
    return folder


def resume(tiny, folder, **keys) -> int:
    return tiny.train("unused", output_dir=folder, **{"save_strategy": "steps", "save_steps": 2, **keys})


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 0.5},
        {"lora_rank": 4},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"seed": 7},
        {"cutoff_len": 32},
        {"finetuning_type": "full"},
        {"optim": "sgd"},
        {"bf16": True},
        {"lora_dropout": 0.5},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_other_settings_are_refused_by_name(tiny, copied, capsys, changed):
    shutil.rmtree(copied / "checkpoint-10")
    assert resume(tiny, copied, **changed) == 2
    (key, value), *_ = changed.items()
    assert f"{key} was " in capsys.readouterr().err


def test_other_data_is_refused(tiny, copied, capsys):
    data = copied.parent / "rows.json"
    data.write_text(json.dumps(json.loads(tiny.data.read_text())[:-1]))
    assert resume(tiny, copied, dataset=data) == 2
    assert "training data was 19 examples" in capsys.readouterr().err


def test_data_of_the_same_size_with_rows_exchanged_is_refused(tiny, tmp_path, capsys):
    rows, data = json.loads(tiny.data.read_text()), tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    assert resume(tiny, tmp_path / "run", dataset=data, max_steps=2) == 0
    (tmp_path / "run/train_results.json").unlink()
    assert resume(tiny, tmp_path / "run", dataset=data, max_steps=3) == 0
    rows[3], rows[5] = rows[5], rows[3]
    data.write_text(json.dumps(rows))
    assert resume(tiny, tmp_path / "run", dataset=data, max_steps=4) == 2
    error = capsys.readouterr().err
    assert "content of training data was" in error and "; training data was" not in error


def test_length_and_bookkeeping_may_change(tiny, copied, capsys):
    changed = {
        "num_train_epochs": 3,
        "logging_steps": 5,
        "save_steps": 5,
        "report_to": "none",
        "plot_loss": True,
    }
    assert resume(tiny, copied, **changed) == 0
    assert "checkpoint-10 at step 10 of 15" in capsys.readouterr().out
    assert max(tiny.checkpoints(copied)) == 15


def test_a_finished_run_does_nothing_and_succeeds(tiny, saved, capsys):
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*") if path.name != "run_config.yaml"}
    assert resume(tiny, saved) == 0
    assert "already trained to step 10" in capsys.readouterr().out
    assert before == {
        path: path.stat().st_mtime_ns for path in saved.rglob("*") if path.name != "run_config.yaml"
    }


def test_a_run_killed_before_its_result_was_written_gets_one(tiny, saved, copied):
    (copied / "adapter_model.safetensors").unlink()
    assert resume(tiny, copied) == 0
    assert_same_weights(tiny.weights(saved), tiny.weights(copied))
    assert tiny.results(copied)["train_loss"] == tiny.results(saved)["train_loss"]


def test_a_damaged_checkpoint_is_named_with_the_way_out(tiny, copied, capsys):
    for file in ("training_state.pt", "rank_state_0.pt", "adapter_model.safetensors", "trainer_state.json"):
        folder = shutil.copytree(copied, copied.parent / f"without-{file}")
        path = folder / "checkpoint-10" / file
        path.write_bytes(path.read_bytes()[:-100])
        assert resume(tiny, folder, num_train_epochs=3) == 2, file
        error = capsys.readouterr().err
        assert str(path) in error and ("damaged" in error or "not a complete" in error)
        assert resume(tiny, folder, resume_from_checkpoint=folder / "checkpoint-8") == 0
        assert "checkpoint-10 is newer than checkpoint-8" in capsys.readouterr().out
        assert tiny.checkpoints(folder)[:5] == [2, 4, 6, 8, 10]
        assert (folder / "old-checkpoint-10").is_dir()


def test_flipped_bits_in_the_state_are_found(tiny, copied, capsys):
    path = copied / "checkpoint-10/training_state.pt"
    content = bytearray(path.read_bytes())
    for place in (2000, len(content) // 2):
        content[place] ^= 16
    path.write_bytes(content)
    assert resume(tiny, copied) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "damaged" in error and "checkpoint-8" in error


def test_resume_from_checkpoint_true_false_and_a_path(tiny, copied, tmp_path, capsys):
    assert resume(tiny, tmp_path / "none", resume_from_checkpoint="true") == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert resume(tiny, copied, resume_from_checkpoint="false") == 2
    assert "overwrite_output_dir=true" in capsys.readouterr().err
    assert resume(tiny, copied, resume_from_checkpoint=tmp_path / "nothing") == 2
    assert "is no complete checkpoint" in capsys.readouterr().err
    assert resume(tiny, copied, resume_from_checkpoint="true", num_train_epochs=3) == 0
    assert "copied/checkpoint-10 at step 10 of 15" in capsys.readouterr().out
    # a path of another folder starts a branch there
    assert resume(tiny, tmp_path / "branch", resume_from_checkpoint=copied / "checkpoint-4") == 0
    assert_same_weights(
        tiny.weights(tmp_path / "branch/checkpoint-10"), tiny.weights(copied / "checkpoint-10")
    )


def test_overwriting_removes_what_would_be_mistaken_for_this_runs(tiny, copied, capsys):
    (copied / "my notes.txt").write_text("mine")
    (copied / "checkpoint-mine").mkdir()
    assert resume(tiny, copied, overwrite_output_dir=True, max_steps=3, save_total_limit=1) == 0
    assert "removed 5 checkpoints" in capsys.readouterr().out
    assert [path.name for path in run_folder.list_checkpoints(copied)] == ["checkpoint-3"]
    assert [entry["current_steps"] for entry in tiny.log(copied)] == [1, 2, 3]
    assert (copied / "my notes.txt").exists() and (copied / "checkpoint-mine").exists()
    # and the next run in the folder goes on from the new checkpoint, not from an old one
    assert resume(tiny, copied, max_steps=5) == 0
    assert "checkpoint-3 at step 3 of 5" in capsys.readouterr().out


def test_overwriting_with_another_method_leaves_one_kind_of_weights(tiny, copied):
    assert resume(tiny, copied, overwrite_output_dir=True, finetuning_type="full", max_steps=2) == 0
    assert (copied / "model.safetensors").exists() and not list(copied.glob("adapter_*"))


def test_a_run_never_removes_what_it_starts_from(tiny, copied, capsys):
    start = copied / "checkpoint-4"
    assert resume(tiny, copied, overwrite_output_dir=True, adapter_name_or_path=start) == 2
    assert "would remove" in capsys.readouterr().err and start.exists()
    model = tiny.make_model("own", seed=3)
    assert resume(tiny, model, model_name_or_path=model) == 2
    assert "output_dir" in capsys.readouterr().err


def test_save_only_model_cannot_be_resumed(tiny, tmp_path, capsys):
    assert resume(tiny, tmp_path / "light", save_only_model=True, max_steps=3) == 0
    assert resume(tiny, tmp_path / "light", save_only_model=True, max_steps=5) == 2
    assert "save_only_model" in capsys.readouterr().err


def test_a_finished_run_without_checkpoints_is_not_overwritten_by_accident(tiny, tmp_path, capsys):
    assert tiny.train("unused", output_dir=tmp_path / "done", max_steps=2) == 0
    assert tiny.train("unused", output_dir=tmp_path / "done", max_steps=2) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert tiny.train("unused", output_dir=tmp_path / "done", max_steps=2, overwrite_output_dir=True) == 0


def test_two_runs_in_one_folder_are_refused(tiny, capsys):
    child = tiny.child("shared", **LONG)
    child.wait_for(lambda: (tiny.folder / "shared/trainer_log.jsonl").exists())
    assert tiny.train("shared", **LONG) == 2
    assert "another training is writing into it" in capsys.readouterr().err
    child.signal(signal.SIGKILL)
    child.wait()
    assert tiny.train("shared", max_steps=1) == 0  # the lock ended with the process


# A full disk


@pytest.mark.parametrize("limit", [9_000, 30_000], ids=["weights", "optimizer state"])
def test_a_full_disk_leaves_earlier_checkpoints_and_nothing_half_written(tiny, saved, tmp_path, limit):
    folder = shutil.copytree(saved / "checkpoint-4", tmp_path / "full/checkpoint-4").parent
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-4").iterdir()}
    keys = {"output_dir": folder, "save_strategy": "steps", "save_steps": 2}
    child = tiny.child("full", file_limit=limit, **keys)
    assert child.wait() == 1
    text = child.text()
    assert f"output_dir: {folder}/checkpoint-6 could not be written" in text and "GB are free" in text
    assert "Traceback" not in text
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-4"] and not list(
        folder.glob(".tmp*")
    )
    assert before == {path.name: path.read_bytes() for path in (folder / "checkpoint-4").iterdir()}
    assert tiny.train("full", **keys) == 0  # room again: the same command goes on
    assert_same_weights(tiny.weights(folder), tiny.weights(saved))
    (tiny.folder / "full.txt").unlink()


def test_a_disk_that_is_full_at_the_end_is_said_so(tiny, tmp_path):
    child = tiny.child("end", file_limit=9_000, output_dir=tmp_path / "end", max_steps=2)
    assert child.wait() == 1
    assert f"output_dir: {tmp_path}/end could not be written" in child.text()
    assert not list((tmp_path / "end").glob("adapter*")) and not list((tmp_path / "end").glob(".tmp*"))


def test_a_disk_too_full_for_log_lines_is_said_so(tiny, tmp_path):
    child = tiny.child("log", file_limit=2500, output_dir=tmp_path / "log")
    assert child.wait() == 1
    assert f"output_dir: {tmp_path}/log: " in child.text() and "make room" in child.text()
    assert "Traceback" not in child.text()
