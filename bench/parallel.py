"""Loss curves of a real model under every way to spread it, on top of each other.

    python bench/parallel.py [steps=50] [only=ddp2,tp3] [out=bench/results]      # on the CPU

Each way is one `torchrun train.py` of the same LoRA run on the same rows; what is shown is how far its
losses are from those of one process. Processes share the cores, so nothing here is a measure of speed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.measure import commit, cpu_name, read_options  # noqa: E402

ROWS = 6  # of an update
WAYS = {  # name -> processes, options
    "one": (1, ""),
    "ddp2": (2, "parallel=ddp"),
    "fsdp2": (2, "parallel=fsdp"),
    "tp3": (3, "tp_size=3"),
    "ring2": (2, "cp_size=2 cp_mode=ring"),
    "ulysses3": (3, "cp_size=3 cp_mode=ulysses"),
}
KEYS = (
    "stage=sft dataset=alpaca_en_demo max_samples=400 cutoff_len=128 lora_rank=8 learning_rate=5e-4 seed=7 "
    "logging_steps=1 save_strategy=no overwrite_output_dir=true per_device_train_batch_size=1"
)


def run(name: str, steps: int, folder: Path) -> list[float]:
    """The losses of each update."""
    processes, options = WAYS[name]
    together = (
        3 if name in ("tp3", "ulysses3") else 2 if name == "ring2" else 1
    )  # ranks that see the same rows
    groups = f"max_steps={steps} gradient_accumulation_steps={ROWS * together // processes}"
    words = [*KEYS.split(), *options.split(), *groups.split(), f"output_dir={folder / name}"]
    words.append(f"model_name_or_path={ROOT / 'models/SmolLM2-135M-Instruct'}")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*start, "train.py", *words], cwd=ROOT, stdout=-1, stderr=-2, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    lines = (folder / name / "trainer_log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, apart = figure.subplots(2, 1, sharex=True)
    for number, (name, values) in enumerate(curves.items()):
        steps = range(1, len(values) + 1)
        losses.plot(steps, values, f"C{number}", label=name, linewidth=6 - 0.9 * number)
        if name != "one":
            distance = [abs(a - b) + 1e-9 for a, b in zip(values, curves["one"])]
            apart.semilogy(steps, distance, f"C{number}", label=name)
    losses.set_ylabel("loss (nats per token)")
    apart.set_ylabel("|loss - that of one process|")
    apart.set_xlabel("update")
    for axes in (losses, apart):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))


def main(argv: list[str]) -> None:
    asked = read_options(argv, {"steps": "50", "only": "", "out": "bench/results"}, __doc__)
    names = ["one", *(name for name in WAYS if name != "one" and name in (asked["only"] or name))]
    out = Path(asked["out"])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        curves = {}
        for name in names:
            curves[name] = run(name, int(asked["steps"]), Path(folder))
            worst = max(abs(a - b) for a, b in zip(curves[name], curves["one"]))
            print(
                f"{name:9} last loss {curves[name][-1]:.6f}, at most {worst:.1e} from one process", flush=True
            )
    command = f"python bench/parallel.py {' '.join(argv)}".strip()
    about = {
        "command": command,
        "cpu": cpu_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "keys": KEYS,
        "ways": WAYS,
    }
    (out / "parallel_curves.json").write_text(json.dumps(about | {"losses": curves}, indent=1) + "\n")
    draw(curves, out / "parallel_curves.png")


if __name__ == "__main__":
    main(sys.argv[1:])
