"""Services are checked before a run, get its options, and never end it."""

import sys
from types import SimpleNamespace

import pytest
from tiny_runs import tiny_runs

from training import trackers
from training.trackers import TRACKERS, Services, check_services


def test_services_are_checked_before_the_run(monkeypatch):
    with pytest.raises(
        ValueError, match="report_to: 'wandbb' is not one of none, tensorboard, wandb, mlflow"
    ):
        check_services(("wandbb",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="mlflow is not installed; pip install mlflow"):
        check_services(("mlflow",))


@pytest.mark.parametrize("moment", ["start", "log", "close"])
@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), SystemExit(1), KeyError("x")], ids=repr)
def test_a_service_that_raises_is_named_and_left_out(monkeypatch, capsys, moment, error):
    logged = []

    class Broken:
        def __init__(self, *start):
            self.raise_at("start")

        def raise_at(self, now):
            logged.append(now)
            if now == moment:
                raise error

        def log(self, values, step):
            self.raise_at("log")

        def close(self):
            self.raise_at("close")

    class Whole(Broken):
        def raise_at(self, now):
            logged.append(f"whole {now}")

    monkeypatch.setattr(trackers, "TRACKERS", {"broken": Broken, "whole": Whole})
    services = Services(("broken", "whole"), "folder", "name", 0, {})
    for step in (1, 2):
        services.log({"loss": 1.0}, step)
    services.close()
    assert [each for each in logged if "whole" in each] == [
        f"whole {n}" for n in ("start", "log", "log", "close")
    ]
    mine = [each for each in logged if "whole" not in each]
    assert (
        mine
        == {"start": ["start"], "log": ["start", "log"], "close": ["start", "log", "log", "close"]}[moment]
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: report_to: broken is left out") and type(error).__name__ in line


@pytest.fixture
def services(monkeypatch):
    """wandb and mlflow as modules that note what they get."""
    got = SimpleNamespace(wandb={}, mlflow={}, largest=0, lines=0)

    def init(**settings):
        got.wandb |= settings["config"]
        return SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

    def log_params(values):
        got.mlflow |= values
        got.largest = max(got.largest, len(values))

    def log_metrics(values, step):
        got.lines += 1
        raise OSError("the server is gone")

    wandb = SimpleNamespace(init=init, __spec__=SimpleNamespace())
    mlflow = SimpleNamespace(
        start_run=lambda run_name: None, end_run=lambda: None, __spec__=SimpleNamespace()
    )
    mlflow.log_params, mlflow.log_metrics = log_params, log_metrics
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return got


def test_services_get_the_options_of_a_run_that_ends_well_without_them(services, tmp_path, capsys):
    with tiny_runs(tmp_path) as tiny:
        long = "x" * 400
        keys = {"report_to": "wandb,mlflow", "hf_hub_token": "secret", "run_name": long, "lora_rank": 3}
        assert tiny.train("run", max_steps=3, **keys) == 0
    for found in (services.wandb, services.mlflow):
        assert int(found["lora_rank"]) == 3 and found["lora_target"] and "hf_hub_token" not in found
    assert services.wandb["run_name"] == long and services.mlflow["run_name"] == long[:250]
    assert services.largest <= 100 and services.lines == 1
    assert (
        "report_to: mlflow is left out from here on (OSError: the server is gone)" in capsys.readouterr().out
    )


def test_every_service_takes_the_same_arguments():
    for tracker in TRACKERS.values():
        assert tracker.__init__.__code__.co_varnames[:5] == ("self", "folder", "run_name", "step", "settings")
