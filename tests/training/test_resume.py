"""A run that was stopped, killed or broken off, and resumed, ends with the bits of one that never stopped."""

import json
import os
import random
import re
import shutil
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import assert_same_weights, files_below, fork, start_ranks, tiny_runs

import kernels
import train
from checkpoints import peft, trainable
from checkpoints.huggingface import load_model
from checkpoints.peft import adapter_parameters, load_adapter
from kernels.linear import Part
from lora import LoraLinear, add_lora, lora_layers
from options.errors import UserError
from parallel.world import World
from pipeline import prefetch
from training import measure, predict, run_folder

LONG = {
    "num_train_epochs": 8,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 3,
}  # 56 updates
ONE = World(0, 1, 0, torch.device("cpu"))
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
    files = [files_below(tiny.folder / name / f"checkpoint-{last}/optimizer") for name in (whole, parts)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    for mine, other in zip(*files):
        assert_equal_states(load_file(mine), load_file(other))


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
            peft.read_adapter_tensors(path)
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
    gone = rf"rank {killed} on {re.escape(socket.gethostname())} is gone after step \d+; the same command "
    assert re.search(rf"{gone}continues from {tiny.folder / name}/checkpoint-{last}\n", text), text
    assert "Traceback" not in text


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


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tiny, saved, copied, capsys):
    for file in ("training_state.pt", "rank_state_0.pt", "adapter_model.safetensors", "trainer_state.json"):
        folder = shutil.copytree(copied, copied.parent / f"without-{file}")
        path = folder / "checkpoint-10" / file
        path.write_bytes(path.read_bytes()[:-100])
        named = folder / "checkpoint-10"
        assert resume(tiny, folder, resume_from_checkpoint=named) == 2, file
        error = capsys.readouterr().err
        assert str(path) in error and "damaged" in error and "there are checkpoint-2" in error
        assert resume(tiny, folder) == 0
        said = capsys.readouterr().out
        assert f"note: {path}: damaged (its bytes are not those that were written); going back to" in said
        assert "checkpoint-10 is newer than checkpoint-8" in said
        assert tiny.checkpoints(folder) == [2, 4, 6, 8, 10]
        assert (folder / "old-checkpoint-10").is_dir()
        assert_same_weights(tiny.weights(saved), tiny.weights(folder))


def test_of_damaged_checkpoints_only_the_newest_is_named(tiny, copied, capsys):
    for path in copied.glob("checkpoint-*/rank_state_0.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    assert resume(tiny, copied) == 2
    assert f"{copied}/checkpoint-10/rank_state_0.pt: damaged" in capsys.readouterr().err


def test_flipped_bits_in_the_state_are_found(tiny, copied, capsys):
    path = copied / "checkpoint-10/training_state.pt"
    content = bytearray(path.read_bytes())
    for place in (2000, len(content) // 2):
        content[place] ^= 16
    path.write_bytes(content)
    assert resume(tiny, copied) == 0
    said = capsys.readouterr().out
    assert str(path) in said and "damaged" in said and "going back to checkpoint-8" in said


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_named(tiny, saved, tmp_path, capsys):
    generator = random.Random(3)
    names = [str(path.relative_to(saved / "checkpoint-10")) for path in files_below(saved / "checkpoint-10")]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "rank_state_0.pt"} < set(
        names
    ) and any(name.startswith("optimizer/") for name in names)
    for number, name in enumerate(names):
        folder = shutil.copytree(saved / "checkpoint-10", tmp_path / str(number) / "checkpoint-10").parent
        shutil.copytree(saved / "checkpoint-8", folder / "checkpoint-8")
        path = folder / "checkpoint-10" / name
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            run_folder.check_files(folder / "checkpoint-10", ONE)
        assert ": damaged (" in str(caught.value) and "there are checkpoint-8" in str(caught.value)
        if name != "checksums.json":
            assert str(caught.value).startswith(f"{path}: ")
    assert resume(tiny, folder, resume_from_checkpoint=folder / "checkpoint-10") == 2
    assert f"{path}: damaged" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: damaged .it is not there, though checksums.json names it"):
        run_folder.check_files(folder / "checkpoint-10", ONE)
    assert resume(tiny, folder, resume_from_checkpoint=folder / "checkpoint-8") == 0
    assert f"checkpoint-10: it has no {name}, so it counts as none" in capsys.readouterr().out
    run_folder.check_files(saved / "checkpoint-10", ONE)


def test_the_best_weights_are_looked_at_before_they_are_taken(tiny, tmp_path, monkeypatch, capsys):
    keys = {"val_size": 4, "evaluation_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}

    def flipping(model, output_dir, *rest):
        (path,) = output_dir.glob("checkpoint-2/adapter_model.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return load_best(model, output_dir, *rest)

    load_best = run_folder.load_best
    monkeypatch.setattr(run_folder, "load_best", flipping)
    assert resume(tiny, tmp_path / "run", max_steps=2, **keys) == 2
    assert "checkpoint-2/adapter_model.safetensors: damaged" in capsys.readouterr().err


def test_a_stream_that_has_changed_where_it_was_consumed_is_refused(tiny, tmp_path, capsys):
    rows, data = json.loads(tiny.data.read_text()), tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    keys = {"dataset": data, "streaming": True, "buffer_size": 1, "num_train_epochs": None}
    assert resume(tiny, tmp_path / "run", max_steps=2, **keys) == 0
    kept = shutil.copytree(tmp_path / "run", tmp_path / "kept")
    rows.append({"instruction": "more", "output": "rows"})
    rows[9]["output"] += " behind"
    data.write_text(json.dumps(rows))  # what is to come may change
    assert resume(tiny, tmp_path / "run", max_steps=3, **keys) == 0
    rows[3]["output"] += " before"
    data.write_text(json.dumps(rows))
    assert resume(tiny, kept, max_steps=3, **keys) == 2
    assert (
        f"dataset: {data}:1, or a row before it, is not what the run was trained on"
        in capsys.readouterr().err
    )


def test_a_resumed_run_removes_the_checkpoints_that_a_kill_has_left(tiny, copied):
    """Killed between the newest checkpoint and the removal of the oldest; here after the last one."""
    assert resume(tiny, copied, save_total_limit=2) == 0
    assert tiny.checkpoints(copied) == [8, 10]


def test_damaged_logs_are_named_and_cost_nothing_else(tiny, copied, capsys):
    log = copied / "trainer_log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:20], *lines[2:], "[3]", '{"current_steps": 9']))
    (copied / "all_results.json").write_text('{"eval_loss": ')
    assert resume(tiny, copied) == 0
    said = capsys.readouterr().out
    assert f"{log}: damaged in line 2, 11, 12, which is left out" in said
    assert f"{copied}/all_results.json: damaged" in said
    assert [entry["current_steps"] for entry in tiny.log(copied)] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert tiny.results(copied)["train_steps"] == 10
    (copied / "train_results.json").unlink()
    for path in (copied / "checkpoint-10/trainer_state.json", copied / "checkpoint-10/checksums.json"):
        path.write_text("[]")  # of an older version, without checksums: what reads the file finds it
    assert resume(tiny, copied, resume_from_checkpoint=copied / "checkpoint-10") == 2
    assert "checkpoint-10/checksums.json: damaged" in capsys.readouterr().err
    (copied / "checkpoint-10/checksums.json").unlink()
    assert resume(tiny, copied) == 2
    assert "checkpoint-10/trainer_state.json: damaged" in capsys.readouterr().err


def test_a_run_is_finished_with_its_last_file(tiny, copied, saved, capsys):
    """Killed between train_results.json and all_results.json."""
    shutil.copy(saved / "train_results.json", copied)
    (copied / "all_results.json").unlink()
    assert resume(tiny, copied) == 0
    assert tiny.results(copied)["train_loss"] == tiny.results(saved)["train_loss"]
    assert "already trained" not in capsys.readouterr().out
    newest = max(copied.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "all_results.json"


# What trains is what is saved, where lora.py has been edited too


def test_a_parameter_that_an_edit_adds_to_an_adapter_is_saved_and_restored(tiny, monkeypatch):
    start, part = LoraLinear.__init__, LoraLinear.part

    def begin(self, *given, **named):
        start(self, *given, **named)
        self.gate = torch.nn.Parameter(torch.ones(self.out_features))

    monkeypatch.setattr(LoraLinear, "__init__", begin)
    monkeypatch.setattr(LoraLinear, "part", lambda self: Part(None, layer=self))
    monkeypatch.setattr(
        LoraLinear, "forward", lambda self, x: kernels.linears(x, [part(self)])[0] * self.gate
    )
    halves(tiny, "gated", 4, max_steps=8, lora_target="q_proj,down_proj")
    gates = {name: tensor for name, tensor in tiny.weights("gated-whole").items() if name.endswith("gate")}
    assert len(gates) == 4 and all((tensor != 1).any() for tensor in gates.values())
    model = load_model(tiny.model)
    load_adapter(model, tiny.folder / "gated-whole")
    for name, tensor in gates.items():
        layer = model.get_submodule(name.removeprefix("base_model.model.model.").removesuffix(".gate"))
        assert torch.equal(layer.gate, tensor) and layer.gate.requires_grad
    adapter = shutil.copytree(tiny.folder / "gated-whole", tiny.folder / "gated-cut")
    kept = {
        name: tensor
        for name, tensor in tiny.weights("gated-whole").items()
        if "1.mlp" not in name or "gate" not in name
    }
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj lacks gate"):
        load_adapter(load_model(tiny.model), adapter)


def test_what_an_edit_freezes_stays_frozen_in_a_resumed_and_in_a_continued_run(tiny, monkeypatch, capsys):
    """LoRA-FA (arXiv 2308.03303): A as it was drawn, B trains."""

    def frozen_a(model, *given):
        add_lora(model, *given)
        for layer in lora_layers(model).values():
            layer.lora_a.requires_grad_(False)

    monkeypatch.setattr(trainable, "add_lora", frozen_a)
    halves(tiny, "fa", 4, max_steps=8)
    first, last = tiny.weights("fa-whole/checkpoint-4"), tiny.weights("fa-whole")
    assert all(torch.equal(first[name], last[name]) == ("lora_A" in name) for name in first)
    monkeypatch.undo()  # the adapter itself says so
    assert tiny.train("fa-more", adapter_name_or_path=tiny.folder / "fa-whole", max_steps=3) == 0
    more = tiny.weights("fa-more")
    assert all(torch.equal(more[name], last[name]) == ("lora_A" in name) for name in more)
    (tiny.folder / "fa-parts/train_results.json").unlink()
    assert tiny.train("fa-parts", max_steps=10) == 2  # without the edit A would begin to train
    error = capsys.readouterr().err
    assert "layers.0.self_attn.q_proj.lora_a trains, but did not when the checkpoint was written" in error


def test_what_would_not_be_saved_is_found_before_the_first_update(tiny, tmp_path, monkeypatch, capsys):
    def without_b(model):
        return (each for each in adapter_parameters(model) if "lora_B" not in each[0])

    monkeypatch.setattr(peft, "adapter_parameters", without_b)
    assert resume(tiny, tmp_path / "run") == 2
    assert "q_proj.lora_b trains, but no checkpoint would hold it" in capsys.readouterr().err
    assert not (tmp_path / "run/trainer_log.jsonl").exists()


# A signal in an evaluation


@pytest.mark.parametrize("kind", ["loss", "texts"])
def test_a_signal_in_an_evaluation_saves_at_once_and_the_evaluation_is_done_again(
    tiny, tmp_path, kind, monkeypatch
):
    keys = {"val_size": 4, "evaluation_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    keys |= {"save_steps": 4, "max_steps": 6, "load_best_model_at_end": True, "per_device_eval_batch_size": 1}
    keys |= {"predict_with_generate": True, "max_new_tokens": 4} if kind == "texts" else {}
    place, name = (measure, "of_the_stage") if kind == "loss" else (predict, "roll_out")
    original, calls = getattr(place, name), []
    assert tiny.train("unused", output_dir=tmp_path / "whole", **keys) == 0

    def interrupted(*given, **named):
        calls.append(kind)
        if len(calls) == (2 if kind == "loss" else 6):  # in the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **named)

    monkeypatch.setattr(place, name, interrupted)
    assert tiny.train("unused", output_dir=tmp_path / "parts", **keys) == 128 + signal.SIGTERM
    assert tiny.checkpoints(tmp_path / "parts") == [4]
    assert list(tiny.losses(tmp_path / "parts", "eval_loss")) == [2]
    count = len(calls)
    monkeypatch.setattr(place, name, original)
    assert tiny.train("unused", output_dir=tmp_path / "parts", **keys) == 0
    assert count == (2 if kind == "loss" else 6)  # nothing more was evaluated
    for key in ("loss", "eval_loss"):
        assert tiny.losses(tmp_path / "whole", key) == tiny.losses(tmp_path / "parts", key)
    assert_same_weights(tiny.weights(tmp_path / "whole"), tiny.weights(tmp_path / "parts"))
    assert tiny.checkpoints(tmp_path / "whole") == tiny.checkpoints(tmp_path / "parts")


def test_a_signal_in_the_last_evaluation_or_prediction_loses_nothing(tiny, tmp_path, monkeypatch, capsys):
    keys = {
        "val_size": 4,
        "do_train": True,
        "do_predict": True,
        "predict_with_generate": True,
        "max_steps": 2,
    }
    original = predict.roll_out

    def interrupted(*given, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*given, **named)

    monkeypatch.setattr(predict, "roll_out", interrupted)
    assert resume(tiny, tmp_path / "run", max_new_tokens=4, **keys) == 128 + signal.SIGINT
    said = capsys.readouterr()
    assert "SIGINT: the evaluation was not finished; what was trained is in" in said.out
    assert (
        "nothing was trained" not in said.err and not (tmp_path / "run/generated_predictions.jsonl").exists()
    )
    monkeypatch.setattr(predict, "roll_out", original)
    assert resume(tiny, tmp_path / "run", max_new_tokens=4, **keys) == 0
    assert (tmp_path / "run/generated_predictions.jsonl").exists()


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
    before = {path: path.read_bytes() for path in files_below(folder / "checkpoint-4")}
    keys = {"output_dir": folder, "save_strategy": "steps", "save_steps": 2}
    child = tiny.child("full", file_limit=limit, **keys)
    assert child.wait() == 1
    text = child.text()
    assert f"output_dir: {folder}/checkpoint-6 could not be written" in text and "GB are free" in text
    assert "Traceback" not in text
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-4"] and not list(
        folder.glob(".tmp*")
    )
    assert before == {path: path.read_bytes() for path in files_below(folder / "checkpoint-4")}
    assert tiny.train("full", **keys) == 0  # room again: the same command goes on
    assert_same_weights(tiny.weights(folder), tiny.weights(saved))
    (tiny.folder / "full.txt").unlink()


def test_a_disk_that_is_full_at_the_end_is_said_so(tiny, tmp_path):
    child = tiny.child("end", file_limit=9_000, output_dir=tmp_path / "end", max_steps=2)
    assert child.wait() == 1
    assert f"output_dir: {tmp_path}/end could not be written" in child.text()
    assert not list((tmp_path / "end").glob("adapter*")) and not list((tmp_path / "end").glob(".tmp*"))


def test_a_disk_too_full_for_log_lines_is_said_so_and_ends_no_run(tiny, tmp_path):
    """Only what is to be saved needs the room."""
    child = tiny.child("log", file_limit=8000, output_dir=tmp_path / "log", num_train_epochs=7)
    assert child.wait() == 1
    assert f"{tmp_path}/log/trainer_log.jsonl: File too large; its lines wait" in child.text()
    assert "step 35/35" in child.text() and f"output_dir: {tmp_path}/log could not be written" in child.text()
    assert "Traceback" not in child.text()
