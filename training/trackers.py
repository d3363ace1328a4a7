"""Outside services that draw a run's numbers (report_to). Each is imported where it is used.

A tracker has log(values, step) and close(). To add one: a class here, and a line in TRACKERS.
"""

import importlib.util
import os
from pathlib import Path

from options.errors import UserError


class TensorBoard:
    def __init__(self, folder: Path, run_name: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: a resumed run draws over what the killed one wrote after its last checkpoint
        self.writer = SummaryWriter(str(folder / "runs"), purge_step=step + 1 if step else None)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            group = "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else "train/" + name
            self.writer.add_scalar(group, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, folder: Path, run_name: str, step: int):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "anvil")
        self.run = wandb.init(project=project, name=run_name, dir=str(folder))

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    def __init__(self, folder: Path, run_name: str, step: int):
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(run_name=run_name)

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def check_services(services: tuple[str, ...]) -> None:
    """UserError for a service that is unknown or not installed."""
    for name in services:
        if name not in TRACKERS:
            raise UserError(f"report_to: {name!r} is not one of none, {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed; pip install {name}")
