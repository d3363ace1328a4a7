"""Predicted against measured: what `train.py plan=true` says of a run, and what that run then takes.

    python bench/plan.py                           # SmolLM2-135M on this machine, a few minutes on a CPU
    python bench/plan.py model=FOLDER steps=3 out=bench/results

Each case is two processes: one plans, one trains for a few steps. Memory is what training logs as its peak
(resident set on a CPU, torch's allocator on a GPU); rows are packed, so the first steps meet the largest
micro-batch too. Speed is of the last step, and is no benchmark here: it only has to stay below the bound.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import measure  # noqa: E402

COMMON = ["stage=sft", "template=chatml", "logging_steps=1", "save_strategy=no", "seed=1"]
COMMON += ["packing=true", "cutoff_len=256"]
CASES = {
    "lora, 4 rows": "finetuning_type=lora per_device_train_batch_size=4",
    "lora, 1 row": "finetuning_type=lora per_device_train_batch_size=1",
    "lora, 8 rows, checkpointing": "finetuning_type=lora per_device_train_batch_size=8 "
    "gradient_checkpointing=full",
    "lora bf16, 8 rows": "finetuning_type=lora per_device_train_batch_size=8 bf16=true",
    "full, 4 rows": "finetuning_type=full per_device_train_batch_size=4",
    "freeze, 4 rows": "finetuning_type=freeze per_device_train_batch_size=4",
    "qlora nf4, 8 rows": "finetuning_type=lora quantization_bit=4 per_device_train_batch_size=8",
    "qlora nf4 bf16, 8 "
    "rows": "finetuning_type=lora quantization_bit=4 per_device_train_batch_size=8 bf16=true",
}
DEFAULTS = {"model": "models/SmolLM2-135M-Instruct", "dataset": "alpaca_en_demo", "dataset_dir": "data"}
DEFAULTS |= {"steps": "3", "out": "", "only": ""}


def main(argv: list[str]) -> int:
    options = measure.read_options(argv, DEFAULTS, __doc__)
    rows = []
    for name, words in CASES.items():
        if options["only"] in name:
            rows.append({"case": name, **measured_case(words.split(), options)})
            print(
                measure.table([{key: show(value) for key, value in row.items()} for row in rows[-1:]]),
                flush=True,
            )
    print(measure.table([{key: show(value) for key, value in row.items()} for row in rows]))
    if options["out"]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        machine = measure.describe_machine(device, "python bench/plan.py " + " ".join(argv))
        machine.pop("note", None)  # of smoke tests on a CPU: this is none
        measure.save("plan", machine, {"rows": rows}, options["out"])
    return 0


def show(value) -> str:
    return value if isinstance(value, str) else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def measured_case(words: list[str], options: dict[str, str]) -> dict:
    """Prediction and measurement of one configuration."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"model_name_or_path={options['model']}", *COMMON, *words]
        command += [f"{key}={options[key]}" for key in ("dataset", "dataset_dir")]
        command += [f"output_dir={folder}/run", f"max_steps={options['steps']}"]
        said = run([*command, "plan=true"])
        run(command)
        log = [json.loads(line) for line in (Path(folder) / "run/trainer_log.jsonl").read_text().splitlines()]
    predicted = float(re.search(r"together +([0-9.]+)", said)[1])
    bound = float(re.search(r"at most ([0-9,]+) tokens/s", said)[1].replace(",", ""))
    peak = max(line["peak_memory"] for line in log if "peak_memory" in line) * 1e9 / 2**30
    speed = [line["tokens_per_second"] for line in log if "tokens_per_second" in line][-1]
    return {
        "predicted GiB": predicted,
        "measured GiB": peak,
        "predicted / measured": predicted / peak,
        "bound tok/s": bound,
        "measured tok/s": speed,
        "share": speed / bound,
        "plan": said[said.index("peak memory") :],
    }


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
