"""The equality matrix: every stage, with every method, in every mode, against one process.

    PYTHONPATH=.:tests python tests/parallel_cells.py [stage=dpo] [method=qlora] [mode=fsdp] [ranks=2]

A cell is a run of train.py of a few updates of SGD. Its losses, its gradient norms and its weights have to be
those of one process on the same rows, and what a spy in each rank saw has to be what the mode promises. All
cells of a number of ranks share one start of the processes.
"""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from stage_runs import METHODS, stage_keys, write_stage_data
from tiny_runs import TinyRuns, fork_ranks, meeting, tiny_runs, wait_for_all
from torch.distributed.tensor import DTensor

import train
from parallel.options import ParallelOptions
from parallel.tensor import is_cut

STAGES = ("pt", "sft", "rm", "dpo", "orpo", "kto", "ppo", "grpo")
MODES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp", "gather_for_generation": False},
    "hsdp": {"parallel": "hsdp", "dp_shard_size": 2, "gather_for_generation": False},
    "tp": {"parallel": "fsdp", "tp_size": 2},
    "cp": {"parallel": "fsdp", "cp_size": 2},
    "ring": {"parallel": "ddp", "cp_size": 2, "cp_mode": "ring"},
}
LIMIT = 1e-5  # of a tensor's largest entry: fp32
ROWS = 8  # of an update


def methods_of(mode: str) -> tuple[str, ...]:
    """Codes are not cut over ranks, and options/rules.py says so."""
    return ("lora", "full") if mode == "tp" else ("lora", "full", "qlora")


class Cell(NamedTuple):
    stage: str
    method: str
    mode: str
    ranks: int
    dropped: bool = False  # the last rank's gradients are left out: the cell has to differ

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def alone(self) -> str:
        return f"{self.stage}-{self.method}"

    @property
    def data(self) -> int:
        """Ranks, or groups of them, that have rows of their own."""
        return ParallelOptions(**MODES[self.mode]).data(self.ranks)


def keys_of(tiny: TinyRuns, cell: Cell) -> dict:
    keys = METHODS[cell.method] | {
        "overwrite_cache": True,
        "ddp_timeout": 120,
    }  # the reference's numbers are made in every cell
    keys |= {"max_steps": 3, "num_train_epochs": None, "seed": 3}
    return stage_keys(tiny, cell.stage, **keys, optim="sgd", learning_rate=0.05, weight_decay=0.1)


def words_of(tiny: TinyRuns, cell: Cell) -> list[str]:
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS // cell.data}
    return tiny.words(cell.name, **keys_of(tiny, cell), **rows, **MODES[cell.mode])


# In a rank


def run_in_turn(cells: list[tuple[bool, list[str], str]]) -> int:
    """Runs (dropped, argv, port) up to the first that fails, whose exit status it gives."""
    plain = train.update
    for dropped, argv, port in cells:
        os.environ["MASTER_PORT"] = port
        train.update = spy = Spy(plain, dropped)
        if status := train.main(argv):
            return status
        folder = Path(dict(word.split("=", 1) for word in argv)["output_dir"])
        (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(spy.seen))
    return 0


class Spy:
    """train.update, but for notes of what there is on this rank, and a gradient that may be dropped."""

    def __init__(self, update, dropped: bool):
        self.update, self.dropped, self.seen = update, dropped, {"rows": [], "tokens": []}

    def __call__(self, model, optimizer, stage, group, scaler, world, limit):
        hook = model.layers[0].register_forward_pre_hook(
            lambda module, inputs: self.seen["tokens"].append(len(inputs[0]))
        )
        loss = type(stage).loss
        if self.dropped and world.rank == world.size - 1:
            stage.loss = lambda *inputs: [
                each * 0 if i == 0 else each for i, each in enumerate(loss(stage, *inputs))
            ]
        result = self.update(model, optimizer, stage, group, scaler, world, limit)
        hook.remove()
        # not before it: who then needs shares, and who takes what is gathered, is the loop's to know
        for kind in ("trained", "frozen"):
            held = [p for p in model.parameters() if p.requires_grad == (kind == "trained")]
            spread = [p for p in held if isinstance(p, DTensor)]
            here = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in held)
            cut = sum(is_cut(p) for p in held)
            self.seen[kind] = {"tensors": len(held), "spread": len(spread), "bytes": here, "cut": cut}
        self.seen["rows"] += [source for batch in group for source in batch.sources]
        self.seen["whole"] = [len(batch.tokens) for batch in group]
        return result


# Beside them


def run(tiny: TinyRuns, cells: list[Cell]) -> dict[Cell, float]:
    """Each cell's difference; all of one number of ranks."""
    (ranks,) = {cell.ranks for cell in cells}
    numbered = [(cell.dropped, words_of(tiny, cell), meeting()) for cell in cells]
    children = fork_ranks(run_in_turn, (numbered,), tiny.folder / f"cells-{ranks}", ranks)
    for cell in cells:
        if not (tiny.folder / cell.alone).exists():
            one = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
            assert tiny.train(cell.alone, **keys_of(tiny, cell), **one) == 0
    wait_for_all(children, 2400)
    for cell in cells:
        check_mode(tiny, cell)
    return {cell: difference(tiny, cell) for cell in cells}


def difference(tiny: TinyRuns, cell: Cell) -> float:
    """The largest of |cell - one process| over losses, gradient norms and weights, each relative to its
    tensor's largest entry."""
    worst = 0.0
    for key in ("loss", "grad_norm"):
        mine, others = tiny.losses(cell.name, key), tiny.losses(cell.alone, key)
        assert mine.keys() == others.keys() and len(mine) == 3
        worst = max(worst, *(abs(mine[step] - others[step]) / max(1.0, abs(others[step])) for step in mine))
    mine, others = tiny.weights(cell.name), tiny.weights(cell.alone)
    assert mine.keys() == others.keys()
    for name, weight in others.items():
        worst = max(worst, float((mine[name] - weight).abs().max() / weight.abs().max().clamp_min(1e-9)))
    return worst


def check_mode(tiny: TinyRuns, cell: Cell) -> None:
    """What each rank saw: parameters in the engine, a share of their bytes, rows and tokens of its own."""
    files = [tiny.folder / cell.name / f"seen-{rank}.json" for rank in range(cell.ranks)]
    seen = [json.loads(file.read_text()) for file in files]
    keys = MODES[cell.mode]
    engine = cell.ranks // keys.get("tp_size", 1)
    share = {"ddp": 1, "fsdp": engine, "hsdp": 2}[keys["parallel"]]
    for each in seen:
        assert each["trained"]["spread"] == each["trained"]["tensors"] * (engine > 1), (cell, each)
        assert (each["trained"]["cut"] > 0) == (keys.get("tp_size", 1) > 1)
        assert (each["frozen"]["spread"] == each["frozen"]["tensors"]) == (
            share > 1 or cell.method == "full"
        ), (cell, each)
        context = keys.get("cp_size", 1)
        if cell.stage in ("pt", "sft"):
            assert each["tokens"][-len(each["whole"]) :] == [-(-whole // context) for whole in each["whole"]]
    for kind in ("trained", "frozen"):
        held = [each[kind]["bytes"] for each in seen]
        assert max(held) < 1.2 * min(held) + 4000, held
    together = cell.ranks // cell.data
    owners = [seen[first]["rows"] for first in range(0, cell.ranks, together)]
    for number, rows in enumerate(owners):
        assert all(each["rows"] == rows for each in seen[number * together : (number + 1) * together])
    assert len({json.dumps(rows) for rows in owners}) == len(owners)


def main(argv: list[str]) -> int:
    """The exit status: 1 where a cell differs."""
    status = False
    asked = dict(word.split("=") for word in argv)
    every = {"stage": STAGES, "method": ("full", "lora", "qlora"), "mode": MODES, "ranks": ("2", "4")}
    chosen = {key: asked[key].split(",") if key in asked else sorted(all_, key=list(all_).index)
              for key, all_ in every.items()}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tiny_runs(Path(folder)) as tiny:
        write_stage_data(tiny, count=11)
        for ranks in map(int, chosen["ranks"]):
            modes = [mode for mode in chosen["mode"] if mode != "hsdp" or ranks == 4]
            parts = itertools.product(chosen["stage"], chosen["method"], modes)
            cells = [Cell(*part, ranks) for part in parts if part[1] in methods_of(part[2])]
            for cell, worst in run(tiny, cells).items():
                print(
                    f"{'-'.join(map(str, cell[:4])):24} {worst:.1e}",
                    "" if worst < LIMIT else "DIFFERS",
                    flush=True,
                )
                status |= worst >= LIMIT
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
