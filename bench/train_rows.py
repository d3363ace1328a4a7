"""bench/train.py on a GPU, and its smoke test: rows of random models, all systems in one process.

Each baseline runs with its usual recipe (gradient checkpointing, torch's choice of attention) and with its
best: no recompute if that fits, cuDNN attention; compile=true adds torch.compile. Systems take turns,
A-B-A-B: in each turn one step without and several with the clock, the host free to run ahead as in training.
5 steps of warm-up come before. The losses of all systems are compared step by step. T2, M1 and M2 train over
a base in NF4 with double quantisation: the baseline has bitsandbytes' layers around the same codes, and T2
also shows Anvil over the same numbers in 16 bits; M1 and M2 are there for their memory, so everything is
recomputed.
tokens/s counts real tokens, never padding. Model TF: 4N per token for LoRA (6N in full) + attention +
adapters, the head on trained tokens only, nothing recomputed; `share` is of the sustained rate of products in
this run. Peak memory is torch's, without what belongs to the other systems.
"""

import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from bench import measure
from bench.baselines import BEST, COMPILED, DEFAULT, Document, MicroBatch
from bench.measure import ROOT, Session, Timer, is_on, synchronize, table
from bench.train_systems import (
    MODELS,
    Setting,
    anvil_in_16_bits,
    anvil_on,
    baseline_on,
    describe,
    flops_per_step,
    random_decoder,
)  # fmt: skip
from pipeline.packing import first_fit

SECONDS = {False: 200.0, True: 70.0}
WARMUP_STEPS = 5
DIFFERENT_GROUPS = 4  # repeated, so that the loss falls and the comparison of losses tells something
LOSS_TOLERANCE = 0.01  # of the loss: bf16 noise over 20 steps is below it, a wrong gradient is not


@dataclass(frozen=True)
class Row:
    """One line of the goals. lengths: tokens of each example of a micro-batch; () = like Alpaca's, cut at
    1,024."""

    name: str
    what: str
    model: str
    rank: int  # 0 = full tuning
    lengths: tuple[int, ...] = ()
    accumulation: int = 1
    packed_to: int = 0  # tokens per row; then 4 rows make a micro-batch
    quick: bool = False
    needs_seconds: float = 25.0  # to be worth starting
    in_4_bits: bool = False
    policy: str = "auto"  # Anvil's gradient_checkpointing
    systems: tuple[str, ...] = ("hf default", "hf best")  # beside Anvil


ROWS = [
    Row("T1", "LoRA r16, 4 x 2048", "Llama-2-7B", 16, (2048,) * 4, quick=True, needs_seconds=35),
    Row(
        "T2", "LoRA r16 over NF4, 4 x 2048", "Llama-2-7B", 16, (2048,) * 4, needs_seconds=50, in_4_bits=True,
        systems=("anvil 16 bit", "hf default", "hf best"),
    ),
    Row(
        "M1", "LoRA r8 over NF4, 1 x 1024", "Llama-2-7B", 8, (1024,), needs_seconds=20, in_4_bits=True,
        policy="full", systems=("hf default",),
    ),
    Row(
        "M5", "LoRA r8, 1 x 1024", "Llama-2-7B", 8, (1024,), needs_seconds=12, policy="full", systems=(),
    ),
    Row("T3", "LoRA r16, 1 x 512", "Llama-2-7B", 16, (512,), needs_seconds=15, systems=("hf default",)),
    Row("T6", "full bf16, 8 x 2048", "TinyLlama-1.1B", 0, (2048,) * 8, quick=True, needs_seconds=20),
    Row(
        "M2", "LoRA r16 over NF4, 1 x 1024", "Llama-2-70B", 16, (1024,), needs_seconds=45, in_4_bits=True,
        policy="full", systems=(),
    ),
    Row("T4", "LoRA r16, Alpaca lengths, batch 4", "Llama-2-7B", 16),
    Row(
        "T2b", "LoRA r8, 4 x 1024, accumulate 2", "Llama-2-7B", 8, (1024,) * 4, accumulation=2,
        needs_seconds=30,
    ),
    Row("T4p", "the same packed, 4 rows of 1024", "Llama-2-7B", 16, packed_to=1024, needs_seconds=30),
    Row(
        "T3q", "LoRA r16 over NF4, 1 x 512", "Llama-2-7B", 16, (512,), needs_seconds=20, in_4_bits=True,
        systems=("hf default",),
    ),
    Row(
        "T8", "LoRA r16 over NF4, 1 x 2048", "Llama-2-70B", 16, (2048,), needs_seconds=60, in_4_bits=True,
        systems=(),
    ),
    Row("L3", "LoRA r16, 4 x 2048", "Llama-3-8B", 16, (2048,) * 4, needs_seconds=40),
    Row("S1", "LoRA r16, 8 x 1024", "SmolLM2-135M", 16, (1024,) * 8, needs_seconds=15),
]  # fmt: skip
SMOKE_ROWS = [
    Row("T1", "LoRA r4, 2 x 24", "tiny", 4, (24,) * 2, needs_seconds=0),
    Row(
        "T2", "LoRA r4 over NF4, 2 x 24", "tiny of whole blocks", 4, (24,) * 2, needs_seconds=0,
        in_4_bits=True, systems=("anvil 16 bit", "hf default", "hf best"),
    ),
    Row(
        "M2", "LoRA r4 over NF4, 1 x 24", "tiny of whole blocks", 4, (24,), needs_seconds=0, in_4_bits=True,
        policy="full", systems=(),
    ),
    Row("T6", "full, 2 x 24", "tiny", 0, (24,) * 2, accumulation=2, needs_seconds=0),
    Row("T4", "LoRA r4, Alpaca lengths", "tiny", 4, needs_seconds=0),
    Row("T4p", "the same packed", "tiny", 4, packed_to=256, needs_seconds=0),
]  # fmt: skip


def run(options: dict[str, str], device: torch.device, command: str) -> int:
    """Measure the rows asked for, print and save them. Gives the exit status."""
    quick, on_gpu = is_on(options["quick"]), device.type == "cuda"
    session = Session(float(options["seconds"] or SECONDS[quick]))
    rows = chosen_rows(ROWS if on_gpu else SMOKE_ROWS, quick, options["rows"])
    machine = measure.describe_machine(device, command)
    timer = Timer(device, seconds=0.1 if on_gpu else 0.005)
    with timer.stream():
        sustained_seconds = (1.0 if quick else 3.0) if on_gpu else 0.05
        ceilings = measure.take_ceilings(timer, sustained_seconds)
    del timer
    release(device)
    print(ceilings.text, flush=True)
    results = {}
    for place, row in enumerate(rows):
        if not session.allows(row.name, row.needs_seconds):
            continue
        seconds = session.left if place + 1 == len(rows) else session.left / 2
        with session.part(row.name):
            results[row.name] = measure_row(row, device, seconds, is_on(options["compile"]), session)
        release(device)
    print_report(results, ceilings, machine)
    report = {"ceilings": ceilings, "rows": results, "left_out": session.left_out, "failed": session.failed}
    measure.save(measure.file_name("train", quick, options["rows"]), machine, report, options["out"])
    return session.finish()


def chosen_rows(rows: list[Row], quick: bool, names: str) -> list[Row]:
    """names: separated by commas; empty: all, or those of a quick run."""
    if not names:
        return [row for row in rows if row.quick or not quick]
    if set(names.split(",")) - {row.name for row in rows}:
        raise SystemExit(f"rows={names}: known are {', '.join(row.name for row in rows)}")
    return [row for row in rows if row.name in names.split(",")]


# Batches


def make_groups(row: Row, count: int) -> list[list[MicroBatch]]:
    """count accumulation groups of random tokens; the lengths are the row's or those of
    data/alpaca_en_demo.json."""
    random, vocabulary = np.random.default_rng(0), MODELS[row.model]["vocab_size"]

    def document(length: int, prompt: int) -> Document:
        ids = random.integers(0, vocabulary, length).astype(np.int32)
        return Document(ids, np.arange(length) >= prompt)

    def micro_batch(lengths) -> MicroBatch:
        return [[document(*pair)] for pair in lengths]

    if row.lengths:
        pairs = [(length, 0) for length in row.lengths]
        return [[micro_batch(pairs) for _ in range(row.accumulation)] for _ in range(count)]
    known = alpaca_lengths(row.packed_to or 1024)
    drawn = [known[i] for i in random.permutation(len(known))]
    if not row.packed_to:
        return [[micro_batch(drawn[4 * i : 4 * i + 4])] for i in range(count)]
    bins = first_fit([length for length, _ in drawn[: 64 * count]], row.packed_to)
    bins.sort(key=lambda members: -sum(drawn[i][0] for i in members))
    return [[[[document(*drawn[i]) for i in one] for one in bins[4 * g : 4 * g + 4]]] for g in range(count)]


def alpaca_lengths(longest: int) -> list[tuple[int, int]]:
    """(tokens of the example, of them prompt), a token for four characters and 20 for the template; cut at
    longest."""
    lengths = []
    for example in json.loads((ROOT / "data/alpaca_en_demo.json").read_text(encoding="utf-8")):
        prompt = 20 + (len(example["instruction"]) + len(example["input"])) // 4
        length = min(longest, prompt + 1 + len(example["output"]) // 4)
        lengths.append((length, min(prompt, length - 2)))
    return lengths


# Measuring


@dataclass
class Entry:
    """One system of a row, with what belongs to it alone."""

    system: Any
    prepared: list = field(default_factory=list)  # the groups in the system's own form
    losses: list[float] = field(default_factory=list)  # of every step, warm-up too
    seconds: list[float] = field(default_factory=list)  # per step, one number for each turn
    step_seconds: float = 0.0  # of the last step of the warm-up
    own_bytes: int = 0  # between steps: adapters and their state, and the weights if they are not shared
    peak_bytes: int = 0  # beyond that during a step
    reserved_bytes: int = 0


def measure_row(row: Row, device: torch.device, seconds: float, with_compile: bool, session: Session) -> dict:
    start = time.monotonic()
    setting = Setting(row.model, row.rank, device, row.in_4_bits, row.policy)
    before = allocated(device)
    source = random_decoder(setting)
    shared_bytes = allocated(device) - before if row.rank else 0
    groups = make_groups(row, DIFFERENT_GROUPS)
    not_run: dict[str, str] = {}
    # baselines first: they copy the weights and adapters before Anvil changes them
    makers = {"anvil": [lambda: anvil_on(setting, source)]}
    others = {
        "anvil 16 bit": [lambda: anvil_in_16_bits(setting, source)],
        "hf default": [lambda: baseline_on(setting, source, DEFAULT)],
        "hf best": [lambda r=recipe: baseline_on(setting, source, r) for recipe in BEST],
    }
    makers |= {name: others[name] for name in row.systems}
    if with_compile and row.systems:
        makers["hf compile"] = [lambda r=recipe: baseline_on(setting, source, r) for recipe in COMPILED]
    entries = build_all(makers, groups, device, shared_bytes, not_run)
    # a smoke test on a CPU takes the fewest, and so does a row that is there for its memory
    few = device.type == "cpu" or row.policy != "auto"
    turn_steps, turns = plan(entries, 0 if few else start + seconds - time.monotonic())
    for turn in range(turns):
        for entry in entries.values():
            take_turn(entry, groups, WARMUP_STEPS + turn * (turn_steps + 1), turn_steps, device)
    result = {"row": asdict(row), "setting": describe(setting), "turns": turns, "steps_per_turn": turn_steps}
    result["systems"] = {
        name: summarise(entry, groups, setting, shared_bytes) for name, entry in entries.items()
    }
    result["not_run"] = not_run
    result["largest_loss_difference"] = compare_losses(row, result["systems"], session)
    return result


def build_all(makers: dict, groups, device, shared_bytes: int, not_run: dict[str, str]) -> dict[str, Entry]:
    """Construct and warm up every system. A baseline's next recipe is taken where one runs out of memory.

    Anvil is constructed first (its adapters are what the baselines copy) and stepped last (so they copy them
    untrained).
    """
    entries: dict[str, Entry] = {}
    before = allocated(device)
    own = makers["anvil"][0]()
    own_bytes = allocated(device) - before + (0 if shared_bytes else model_bytes(own.model))
    for name, recipes in makers.items():
        if name == "anvil":
            continue
        for make in recipes:
            entry, problem = try_system(make, groups, device)
            release(device)  # here, where the failed system is in nobody's hands any more
            if entry is not None:
                entries[name] = entry
                break
            not_run[f"{name} ({problem[0]})"] = problem[1]
            print(f"{name} ({problem[0]}): {problem[1]}", flush=True)
            if not problem[1].startswith("OutOfMemoryError"):
                break
    entry = Entry(own)
    before = allocated(device)
    warm_up(entry, groups, device)
    entry.own_bytes = own_bytes + allocated(device) - before
    return {"anvil": entry, **entries}


def try_system(make, groups, device) -> tuple[Entry | None, tuple[str, str]]:
    """(the system, warm) or (None, (its settings, why not)). Nothing of a failed one survives in a
    traceback."""
    before, note = allocated(device), "construction"
    try:
        system = make()
        note = system.note
        entry = Entry(system)
        warm_up(entry, groups, device)
    except Exception as error:  # a baseline may raise what it likes; the table then says so
        text = str(error).splitlines()[0] if str(error) else ""
        return None, (note, f"{type(error).__name__}: {text}"[:300])
    entry.own_bytes = allocated(device) - before - getattr(system, "unused_bytes", 0)
    return entry, (note, "")


def warm_up(entry: Entry, groups, device) -> None:
    entry.prepared = [entry.system.prepare(group) for group in groups]
    for step in range(WARMUP_STEPS):
        synchronize(device)
        start = time.perf_counter()
        loss = entry.system.step(entry.prepared[step % len(groups)])
        entry.losses.append(loss.item())
        entry.step_seconds = time.perf_counter() - start


def plan(entries: dict[str, Entry], seconds: float) -> tuple[int, int]:
    """(timed steps in a turn, turns) that fit: 5 turns of 4 where there is time, never fewer than 2 of 3."""
    step_seconds = sum(entry.step_seconds for entry in entries.values())
    for steps, turns in ((4, 5), (4, 4), (4, 3), (3, 3), (3, 2)):
        if step_seconds * (steps + 1) * turns <= seconds:
            break
    return steps, turns


def take_turn(entry: Entry, groups, first: int, steps: int, device) -> None:
    """One step to come back into the memory, then `steps` timed ones without looking at any result in
    between."""
    release(device)
    at_start = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        reserved_at_start = torch.cuda.memory_reserved(device)
    losses = [entry.system.step(entry.prepared[first % len(groups)])]
    synchronize(device)
    start = time.perf_counter()
    for step in range(first + 1, first + 1 + steps):
        losses.append(entry.system.step(entry.prepared[step % len(groups)]))
    synchronize(device)
    entry.seconds.append((time.perf_counter() - start) / steps)
    entry.losses += torch.stack(losses).tolist()
    if device.type == "cuda":
        entry.peak_bytes = max(entry.peak_bytes, torch.cuda.max_memory_allocated(device) - at_start)
        grown = torch.cuda.max_memory_reserved(device) - reserved_at_start
        entry.reserved_bytes = max(entry.reserved_bytes, grown)


def summarise(entry: Entry, groups, setting: Setting, shared_bytes: int) -> dict[str, Any]:
    """Medians over the turns."""
    tokens = statistics.mean(sum(len(d.ids) for rows in g for row in rows for d in row) for g in groups)
    work = statistics.mean(flops_per_step(setting.config, setting.rank, group) for group in groups)
    seconds = statistics.median(entry.seconds)
    return {
        "setting": entry.system.note,
        "tokens_per_second": tokens / seconds,
        "spread": [tokens / max(entry.seconds), tokens / min(entry.seconds)],
        "step_seconds": entry.seconds,
        "model_tflops": work / seconds / 1e12,
        "peak_gib": (shared_bytes + entry.own_bytes + entry.peak_bytes) / 2**30 if entry.peak_bytes else None,
        "reserved_gib": (shared_bytes + entry.own_bytes + entry.reserved_bytes) / 2**30
        if entry.peak_bytes
        else None,
        "losses": entry.losses,
    }


def compare_losses(row: Row, systems: dict[str, dict], session: Session) -> dict[str, float]:
    """Largest difference of a step's loss to Anvil's, per baseline; beyond the tolerance is a failure."""
    own, found = systems["anvil"]["losses"], {}
    for name, result in systems.items():
        if name == "anvil":
            continue
        found[name] = max(abs(a - b) for a, b in zip(own, result["losses"], strict=True))
        if not found[name] <= LOSS_TOLERANCE * max(own):  # NaN fails too
            session.failed.append(
                f"{row.name}: losses of {name} differ by {found[name]:.3g} from {own[0]:.3f}"
            )
    return found


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def model_bytes(model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def release(device: torch.device) -> None:
    """Give back what no system holds any more, so that the next one's memory is its own; a CPU's is not
    measured."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def print_report(results: dict[str, dict], ceilings, machine: dict) -> None:
    lines = []
    for name, result in results.items():
        systems, row = result["systems"], result["row"]
        own = systems["anvil"]["tokens_per_second"]
        for place, (system, found) in enumerate(systems.items()):
            low, high = found["spread"]
            line = {"row": f"{name} {row['model']} {row['what']}" if place == 0 else "", "system": system}
            line |= {"tok/s": f"{found['tokens_per_second']:.0f}", "min..max": f"{low:.0f}..{high:.0f}"}
            line |= {"TF": f"{found['model_tflops']:.0f}"}
            line["share"] = f"{found['model_tflops'] / ceilings.sustained_tflops:.0%}"
            if found["peak_gib"] is not None:
                line |= {"peak GiB": f"{found['peak_gib']:.2f}", "reserved": f"{found['reserved_gib']:.2f}"}
            if system != "anvil":
                line["anvil is"] = f"{own / found['tokens_per_second']:.2f}x"
                line["losses differ"] = f"{result['largest_loss_difference'][system]:.1e}"
            lines.append(line | {"settings": found["setting"]})
        for system, reason in result["not_run"].items():
            lines.append({"row": "", "system": system, "tok/s": "not run", "settings": reason[:60]})
    print(f"\n{machine.get('gpu') or 'CPU, smoke test'}, torch {machine['torch']}, transformers ", end="")
    print(f"{machine['transformers']}, peft {machine['peft']}, commit {machine['commit']}\n{ceilings.text}\n")
    print(table(lines))
