"""How the rows of an update lie on ranks, and how a run goes on where they lie otherwise.

What decides the weights is the global batch, per_device_train_batch_size x gradient_accumulation_steps x the
ranks with rows of their own. How it is divided does not: a run goes on with the same rows in the same order
on another number of ranks and in another mode. Only what each rank knows for itself is lost: the random
numbers of dropout are new, and the texts of a rollout stay where they were written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data import DataOptions
from options.config import Config
from options.errors import UserError, refuse
from parallel.world import World
from training.options import TrainOptions

ROWS, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"
RANKS, DATA = "number of processes", "ranks with rows of their own"
KEYS = (ROWS, STEPS, RANKS, DATA)  # of a fingerprint


@dataclass(frozen=True)
class Layout:
    rows: int  # of a micro-batch
    steps: int  # micro-batches of an update, on each rank
    ranks: int
    data: int  # ranks, or groups of them, with rows of their own

    @classmethod
    def of(cls, config: Config, world: World) -> "Layout":
        return cls(config.values[ROWS], config.values[STEPS], world.size, world.data_size)

    @classmethod
    def read(cls, fingerprint: Mapping[str, str]) -> "Layout":
        """Of a checkpoint; of an older version, where all ranks had rows of their own."""
        return cls(*(int(fingerprint[k]) for k in KEYS[:3]), int(fingerprint.get(DATA, fingerprint[RANKS])))

    @property
    def described(self) -> dict[str, str]:
        """For a fingerprint."""
        return dict(zip(KEYS, map(str, (self.rows, self.steps, self.ranks, self.data))))

    @property
    def batch(self) -> int:
        """Rows of an update, on all ranks."""
        return self.rows * self.steps * self.data

    def same_rows(self, other: "Layout", grouped: bool) -> bool:
        """Whether every update has the same rows. grouped: rows are sorted by length among those of some
        micro-batches, so that these have to be as large."""
        alike = not grouped or self.rows * self.data == other.rows * other.data
        return self.batch == other.batch and alike


def fitted(config: Config, world: World, folder: Path, fingerprint: Mapping[str, str]) -> Config:
    """The options with which the checkpoint in `folder` goes on here: on another number of ranks the global
    batch stays what it was. UserError where it cannot. What else has changed is not looked at."""
    then, now = Layout.read(fingerprint), Layout.of(config, world)
    grouped = config[DataOptions].group_by_length
    if then.data == now.data or then.same_rows(now, grouped):
        return config
    each = then.batch // now.data
    most = each if not grouped else then.rows * then.data // now.data
    fit = [rows for rows in range(1, most + 1) if each % rows == 0 and (not grouped or rows == most)]
    whole = then.rows * then.data if grouped else then.batch
    if whole % now.data:
        sizes = ", ".join(str(size) for size in range(1, whole + 1) if whole % size == 0)
        kind = "that group_by_length sorts together" if grouped else "in an update"
        found = f"{whole} rows {kind}, which {now.data} ranks do not divide"
        raise UserError(f"{folder}: it was trained with {found}; start on a number that does: {sizes}")
    rows = max([rows for rows in fit if rows <= now.rows] or fit[:1])
    steps = each // rows
    ranks = f"{then.ranks} ranks trained on {then.batch} rows an update, and so do {now.ranks} here"
    was = f"({ROWS} {then.rows} and {STEPS} {then.steps} there, {now.rows} and {now.steps} asked for here)"
    world.print(f"note: {folder}: {ranks}: {ROWS} is {rows} and {STEPS} {steps} {was}")
    return config.changed(TrainOptions, **{ROWS: rows, STEPS: steps})


def refuse_within_rollout(folder: Path, stage: Mapping, then: Layout, updates: int) -> None:
    """UserError for a checkpoint of another layout whose `stage` holds texts that updates are still to be
    made of. updates: of a rollout."""
    there = f"{then.ranks} processes with {ROWS}={then.rows} {STEPS}={then.steps}"
    found = (
        f"it lies between the {updates} updates of a rollout, whose texts are on the ranks that wrote them"
    )
    remedy = f"continue on {there}, or from a checkpoint at a multiple of {updates} steps"
    refuse(stage.get("drawn"), f"{folder}: {found}; {remedy}")
