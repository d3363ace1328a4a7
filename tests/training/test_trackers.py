"""Services are checked before a run."""

import pytest

from training.trackers import check_services


def test_services_are_checked_before_the_run(monkeypatch):
    with pytest.raises(
        ValueError, match="report_to: 'wandbb' is not one of none, tensorboard, wandb, mlflow"
    ):
        check_services(("wandbb",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="mlflow is not installed; pip install mlflow"):
        check_services(("mlflow",))
