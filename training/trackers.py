"""Outside services that draw a run's numbers (report_to). Each is imported where it is used.

    services = Services(("wandb",), folder, run_name, step, settings)      # settings: the options of the run
    services.log({"loss": 1.2}, step)

A tracker is made of (folder, run_name, step, settings) and has log(values, step) and close(). To add one: a
class here, and a line in TRACKERS.
"""

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from options.errors import UserError, refuse, say

PARAMETERS, PARAMETER_CHARACTERS = 100, 250  # mlflow takes so many at once, and so much of each


class TensorBoard:
    def __init__(self, folder: Path, run_name: str, step: int, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: a resumed run draws over what the killed one wrote after its last checkpoint
        self.writer = SummaryWriter(str(folder / "runs"), purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text("options", "\n".join(f"    {key}: {settings[key]}" for key in settings))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            group = "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else "train/" + name
            self.writer.add_scalar(group, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, folder: Path, run_name: str, step: int, settings: dict):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "anvil")
        self.run = wandb.init(project=project, name=run_name, dir=str(folder), config=settings)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    def __init__(self, folder: Path, run_name: str, step: int, settings: dict):
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(run_name=run_name)
        texts = iter([(key, str(value)[:PARAMETER_CHARACTERS]) for key, value in settings.items()])
        while part := dict(itertools.islice(texts, PARAMETERS)):
            mlflow.log_params(part)

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def installed() -> tuple[str, ...]:
    """What report_to=all means, as in the Hugging Face trainer."""
    return tuple(name for name in TRACKERS if importlib.util.find_spec(name) is not None)


def check_services(services: tuple[str, ...]) -> None:
    """UserError for a service that is unknown or not installed."""
    for name in services:
        refuse(name not in TRACKERS, f"report_to: {name!r} is not one of none, {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed; pip install {name}")


class Services:
    """Those that still answer: one that raises something is left out from then on, and the run goes on."""

    def __init__(self, names: Iterable[str], *start):
        """start: what a tracker is made of."""
        self.trackers: dict[str, object] = {}
        for name in names:
            tracker = self._attempt(name, TRACKERS[name], *start)
            self.trackers |= {} if tracker is None else {name: tracker}

    def log(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, tracker.log, values, step)

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, tracker.close)
        self.trackers.clear()

    def _attempt(self, name: str, call: Callable, *arguments) -> object:
        try:
            return call(*arguments)
        except (Exception, SystemExit) as error:  # of other people's code, and of the network
            self.trackers.pop(name, None)
            found = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"note: report_to: {name} is left out from here on ({found})")
            return None
