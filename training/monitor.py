"""What a person and a machine see of a run: progress bar, log lines, trainer_log.jsonl, plot, TensorBoard and
friends; and the instruments of the loop: MetricWindow (loss and speed since the last line) and Health (is every
loss finite).

Only rank 0 makes a Monitor that writes. File names and keys are the ones the ecosystem knows (LLaMA-Factory's
trainer_log.jsonl, the Hugging Face trainer's log_history and all_results.json).
"""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from parallel.world import World
from pipeline.batch import Batch

LOG_FILE, PLOT_FILE, SAMPLES_FILE = "trainer_log.jsonl", "training_loss.png", "generated_samples.jsonl"
SERVICES = ("tensorboard", "wandb", "mlflow")
SAMPLES, SAMPLE_CHARACTERS = 3, 300  # generated texts shown at an evaluation, and of each so much
QUIET_SECONDS = 30  # without a terminal: a line at least this often, so that a log file shows life
# The plot's panels: what is written at the axis, and the metrics drawn there if a run has them
PANELS = {
    "rewards of the answers": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "accuracy": ("rewards/accuracies", "accuracy", "exact_match"),
    "reward": ("reward",),
    "KL to the reference (nats)": ("kl",),
    "length of an answer (tokens)": ("completions/mean_length",),
}
# How a number is shown on the console, by its name without eval_; None: it is in the files only
SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{:.0f} tok/s",
    "peak_memory": "{:.2f} GB",
    "loss_scale": "scale {:.0f}",
    "rewards/accuracies": "accuracy {:.2f}",
    "rewards/margins": "margin {:.3f}",
    "rewards/chosen": "chosen {:.3f}",
    "rewards/rejected": "rejected {:.3f}",
    "accuracy": "accuracy {:.2f}",
    "reward": "reward {:.3f}",
    "kl": "kl {:.3f}",
    "generated_tokens_per_second": None,
    "exact_match": "exact match {:.3f}",
    "completions/mean_length": "length {:.1f}",
    "logps/chosen": None,
    "logps/rejected": None,
    "logits/chosen": None,
    "logits/rejected": None,
    "completions/clipped_ratio": "cut off {:.2f}",
    "clip_ratio": "clipped {:.2f}",
    "reward_std": "reward std {:.3f}",
    "frac_reward_zero_std": "equal {:.2f}",
    "kl_coef": None,
    "values": None,
    "returns": None,
    "approx_kl": None,
    "value_clip_ratio": None,
    "clip_ratio/low_mean": None,
    "clip_ratio/high_mean": None,
    "clip_ratio/region_mean": "clipped {:.2f}",
}


def check_services(services: tuple[str, ...]) -> None:
    """ValueError for a service that is unknown or not installed."""
    for name in services:
        if name not in SERVICES:
            raise ValueError(f"report_to: {name!r} is not one of none, {', '.join(SERVICES)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed; pip install {name}")


class Monitor:
    """Collects the numbers of one run. `history` is the Hugging Face trainer's log_history."""

    def __init__(self, folder: Path, services: tuple[str, ...], run_name: str, active: bool):
        self.folder, self.active, self.run_name = folder, active, run_name
        self.service_names = services
        self.services: list = []
        self.history: list[dict] = []
        self.bar: tqdm | None = None
        self.total_steps = 0

    def begin(self, step: int, total_steps: int, history: list[dict], seconds_before: float) -> None:
        """Start after `step` updates, made by earlier processes in seconds_before; open the bar and the
        services.

        What the logs say beyond `step` is of updates that will be done again, or of another run: it goes.
        """
        self.total_steps, self.history = total_steps, list(history)
        self.steps_before, self.seconds_before = step, seconds_before
        self.started_at = self.spoke_at = time.monotonic()
        if not self.active:
            return
        for name in (LOG_FILE, SAMPLES_FILE):
            _cut_log(self.folder / name, step)
        self.services = [_open_service(name, self.folder, self.run_name, step) for name in self.service_names]
        if (
            sys.stderr.isatty() and sys.stdout.isatty()
        ):  # in a pipe the bar and the lines would overwrite each other
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def seconds(self) -> float:
        """Of training, over all processes that worked on this run."""
        return self.seconds_before + time.monotonic() - self.started_at

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update()
        elif self.active and time.monotonic() - self.spoke_at > QUIET_SECONDS:
            self._say(f"step {step}/{self.total_steps}  {clock(self._remaining(step))} left")

    def log(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line for the reader, one JSON object for machines, one entry for trainer_state.json."""
        self.history.append({**values, "epoch": round(epoch, 4), "step": step})
        if not self.active:
            return
        remaining = clock(self._remaining(step))
        entry = {
            "current_steps": step,
            "total_steps": self.total_steps,
            **_under_known_names(values),
            "epoch": round(epoch, 4),
            "percentage": round(100 * step / max(self.total_steps, 1), 2),
            "elapsed_time": clock(self.seconds()),
            "remaining_time": remaining,
        }
        with open(self.folder / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for service in self.services:
            service.log(values, step)
        if self.bar is not None and "loss" in values:
            rate = f"{values['tokens_per_second']:.0f} tok/s"
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate}", refresh=False)
        self._say(_line(step, self.total_steps, values) + (f"  {remaining} left" if "loss" in values else ""))

    def show_samples(self, step: int, rows: list[dict]) -> None:
        """Some of the generated texts, from all over the rows: for the reader, and in
        generated_samples.jsonl."""
        if not self.active or not rows:
            return
        count = min(SAMPLES, len(rows))
        shown = [rows[i * len(rows) // count] for i in range(count)]
        with open(self.folder / SAMPLES_FILE, "a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"current_steps": step, **row}, ensure_ascii=False) + "\n" for row in shown
            )
        for row in shown:
            self._say("\n".join(f"  {name:8} {_excerpt(name, text)}" for name, text in row.items()))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for service in self.services:
            service.close()
        self.services = []

    def _say(self, text: str) -> None:
        self.spoke_at = time.monotonic()
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def _remaining(self, step: int) -> float:
        """Seconds, at the pace of this process."""
        done = step - self.steps_before
        return (time.monotonic() - self.started_at) / done * (self.total_steps - step) if done else 0.0

    def save_results(self, name: str, results: dict) -> None:
        """Write <name>_results.json and merge it into all_results.json."""
        if not self.active:
            return
        write_json(self.folder / f"{name}_results.json", results)
        path = self.folder / "all_results.json"
        everything = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, everything | results)

    def plot(self) -> None:
        """training_loss.png: loss and metrics as logged, smoothed, and as evaluated."""
        if self.active:
            plot_history(self.history, self.folder / PLOT_FILE)


def _under_known_names(values: dict[str, float]) -> dict[str, float]:
    """The same, with LLaMA-Factory's `accuracy` beside what trl calls rewards/accuracies."""
    extra = {"accuracy": values["rewards/accuracies"]} if "rewards/accuracies" in values else {}
    return extra | values


def _excerpt(name: str, text: str | None) -> str:
    """On one line, without characters that could steer a terminal: the end of a prompt, the beginning of an
    answer."""
    if text is None:
        return "(none)"
    cut = len(text) > SAMPLE_CHARACTERS
    if name == "prompt":
        text = "..." * cut + text[-SAMPLE_CHARACTERS:]
    else:
        text = text[:SAMPLE_CHARACTERS] + "..." * cut
    return json.dumps(text, ensure_ascii=False)


def _cut_log(path: Path, step: int) -> None:
    """Keep the lines up to `step`."""
    if not path.exists():
        return
    kept = []
    # not splitlines(), which also splits at characters that a generated text may hold
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the process was killed
        if entry.get("current_steps", 0) <= step:
            kept.append(line + "\n")
    _replace(path, "".join(kept) if step else "")


def _replace(path: Path, text: str) -> None:
    """The file is complete or the old one is still there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON; the file is complete or the old one is still there."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def smooth(values: list[float]) -> list[float]:
    """Exponential smoothing with weight 1.8 (sigmoid(0.05 n) - 0.5), LLaMA-Factory's rule for its plots."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed, last = [], values[0] if values else 0.0
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed


def plot_history(history: list[dict], path: Path) -> None:
    """Draw the loss over the steps, and a panel for each kind of metric that `history` holds; see PANELS."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {key for entry in history for key in entry}
    panels = {label: drawn for label, kinds in PANELS.items() if (drawn := _curves(names, kinds))}
    panels = {"loss" if panels else "loss (nats per token)": _curves(names, ("loss",))} | panels
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (8, 4.5) if columns == 1 else (11, 3.4 * rows)  # inches of 100 pixels
    figure = Figure(figsize=size, layout="constrained")
    axes_of = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (label, drawn) in zip(axes_of, panels.items()):
        for color, name in enumerate(drawn):
            _draw(axes, history, name, f"C{color}")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend(fontsize="small")
    for axes in axes_of[len(panels) :]:
        axes.set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def _curves(names: set[str], kinds: tuple[str, ...]) -> list[str]:
    """These metrics among the names of a history: of the training, then of each evaluation set."""
    found = [kind for kind in kinds if kind in names]
    for kind in kinds:
        found += sorted(name for name in names if name.startswith("eval_") and name.endswith(f"_{kind}"))
    return found


def _draw(axes, history: list[dict], name: str, color: str) -> None:
    """A metric of the training pale and smoothed, of an evaluation with its points."""
    steps, values = zip(*[(entry["step"], entry[name]) for entry in history if name in entry])
    if name.startswith("eval_"):
        axes.plot(steps, values, "o-", color=color, markersize=4, label=name)
    else:
        axes.plot(steps, values, color=color, alpha=0.35, label=name)
        axes.plot(steps, smooth(list(values)), color=color, label=f"{name}, smoothed")


def _line(step: int, total: int, values: dict[str, float]) -> str:
    """step 40/500  loss 1.2031  lr 1.9e-04  grad 0.71  412 tok/s  1.3 GB"""
    parts = [f"step {step}/{total}"]
    for name, value in values.items():
        kind = name.removeprefix("eval_")
        shown = SHOWN.get(kind, kind + " {:.4f}")
        if shown is not None:
            parts.append(("eval_" if kind != name else "") + shown.format(value))
    return "  ".join(parts)


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


# Instruments of the loop


@dataclass(frozen=True)
class Totals:
    """Over all ranks, since the last log line."""

    steps: int
    loss: float  # sum over steps
    tokens: int
    examples: int
    seconds: float
    metrics: dict[str, float]  # means


class MetricWindow:
    """What this rank did since the last log line. Adding to it never waits for the device."""

    def __init__(self, world: World):
        self.world = world
        self.loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self.reset()

    def reset(self) -> None:
        self.loss.zero_()
        self.metrics: dict[
            str, torch.Tensor
        ] = {}  # name -> (2,) fp64: sum, count; the same names on all ranks
        self.steps = self.tokens = self.examples = 0
        self.started_at = time.monotonic()

    def add(self, loss: torch.Tensor, group: list[Batch]) -> None:
        self.loss += loss
        self.steps += 1
        self.examples += sum(len(batch) for batch in group)
        self.tokens += sum(
            batch.tokens.shape[0] for batch in group if batch.sources
        )  # not an empty batch's one

    def add_metrics(self, metrics: dict[str, torch.Tensor]) -> None:
        """name -> (2,): a sum and its count, of one micro-batch."""
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value.double()

    def totals(self) -> Totals:
        """All ranks have to ask. Waits for the device."""
        counts = torch.tensor([self.tokens, self.examples], dtype=torch.float64, device=self.loss.device)
        everything = self.world.sum(torch.cat([self.loss[None], counts, *self.metrics.values()]))
        loss, tokens, examples, *metrics = everything.tolist()
        means = [total / max(count, 1) for total, count in zip(metrics[::2], metrics[1::2])]
        seconds = max(time.monotonic() - self.started_at, 1e-9)
        return Totals(self.steps, loss, int(tokens), int(examples), seconds, dict(zip(self.metrics, means)))

    def leave_out(self, seconds: float) -> None:
        """Time that was not training."""
        self.started_at += seconds

    def state(self) -> dict:
        seconds = time.monotonic() - self.started_at
        counts = {"steps": self.steps, "tokens": self.tokens, "examples": self.examples}
        metrics = {name: value.cpu() for name, value in self.metrics.items()}
        return counts | {"loss": self.loss.item(), "metrics": metrics, "seconds": seconds}

    def restore(self, state: dict) -> None:
        self.steps, self.tokens, self.examples = state["steps"], state["tokens"], state["examples"]
        self.loss.fill_(state["loss"])
        self.metrics = {name: value.to(self.loss.device) for name, value in state["metrics"].items()}
        self.started_at = time.monotonic() - state["seconds"]


class Health:
    """Finds the first update whose loss or gradient is not finite, without waiting for the device each
    time."""

    def __init__(self, world: World, names: list[str]):
        self.world, self.names = world, names  # names: of the data sets
        self.first_bad = torch.zeros((), dtype=torch.int64, device=world.device)  # step, 0 = none yet
        self.seen: list[tuple[int, list[tuple[int, int]]]] = []  # (step, sources) since the last check

    def watch(self, step: int, numbers: list[torch.Tensor], group: list[Batch]) -> None:
        for number in numbers:
            bad = ~torch.isfinite(number) & (self.first_bad == 0)
            self.first_bad.masked_fill_(
                bad, step
            )  # where(bad, step, ...) would copy the step to the device and wait
        self.seen.append((step, [source for batch in group for source in batch.sources]))

    def problem(self) -> str | None:
        """The first bad update since the last call, with this rank's rows. All ranks have to ask."""
        step = int(self.first_bad.item())
        if not self.world.any(step > 0):
            self.seen.clear()
            return None
        if not step:
            return "the loss of another rank is not a finite number"
        rows = dict(self.seen)[step]
        listed = ", ".join(f"{self.names[dataset]} row {row}" for dataset, row in rows[:16])
        more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        return f"the loss or its gradient is not a finite number at step {step}; rows of that update: {listed}{more}"


def peak_memory_gb(device: torch.device) -> float:
    """GB (1e9 bytes): of the GPU's allocator, or of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# Outside services. Each is imported where it is used, so that none is needed to train.


def _open_service(name: str, folder: Path, run_name: str, step: int):
    if name == "tensorboard":
        return _TensorBoard(folder, step)
    return _Wandb(folder, run_name) if name == "wandb" else _Mlflow(run_name)


class _TensorBoard:
    def __init__(self, folder: Path, step: int):
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


class _Wandb:
    def __init__(self, folder: Path, run_name: str):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "anvil"), name=run_name, dir=str(folder)
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, run_name: str):
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(run_name=run_name)

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()
