"""DPO on a CPU: Anvil beside trl's DPOTrainer, same weights, same adapters, same pairs, in one run.

    python bench/preference_cpu.py
    python bench/preference_cpu.py steps=6 pairs=4 longest=320 threads=2 systems=anvil,trl

Pairs of data/dpo_en_demo.json of at most `longest` tokens a side, LoRA r=8 on all linears, fp32, AdamW, beta
0.1, no checkpointing on either side (trl's own default would compute each block twice). What a step holds:
anvil         the reference's log-probabilities of these pairs, then the update: a pair in a run of one epoch
anvil:cached  the update alone: further epochs, and every later run on the same data
trl           trl's default: the reference inside each step
trl:cached    trl with precompute_ref_log_probs: the update alone
Each system lives in its own process (so peak memory is its own) and they take turns step by step. trl's part
is its collator and its compute_loss with the same optimizer calls as ours, without the overhead of its
Trainer. trl pads; only real tokens count. The losses of all steps are compared.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import baselines, turns  # noqa: E402
from bench.measure import commit, cpu_name, read_options  # noqa: E402

DEFAULTS = {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "steps": "6", "threads": "2", "pairs": "4"}
DEFAULTS |= {"longest": "320", "systems": "anvil,trl,anvil:cached,trl:cached", "out": ""}
BETA = 0.1


def make_groups(model_folder: str, options: dict, count: int) -> list[list[dict]]:
    """Micro-batches of {prompt_ids, chosen_ids, rejected_ids}."""
    encode, longest, pairs = turns.encoder(model_folder), int(options["longest"]), []
    for row in json.loads((ROOT / "data/dpo_en_demo.json").read_text(encoding="utf-8")):
        sides = {}
        for side in ("chosen", "rejected"):
            encoded = encode(row["conversations"][0]["value"], row[side]["value"])
            start, end = encoded.answer.index(True), len(encoded.answer) - encoded.answer[::-1].index(True)
            sides[side] = (encoded.ids[:start], encoded.ids[start:end])
        (prompt, chosen), (_, rejected) = sides["chosen"], sides["rejected"]
        if len(row["conversations"]) == 1 and len(prompt) + max(len(chosen), len(rejected)) <= longest:
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    size = int(options["pairs"])
    if len(pairs) < size * count:
        raise SystemExit(
            f"steps: {size * count} pairs are needed, {len(pairs)} have at most {longest} tokens a side"
        )
    return [pairs[size * i : size * i + size] for i in range(count)]


# The two systems. Each gives a function step(pairs) -> loss.


def anvil(folder: str, adapter: str, cached: bool):
    import numpy as np

    from parallel.world import World
    from pipeline.batch import ROW_MULTIPLE, Example, collate
    from stages.dpo import PairPreference, PreferenceOptions
    from stages.reference import Reference

    model = turns.our_model(folder, adapter, torch.float32)
    update = turns.our_update(model)
    world = World(0, 1, 0, torch.device("cpu"))
    stage = PairPreference(PreferenceOptions(pref_beta=BETA), Reference(), world)

    def example(pair: dict) -> Example:
        parts = [(pair["prompt_ids"], False), (pair["chosen_ids"], True)] * 2
        parts[3] = (pair["rejected_ids"], True)
        tokens = np.array([token for ids, _ in parts for token in ids], np.int32)
        trained = np.array([flag for ids, flag in parts for _ in ids], bool)
        zeros = np.zeros(len(tokens))
        split = len(pair["prompt_ids"]) + len(pair["chosen_ids"])
        return Example(tokens, trained, zeros.astype(np.int16), zeros.astype(np.uint8), (0, 0), split=split)

    def step(pairs: list[dict]) -> dict[str, float]:
        batch = collate([example(pair) for pair in pairs]).rounded(ROW_MULTIPLE["cpu"])
        if cached:
            batch.per_segment["reference"] = stage.reference.sums(model, batch)
        start = time.perf_counter()
        loss, _ = stage.loss(model, batch)
        loss = loss / stage.weight(batch)
        loss.backward()
        update()
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}

    return step


def trl(folder: str, adapter: str, cached: bool):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = baselines.peft_model(folder, adapter, torch.float32)
    dummy = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with tempfile.TemporaryDirectory() as output:
        arguments = DPOConfig(
            output_dir=output, beta=BETA, use_cpu=True, bf16=False, report_to=[], max_length=None,
            gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        trainer = DPOTrainer(model, args=arguments, train_dataset=dummy, processing_class=tokenizer)
    model = trainer.model.train()
    update = baselines.torch_update(model)

    def step(pairs: list[dict]) -> dict[str, float]:
        trainer.precompute_ref_logps = False
        if cached:
            chosen, rejected = trainer.compute_ref_log_probs(model, trainer.data_collator(pairs))
            for pair, first, second in zip(pairs, chosen.tolist(), rejected.tolist()):
                pair |= {"ref_chosen_logps": first, "ref_rejected_logps": second}
            trainer.precompute_ref_logps = True
        start = time.perf_counter()
        loss = trainer.compute_loss(model, trainer.data_collator(pairs))
        loss.backward()
        update()
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}

    return step


def worker(system: str, options: dict, adapter: str) -> None:
    """Takes micro-batches, answers {seconds, loss, peak_gb}."""
    torch.set_num_threads(int(options["threads"]))
    name, _, kind = system.partition(":")
    turns.serve({"anvil": anvil, "trl": trl}[name](options["model"], adapter, kind == "cached"))


def measure(options: dict, adapter: str) -> dict:
    groups = make_groups(options["model"], options, int(options["steps"]) + turns.WARMUP_STEPS)
    answers = turns.take_turns(
        turns.start_workers(__file__, options["systems"].split(","), options, adapter), groups
    )
    names = ("chosen_ids", "rejected_ids")
    tokens = [
        sum(2 * len(pair["prompt_ids"]) + sum(len(pair[name]) for name in names) for pair in pairs)
        for pairs in groups
    ][turns.WARMUP_STEPS :]
    result = {}
    for system, lines in answers.items():
        result[system] = {
            **turns.speeds(tokens, [line["seconds"] for line in lines[turns.WARMUP_STEPS :]]),
            "peak_gb": lines[-1]["peak_gb"],
            "losses": [round(line["loss"], 6) for line in lines],
        }
    every = [row["losses"] for row in result.values()]
    difference = max(max(step) - min(step) for step in zip(*every))
    return {"tokens": tokens, "systems": result, "largest_loss_difference": difference}


def main(argv: list[str]) -> None:
    if argv[:1] == ["--worker"]:
        return worker(argv[1], json.loads(argv[2]), argv[3])
    options = read_options(argv, DEFAULTS, __doc__)
    from importlib import metadata

    report = {
        "command": "python bench/preference_cpu.py " + " ".join(argv),
        "commit": commit(),
        "machine": cpu_name(),
        "threads": int(options["threads"]),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "matmul_gflops": turns.matmul_rates(int(options["threads"]), torch.float32),
    }
    with baselines.fresh_adapter(options["model"]) as adapter:
        report |= measure(options, adapter)
    print_table(report)
    turns.write_report(report, options["out"])
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
