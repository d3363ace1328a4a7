"""Training on a CPU: Anvil beside transformers + peft, same weights, same adapters, same batches, in one run.

    python bench/train_cpu.py model=models/SmolLM2-135M-Instruct
    python bench/train_cpu.py model=... steps=12 threads=2 shapes=equal,alpaca dtype=float32
    python bench/train_cpu.py shapes=equal dtype=bfloat16 systems=anvil,peft,peft:float32
    python bench/train_cpu.py shapes=equal tuning=full checkpointing=selective     (none | selective | full)

tuning=lora: r=8 on all linears, adapters in fp32 as both systems keep them; tuning=full: every weight. AdamW,
no dropout. A system may have a dtype of its own (peft:float32). checkpointing is Anvil's: the rival keeps
everything. `equal`: 4 x 256 tokens, every token trained, no padding on either side. `alpaca`: rows of
data/alpaca_en_demo.json, batch 8, prompt masked; the rival pads to the longest row of each batch, as its
collators do; only real tokens count. Each system lives in its own process (so peak memory is its own) and the
parent lets them take turns step by step, A-B-A-B. Also prints the rate of torch's matmul in this run, and the
share of it that the multiply-adds of a step make: 4 (full: 6) per weight of the blocks and token, as many per
weight of the head and trained row.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import rivals  # noqa: E402
from bench.measure import commit, cpu_name, read_options  # noqa: E402

DEFAULTS = {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "steps": "12", "threads": "2"}
DEFAULTS |= {"shapes": "equal,alpaca", "systems": "anvil,peft", "dtype": "float32", "out": ""}
DEFAULTS |= {"tuning": "lora", "checkpointing": "none"}


def make_batches(shape: str, model_folder: str, count: int) -> list[dict[str, list]]:
    """Batches as lists of (token ids, trained flags) rows."""
    encode, rows = rivals.encoder(model_folder), []
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


# The two systems. Each gives a function step(rows) -> loss.


def anvil(folder: str, adapter: str, dtype: torch.dtype, checkpointing: str):
    import numpy as np

    from kernels import recompute
    from pipeline.batch import ROW_MULTIPLE, Example, collate
    from stages.sft import TokenLoss

    model, stage = rivals.our_model(folder, adapter, dtype), TokenLoss()
    update = rivals.our_update(model)
    if checkpointing != "none":
        model.runtime.recompute = recompute.Plan(**{checkpointing: model.config.num_layers})

    def example(tokens, trained) -> Example:
        return Example(
            tokens, trained, np.zeros(len(tokens), np.int16), np.zeros(len(tokens), np.uint8), (0, 0)
        )

    def step(rows) -> float:
        batch = collate(
            [example(np.array(ids, np.int32), np.array(trained, bool)) for ids, trained in rows]
        ).rounded(ROW_MULTIPLE["cpu"])
        loss, _ = stage.loss(model, batch)
        loss = loss / stage.weight(batch)
        loss.backward()
        update()
        return loss.item()

    return step


def peft(folder: str, adapter: str, dtype: torch.dtype, checkpointing: str):
    model = rivals.peft_model(folder, adapter, dtype)
    update = rivals.torch_update(model)

    def step(rows) -> float:
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, (tokens, trained) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            labels[i, : len(tokens)] = torch.where(torch.tensor(trained), torch.tensor(tokens), -100)
        # without padding no mask is given: that lets the rival take its fastest attention
        given = None if bool(mask.all()) else mask
        loss = model(input_ids=ids, attention_mask=given, labels=labels, use_cache=False).loss
        loss.backward()
        update()
        return loss.item()

    return step


def worker(system: str, options: dict, adapter: str) -> None:
    """Takes batches, answers {seconds, loss, peak_gb}."""
    torch.set_num_threads(int(options["threads"]))
    name, _, dtype = system.partition(":")
    dtype = getattr(torch, dtype or options["dtype"])
    step = {"anvil": anvil, "peft": peft}[name](options["model"], adapter, dtype, options["checkpointing"])

    def timed(rows) -> dict[str, float]:
        start = time.perf_counter()
        loss = step(rows)
        return {"seconds": time.perf_counter() - start, "loss": loss}

    rivals.serve(timed)


def flop_per_token(folder: str, tuning: str) -> tuple[float, float]:
    """Multiply-adds x 2 that a step cannot avoid: per token in the blocks, per row in the head."""
    from checkpoints.huggingface import load_config

    c = load_config(folder)
    qo, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    block = c.hidden_size * (2 * qo + 2 * kv + 3 * c.intermediate_size)
    each = {"lora": 4.0, "full": 6.0}[tuning]  # forward and gradient of x, 2 each; gradient of the weight 2
    return each * block * c.num_layers, each * c.vocab_size * c.hidden_size


def measure(shape: str, options: dict, adapter: str) -> dict:
    batches = make_batches(shape, options["model"], int(options["steps"]) + rivals.WARMUP_STEPS)
    workers = rivals.start_workers(__file__, options["systems"].split(","), options, adapter)
    answers = rivals.take_turns(workers, batches, shape)
    tokens = [sum(len(ids) for ids, _ in rows) for rows in batches][rivals.WARMUP_STEPS :]
    trained = [sum(sum(flags[1:]) for _, flags in rows) for rows in batches][rivals.WARMUP_STEPS :]
    per_block, per_head = flop_per_token(options["model"], options["tuning"])
    work = per_block * sum(tokens) + per_head * sum(trained)
    result = {}
    for system, lines in answers.items():
        seconds = [line["seconds"] for line in lines[rivals.WARMUP_STEPS :]]
        result[system] = {
            **rivals.speeds(tokens, seconds),
            "useful_gflops": work / sum(seconds) / 1e9,
            "peak_gb": lines[-1]["peak_gb"],
            "losses": [round(line["loss"], 6) for line in lines],
        }
    every = list(answers.values())
    result["largest_loss_difference"] = max(abs(a["loss"] - b["loss"]) for a, b in zip(every[0], every[-1]))
    return result


def main(argv: list[str]) -> None:
    if argv[:1] == ["--worker"]:
        return worker(argv[1], json.loads(argv[2]), argv[3])
    options = read_options(argv, DEFAULTS, __doc__)
    import transformers

    report = {
        "command": "python bench/train_cpu.py " + " ".join(argv),
        "commit": commit(),
        "machine": cpu_name(),
        "threads": int(options["threads"]),
        "dtype": options["dtype"],
        "tuning": options["tuning"],
        "checkpointing": options["checkpointing"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul_gflops": rivals.matmul_rates(int(options["threads"]), getattr(torch, options["dtype"])),
        "shapes": {},
    }
    with (
        nullcontext("") if options["tuning"] == "full" else rivals.fresh_adapter(options["model"]) as adapter
    ):
        for shape in options["shapes"].split(","):
            report["shapes"][shape] = measure(shape, options, adapter)
    print_table(report)
    rivals.write_report(report, options["out"])
    return None


def print_table(report: dict) -> None:
    rates = report["matmul_gflops"]
    print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}", end=", ")
    print(f"{report['dtype']}, {report['tuning']}, checkpointing {report['checkpointing']}")
    print(f"matmul in this run: torch.mm {rates['torch.mm']:.0f} GF/s, kernels {rates['kernels']:.0f} GF/s")
    print(f"{'shape':8} {'system':12} {'tok/s':>8} {'median':>8} {'min..max':>16} ", end="")
    print(f"{'GF/s':>6} {'of matmul':>9} {'peak GB':>8}")
    for shape, result in report["shapes"].items():
        for system, row in result.items():
            if not isinstance(row, dict):
                continue
            low, high = row["spread"]
            share = row["useful_gflops"] / rates["kernels"]
            print(
                f"{shape:8} {system:12} {row['tokens_per_second']:8.0f} "
                f"{row['median_tokens_per_second']:8.0f} "
                f"{low:7.0f}..{high:<7.0f} {row['useful_gflops']:6.0f} {share:9.0%} {row['peak_gb']:8.2f}"
            )
        for rival in [name for name in result if name.startswith("peft") and "anvil" in result]:
            ratio = result["anvil"]["tokens_per_second"] / result[rival]["tokens_per_second"]
            memory = result["anvil"]["peak_gb"] / result[rival]["peak_gb"]
            print(f"{shape:8} anvil / {rival}: {ratio:.2f}x speed, {memory:.2f}x memory")
        print(f"{shape:8} losses differ by at most {result['largest_loss_difference']:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
