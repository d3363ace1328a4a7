"""The log, the results and the console."""

import json
from types import SimpleNamespace

import pytest
import torch

from parallel.world import World
from training import monitor
from training.monitor import Monitor

ONE = World(0, 1, 0, torch.device("cpu"))


def begun(folder, step=0, total=10, history=(), services=(), active=True) -> Monitor:
    made = Monitor(folder, services, "name", active)
    made.begin(step, total, list(history), 5.0)
    return made


def values(loss: float) -> dict[str, float]:
    return {
        "loss": loss,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 100.0,
        "peak_memory": 1.0,
    }


def test_begin_cuts_the_log_to_the_resumed_step_and_a_torn_line(tmp_path):
    first = begun(tmp_path)
    for step in (2, 4, 6):
        first.log(step, step / 10, values(1.0))
    path = tmp_path / monitor.LOG_FILE
    path.write_text(path.read_text() + '{"current_steps": 8, "lo')
    again = begun(tmp_path, step=4, history=first.history[:2])
    again.log(6, 0.6, values(0.5))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["current_steps"] for line in lines] == [2, 4, 6] and lines[2]["loss"] == 0.5
    assert [entry["step"] for entry in again.history] == [2, 4, 6]
    begun(tmp_path)  # a new run in the folder
    assert path.read_text() == ""


def test_times_count_earlier_processes_and_the_rest_goes_by_the_pace_of_this_one(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = begun(tmp_path, step=40, total=100)
    now[0] += 20
    made.log(50, 0.5, values(1.0))
    (line,) = (tmp_path / monitor.LOG_FILE).read_text().splitlines()
    assert json.loads(line)["elapsed_time"] == "0:00:25" and json.loads(line)["remaining_time"] == "0:01:40"


def test_without_a_terminal_there_is_a_line_now_and_then_and_no_bar(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = begun(tmp_path, total=100)
    for step in range(1, 101):
        now[0] += 1
        made.advance(step)
    text = capsys.readouterr()
    wanted = ((31, "1:09"), (62, "0:38"), (93, "0:07"))
    assert text.out.splitlines() == [f"step {step}/100  0:0{left} left" for step, left in wanted]
    assert text.err == ""


def test_in_a_terminal_lines_stand_above_the_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    made = begun(tmp_path, total=4)
    made.advance(1)
    made.log(1, 0.25, values(1.5))
    made.close()
    text = capsys.readouterr()
    assert (
        "step 1/4  loss 1.5000  lr 1.0e-04  grad 0.50  100 tok/s  1.00 GB" in text.out
        and "left\n" in text.out
    )
    assert "1/4" in text.err and "loss 1.5000, 100 tok/s" in text.err


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    made = begun(tmp_path, active=False)
    made.log(1, 0.1, values(1.0))
    made.advance(1)
    made.save_results("train", {"a": 1})
    made.plot()
    made.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
    assert len(made.history) == 1  # every rank knows the losses


def test_results_are_merged(tmp_path):
    made = begun(tmp_path)
    made.save_results("train", {"train_loss": 1.0})
    made.save_results("eval", {"eval_loss": 2.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"train_loss": 1.0, "eval_loss": 2.0}
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_loss": 2.0}


def test_metrics_are_short_on_the_console_and_whole_in_the_log_with_the_names_of_llama_factory(
    tmp_path, capsys
):
    made = begun(tmp_path)
    made.log(
        1, 0.1, values(1.0) | {"rewards/accuracies": 0.75, "rewards/margins": 0.5, "logps/chosen": -31.5}
    )
    made.log(2, 0.2, {"eval_loss": 0.5, "eval_rewards/accuracies": 0.5, "eval_logps/chosen": -20.0})
    first, second = capsys.readouterr().out.splitlines()
    assert "accuracy 0.75  margin 0.500" in first and "logps" not in first
    assert "eval_loss 0.5000  eval_accuracy 0.50" in second and "logps" not in second
    entries = [json.loads(line) for line in (tmp_path / monitor.LOG_FILE).read_text().splitlines()]
    assert entries[0]["accuracy"] == entries[0]["rewards/accuracies"] == 0.75
    assert entries[0]["logps/chosen"] == -31.5 and entries[1]["eval_logps/chosen"] == -20.0
    assert "accuracy" not in made.history[0]  # trainer_state.json holds trl's names alone


def test_lines_that_a_full_disk_has_no_room_for_come_when_there_is_some(tmp_path, monkeypatch, capsys):
    made, room = begun(tmp_path), [30]
    plain = open

    class Limited:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content: bytes) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            written = self.file.write(content[: room[0]])
            room[0] -= written
            return written

    monkeypatch.setattr(monitor, "open", lambda *given, **how: Limited(plain(*given, **how)), raising=False)
    for step in (1, 2, 3):
        room[0] += 10**6 * (step == 3)
        made.log(step, step / 10, values(1.0))
        lines = (tmp_path / monitor.LOG_FILE).read_text()
        assert len(lines) == 30 or step == 3
    assert [json.loads(line)["current_steps"] for line in lines.splitlines()] == [1, 2, 3]
    said = capsys.readouterr().out
    assert (
        said.count("No space left on device; its lines wait, and the run goes on") == 1
        and "step 3/10" in said
    )


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "gone"), OSError(28, "full"), OSError(5, "no terminal")]
)
def test_a_line_that_nobody_can_read_ends_no_run(tmp_path, monkeypatch, error):
    def write(text):
        raise error

    monkeypatch.setattr("options.errors.drop_output", lambda: None)  # of pytest's own
    made = begun(tmp_path)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: False))
    made.log(1, 0.1, values(1.0))
    ONE.print("a line")
    monkeypatch.setattr("sys.stdout", None)  # closed before the program started
    made = begun(tmp_path, step=1, history=made.history)
    made.log(2, 0.2, values(1.0))
    monkeypatch.undo()
    assert len((tmp_path / monitor.LOG_FILE).read_text().splitlines()) == 2


def test_tensorboard_gets_the_scalars_and_a_resumed_run_draws_over_what_was_lost(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = begun(tmp_path, services=("tensorboard",))
    for step in (1, 2, 3):
        first.log(step, 0.1, values(float(step)))
    first.log(3, 0.1, {"eval_loss": 7.0})
    first.close()
    again = begun(tmp_path, step=2, services=("tensorboard",))
    again.log(3, 0.1, values(30.0))
    again.close()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert "eval/loss" in events.Tags()["scalars"] and "train/learning_rate" in events.Tags()["scalars"]
