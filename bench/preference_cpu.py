"""DPO on a CPU: Anvil beside trl's DPOTrainer, same weights, same adapters, same pairs, in one run.

    python bench/preference_cpu.py
    python bench/preference_cpu.py steps=6 pairs=4 longest=320 threads=2 systems=anvil,trl,anvil:cached,trl:cached

Pairs of data/dpo_en_demo.json of at most `longest` tokens a side, LoRA r=8 on all linears, fp32, AdamW, beta 0.1, no
checkpointing on either side (trl's own default would compute each block twice). What a step holds:
anvil         the reference's log-probabilities of these pairs, then the update: what a pair costs in a run of one epoch
anvil:cached  the update alone: further epochs, and every later run on the same data
trl           trl's default: the reference inside each step
trl:cached    trl with precompute_ref_log_probs: the update alone
Each system lives in its own process (so peak memory is its own) and they take turns step by step. trl's part is its
collator and its compute_loss with the same optimizer calls as ours, without the overhead of its Trainer. trl pads; only
real tokens count. The losses of all steps are compared.
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

import torch  # noqa: E402

from bench.measure import read_options  # noqa: E402
from bench.train_cpu import LEARNING_RATE, WARMUP_STEPS, commit, cpu_name, matmul_rates, peft_model  # noqa: E402

DEFAULTS = {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "steps": "6", "threads": "2", "pairs": "4"}
DEFAULTS |= {"longest": "320", "systems": "anvil,trl,anvil:cached,trl:cached", "out": ""}
BETA = 0.1


def make_groups(model_folder: str, options: dict, count: int) -> list[list[dict]]:
    """Micro-batches of {prompt_ids, chosen_ids, rejected_ids}."""
    from templates import Message, encode_dialogue, get_template
    from tokenizer import Tokenizer

    tokenizer, template = Tokenizer.from_folder(model_folder), get_template("chatml", None)
    longest, pairs = int(options["longest"]), []
    for row in json.loads((ROOT / "data/dpo_en_demo.json").read_text(encoding="utf-8")):
        sides = {}
        for side in ("chosen", "rejected"):
            messages = [Message("user", row["conversations"][0]["value"]), Message("assistant", row[side]["value"])]
            encoded = encode_dialogue(tokenizer, template.render(messages, tokenizer.bos_token, tokenizer.eos_token))
            start, end = encoded.answer.index(True), len(encoded.answer) - encoded.answer[::-1].index(True)
            sides[side] = (encoded.ids[:start], encoded.ids[start:end])
        (prompt, chosen), (_, rejected) = sides["chosen"], sides["rejected"]
        if len(row["conversations"]) == 1 and len(prompt) + max(len(chosen), len(rejected)) <= longest:
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    size = int(options["pairs"])
    if len(pairs) < size * count:
        raise SystemExit(f"steps: {size * count} pairs are needed, {len(pairs)} have at most {longest} tokens a side")
    return [pairs[size * i : size * i + size] for i in range(count)]


# The two systems. Each gives a function step(pairs) -> loss.


def anvil(folder: str, adapter: str, cached: bool):
    import numpy as np

    import host_memory
    import optim
    from batches import ROW_MULTIPLE, Example, collate
    from checkpoint import load_adapter, load_model
    from parallel import World
    from preference import PairPreference, PreferenceOptions
    from reference import Reference

    host_memory.keep_freed()  # as train.py does
    model = load_model(folder, dtype=torch.float32)
    load_adapter(model, adapter)
    optimizer = optim.make_optimizer(model, optim.OptimOptions(learning_rate=LEARNING_RATE))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    world = World(0, 1, 0, torch.device("cpu"))
    stage = PairPreference(PreferenceOptions(pref_beta=BETA), Reference(), world)
    model.train()

    def example(pair: dict) -> Example:
        parts = [(pair["prompt_ids"], False), (pair["chosen_ids"], True)] * 2
        parts[3] = (pair["rejected_ids"], True)
        tokens = np.array([token for ids, _ in parts for token in ids], np.int32)
        trained = np.array([flag for ids, flag in parts for _ in ids], bool)
        zeros = np.zeros(len(tokens))
        split = len(pair["prompt_ids"]) + len(pair["chosen_ids"])
        return Example(tokens, trained, zeros.astype(np.int16), zeros.astype(np.uint8), (0, 0), split=split)

    def step(pairs: list[dict]) -> tuple[float, float]:
        batch = collate([example(pair) for pair in pairs]).rounded(ROW_MULTIPLE["cpu"])
        if cached:
            batch.reference = stage.reference.sums(model, batch)
        start = time.perf_counter()
        loss, _ = stage.loss(model, batch)
        loss = loss / stage.weight(batch)
        loss.backward()
        optim.clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), time.perf_counter() - start

    return step


def trl(folder: str, adapter: str, cached: bool):
    from datasets import Dataset
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = peft_model(folder, torch.float32)
    set_peft_model_state_dict(model, load_file(f"{adapter}/adapter_model.safetensors"))
    dummy = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with tempfile.TemporaryDirectory() as output:
        arguments = DPOConfig(
            output_dir=output, beta=BETA, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
            max_length=None,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        trainer = DPOTrainer(model, args=arguments, train_dataset=dummy, processing_class=tokenizer)
    model = trainer.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(pairs: list[dict]) -> tuple[float, float]:
        trainer.precompute_ref_logps = False
        if cached:
            chosen, rejected = trainer.compute_ref_log_probs(model, trainer.data_collator(pairs))
            for pair, first, second in zip(pairs, chosen.tolist(), rejected.tolist()):
                pair |= {"ref_chosen_logps": first, "ref_rejected_logps": second}
            trainer.precompute_ref_logps = True
        start = time.perf_counter()
        loss = trainer.compute_loss(model, trainer.data_collator(pairs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), time.perf_counter() - start

    return step


def worker(system: str, folder: str, adapter: str, threads: int) -> None:
    """Reads micro-batches as JSON lines, answers {seconds, loss, peak_gb}."""
    torch.set_num_threads(threads)
    name, _, kind = system.partition(":")
    step = {"anvil": anvil, "trl": trl}[name](folder, adapter, kind == "cached")
    print("ready", flush=True)
    for line in sys.stdin:
        loss, seconds = step(json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_gb": peak}), flush=True)


def start_workers(options: dict, adapter: str) -> dict[str, subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": options["threads"], "HF_HUB_OFFLINE": "1"}
    processes = {}
    for system in options["systems"].split(","):
        command = [sys.executable, __file__, "--worker", system, options["model"], adapter, options["threads"]]
        processes[system] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    for system, process in processes.items():
        while (line := process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit(f"{system}: the worker ended before it was ready")
    return processes


def measure(options: dict, adapter: str) -> dict:
    groups = make_groups(options["model"], options, int(options["steps"]) + WARMUP_STEPS)
    processes = start_workers(options, adapter)
    answers = {system: [] for system in processes}
    for pairs in groups:
        for system, process in processes.items():
            process.stdin.write(json.dumps(pairs) + "\n")
            process.stdin.flush()
            answers[system].append(json.loads(process.stdout.readline()))
            print(f"{system} {answers[system][-1]}", file=sys.stderr, flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    names = ("chosen_ids", "rejected_ids")
    tokens = [
        sum(2 * len(pair["prompt_ids"]) + sum(len(pair[name]) for name in names) for pair in pairs) for pairs in groups
    ][WARMUP_STEPS:]
    result = {}
    for system, lines in answers.items():
        timed = lines[WARMUP_STEPS:]
        rates = [count / line["seconds"] for count, line in zip(tokens, timed)]
        result[system] = {
            "tokens_per_second": sum(tokens) / sum(line["seconds"] for line in timed),
            "median_tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "peak_gb": timed[-1]["peak_gb"],
            "losses": [round(line["loss"], 6) for line in lines],
        }
    every = [row["losses"] for row in result.values()]
    difference = max(max(step) - min(step) for step in zip(*every))
    return {"tokens": tokens, "systems": result, "largest_loss_difference": difference}


def main(argv: list[str]) -> None:
    if argv[:1] == ["--worker"]:
        return worker(argv[1], argv[2], argv[3], int(argv[4]))
    options = read_options(argv, DEFAULTS, __doc__)
    from importlib import metadata

    report = {
        "command": "python bench/preference_cpu.py " + " ".join(argv),
        "commit": commit(),
        "machine": cpu_name(),
        "threads": int(options["threads"]),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "matmul_gflops": matmul_rates(int(options["threads"]), torch.float32),
    }
    with tempfile.TemporaryDirectory() as adapter:
        torch.manual_seed(0)
        peft_model(options["model"], torch.float32).save_pretrained(adapter)
        report |= measure(options, adapter)
    print_table(report)
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(report, indent=1) + "\n")
    return None


def print_table(report: dict) -> None:
    systems = report["systems"]
    print(f"{report['machine']}, {report['threads']} threads, torch {report['versions']['torch']}")
    print(f"{'system':14} {'tok/s':>7} {'median':>7} {'min..max':>14} {'peak GB':>8}")
    for system, row in systems.items():
        low, high = row["spread"]
        print(
            f"{system:14} {row['tokens_per_second']:7.0f} {row['median_tokens_per_second']:7.0f} "
            f"{low:6.0f}..{high:<6.0f} {row['peak_gb']:8.2f}"
        )
    for ours, theirs in (("anvil", "trl"), ("anvil:cached", "trl:cached"), ("anvil:cached", "trl")):
        if ours in systems and theirs in systems:
            speed = systems[ours]["tokens_per_second"] / systems[theirs]["tokens_per_second"]
            memory = systems[ours]["peak_gb"] / systems[theirs]["peak_gb"]
            print(f"{ours} / {theirs}: {speed:.2f}x speed, {memory:.2f}x memory")
    print(f"losses differ by at most {report['largest_loss_difference']:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
