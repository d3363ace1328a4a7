"""Training on this GPU: Anvil beside transformers + peft on the same random weights, adapters and batches, in one run.

    python bench/train.py                           # under 160 s: T1, T6, T4, then what fits
    python bench/train.py quick=true                # under 70 s
    python bench/train.py rows=T1,T2b compile=true seconds=500
    python bench/train.py device=cpu                # smoke test at tiny sizes; the numbers mean nothing

Each rival runs with its usual recipe (gradient checkpointing, torch's choice of attention) and with its best: no
recompute if that fits, cuDNN attention; compile=true adds torch.compile. Systems take turns, A-B-A-B: in each turn one
step without and several with the clock, the host free to run ahead as in training. 5 steps of warm-up come before. The
losses of all systems are compared step by step. tokens/s counts real tokens, never padding. Model TF: 4N per token for
LoRA (6N in full) + attention + adapters, the head on trained tokens only, nothing recomputed; `share` is of the
sustained rate of products in this run. Peak memory is torch's, without what belongs to the other systems.
Results: bench/results/train_<gpu>.json.
"""

import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from batches import first_fit  # noqa: E402
from bench.measure import (  # noqa: E402
    Session,
    Timer,
    describe_machine,
    pick_device,
    read_options,
    save,
    synchronize,
    table,
    take_ceilings,
)
from bench.train_systems import (  # noqa: E402
    BEST,
    COMPILED,
    DEFAULT,
    MODELS,
    Anvil,
    Document,
    MicroBatch,
    Rival,
    Setting,
    describe,
    flops_per_step,
    random_decoder,
)

DEFAULTS = {"device": "auto", "quick": "false", "seconds": "", "rows": "", "compile": "false", "out": ""}
SECONDS = {"false": 160.0, "true": 70.0}
WARMUP_STEPS = 5
DIFFERENT_GROUPS = 4  # repeated, so that the loss falls and the comparison of losses tells something
LOSS_TOLERANCE = 0.01  # of the loss: bf16 noise over 20 steps is below it, a wrong gradient is not


@dataclass(frozen=True)
class Row:
    """One line of the goals. lengths: tokens of each example of a micro-batch; () = like Alpaca's, cut at 1,024."""

    name: str
    what: str
    model: str
    rank: int  # 0 = full tuning
    lengths: tuple[int, ...] = ()
    accumulation: int = 1
    packed_to: int = 0  # tokens per row; then 4 rows make a micro-batch
    quick: bool = False
    needs_seconds: float = 25.0  # to be worth starting


ROWS = [
    Row("T1", "LoRA r16, 4 x 2048", "Llama-2-7B", 16, (2048,) * 4, quick=True, needs_seconds=40),
    Row("T6", "full bf16, 8 x 2048", "TinyLlama-1.1B", 0, (2048,) * 8, quick=True, needs_seconds=20),
    Row("T4", "LoRA r16, Alpaca lengths, batch 4", "Llama-2-7B", 16),
    Row("T2b", "LoRA r8, 4 x 1024, accumulate 2", "Llama-2-7B", 8, (1024,) * 4, accumulation=2, needs_seconds=30),
    Row("T4p", "the same packed, 4 rows of 1024", "Llama-2-7B", 16, packed_to=1024, needs_seconds=30),
    Row("L3", "LoRA r16, 4 x 2048", "Llama-3-8B", 16, (2048,) * 4, needs_seconds=40),
    Row("S1", "LoRA r16, 8 x 1024", "SmolLM2-135M", 16, (1024,) * 8, needs_seconds=15),
]
SMOKE_ROWS = [
    Row("T1", "LoRA r4, 2 x 24", "tiny", 4, (24,) * 2, needs_seconds=0),
    Row("T6", "full, 2 x 24", "tiny", 0, (24,) * 2, accumulation=2, needs_seconds=0),
    Row("T4", "LoRA r4, Alpaca lengths", "tiny", 4, needs_seconds=0),
    Row("T4p", "the same packed", "tiny", 4, packed_to=1024, needs_seconds=0),
]


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    device, quick = pick_device(options["device"]), options["quick"] == "true"
    on_gpu = device.type == "cuda"
    session = Session(float(options["seconds"] or SECONDS[options["quick"]]))
    rows = [row for row in (ROWS if on_gpu else SMOKE_ROWS) if row.quick or not quick or options["rows"]]
    if options["rows"]:
        wanted = options["rows"].split(",")
        if set(wanted) - {row.name for row in rows}:
            raise SystemExit(f"rows={options['rows']}: known are {', '.join(row.name for row in rows)}")
        rows = [row for row in rows if row.name in wanted]
    machine = describe_machine(device, "python bench/train.py " + " ".join(argv))
    timer = Timer(device, seconds=0.005 if not on_gpu else 0.1)
    with timer.stream():
        ceilings = take_ceilings(timer, sustained_seconds=0.05 if not on_gpu else 1.0 if quick else 3.0)
    del timer
    print(ceilings.text, flush=True)
    results = {}
    for place, row in enumerate(rows):
        if not session.allows(row.name, row.needs_seconds):
            continue
        seconds = session.left if place + 1 == len(rows) else session.left * 0.6
        with session.part(row.name):
            results[row.name] = measure_row(row, device, seconds, options["compile"] == "true", session)
        release(device)
    print_report(results, ceilings, machine)
    report = {"ceilings": ceilings, "rows": results, "left_out": session.left_out, "failed": session.failed}
    save("train", machine, report, options["out"])
    return session.finish()


# Batches


def make_groups(row: Row, count: int) -> list[list[MicroBatch]]:
    """count accumulation groups of random tokens; the lengths are the row's or those of data/alpaca_en_demo.json."""
    random, vocabulary = np.random.default_rng(0), MODELS[row.model]["vocab_size"]

    def document(length: int, prompt: int) -> Document:
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        return Document(ids, np.arange(length) >= prompt)

    def micro_batch(lengths) -> MicroBatch:
        return [[document(*pair)] for pair in lengths]

    if row.lengths:
        pairs = [(length, 0) for length in row.lengths]
        return [[micro_batch(pairs) for _ in range(row.accumulation)] for _ in range(count)]
    known = alpaca_lengths()
    drawn = [known[i] for i in random.permutation(len(known))]
    if not row.packed_to:
        return [[micro_batch(drawn[4 * i : 4 * i + 4])] for i in range(count)]
    bins = first_fit([length for length, _ in drawn[: 64 * count]], row.packed_to)
    bins.sort(key=lambda members: -sum(drawn[i][0] for i in members))
    return [[[[document(*drawn[i]) for i in one] for one in bins[4 * g : 4 * g + 4]]] for g in range(count)]


def alpaca_lengths() -> list[tuple[int, int]]:
    """(tokens of the example, of them prompt), one token per four characters and 20 for the template; cut at 1,024."""
    lengths = []
    for example in json.loads((ROOT / "data/alpaca_en_demo.json").read_text(encoding="utf-8")):
        prompt = 20 + (len(example["instruction"]) + len(example["input"])) // 4
        length = min(1024, prompt + 1 + len(example["output"]) // 4)
        lengths.append((length, min(prompt, length - 2)))
    return lengths


# Measuring


@dataclass
class Entry:
    """One system of a row, with what belongs to it alone."""

    system: Any
    own_bytes: int = 0
    losses: list = None
    seconds: list = None
    peak_bytes: int = 0
    reserved_bytes: int = 0


def measure_row(row: Row, device: torch.device, seconds: float, with_compile: bool, session: Session) -> dict:
    start = time.monotonic()
    setting = Setting(row.model, row.rank, device)
    before = allocated(device)
    source = random_decoder(setting)
    shared_bytes = allocated(device) - before if row.rank else 0
    groups = make_groups(row, DIFFERENT_GROUPS)
    not_run: dict[str, str] = {}
    # rivals first: they copy the weights and adapters before Anvil changes them
    makers = {"anvil": [lambda: Anvil(setting, source, 1000)]}
    makers["peft default"] = [lambda: Rival("peft default", setting, source, DEFAULT)]
    makers["peft best"] = [lambda r=recipe: Rival("peft best", setting, source, r) for recipe in BEST]
    if with_compile:
        makers["peft compile"] = [lambda r=recipe: Rival("peft compile", setting, source, r) for recipe in COMPILED]
    entries = build_all(makers, groups, device, shared_bytes, not_run)
    turn_steps, turns = plan(entries, start + seconds - time.monotonic())
    for turn in range(turns):
        for entry in entries.values():
            take_turn(entry, groups, WARMUP_STEPS + turn * (turn_steps + 1), turn_steps, device)
    result = {"row": asdict(row), "setting": describe(setting), "turns": turns, "steps_per_turn": turn_steps}
    result["systems"] = {name: summarise(entry, groups, setting, shared_bytes) for name, entry in entries.items()}
    result["not_run"] = not_run
    result["largest_loss_difference"] = compare_losses(row, result["systems"], session)
    return result
