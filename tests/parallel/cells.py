"""The equality matrix: every stage, with every method, in every mode, against one process.

    PYTHONPATH=.:tests python tests/parallel/cells.py [stage=dpo] [method=qlora] [mode=fsdp] [ranks=2]

A cell is a run of train.py of a few updates of SGD. Its losses, its gradient norms and its weights have to be
those of one process on the same rows. All cells of a number of ranks share one start of the processes.
"""

import itertools
import sys
import tempfile
from pathlib import Path

from stage_runs import stage_keys, write_stage_data
from tiny_runs import TinyRuns, start_ranks_in_turn, tiny_runs

STAGES = ("pt", "sft", "rm", "dpo", "orpo", "kto", "ppo", "grpo")
METHODS = {
    "full": {"finetuning_type": "full"},
    "lora": {"lora_rank": 3},
    "qlora": {"lora_rank": 3, "quantization_bit": 4},
}
MODES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "hsdp": {"parallel": "hsdp", "dp_shard_size": 2},
    "ulysses": {"parallel": "fsdp", "cp_size": 2},
    "ring": {"parallel": "ddp", "cp_size": 2, "cp_mode": "ring"},
    "tp": {"parallel": "fsdp", "tp_size": 2},
}
ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def keys_of(tiny: TinyRuns, stage: str, method: str) -> dict:
    keys = METHODS[method] | {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "seed": 3}
    return stage_keys(tiny, stage, **keys, num_train_epochs=None)


def run_alone(tiny: TinyRuns, stage: str, method: str) -> str:
    name = f"{stage}-{method}"
    if not (tiny.folder / name).exists():
        assert tiny.train(name, **keys_of(tiny, stage, method), **ONE) == 0
    return name


def words_of(tiny: TinyRuns, stage: str, method: str, mode: str, ranks: int) -> list[str]:
    share = {"per_device_train_batch_size": 1} | MODES[mode]
    together = share.get("cp_size", 1) * share.get("tp_size", 1)  # ranks that see the same rows
    share["gradient_accumulation_steps"] = 8 * together // ranks
    return tiny.words(f"{stage}-{method}-{mode}-{ranks}", **keys_of(tiny, stage, method), **share)


def difference(tiny: TinyRuns, stage: str, method: str, mode: str, ranks: int) -> float:
    """The largest of |cell - one process| over losses, gradient norms and weights, each relative to its
    tensor's largest entry."""
    alone, cell = f"{stage}-{method}", f"{stage}-{method}-{mode}-{ranks}"
    worst = 0.0
    for key in ("loss", "grad_norm"):
        mine, theirs = tiny.losses(cell, key), tiny.losses(alone, key)
        assert mine.keys() == theirs.keys()
        worst = max(worst, *(abs(mine[n] - theirs[n]) / max(1.0, abs(theirs[n])) for n in mine))
    mine, theirs = tiny.weights(cell), tiny.weights(alone)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        worst = max(worst, float((mine[name] - weight).abs().max() / weight.abs().max().clamp_min(1e-9)))
    return worst


def run(tiny: TinyRuns, cells: list[tuple[str, str, str]], ranks: int) -> dict[tuple, float]:
    """Each cell's difference."""
    words = [words_of(tiny, *cell, ranks) for cell in cells]
    children = start_ranks_in_turn(words, tiny.folder / f"cells-{ranks}", ranks)
    for stage, method, _ in cells:
        run_alone(tiny, stage, method)
    statuses = [child.wait(1200) for child in children]
    assert statuses == [0] * ranks, "".join(child.text()[-3000:] for child in children)
    return {cell: difference(tiny, *cell, ranks) for cell in cells}


def main(argv: list[str]) -> None:
    asked = dict(word.split("=") for word in argv)
    stages = asked.get("stage", ",".join(STAGES)).split(",")
    methods = asked.get("method", ",".join(METHODS)).split(",")
    modes = asked.get("mode", ",".join(MODES)).split(",")
    with tempfile.TemporaryDirectory() as folder, tiny_runs(Path(folder)) as tiny:
        write_stage_data(tiny)
        for ranks in map(int, asked.get("ranks", "2,4").split(",")):
            there = [mode for mode in modes if mode != "hsdp" or ranks == 4]
            cells = list(itertools.product(stages, methods, there))
            for cell, worst in run(tiny, cells, ranks).items():
                print(ranks, *cell, f"{worst:.1e}", "" if worst < 1e-5 else "DIFFERS", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
