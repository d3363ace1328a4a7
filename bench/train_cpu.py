"""Training on a CPU: Anvil beside transformers + peft, same weights, same adapters, same batches, in one run.

    python bench/train_cpu.py model=models/SmolLM2-135M-Instruct
    python bench/train_cpu.py model=... steps=12 threads=2 shapes=equal,alpaca dtype=float32
    python bench/train_cpu.py shapes=equal dtype=bfloat16 systems=anvil,peft,peft:float32
    python bench/train_cpu.py shapes=equal tuning=full checkpointing=selective     (none | selective | full)

tuning=lora: r=8 on all linears, adapters in fp32 as both systems keep them; tuning=full: every weight. AdamW, no
dropout. A system may have a dtype of its own (peft:float32). checkpointing is Anvil's: the rival keeps everything.
`equal`: 4 x 256 tokens, every token trained, no padding on either side.
`alpaca`: rows of data/alpaca_en_demo.json, batch 8, prompt masked; the rival pads to the longest row of each batch, as
its collators do; only real tokens count.
Each system lives in its own process (so peak memory is its own) and the parent lets them take turns step by step,
A-B-A-B. Also prints the rate of torch's matmul in this run, and the share of it that the multiply-adds of a step make:
4 (full: 6) per weight of the blocks and token, as many per weight of the head and trained row.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.measure import read_options  # noqa: E402

DEFAULTS = {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "steps": "12", "threads": "2"}
DEFAULTS |= {"shapes": "equal,alpaca", "systems": "anvil,peft", "dtype": "float32", "out": ""}
DEFAULTS |= {"tuning": "lora", "checkpointing": "none"}
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-4
WARMUP_STEPS = 2


def make_batches(shape: str, model_folder: str, count: int) -> list[dict[str, list]]:
    """Batches as lists of (token ids, trained flags) rows."""
    from templates import Message, encode_dialogue, get_template
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model_folder)
    template = get_template("chatml", None)
    rows = []
    for row in json.loads((ROOT / "data/alpaca_en_demo.json").read_text(encoding="utf-8")):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        messages = [Message("user", question), Message("assistant", row["output"])]
        encoded = encode_dialogue(tokenizer, template.render(messages, tokenizer.bos_token, tokenizer.eos_token))
        rows.append((encoded.ids[:1024], encoded.answer[:1024]))
    if shape == "alpaca":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [rows[i] for i in order]
        return [rows[8 * i : 8 * i + 8] for i in range(count)]
    stream = [token for ids, _ in rows for token in ids]
    pieces = [(stream[256 * i : 256 * i + 256], [True] * 256) for i in range(4 * count)]
    return [pieces[4 * i : 4 * i + 4] for i in range(count)]


# The two systems. Each gives a function step(rows) -> loss.


def anvil(folder: str, adapter: str, dtype: torch.dtype, checkpointing: str = "none"):
    import numpy as np

    import host_memory
    import lora
    import optim
    import recompute
    from batches import ROW_MULTIPLE, Example, collate
    from checkpoint import load_adapter, load_model
    from objectives import TokenLoss

    host_memory.keep_freed()  # as train.py does
    model = load_model(folder, dtype=dtype)
    if adapter:
        load_adapter(model, adapter)
        assert len(lora.lora_layers(model)) == 7 * model.config.num_layers
    optimizer = optim.make_optimizer(model, optim.OptimOptions(learning_rate=LEARNING_RATE))
    parameters = [layer for layer in model.parameters() if layer.requires_grad]
    if checkpointing != "none":
        model.recompute = recompute.Plan(**{checkpointing: model.config.num_layers})
    stage = TokenLoss()
    model.train()

    def example(tokens, trained) -> Example:
        return Example(tokens, trained, np.zeros(len(tokens), np.int16), np.zeros(len(tokens), np.uint8), (0, 0))

    def step(rows) -> float:
        batch = collate(
            [example(np.array(ids, np.int32), np.array(trained, bool)) for ids, trained in rows]
        ).rounded(ROW_MULTIPLE["cpu"])
        loss, _ = stage.loss(model, batch)
        loss = loss / stage.weight(batch)
        loss.backward()
        optim.clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def transformers_model(folder: str, dtype: torch.dtype):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def peft_model(folder: str, dtype: torch.dtype):
    import peft

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    return peft.get_peft_model(transformers_model(folder, dtype), options)


def peft(folder: str, adapter: str, dtype: torch.dtype, checkpointing: str = "none"):
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    if adapter:
        model = peft_model(folder, dtype).train()
        set_peft_model_state_dict(model, load_file(f"{adapter}/adapter_model.safetensors"))
    else:
        model = transformers_model(folder, dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

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
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def worker(system: str, folder: str, adapter: str, threads: int, dtype: str, checkpointing: str) -> None:
    """Reads batches as JSON lines, answers {seconds, loss, peak_gb}."""
    torch.set_num_threads(threads)
    step = {"anvil": anvil, "peft": peft}[system](folder, adapter, getattr(torch, dtype), checkpointing)
    print("ready", flush=True)
    for line in sys.stdin:
        rows = json.loads(line)
        start = time.perf_counter()
        loss = step(rows)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_gb": peak}), flush=True)


def matmul_rates(threads: int, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of 2048^3: torch.mm, and the product that kernels/linear.py takes."""
    from kernels.linear import matmul_transposed

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)

    def rate(product) -> float:
        product()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        return 2 * 2048**3 / statistics.median(times) / 1e9

    return {"torch.mm": rate(lambda: torch.mm(a, b)), "kernels": rate(lambda: matmul_transposed(a, b))}


def flop_per_token(folder: str, tuning: str) -> tuple[float, float]:
    """Multiply-adds x 2 that a step cannot avoid: per token in the blocks, per row in the head."""
    from checkpoint import load_config

    c = load_config(folder)
    qo, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    block = c.hidden_size * (2 * qo + 2 * kv + 3 * c.intermediate_size)
    each = {"lora": 4.0, "full": 6.0}[tuning]  # forward and gradient of x, 2 each; gradient of the weight 2
    return each * block * c.num_layers, each * c.vocab_size * c.hidden_size


def measure(shape: str, options: dict, adapter: str) -> dict:
    steps, threads = int(options["steps"]), int(options["threads"])
    batches = make_batches(shape, options["model"], steps + WARMUP_STEPS)
    systems = options["systems"].split(",")
    processes = {}
    for system in systems:
        name, _, dtype = system.partition(":")
        command = [sys.executable, __file__, "--worker", name, options["model"], adapter]
        command += [str(threads), dtype or options["dtype"], options["checkpointing"]]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        processes[system] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        line = processes[system].stdout.readline()
        while line.strip() != "ready":
            if not line:
                raise SystemExit(f"{system}: the worker ended before it was ready")
            line = processes[system].stdout.readline()
    answers = {system: [] for system in systems}
    for rows in batches:
        for system, process in processes.items():
            process.stdin.write(json.dumps(rows) + "\n")
            process.stdin.flush()
            answers[system].append(json.loads(process.stdout.readline()))
            print(f"{shape} {system} {answers[system][-1]}", file=sys.stderr, flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    tokens = [sum(len(ids) for ids, _ in rows) for rows in batches][WARMUP_STEPS:]
    trained = [sum(sum(flags[1:]) for _, flags in rows) for rows in batches][WARMUP_STEPS:]
    per_block, per_head = flop_per_token(options["model"], options["tuning"])
    result = {}
    for system, lines in answers.items():
        timed = lines[WARMUP_STEPS:]
        rates = [count / line["seconds"] for count, line in zip(tokens, timed)]
        work = [per_block * t + per_head * r for t, r in zip(tokens, trained)]
        result[system] = {
            "tokens_per_second": sum(tokens) / sum(line["seconds"] for line in timed),
            "median_tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "useful_gflops": sum(work) / sum(line["seconds"] for line in timed) / 1e9,
            "peak_gb": timed[-1]["peak_gb"],
            "losses": [round(line["loss"], 6) for line in lines],
        }
    result["largest_loss_difference"] = max(
        abs(a["loss"] - b["loss"]) for lines in [list(answers.values())] for a, b in zip(lines[0], lines[-1])
    )
    return result


def main(argv: list[str]) -> None:
    if argv[:1] == ["--worker"]:
        return worker(argv[1], argv[2], argv[3], int(argv[4]), argv[5], argv[6])
    options = read_options(argv, DEFAULTS, __doc__)
    import tempfile

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
        "matmul_gflops": matmul_rates(int(options["threads"]), getattr(torch, options["dtype"])),
        "shapes": {},
    }
    with tempfile.TemporaryDirectory() as adapter:
        if options["tuning"] == "full":
            adapter = ""
        else:
            torch.manual_seed(0)
            peft_model(options["model"], torch.float32).save_pretrained(adapter)
        for shape in options["shapes"].split(","):
            report["shapes"][shape] = measure(shape, options, adapter)
    print_table(report)
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(report, indent=1) + "\n")
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
                f"{shape:8} {system:12} {row['tokens_per_second']:8.0f} {row['median_tokens_per_second']:8.0f} "
                f"{low:7.0f}..{high:<7.0f} {row['useful_gflops']:6.0f} {share:9.0%} {row['peak_gb']:8.2f}"
            )
        for rival in [name for name in result if name.startswith("peft") and "anvil" in result]:
            ratio = result["anvil"]["tokens_per_second"] / result[rival]["tokens_per_second"]
            memory = result["anvil"]["peak_gb"] / result[rival]["peak_gb"]
            print(f"{shape:8} anvil / {rival}: {ratio:.2f}x speed, {memory:.2f}x memory")
        print(f"{shape:8} losses differ by at most {result['largest_loss_difference']:.1e}")


def commit() -> str:
    """The commit that was measured; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main(sys.argv[1:])
