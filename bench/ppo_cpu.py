"""PPO on a CPU: Anvil beside trl's PPOTrainer, same weights, same prompts, same amount of work, in one run.

    pip install --no-deps --target trl-1.0.0 trl==1.0.0          # newer releases of trl have no PPO any more
    python bench/ppo_cpu.py trl=trl-1.0.0
    python bench/ppo_cpu.py trl=trl-1.0.0 draws=2 texts=8 prompt=64 new=64 batch=4 threads=2

A draw: `texts` prompts of `prompt` tokens each (text of data/alpaca_en_demo.json), `new` tokens sampled to
each at temperature 1 (nothing stops a text early, so nobody pads), log-probabilities under policy and
reference, values, advantages, then 4 updates on all of them in micro-batches of `batch`. LoRA r=8 on all
linears, fp32, AdamW, no checkpointing; a reward that costs nothing. The texts differ (own random numbers),
the work does not. What differs by design: our value head shares the policy's trunk; trl's value model is a
model of its own, here with all but its head frozen, which is the cheapest that trl allows. Each system lives
in its own process and they take turns draw by draw. The first draw of each is not counted.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import baselines, turns  # noqa: E402
from bench.measure import commit, cpu_name, read_options  # noqa: E402

DEFAULTS = {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "draws": "2", "texts": "8", "prompt": "64"}
DEFAULTS |= {"new": "64", "batch": "4", "threads": "2", "systems": "anvil,trl", "trl": "", "out": ""}
EPOCHS = 4


def make_prompts(options: dict) -> list[list[int]]:
    """Token ids of the prompts of one draw, all of one length."""
    from text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(options["model"])
    rows = json.loads((ROOT / "data/alpaca_en_demo.json").read_text(encoding="utf-8"))
    stream = [token for row in rows for token in tokenizer.encode(row["output"])]
    length = int(options["prompt"])
    return [stream[length * i : length * i + length] for i in range(int(options["texts"]))]


# The two systems. Each calls turn() after a draw with all its updates; turn() gives when the next may begin.


def anvil(options: dict, adapter: str, turn) -> None:
    from checkpoints.value_head import ValueHead
    from generation.sampling import GenerateOptions
    from parallel.world import World
    from stages.ppo import PPO, PPOOptions
    from stages.reference import Reference
    from stages.rollouts import Prompt
    from text.tokenizer import Tokenizer

    class NoReward:
        names, weights = ("none",), (1.0,)

        def scores(self, samples):
            return torch.zeros(len(samples))

    model = turns.our_model(options["model"], adapter, torch.float32)
    model.v_head = ValueHead(model.config.hidden_size)
    update = turns.our_update(model)
    size, prompts = int(options["batch"]), make_prompts(options)
    generation = GenerateOptions(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=int(options["new"]))
    stage = PPO(
        PPOOptions(ppo_epochs=EPOCHS), generation, NoReward(),
        tokenizer=Tokenizer.from_folder(options["model"]), stop_ids=(), reference=Reference(), seed=0,
        world=World(0, 1, 0, torch.device("cpu")), group_size=len(prompts) // size, output_dir=Path("."),
    )  # fmt: skip

    asked = [Prompt(ids, "", None, (0, number)) for number, ids in enumerate(prompts)]
    drawn = [asked[start : start + size] for start in range(0, len(asked), size)]
    while turn():
        for group in stage.groups(model, drawn, 0):
            total = sum(stage.weight(batch) for batch in group)
            for batch in group:
                loss, _ = stage.loss(model, batch)
                (loss / total).backward()
            update()


def trl(options: dict, adapter: str, turn) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sys.path.insert(0, options["trl"])
    import transformers
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class NoReward(torch.nn.Module):
        base_model_prefix = "backbone"

        def backbone(self, input_ids, **others):
            return transformers.modeling_outputs.BaseModelOutput(
                hidden_states=(torch.zeros(*input_ids.shape, 1),)
            )

        def score(self, hidden):
            return hidden

    class Turns(transformers.TrainerCallback):
        def on_step_end(self, *others, **values):
            turn()

    policy = baselines.peft_model(options["model"], adapter, torch.float32)
    value = transformers.AutoModelForSequenceClassification.from_pretrained(
        options["model"], num_labels=1, dtype=torch.float32
    )
    for name, parameter in value.named_parameters():
        parameter.requires_grad_(name.startswith("score"))
    prompts, size = make_prompts(options), int(options["batch"])
    rows = Dataset.from_list([{"input_ids": ids} for ids in prompts])
    with tempfile.TemporaryDirectory() as output:
        arguments = PPOConfig(
            output_dir=output, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no", per_device_train_batch_size=size, gradient_checkpointing=False,
            gradient_accumulation_steps=len(prompts) // size, num_ppo_epochs=EPOCHS, num_mini_batches=1,
            total_episodes=len(prompts) * (int(options["draws"]) + 1), num_sample_generations=0,
            response_length=int(options["new"]), local_rollout_forward_batch_size=len(prompts),
            stop_token=None, temperature=1.0, learning_rate=turns.LEARNING_RATE,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=arguments,
            processing_class=transformers.AutoTokenizer.from_pretrained(
                options["model"], padding_side="left"
            ),
            model=policy,
            ref_model=None,
            reward_model=NoReward(),
            value_model=value,
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[Turns()],
        )
        turn()
        trainer.train()


def worker(system: str, options: dict, adapter: str) -> None:
    """A line on stdin starts a draw; its answer on the original stdout is {seconds, peak_gb}."""
    torch.set_num_threads(int(options["threads"]))
    answers, sys.stdout = sys.stdout, sys.stderr  # trainers print
    started: list[float] = []

    def turn() -> bool:
        if started:
            answer = json.dumps({"seconds": time.perf_counter() - started.pop(), "peak_gb": turns.peak_gb()})
        else:
            answer = turns.READY
        print(answer, file=answers, flush=True)
        goes_on = bool(sys.stdin.readline())
        started.append(time.perf_counter())
        return goes_on

    {"anvil": anvil, "trl": trl}[system](options, adapter, turn)


def measure(options: dict, adapter: str) -> dict:
    workers = turns.start_workers(__file__, options["systems"].split(","), options, adapter)
    answers = turns.take_turns(workers, ["go"] * (int(options["draws"]) + 1))
    result = {}
    for system, lines in answers.items():
        seconds = [line["seconds"] for line in lines[1:]]
        result[system] = {
            "texts_per_second": int(options["texts"]) * len(seconds) / sum(seconds),
            "median_seconds_per_draw": statistics.median(seconds),
            "spread_seconds": [min(seconds), max(seconds)],
            "peak_gb": lines[-1]["peak_gb"],
        }
    return result


def main(argv: list[str]) -> None:
    if argv[:1] == ["--worker"]:
        return worker(argv[1], json.loads(argv[2]), argv[3])
    options = read_options(argv, DEFAULTS, __doc__)
    if (
        "trl" in options["systems"].split(",")
        and not (Path(options["trl"]) / "trl/experimental/ppo").is_dir()
    ):
        raise SystemExit(
            "trl=FOLDER: no trl with PPO there; pip install --no-deps --target trl-1.0.0 trl==1.0.0"
        )
    options["trl"] = options["trl"] and str(Path(options["trl"]).resolve())
    from importlib import metadata

    report = {
        "command": "python bench/ppo_cpu.py "
        + " ".join("trl=trl-1.0.0" if a.startswith("trl=") else a for a in argv),
        "commit": commit(),
        "machine": cpu_name(),
        "threads": int(options["threads"]),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        | {"trl": "1.0.0"},
        "lora": {"rank": baselines.RANK, "alpha": baselines.ALPHA},
        "matmul_gflops": turns.matmul_rates(int(options["threads"]), torch.float32),
    }
    with baselines.fresh_adapter(options["model"]) as adapter:
        report["systems"] = measure(options, adapter)
    print_table(report)
    turns.write_report(report, options["out"])
    return None


def print_table(report: dict) -> None:
    print(f"{report['machine']}, {report['threads']} threads, torch {report['versions']['torch']}")
    print(f"{'system':8} {'texts/s':>8} {'s a draw':>9} {'min..max':>14} {'peak GB':>8}")
    for system, row in report["systems"].items():
        low, high = row["spread_seconds"]
        print(
            f"{system:8} {row['texts_per_second']:8.3f} {row['median_seconds_per_draw']:9.2f} "
            f"{low:6.1f}..{high:<6.1f} {row['peak_gb']:8.2f}"
        )
    if {"anvil", "trl"} <= report["systems"].keys():
        ours, theirs = report["systems"]["anvil"], report["systems"]["trl"]
        speed, memory = (
            ours["texts_per_second"] / theirs["texts_per_second"],
            ours["peak_gb"] / theirs["peak_gb"],
        )
        print(f"anvil / trl: {speed:.2f}x speed, {memory:.2f}x memory")


if __name__ == "__main__":
    main(sys.argv[1:])
