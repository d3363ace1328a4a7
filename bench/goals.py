"""The performance goals against what the parts of `make gpu` wrote: a row for each, measured or why not.

    python bench/goals.py out=FOLDER machine=h200       # of the files in FOLDER; bench/gpu.py does it last

A goal is a ratio to a rival in the same run, a share of a ceiling of the same run, or a number with its unit.
`must` and `wish` are its two marks. A rival that is not there is `not run`, never a number from elsewhere.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.measure import RESULTS, read_options, table  # noqa: E402

Found = float | str  # the number, or why there is none


@dataclass(frozen=True)
class Goal:
    name: str
    what: str
    must: float
    wish: float
    find: Callable[[dict], Found]
    below: bool = False  # the smaller, the better


def main(argv: list[str]) -> int:
    options = read_options(argv, {"out": str(RESULTS), "machine": "cpu"}, __doc__)
    print(table(lines_of(read_reports(Path(options["out"]), options["machine"]))))
    return 0


def read_reports(folder: Path, machine: str, since: float = 0.0) -> dict[str, Any]:
    """What the parts wrote there about this machine; since: seconds since 1970, what is older is not read."""
    reports = {}
    for part in ("train", "decode", "kernels"):
        files = [folder / f"{part}{quick}_{machine}.json" for quick in ("_quick", "")]
        files = [path for path in files if path.exists() and path.stat().st_mtime >= since - 1]
        if files:
            newest = max(files, key=lambda path: path.stat().st_mtime)
            reports[part] = json.loads(newest.read_text(encoding="utf-8"))
    return reports


def lines_of(reports: dict[str, Any]) -> list[dict[str, str]]:
    """One row of texts for each goal."""
    lines, on_cpu = [], any(not report["machine"]["gpu"] for report in reports.values())
    for goal in GOALS:
        found = goal.find(reports)
        line = {"goal": goal.name, "what": goal.what}
        if isinstance(found, str):
            lines.append(line | {"measured": "not measured", "remark": found})
            continue
        met = [found <= mark if goal.below else found >= mark for mark in (goal.must, goal.wish)]
        verdict = "reached, wish too" if met[1] else "reached" if met[0] else "missed"
        verdict = "smoke test on a CPU: means nothing" if on_cpu else verdict
        numbers = {"measured": found, "must": goal.must, "wish": goal.wish}
        lines.append(line | {key: f"{value:.3g}" for key, value in numbers.items()} | {"remark": verdict})
    return lines


# Where the numbers stand


def _left_out(report: dict, name: str) -> str:
    """Why there is no number: what the part says of it."""
    texts = [*report.get("failed", ()), *(f"left out: {each}" for each in report["left_out"])]
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)  # T2 is not T2b
    return next(filter(word.search, texts), f"{name} was not run")


def of_training(row: str, system: str | None = None, of: Callable[[dict, dict], Found] | None = None):
    """The ratio of speeds to that system in a row of bench/train.py; or `of` (Anvil's entry, report)."""

    def find(reports: dict) -> Found:
        report = reports.get("train")
        if report is None:
            return "the part train was not run"
        if row not in report["rows"]:
            return _left_out(report, row)
        systems = report["rows"][row]["systems"]
        if of is not None:
            return of(systems["anvil"], report)
        if system not in systems:
            reasons = report["rows"][row]["not_run"]
            return next((f"{key}: {why}" for key, why in reasons.items() if key.startswith(system)), NO_RIVAL)
        return systems["anvil"]["tokens_per_second"] / systems[system]["tokens_per_second"]

    return find


def speed_on(gpu: str):
    """Tokens a second: a goal that is no ratio holds for this GPU alone."""

    def find(anvil: dict, report: dict) -> Found:
        here = report["machine"]["gpu"] or "a CPU"
        return anvil["tokens_per_second"] if gpu in here else f"a mark of {gpu}; this is {here}"

    return find


def share_of_products(anvil: dict, report: dict) -> float:
    return anvil["model_tflops"] / report["ceilings"]["sustained_tflops"]


NO_MEMORY = "memory is not measured on a CPU"


def peak_gib(anvil: dict, report: dict) -> Found:
    return NO_MEMORY if anvil["peak_gib"] is None else anvil["peak_gib"]


def smaller_peak(row: str, system: str):
    """Anvil's peak memory over that system's."""

    def find(reports: dict) -> Found:
        speeds = of_training(row, system)(reports)
        if isinstance(speeds, str):
            return speeds
        systems = reports["train"]["rows"][row]["systems"]
        ours, theirs = systems["anvil"]["peak_gib"], systems[system]["peak_gib"]
        return NO_MEMORY if None in (ours, theirs) else ours / theirs

    return find


def of_decoding(case: str, system: str = ""):
    """The ratio of speeds to that system in a case of bench/decode.py; without one the share of the bound."""

    def find(reports: dict) -> Found:
        report = reports.get("decode")
        if report is None:
            return "the part decode was not run"
        rows = {row["system"]: row for row in report["rows"] if row["case"] == case}
        if "anvil" not in rows or (system and system not in rows):
            return _left_out(report, f"{case} {system or 'anvil'}")
        if not system:
            return rows["anvil"]["share_of_bound"]
        return rows["anvil"]["tokens_per_second"] / rows[system]["tokens_per_second"]

    return find


def of_kernels(case: str, direction: str, system="", sizes="", of=None, worst=min, own="anvil"):
    """Over the rows of that case in bench/kernels.py whose sizes have these words, the worst: that system's
    time over ours, or without one the share of the floor; `of`: a number of our row."""

    def find(reports: dict) -> Found:
        report = reports.get("kernels")
        if report is None:
            return "the part kernels was not run"
        rows = [
            row
            for row in report["rows"]
            if row["case"] == case and f" {sizes}" in f" {row['sizes']}" and row["pass"] in (direction, "")
        ]
        ours = {row["sizes"]: row for row in rows if row["system"] == own and "timing" in row}
        if not ours:
            return _left_out(report, case)
        if not system:
            return worst(of(row) if of else row["share"] for row in ours.values())
        theirs = [row for row in rows if row["system"] == system]
        timed = [row for row in theirs if "timing" in row and row["sizes"] in ours]
        if not timed:
            return next((row["not_run"] for row in theirs if "not_run" in row), _left_out(report, system))
        return worst(row["timing"]["seconds"] / ours[row["sizes"]]["timing"]["seconds"] for row in timed)

    return find


def workspace(row: dict) -> float:
    return row["workspace_mib"] or 0.0


def never(why: str):
    return lambda reports: why


NO_RIVAL = "no such system in this run"
UNSLOTH = never("not run: Unsloth is not installed")
LIGER, FEW_ROWS = "liger", ("small_batch_4bit", "forward")
WRITTEN_OUT = "dequantise_4bit", "forward"

GOALS = [
    Goal("T1", "LoRA 7B, 4 x 2048: speed over HF as documented", 2.0, 2.5, of_training("T1", "hf default")),
    Goal("T1b", "over HF at its best", 1.35, 1.6, of_training("T1", "hf best")),
    Goal("T1c", "over Unsloth", 1.3, 1.5, UNSLOTH),
    Goal("T1d", "over HF with torch.compile (compile=true)", 1.2, 1.35, of_training("T1", "hf compile")),
    Goal("T1e", "share of the rate of products", 0.65, 0.73, of_training("T1", of=share_of_products)),
    Goal("T2", "QLoRA 7B: speed over own 16 bit", 0.93, 0.97, of_training("T2", "anvil 16 bit")),
    Goal("T2", "over HF as documented", 2.0, 2.5, of_training("T2", "hf default")),
    Goal("T2", "over Unsloth in 4 bits", 1.3, 1.5, UNSLOTH),
    Goal("T2b", "LoRA 7B, 4 x 1024, accumulated: over HF", 2.0, 2.4, of_training("T2b", "hf default")),
    Goal("T3", "LoRA 7B, 1 x 512: over HF as documented", 2.5, 4.0, of_training("T3", "hf default")),
    Goal("T3", "QLoRA 7B, 1 x 512: over HF as documented", 2.5, 4.0, of_training("T3q", "hf default")),
    Goal("T4", "Alpaca's lengths: over HF padded", 3.0, 4.0, of_training("T4", "hf default")),
    Goal("T4", "packed: over HF packed", 1.7, 2.0, of_training("T4p", "hf default")),
    Goal("T5", "LoRA over P-tuning, samples/s", 3.7, 5.0, never("no row: P-tuning is none of our methods")),
    Goal("T6", "full 1.1B: over HF as documented", 1.6, 2.0, of_training("T6", "hf default")),
    Goal("T6", "over HF at its best", 1.1, 1.2, of_training("T6", "hf best")),
    Goal("T6", "share of the rate of products", 0.55, 0.63, of_training("T6", of=share_of_products)),
    Goal("T7", "full 7B on 80 GB: peak GiB", 60, 30, never("no AdamW in 8 bits within the backward"), True),
    *(
        Goal("T8", f"QLoRA 70B, 1 x 2048, {gpu}: tok/s", *marks, of_training("T8", of=speed_on(gpu)))
        for gpu, marks in (("H100", (1000, 1250)), ("H200", (1300, 1700)))
    ),
    Goal("T9", "DPO 7B: over TRL", 1.8, 2.3, never("on a CPU by bench/preference_cpu.py; no GPU row")),
    Goal("T10", "PPO 1.1B: over TRL", 4.0, 8.0, never("on a CPU by bench/ppo_cpu.py; no GPU row")),
    Goal("M1", "QLoRA 7B, 1 x 1024: peak GiB", 5.0, 4.6, of_training("M1", of=peak_gib), True),
    Goal("M1", "over HF with bitsandbytes", 0.8, 0.7, smaller_peak("M1", "hf default"), True),
    Goal("M2", "QLoRA 70B, 1 x 1024: peak GiB", 42, 39, of_training("M2", of=peak_gib), True),
    Goal("M3", "QLoRA 7B in 24 GiB: tokens", 64e3, 100e3, never("a search by steps of 10 s; see plan=true")),
    Goal("M4", "QLoRA 8B in 80 GB: tokens", 345e3, 400e3, never("a step takes 6 minutes; see plan=true")),
    Goal("M5", "full 7B: peak GiB", 45, 30, never("as T7"), True),
    Goal("M5", "LoRA 7B, 1 x 1024: peak GiB", 15, 14.3, of_training("M5", of=peak_gib), True),
    *(  # what users get, and our own kernels apart from it
        Goal("K1", f"attention {direction}, {own}: over {text}", must, wish, of_kernels(*where, own=system))
        for own, system in (("auto", "anvil"), ("own", "anvil triton"))
        for direction, mark in (("forward", 0.85), ("backward", 0.8))
        for text, must, wish, where in (
            ("cuDNN", mark, 1.0, ("attention", direction, "cudnn")),
            ("FlashAttention 2", 1.3, 1.7, ("attention", direction, "flash")),
            ("FlexAttention, packed", 1.1, 1.5, ("attention packed", direction, "flex document")),
        )
    ),
    *(
        Goal("K2", f"{case} {direction}: share of copy", 0.85, 0.92, of_kernels(case, direction))
        for case in ("add_rms_norm", "gated_mlp", "rope")
        for direction in ("forward", "backward")
    ),
    Goal("K2", "rms_norm backward: over Liger", 1.3, 1.8, of_kernels("rms_norm", "backward", LIGER)),
    Goal("K3", "cross entropy: over Liger", 1.5, 1.9, of_kernels("cross_entropy", "both", LIGER)),
    Goal(
        "K4", "linear cross entropy: its two products' share of the time", 1 / 1.35, 1 / 1.15,
        of_kernels("linear_cross_entropy", "both", "two products"),
    ),
    Goal("K4", "over Liger", 1.5, 2.0, of_kernels("linear_cross_entropy", "both", LIGER)),
    Goal(
        "K4", "workspace, MiB", 256, 256,
        of_kernels("linear_cross_entropy", "both", of=workspace, worst=max), True,
    ),
    Goal("K5", "NF4 written out: share of copy", 0.8, 0.92, of_kernels(*WRITTEN_OUT)),
    Goal("K5", "over bitsandbytes", 1.1, 1.3, of_kernels(*WRITTEN_OUT, "bitsandbytes")),
    Goal("K5", "double: over bitsandbytes", 1.3, 1.6, of_kernels(*WRITTEN_OUT, "bitsandbytes", "double")),
    *(
        Goal("K6", f"NF4, {rows} row(s): {text}", must, wish, of_kernels(*FEW_ROWS, system, f"{rows} x"))
        for rows, rival in ((1, 1.2), (4, 1.3), (16, 1.3))
        for text, must, wish, system in (
            ("share of read", 0.6, 0.75, ""),
            ("over bitsandbytes", rival, 1.6, "bitsandbytes"),
            ("over 16 bits", 2.2, 3.0, "16 bit"),
        )
    ),
    Goal("D1", "7B bf16: over HF generate", 3.5, 5.0, of_decoding("d1", "eager")),
    Goal("D1", "over HF with a static cache, compiled", 1.2, 1.4, of_decoding("d1", "static")),
    Goal("D1", "share of the bound", 0.8, 0.88, of_decoding("d1")),
    Goal("D2", "7B NF4: over HF with bitsandbytes", 8.0, 14.0, of_decoding("d2", "eager")),
    Goal("D2", "over own 16 bit", 1.7, 2.3, of_decoding("d2", "16bit")),
    *(
        Goal("D3", f"8B, {case[3:]} sequences: {what}", must, wish, of_decoding(case, system))
        for case in ("d3-32", "d3-128")
        for what, must, wish, system in (
            ("over HF generate", 3.0, 5.0, "eager"),
            ("share of the bound", 0.5, 0.65, ""),
        )
    ),
    Goal("D4", "server, 64 at a time: over HF one by one", 10, 20, never("there is no server yet")),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
