"""Each recipe of configs/ under two ranks, with a tiny model."""

import os
from pathlib import Path

import pytest
from tiny_runs import ROOT, fork_ranks, meeting, tiny_runs, wait_for_all

import train

RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("recipes")) as made:
        yield made


def run_recipes(runs: list[tuple[list[str], str]]) -> int:
    """In a child, from the root, as recipes name their files."""
    os.chdir(ROOT)
    for words, port in runs:
        os.environ["MASTER_PORT"] = port
        print(words[0], flush=True)
        if status := train.main(words):
            return status
    return 0


def words_of(tiny, name: str) -> list[str]:
    words = [
        f"configs/{name}",
        "template=chatml",
        "max_steps=2",
        "max_samples=8",
        f"model_name_or_path={tiny.model}",
    ]
    words += [f"output_dir={tiny.folder / Path(name).stem}", "device=cpu", "cutoff_len=256"]
    return words + (
        ["max_new_tokens=4"] if name in ("ppo_lora.yaml", "grpo_lora.yaml", "predict.yaml") else []
    )


def test_every_recipe_runs_on_two_ranks(tiny):
    runs = [(words_of(tiny, name), meeting()) for name in RECIPES]
    wait_for_all(fork_ranks(run_recipes, (runs,), tiny.folder / "recipes", 2), 600)
