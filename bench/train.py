"""Training: Anvil beside transformers + peft, same weights, same adapters, same batches, in one run.

    python bench/train.py                       # on the GPU, or the CPU where there is none (device=cuda|cpu)

On a GPU, shapes of known models with random weights (train_rows.py says how they are measured):
    python bench/train.py                       # under 200 s: T1, T2, M1, M2, then what fits
    python bench/train.py quick=true            # under 70 s
    python bench/train.py rows=T1,T2b compile=true seconds=500
    python bench/train.py smoke=true            # tiny sizes on a CPU; the numbers mean nothing
Results: bench/results/train_<gpu>.json, or the folder out=FOLDER.

On a CPU, a real model:
    python bench/train.py device=cpu model=models/SmolLM2-135M-Instruct
    python bench/train.py device=cpu steps=12 threads=2 shapes=equal,alpaca dtype=float32 out=result.json
    python bench/train.py device=cpu shapes=equal dtype=bfloat16 systems=anvil,peft,peft:float32
    python bench/train.py device=cpu shapes=equal tuning=full checkpointing=selective  (none|selective|full)
tuning=lora: r=8 on all linears, adapters in fp32 as both systems keep them; tuning=full: every weight. AdamW,
no dropout. A system may have a dtype of its own (peft:float32). checkpointing is Anvil's: the baseline keeps
everything. `equal`: 4 x 256 tokens, every token trained, no padding on either side. `alpaca`: rows of
data/alpaca_en_demo.json, batch 8, prompt masked; the baseline pads to the longest row of each batch, as its
collators do; only real tokens count. Each system lives in its own process (so peak memory is its own) and the
parent lets them take turns step by step, A-B-A-B. Also prints the rate of torch's matmul in this run, and the
share of it that the model operations of a step make (train_systems.flops_per_step).
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench import baselines, turns  # noqa: E402
from bench.measure import commit, cpu_name, read_device_options  # noqa: E402

ON_GPU = {"quick": "false", "seconds": "", "rows": "", "compile": "false", "out": ""}
ON_CPU = {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "steps": "12", "threads": "2"}
ON_CPU |= {"shapes": "equal,alpaca", "systems": "anvil,peft", "dtype": "float32", "out": ""}
ON_CPU |= {"tuning": "lora", "checkpointing": "none"}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--worker"]:
        worker(argv[1], json.loads(argv[2]), argv[3])
        return 0
    options, device = read_device_options(argv, ON_GPU, ON_CPU, __doc__)
    command = "python bench/train.py " + " ".join(argv)
    if "rows" in options:
        from bench import train_rows

        return train_rows.run(options, device, command)
    report = measure_real_model(options, command)
    print_table(report)
    turns.write_report(report, options["out"])
    return 0


# A real model on a CPU


def measure_real_model(options: dict, command: str) -> dict:
    import transformers

    threads, dtype = int(options["threads"]), getattr(torch, options["dtype"])
    report = {
        "command": command, "commit": commit(), "machine": cpu_name(), "threads": threads,
        **{key: options[key] for key in ("dtype", "tuning", "checkpointing")},
        "torch": torch.__version__, "transformers": transformers.__version__,
        "matmul_gflops": turns.matmul_rates(threads, dtype), "shapes": {},
    }  # fmt: skip
    full = options["tuning"] == "full"
    with nullcontext("") if full else baselines.fresh_adapter(options["model"]) as adapter:
        for shape in options["shapes"].split(","):
            report["shapes"][shape] = measure_shape(shape, options, adapter)
    return report


def measure_shape(shape: str, options: dict, adapter: str) -> dict:
    from bench.train_systems import flops_per_step
    from checkpoints.huggingface import load_config

    warm_up = turns.WARMUP_STEPS
    batches = make_batches(shape, options["model"], int(options["steps"]) + warm_up)
    workers = turns.start_workers(__file__, options["systems"].split(","), options, adapter)
    answers = turns.take_turns(workers, batches, shape)
    tokens = [sum(len(ids) for ids, _ in rows) for rows in batches][warm_up:]
    config, rank = load_config(options["model"]), baselines.RANK if adapter else 0
    work = sum(flops_per_step(config, rank, [micro_batch(rows)]) for rows in batches[warm_up:])
    result = {}
    for system, lines in answers.items():
        seconds = [line["seconds"] for line in lines[warm_up:]]
        result[system] = {
            **turns.speeds(tokens, seconds),
            "model_gflops": work / sum(seconds) / 1e9,
            "peak_gb": lines[-1]["peak_gb"],
            "losses": [round(line["loss"], 6) for line in lines],
        }
    every = list(answers.values())
    result["largest_loss_difference"] = max(abs(a["loss"] - b["loss"]) for a, b in zip(every[0], every[-1]))
    return result


def make_batches(shape: str, model_folder: str, count: int) -> list[list]:
    """Batches as lists of (token ids, trained flags) rows."""
    encode, rows = turns.encoder(model_folder), []
    for row in json.loads((ROOT / "data/alpaca_en_demo.json").read_text(encoding="utf-8")):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        encoded = encode(question, row["output"])
        rows.append((encoded.ids[:1024], encoded.answer[:1024]))
    if shape == "alpaca":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[i] for i in order]
        return [rows[8 * i : 8 * i + 8] for i in range(count)]
    stream = [token for ids, _ in rows for token in ids]
    pieces = [(stream[256 * i : 256 * i + 256], [True] * 256) for i in range(4 * count)]
    return [pieces[4 * i : 4 * i + 4] for i in range(count)]


def micro_batch(rows: list) -> baselines.MicroBatch:
    return [[baselines.Document(np.array(ids, np.int32), np.array(flags, bool))] for ids, flags in rows]


def worker(name: str, options: dict, adapter: str) -> None:
    """Takes batches, answers {seconds, loss, peak_gb}."""
    torch.set_num_threads(int(options["threads"]))
    kind, _, dtype = name.partition(":")
    system = SYSTEMS[kind](options, adapter, getattr(torch, dtype or options["dtype"]))

    def step(rows) -> dict[str, float]:
        start = time.perf_counter()
        loss = system.step(system.prepare([micro_batch(rows)])).item()
        return {"seconds": time.perf_counter() - start, "loss": loss}

    turns.serve(step)


def anvil(options: dict, adapter: str, dtype: torch.dtype):
    from bench.train_systems import Anvil

    model = turns.our_model(options["model"], adapter, dtype)
    return Anvil(model, torch.device("cpu"), options["checkpointing"])


def peft(options: dict, adapter: str, dtype: torch.dtype):
    model = baselines.peft_model(options["model"], adapter, dtype)
    return baselines.Baseline(model, baselines.Recipe(), torch.device("cpu"))


SYSTEMS = {"anvil": anvil, "peft": peft}


def print_table(report: dict) -> None:
    rates = report["matmul_gflops"]
    print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}", end=", ")
    print(f"{report['dtype']}, {report['tuning']}, checkpointing {report['checkpointing']}")
    print(f"matmul in this run: torch.mm {rates['torch.mm']:.0f} GF/s, kernels {rates['kernels']:.0f} GF/s")
    print(f"{'shape':8} {'system':12} {'tok/s':>8} {'median':>8} {'min..max':>16} ", end="")
    print(f"{'GF/s':>6} {'of matmul':>9} {'peak GB':>8}")
    for shape, result in report["shapes"].items():
        systems = {name: row for name, row in result.items() if isinstance(row, dict)}
        for system, row in systems.items():
            low, high = row["spread"]
            share = row["model_gflops"] / rates["kernels"]
            rate, median = row["tokens_per_second"], row["median_tokens_per_second"]
            print(f"{shape:8} {system:12} {rate:8.0f} {median:8.0f} {low:7.0f}..{high:<7.0f} ", end="")
            print(f"{row['model_gflops']:6.0f} {share:9.0%} {row['peak_gb']:8.2f}")
        for baseline in [name for name in systems if name.startswith("peft") and "anvil" in systems]:
            ours, theirs = systems["anvil"], systems[baseline]
            speed, memory = (ours[key] / theirs[key] for key in ("tokens_per_second", "peak_gb"))
            print(f"{shape:8} anvil / {baseline}: {speed:.2f}x speed, {memory:.2f}x memory")
        print(f"{shape:8} losses differ by at most {result['largest_loss_difference']:.1e}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
