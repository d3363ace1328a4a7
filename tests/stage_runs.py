"""What tests of all stages share: data of each kind, and the keys that make a short run of a stage.

write_stage_data(tiny)
tiny.train("out", **stage_keys(tiny, "kto"))
"""

import json
from pathlib import Path

from tiny_runs import TinyRuns, make_rows

from stages import STAGES, WRITES

METHODS = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "num_layer_trainable": 1},
    "lora": {"lora_rank": 4},
    "qlora": {"lora_rank": 4, "quantization_bit": 4},
}
PAIRED = ("rm", "dpo", "orpo")
REWARDS = '''"""Texts with many letters e, each text for itself."""


def letters(completions, **others):
    return [text.count("e") - len(text) / 20 for text in completions]
'''


def all_stages(*without: str) -> list[str]:
    return [stage for stage in STAGES if stage not in without]


def write_stage_data(tiny: TinyRuns, count: int = 12) -> None:
    """<folder>/stages: documents, dialogues, pairs, rated answers and prompts, `count` rows and 5 to evaluate
    on."""
    folder = tiny.folder / "stages"
    folder.mkdir()
    entries = {}
    for name, rows in {"": make_rows(count, seed=11), "held_": make_rows(5, seed=12)}.items():
        others = make_rows(len(rows), seed=13 + len(rows))
        answers = [(row["output"], other["output"]) for row, other in zip(rows, others)]
        tables = {
            "documents": [{"text": row["output"]} for row in rows],
            "dialogues": rows,
            "pairs": [
                {"instruction": row["instruction"], "chosen": good, "rejected": f"{bad} so"}
                for row, (good, bad) in zip(rows, answers)
            ],
            "rated": [row | {"label": number % 3 > 0} for number, row in enumerate(rows)],
            "prompts": rows,
        }
        for kind, table in tables.items():
            (folder / f"{name}{kind}.json").write_text(json.dumps(table))
            entries[name + kind] = {"file_name": f"{name}{kind}.json"}
        entries[f"{name}documents"]["columns"] = {"prompt": "text"}
        columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
        entries[f"{name}pairs"] |= {"ranking": True, "columns": columns}
        entries[f"{name}rated"]["columns"] = {
            "prompt": "instruction",
            "response": "output",
            "kto_tag": "label",
        }
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    (folder / "rewards.py").write_text(REWARDS)


def data_of(stage: str) -> str:
    if stage in PAIRED:
        return "pairs"
    return {"pt": "documents", "sft": "dialogues", "kto": "rated"}.get(stage, "prompts")


def stage_keys(tiny: TinyRuns, stage: str, **keys) -> dict:
    """A run of this stage on the data of write_stage_data."""
    folder = tiny.folder / "stages"
    chosen = {"stage": stage, "dataset_dir": folder, "dataset": data_of(stage)}
    if stage in WRITES:
        chosen |= {"reward_file": folder / "rewards.py", "max_new_tokens": 6}
    if stage == "ppo":
        chosen |= {"ppo_epochs": 2}
    if stage == "grpo":
        chosen |= {"num_generations": 3, "num_iterations": 2}
    return chosen | keys


def held_out(stage: str) -> dict:
    """Keys that evaluate after every second update."""
    return {"eval_dataset": f"held_{data_of(stage)}", "evaluation_strategy": "steps", "eval_steps": 2}


def value_head(folder: Path) -> bool:
    return (folder / "value_head.safetensors").exists()
