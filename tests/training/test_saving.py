"""async_save: a thread writes the bytes that saving at once would have written, and nothing is lost."""

import shutil
import signal
import threading
import time

import pytest
import torch
from tiny_runs import assert_same_checkpoint, assert_same_weights, fork, tiny_runs, train_slowly

import train
from options import limits
from options.errors import StopRun
from parallel.world import World
from templates import get_template
from training import memory, run, run_folder
from training.saving import Saver

ONE = World(0, 1, 0, torch.device("cpu"))
NOISY = {"lora_dropout": 0.2, "neftune_noise_alpha": 5}
SAVES = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("saving")) as made:
        chatml = get_template("chatml", None).to_jinja()
        (shutil.copytree(made.model, made.folder / "talks") / "chat_template.jinja").write_text(chatml)
        yield made


def late(monkeypatch, updates: int) -> list[tuple[str, int]]:
    """From here on a thread begins to write when so many more updates are done, or the loop waits for it.
    Gives the names of the checkpoints, and the updates that were done by then."""
    seen, now, turn = [], {"updates": 0, "waits": False}, threading.Condition()
    plain_update, plain_wait, plain_writing = train.update, Saver.wait, run_folder.writing_checkpoint

    def note(**changes) -> None:
        with turn:
            now.update(changes)
            turn.notify_all()

    def update(*given):
        result = plain_update(*given)
        note(updates=now["updates"] + 1)
        return result

    def wait(saver):
        note(waits=True)
        plain_wait(saver)
        note(waits=False)

    def writing(final, world):
        due = int(final.name.partition("-")[2]) + updates
        with turn:
            turn.wait_for(lambda: now["waits"] or now["updates"] >= due)
            seen.append((final.name, now["updates"]))
        return plain_writing(final, world)

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(Saver, "wait", wait)
    monkeypatch.setattr(run_folder, "writing_checkpoint", writing)
    return seen


KINDS = {
    "lora": {**NOISY, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "full": {"finetuning_type": "full", "save_total_limit": 2},
    "in backward": {"finetuning_type": "full", "optim_in_backward": True, "max_grad_norm": 0},
    "8 bits": {"finetuning_type": "full", "optim": "adamw_8bit"},
    "fp16, best": {"fp16": True, "val_size": 4, "evaluation_strategy": "steps", "eval_steps": 2}
    | {"load_best_model_at_end": True, "save_total_limit": 1},
    "weights alone": {"save_only_model": True},
    "template of the checkpoint": {"template": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_thread_writes_later_what_saving_at_once_writes(tiny, tmp_path, monkeypatch, kind):
    """The loop has trained on by two updates before a byte is written, and none of that is in the files."""
    keys = SAVES | {"save_steps": 3, "max_steps": 9} | KINDS[kind]
    keys |= {"save_steps": 4, "max_steps": 8} if kind == "fp16, best" else {}
    keys |= {"model_name_or_path": tiny.folder / "talks"} if "template" in keys else {}
    assert tiny.train("unused", output_dir=tmp_path / "at once", **keys) == 0
    seen = late(monkeypatch, 2)
    monkeypatch.setattr(limits, "_beside", None)  # the thread starts no process to run a template in
    assert tiny.train("unused", output_dir=tmp_path / "beside", async_save=True, **keys) == 0
    first = keys["save_steps"]
    assert seen[0][0] == f"checkpoint-{first}" and seen[0][1] >= first + 2
    steps = tiny.checkpoints(tmp_path / "at once")
    assert tiny.checkpoints(tmp_path / "beside") == steps
    for step in steps:
        assert_same_checkpoint(*(tmp_path / name / f"checkpoint-{step}" for name in ("at once", "beside")))
    assert tiny.losses(tmp_path / "at once") == tiny.losses(tmp_path / "beside")
    assert_same_weights(tiny.weights(tmp_path / "at once"), tiny.weights(tmp_path / "beside"))


def test_kill_9_while_the_thread_writes_leaves_the_earlier_checkpoints(tiny, tmp_path):
    keys = SAVES | NOISY | {"num_train_epochs": None, "max_steps": 40, "per_device_train_batch_size": 1}
    keys |= {"output_dir": tmp_path / "killed", "async_save": True, "save_total_limit": 2}
    child = fork(train_slowly, (tiny.words("unused", **keys),), tmp_path / "said", {})
    child.wait_for(lambda: tiny.checkpoints(tmp_path / "killed"))
    child.wait_for(lambda: list((tmp_path / "killed").glob(".tmp-checkpoint-*/training_state.pt")))
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list((tmp_path / "killed").glob(".tmp-checkpoint-*"))
    for path in run_folder.list_checkpoints(tmp_path / "killed"):
        run_folder.check_files(path, ONE)
    assert tiny.train("unused", **keys) == 0
    assert not list((tmp_path / "killed").glob(".tmp-*"))
    assert tiny.train("unused", **keys | {"output_dir": tmp_path / "calm", "async_save": False}) == 0
    assert tiny.losses(tmp_path / "killed") == tiny.losses(tmp_path / "calm")
    assert_same_weights(tiny.weights(tmp_path / "killed"), tiny.weights(tmp_path / "calm"))


def test_a_signal_waits_for_the_checkpoint_that_is_being_written_and_for_its_own(tiny, tmp_path):
    keys = SAVES | {"num_train_epochs": 900, "per_device_train_batch_size": 1, "async_save": True}
    words = tiny.words("unused", output_dir=tmp_path / "stopped", **keys)
    child = fork(train_slowly, (words,), tmp_path / "said", {})
    child.wait_for(lambda: list((tmp_path / "stopped").glob(".tmp-checkpoint-2/training_state.pt")))
    child.signal(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    first, *others = tiny.checkpoints(tmp_path / "stopped")
    assert first == 2 and f"continues from {tmp_path}/stopped/checkpoint-{others[-1]}" in child.text()
    assert not list((tmp_path / "stopped").glob(".tmp-*"))


@pytest.mark.parametrize("save_steps", [2, 99], ids=["at the next save", "at the end"])
def test_a_disk_that_is_full_for_the_thread_ends_the_run_with_the_words_of_saving_at_once(
    tiny, tmp_path, save_steps
):
    folder = tmp_path / "full"
    assert tiny.train("unused", output_dir=folder, **SAVES, max_steps=4) == 0
    (folder / "train_results.json").unlink()
    keys = {"output_dir": folder, "async_save": True, "max_steps": 10, "save_strategy": "steps"}
    child = tiny.child("full", file_limit=30_000, **keys, save_steps=save_steps)
    assert child.wait() == 1
    step = 6 if save_steps == 2 else 10
    assert f"output_dir: {folder}/checkpoint-{step} could not be written" in child.text(), child.text()
    assert "GB are free" in child.text() and "Traceback" not in child.text()
    assert tiny.checkpoints(folder) == [2, 4] and not list(folder.glob(".tmp*"))
    (tiny.folder / "full.txt").unlink()


def test_what_ends_a_run_waits_for_the_thread_and_stays_what_is_told(capsys):
    written = []

    def write(world):
        time.sleep(0.2)
        written.append(1)
        raise StopRun("no room")

    for error in (StopRun("NaN"), None):
        with (
            pytest.raises(StopRun, match="NaN" if error else "no room"),
            Saver(torch.nn.Linear(1, 1), ONE, True, 60) as saver,
        ):
            kept = saver.take(given := torch.ones(3))
            given += 1
            assert kept.tolist() == [1, 1, 1]
            saver.begin(write)
            if error:
                raise error
            saver.wait()
    assert len(written) == 2 and capsys.readouterr().out == "note: no room\n"


def test_what_a_thread_gets_wrong_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_json", None)
    with pytest.raises(TypeError):
        tiny.train("unused", output_dir=tmp_path / "bug", async_save=True, **SAVES)


def test_the_planner_tells_of_the_bytes_that_are_copied(tiny, tmp_path, monkeypatch, capsys):
    taken, counted, take, copied = [], [], Saver.take, memory.copied
    keys = {"finetuning_type": "full", "output_dir": tmp_path / "run", "async_save": True, "max_steps": 1}
    monkeypatch.setattr(Saver, "take", lambda self, each: (taken.append(each.nbytes), take(self, each))[1])
    monkeypatch.setattr(memory, "copied", lambda *given: counted.append(copied(*given)) or counted[0])
    assert tiny.train("unused", **keys, save_strategy="steps", save_steps=1) == 0
    assert tiny.train("unused", **keys, plan=True) == 0
    assert counted == [pytest.approx(sum(taken), rel=0.001)]  # AdamW has a number of steps for each tensor
    assert "in host memory, while a checkpoint is written: 0.00 GiB of copies" in capsys.readouterr().out
