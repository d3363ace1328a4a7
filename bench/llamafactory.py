"""The same YAML file, unchanged, run by LLaMA-Factory and by train.py: seconds, peak memory, losses.

    python bench/llamafactory.py                                # makes .cache/llamafactory for the baseline
    python bench/llamafactory.py repeats=1 steps=3 out=              # a quick look, nothing written

LLaMA-Factory 0.9.5 from the package registry goes into an environment of its own, without torchvision,
which a text model does not need; its import of torchaudio, which a text model never calls, is satisfied by
an empty package. The work: SmolLM2-135M-Instruct, Alpaca rows, LoRA r=8 on all linears, batch 8, 12
updates, fp32, as many threads as given. Whole processes are timed, from start to the saved adapter, in
turns; both tokenise anew each time. Peak memory is that of the largest process (getrusage).
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.measure import commit, cpu_name, read_options, version  # noqa: E402

VERSION = "0.9.5"
# its requirements as it bounds them, without pictures, sound and the web page, and with train.py's torch
REQUIREMENTS = """torch=={torch} accelerate<=1.11.0 datasets<=4.0.0 einops fastapi fire hf-transfer matplotlib
numpy omegaconf packaging pandas peft>=0.18.0,<=0.18.1 protobuf pydantic pyyaml safetensors scipy
sentencepiece sse-starlette tiktoken transformers>=4.55.0,<=5.6.0 trl>=0.18.0,<=0.24.0 tyro<0.9.0 uvicorn"""
DEFAULTS = {
    "model": str(ROOT / "models/SmolLM2-135M-Instruct"),
    "repeats": "2",
    "steps": "12",
    "threads": "2",
}
DEFAULTS |= {"environment": str(ROOT / ".cache/llamafactory"), "out": str(ROOT / "bench/results")}
RECIPE = """model_name_or_path: {model}
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: alpaca_en_demo
dataset_dir: {data}
template: default
cutoff_len: 1024
max_samples: 96
overwrite_cache: true
preprocessing_num_workers: 1
output_dir: {output}
overwrite_output_dir: true
logging_steps: 1
save_strategy: "no"
plot_loss: false
report_to: none
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
max_steps: {steps}
lr_scheduler_type: cosine
warmup_ratio: 0.1
seed: 1
"""


def baseline(folder: Path) -> Path:
    """The python of an environment with LLaMA-Factory; made once."""
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch_version = version("torch").partition("+")[0]
        subprocess.run([*install, *REQUIREMENTS.format(torch=torch_version).split()], check=True)
        subprocess.run([*install, "--no-deps", f"llamafactory=={VERSION}"], check=True)
        site = next((folder / "lib").glob("python3*/site-packages"))
        (site / "torchaudio").mkdir(exist_ok=True)
        (site / "torchaudio" / "__init__.py").write_text('"""Stands in for the package of sound."""\n')
        (folder / ".ready").touch()
    return python


def run(command: list[str], recipe: str, folder: Path, threads: str) -> dict:
    """One whole run of the recipe in a process of its own."""
    (folder / "recipe.yaml").write_text(recipe)
    caches = {"HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "xdg"), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | caches | {"OMP_NUM_THREADS": threads, "DISABLE_VERSION_CHECK": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.monotonic()
    done = subprocess.run(
        [*command, str(folder / "recipe.yaml")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    log = (folder / "run" / "trainer_log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {"seconds": seconds, "losses": losses, "peak_kib": peak}


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    systems = {
        "anvil": [sys.executable, str(ROOT / "train.py")],  # first: the largest child so far is then its own
        "LLaMA-Factory": [str(baseline(Path(options["environment"]))), "-m", "llamafactory.cli", "train"],
    }
    found: dict[str, list[dict]] = {name: [] for name in systems}
    for _ in range(int(options["repeats"])):
        for name, command in systems.items():
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                keys = {"model": options["model"], "data": ROOT / "data", "output": folder / "run"}
                recipe = RECIPE.format(**keys, steps=options["steps"])
                found[name].append(run(command, recipe, folder, options["threads"]))
            print(
                f"{name}: {found[name][-1]['seconds']:.1f} s, losses {found[name][-1]['losses']}", flush=True
            )
    result = {
        "command": "python bench/llamafactory.py " + " ".join(argv),
        "commit": commit(),
        "machine": cpu_name(),
        "threads": int(options["threads"]),
        "versions": {"llamafactory": VERSION},
        "work": "SmolLM2-135M-Instruct, Alpaca rows, LoRA r=8 on all linears, batch 8, "
        f"{options['steps']} updates, fp32; whole processes, the same unchanged YAML file.",
        "recipe": RECIPE,
        "systems": {
            name: {
                "seconds": statistics.median(run["seconds"] for run in runs),
                "spread": [min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)],
                "peak_gb": runs[0]["peak_kib"] * 1024 / 1e9,  # of the first turn; later ones see both systems
                "losses": runs[0]["losses"],
                "last_loss": runs[0]["losses"][-1],
            }
            for name, runs in found.items()
        },
    }
    if options["out"]:
        path = Path(options["out"]) / "llamafactory.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}; python bench/document.py puts it into docs/benchmarks.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
