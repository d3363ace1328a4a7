"""The resume matrix: runs that stop and go on in another mode, on another number of ranks, and one process
that never stopped.

    PYTHONPATH=.:tests python tests/parallel_resume.py [chain=ddp2-fsdp2] [method=qlora]

Each part of a chain is a call of train.py, two more updates of AdamW from the newest checkpoint. Shown
are the largest differences of losses, relative to the loss, and of weights, relative to each tensor's largest
entry. A part that has to be refused is marked with an x.
"""

import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from parallel_cells import MODES, ROWS, methods_of
from stage_runs import METHODS, stage_keys, write_stage_data
from tiny_runs import TinyRuns, start_ranks_in_turn, tiny_runs, wait_for_all

import train
from parallel.options import ParallelOptions

CHAINS = (
    "ddp2-fsdp2",
    "fsdp2-one1-fsdp4",
    "hsdp4-ddp2",
    "cp2-ddp2",
    "ring2-fsdp2",
    "one1-hsdp4",
    "fsdp4-cp4",
)
CHAINS += ("tp2-tp4", "tp2-one1x", "ddp2-hsdp4-ring2")
UPDATES = 2  # of a part
LIMIT = 1e-5  # fp32, as of parallel_cells
# constant: the same rate whatever the run's length is; epsilon: AdamW divides by the size of a gradient, and
# one that is all rounding would become an update as large as any
KEYS = {"num_train_epochs": None, "lr_scheduler_type": "constant", "learning_rate": 0.01, "seed": 3}
KEYS |= {"adam_epsilon": 0.01, "logging_steps": 1, "overwrite_cache": True}


def parts_of(chain: str) -> list[tuple[str, int]]:
    """(mode, ranks) of each."""
    return [(part.rstrip("x")[:-1], int(part.rstrip("x")[-1])) for part in chain.split("-")]


def words_of(tiny: TinyRuns, chain: str, method: str, number: int) -> list[str]:
    mode, ranks = parts_of(chain)[number]
    spread = MODES.get(mode, {})
    rows = (
        ROWS // ParallelOptions(**spread).data(ranks) if number == 0 else 4
    )  # then it goes by the checkpoint
    lasting = {"max_steps": UPDATES * (number + 1), "per_device_train_batch_size": rows}
    saving = {"save_strategy": "steps", "save_steps": UPDATES}
    keys = METHODS[method] | KEYS | lasting | saving | spread
    return tiny.words(f"{chain}-{method}", **stage_keys(tiny, "sft", **keys))


def run(tiny: TinyRuns, asked: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(chain, method) -> what came out."""
    for number in range(max(len(parts_of(chain)) for chain, _ in asked)):
        for ranks in (1, 2, 4):
            each = [one for one in asked if number < len(parts_of(one[0]))]
            words = [words_of(tiny, *one, number) for one in each if parts_of(one[0])[number][1] == ranks]
            if words and ranks > 1:
                wait_for_all(start_ranks_in_turn(words, tiny.folder / f"part-{number}", ranks), 2400)
            for argv in words if ranks == 1 else ():
                with redirect_stderr(StringIO()) as said:
                    status = train.main(argv)
                refused = [
                    one for one in asked if f"{one[0]}-{one[1]}" in " ".join(argv) and one[0][-1] == "x"
                ]
                assert status == (2 if refused else 0), said.getvalue()
                assert not refused or "tp_size was 2, is 1" in said.getvalue(), said.getvalue()
    return {one: outcome(tiny, *one) for one in asked}


def outcome(tiny: TinyRuns, chain: str, method: str) -> str:
    if chain[-1] == "x":
        return "refused by name"
    updates, name = UPDATES * len(parts_of(chain)), f"{chain}-{method}"
    whole = f"whole-{method}-{updates}"
    if not (tiny.folder / whole).exists():
        keys = METHODS[method] | KEYS | {"max_steps": updates, "per_device_train_batch_size": ROWS}
        assert tiny.train(whole, **stage_keys(tiny, "sft", **keys)) == 0
    mine, others = tiny.losses(name), tiny.losses(whole)
    assert mine.keys() == others.keys() == set(range(1, updates + 1))
    loss = max(abs(mine[step] - others[step]) / abs(others[step]) for step in mine)
    mine, others = tiny.weights(name), tiny.weights(whole)
    assert mine.keys() == others.keys()
    weight = max(
        float((mine[key] - tensor).abs().max() / tensor.abs().max()) for key, tensor in others.items()
    )
    return f"{loss:.1e}  {weight:.1e}" + "  DIFFERS" * (max(loss, weight) > LIMIT)


def main(argv: list[str]) -> int:
    """The exit status: 1 where a chain differs."""
    given = {key: value.split(",") for key, value in (word.split("=") for word in argv)}
    asked = []
    for chain in given.get("chain", CHAINS):
        methods = set(methods_of("tp" if "tp" in chain else "ddp"))
        asked += [(chain, each) for each in given.get("method", ("full", "lora", "qlora")) if each in methods]
    with tempfile.TemporaryDirectory() as folder, tiny_runs(Path(folder)) as tiny:
        write_stage_data(tiny, 19)
        with redirect_stdout(StringIO()):
            found = run(tiny, asked)
    print(f"# torch {torch.__version__}, gloo; python tests/parallel_resume.py; a part is MODE and its ranks")
    print(
        "# hsdp: shards of 2; tp: fsdp, tp_size 2; cp: fsdp, cp_size 2; ring: ddp, cp_size 2; 2 updates each"
    )
    print(f"{'chain':24} {'method':6} losses   weights")
    for (chain, method), text in found.items():
        print(f"{chain.replace('-', ' -> '):24} {method:6} {text}", flush=True)
    return int(any("DIFFERS" in text for text in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
