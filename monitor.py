"""What a person and a machine see of a run: progress bar, log lines, trainer_log.jsonl, plot, TensorBoard and friends.

Only rank 0 makes a Monitor that writes. File names and keys are the ones the ecosystem knows (LLaMA-Factory's
trainer_log.jsonl, the Hugging Face trainer's log_history and all_results.json).
"""

import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

LOG_FILE, PLOT_FILE = "trainer_log.jsonl", "training_loss.png"
SERVICES = ("tensorboard", "wandb", "mlflow")


class Monitor:
    """Collects the numbers of one run. `history` is the Hugging Face trainer's log_history."""

    def __init__(self, folder: Path, total_steps: int, services: tuple[str, ...], run_name: str, active: bool):
        self.folder, self.total_steps, self.active = folder, total_steps, active
        self.history: list[dict] = []
        self.started_at = time.monotonic()
        self.steps_before = 0  # steps done by an earlier process that this one resumes
        self.bar: tqdm | None = None
        self.services = [_open_service(name, folder, run_name) for name in services] if active else []

    def resume(self, step: int, history: list[dict]) -> None:
        """Continue after `step`: what the log says beyond it is of steps that will be done again."""
        self.steps_before = step
        self.history = [entry for entry in history if entry["step"] <= step]
        path = self.folder / LOG_FILE
        if self.active and path.exists():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that was being written when the process was killed
                if entry.get("current_steps", 0) <= step:
                    kept.append(line + "\n")
            path.write_text("".join(kept))

    def open_bar(self) -> None:
        if self.active:
            self.bar = tqdm(total=self.total_steps, initial=self.steps_before, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def log(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line for the reader, one JSON object for machines, one entry for trainer_state.json."""
        self.history.append({**values, "epoch": round(epoch, 4), "step": step})
        if not self.active:
            return
        elapsed = time.monotonic() - self.started_at
        done = step - self.steps_before
        remaining = elapsed / done * (self.total_steps - step) if done else 0.0
        entry = {
            "current_steps": step,
            "total_steps": self.total_steps,
            **values,
            "epoch": round(epoch, 4),
            "percentage": round(100 * step / max(self.total_steps, 1), 2),
            "elapsed_time": _clock(elapsed),
            "remaining_time": _clock(remaining),
        }
        with open(self.folder / LOG_FILE, "a") as file:
            file.write(json.dumps(entry) + "\n")
        for service in self.services:
            service.log(values, step)
        if self.bar is not None:
            if "loss" in values:
                self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:.0f} tok/s")
            self.bar.write(_line(step, self.total_steps, values), file=sys.stdout)
        else:
            print(_line(step, self.total_steps, values), flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for service in self.services:
            service.close()

    def save_results(self, name: str, results: dict) -> None:
        """Write <name>_results.json and merge it into all_results.json."""
        if not self.active:
            return
        write_json(self.folder / f"{name}_results.json", results)
        path = self.folder / "all_results.json"
        everything = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, everything | results)

    def plot(self) -> None:
        """training_loss.png: every logged loss, its exponential smoothing, and the evaluation losses."""
        if self.active:
            plot_losses(self.history, self.folder / PLOT_FILE)


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name and rename: the file is complete or the old one is still there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def smooth(values: list[float]) -> list[float]:
    """Exponential smoothing with weight 1.8 (sigmoid(0.05 n) - 0.5), LLaMA-Factory's rule for its plots."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed, last = [], values[0] if values else 0.0
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed


def plot_losses(history: list[dict], path: Path) -> None:
    """Draw the training loss and every evaluation loss in `history` over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if points:
        steps, losses = zip(*points)
        axes.plot(steps, losses, color="#1f77b4", alpha=0.35, label="loss")
        axes.plot(steps, smooth(list(losses)), color="#1f77b4", label="loss, smoothed")
    names = sorted({key for entry in history for key in entry if key.startswith("eval_") and key.endswith("loss")})
    for color, name in enumerate(names, start=1):
        steps, losses = zip(*[(entry["step"], entry[name]) for entry in history if name in entry])
        axes.plot(steps, losses, "o-", color=f"C{color}", markersize=4, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if points or names:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def _line(step: int, total: int, values: dict[str, float]) -> str:
    """step 40/500  loss 1.2031  lr 1.9e-04  grad 0.71  412 tok/s  1.3 GB"""
    parts = [f"step {step}/{total}"]
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.1e}",
        "grad_norm": "grad {:.2f}",
        "tokens_per_second": "{:.0f} tok/s",
        "peak_memory": "{:.2f} GB",
    }
    for name, value in values.items():
        parts.append(formats.get(name, name + " {:.4f}").format(value))
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


# Outside services. Each is imported where it is used, so that none is needed to train.


def _open_service(name: str, folder: Path, run_name: str):
    if name == "tensorboard":
        return _TensorBoard(folder)
    if name == "wandb":
        return _Wandb(folder, run_name)
    if name == "mlflow":
        return _Mlflow(run_name)
    raise ValueError(f"report_to: {name!r} is not one of none, {', '.join(SERVICES)}")


class _TensorBoard:
    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("report_to: tensorboard is not installed; pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder / "runs"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            group = "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else "train/" + name
            self.writer.add_scalar(group, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, run_name: str):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("report_to: wandb is not installed; pip install wandb") from error
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "anvil"), name=run_name, dir=str(folder))

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, run_name: str):
        try:
            import mlflow
        except ImportError as error:
            raise ValueError("report_to: mlflow is not installed; pip install mlflow") from error
        self.mlflow = mlflow
        mlflow.start_run(run_name=run_name)

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()
