"""Instruments of the loop: MetricWindow (loss, metrics, speed since the last log line), Health (is every loss
finite), peak memory. Noting something never waits for the device; asking does."""

import itertools
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from options.errors import StopRun
from parallel.world import World
from pipeline.batch import Batch
from stages.metrics import Metrics, means_of


@dataclass(frozen=True)
class Totals:
    """Over all ranks, since the last log line."""

    steps: int
    loss: float  # sum over steps
    tokens: int
    examples: int
    seconds: float
    metrics: dict[str, float]  # means; not of what was not there


class MetricWindow:
    """What this rank did since the last log line. Metrics are named as they come, the same on all ranks."""

    def __init__(self, world: World):
        self.world = world
        self.loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self.reset()

    def reset(self) -> None:
        self.loss.zero_()
        self.metrics: dict[str, torch.Tensor] = {}  # name -> (2,) fp64: sum and count
        self.steps = self.tokens = self.examples = 0
        self.started_at = time.monotonic()

    def add(self, loss: torch.Tensor, group: list[Batch], metrics: Iterable[Metrics] = ()) -> None:
        """An update: its mean loss, what it was made of, and the metrics of each micro-batch."""
        self.loss += loss
        self.steps += 1
        self.examples += sum(len(batch) for batch in group)
        self.tokens += sum(len(batch.tokens) for batch in group if batch.sources)  # not an empty batch's one
        for name, values in itertools.chain.from_iterable(measured.items() for measured in metrics):
            if name not in self.metrics:
                self.metrics[name] = torch.zeros(2, dtype=torch.float64, device=values.device)
            self.metrics[name] += values

    def totals(self) -> Totals:
        """All ranks have to ask. Waits for the device."""
        counts = torch.tensor([self.tokens, self.examples], dtype=torch.float64, device=self.loss.device)
        names = sorted(self.metrics)  # one order on all ranks
        sums = torch.cat([self.loss[None], counts, *(self.metrics[name] for name in names)])
        loss, tokens, examples, *rest = self.world.sum(sums).tolist()
        means = means_of({name: pair for name, *pair in zip(names, rest[::2], rest[1::2])})
        seconds = max(time.monotonic() - self.started_at, 1e-9)
        in_order = {name: means[name] for name in self.metrics if name in means}
        return Totals(self.steps, loss, int(tokens), int(examples), seconds, in_order)

    def leave_out(self, seconds: float) -> None:
        """Time that was not training."""
        self.started_at += seconds

    def state(self) -> dict:
        counts = {"steps": self.steps, "tokens": self.tokens, "examples": self.examples}
        metrics = {name: values.cpu() for name, values in self.metrics.items()}
        seconds = time.monotonic() - self.started_at
        return counts | {"loss": self.loss.item(), "metrics": metrics, "seconds": seconds}

    def restore(self, state: dict) -> None:
        self.steps, self.tokens, self.examples = state["steps"], state["tokens"], state["examples"]
        self.loss.fill_(state["loss"])
        self.metrics = {name: values.to(self.loss.device) for name, values in state["metrics"].items()}
        self.started_at = time.monotonic() - state["seconds"]


def joined(states: list[dict], like: dict) -> dict:
    """What several ranks counted, each MetricWindow.state(), as if one had; of none the names of `like`."""
    counts = {key: sum(state[key] for state in states) for key in ("tokens", "examples", "loss")}
    sums = {
        name: sum((state["metrics"][name] for state in states), torch.zeros_like(values))
        for name, values in like["metrics"].items()
    }
    return like | counts | {"loss": float(counts["loss"]), "metrics": sums}


class Health:
    """Finds the first update whose loss or gradient is not finite; waits for the device only when asked."""

    def __init__(self, world: World, names: list[str]):
        self.world, self.names = world, names  # names: of the data sets
        # the step of the first bad loss of this rank, and of the first bad gradient of all; 0 = none yet
        self.first_bad = torch.zeros(2, dtype=torch.int64, device=world.device)
        self.seen: list[tuple[int, list[tuple[int, int]]]] = []  # (step, sources) since the last check

    def watch(self, step: int, numbers: list[torch.Tensor], group: list[Batch]) -> None:
        """numbers: the loss and, where it counts, the norm of the gradient."""
        for first, number in zip(self.first_bad, numbers):
            # where(bad, step, ...) would copy the step to the device and wait
            first.masked_fill_(~torch.isfinite(number) & (first == 0), step)
        self.seen.append((step, [source for batch in group for source in batch.sources]))

    def problem(self) -> str | None:
        """The first bad update since the last call, with the rows of the ranks whose loss it was, or of all
        where only the gradient says so. All ranks have to ask, and get the same."""
        loss, gradient = self.first_bad.tolist()
        if not self.world.any(loss + gradient > 0):
            self.seen.clear()
            return None
        mine = min(step for step in (loss, gradient) if step) if loss or gradient else 0
        rows = dict(self.seen).get(mine, [])
        listed = ", ".join(f"{self.names[dataset]} row {row}" for dataset, row in rows[:16])
        listed += f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        every = self.world.gather([mine, 0 < loss == mine, listed])
        step = min(first for first, _, _ in every if first)
        found = f"the loss or its gradient is not a finite number at step {step}; rows of that update: "
        blamed = [rank for rank, (first, own, _) in enumerate(every) if own and first == step]
        blamed = blamed or [rank for rank, (first, _, _) in enumerate(every) if first == step]
        if self.world.size == 1:
            return found + listed
        return found + "; ".join(f"rank {rank}: {every[rank][2] or 'none'}" for rank in blamed)

    def check(self, loss_scale: float) -> None:
        """StopRun if an update since the last check went wrong. Comes before anything is logged or saved.

        loss_scale: fp16's; 1 without.
        """
        step, problem = self.seen[-1][0] if self.seen else 0, self.problem()
        if problem is not None:
            remedy = "Look at these rows, lower learning_rate, or use bf16 instead of fp16"
            raise StopRun(f"{problem}. Nothing was saved after it. {remedy}")
        if loss_scale < 1:
            overflow = f"gradients overflow even with a loss scale of {loss_scale:g}"
            raise StopRun(f"fp16: at step {step} {overflow}; use bf16, or lower learning_rate")


def peak_memory_gb(device: torch.device) -> float:
    """GB (1e9 bytes): of the GPU's allocator, or of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
