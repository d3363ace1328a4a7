"""What ranks evaluate and write together is what one process does: every row once, in order."""

import json

import pytest
from parallel_cells import MODES
from stage_runs import held_out, stage_keys, write_stage_data
from tiny_runs import start_ranks_in_turn, tiny_runs, wait_for_all

from parallel.options import ParallelOptions

RUNS = {"sft": {"predict_with_generate": True, "max_new_tokens": 7}, "rm": {}}
MODES = MODES | {"fsdp, gathered": {"parallel": "fsdp"}}
RANKS = {2: [mode for mode in MODES if mode != "hsdp"], 4: ["hsdp"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("predictions")) as made:
        write_stage_data(made, count=11)
        yield made


def keys_of(tiny, stage: str) -> dict:
    keys = RUNS[stage] | held_out(stage) | {"do_train": True, "do_eval": True, "do_predict": True}
    keys |= {
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
    }  # AdamW would blow up a gradient of rounding
    return stage_keys(tiny, stage, **keys, per_device_eval_batch_size=2)


@pytest.fixture(scope="module")
def of_ranks(tiny):
    """Each stage alone, and in each mode on two or four ranks, of which each number is started once."""
    children = []
    for size, modes in RANKS.items():
        words = [words_of(tiny, stage, mode, size) for stage in RUNS for mode in modes]
        children += start_ranks_in_turn(words, tiny.folder / f"predictions-{size}", size)
    for stage in RUNS:
        assert tiny.train(stage, **keys_of(tiny, stage), per_device_train_batch_size=8) == 0
    wait_for_all(children, 900)


def words_of(tiny, stage: str, mode: str, ranks: int) -> list[str]:
    rows = 8 // ParallelOptions(**MODES[mode]).data(ranks)
    keys = keys_of(tiny, stage) | MODES[mode] | {"per_device_train_batch_size": rows}
    return tiny.words(f"{stage}-{mode}", **keys)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", RUNS)
def test_every_row_comes_once_and_in_order(tiny, of_ranks, stage, mode):
    files = [tiny.folder / run / "generated_predictions.jsonl" for run in (stage, f"{stage}-{mode}")]
    alone, mine = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(alone) == len(mine) == 5
    for row, other in zip(alone, mine):
        assert {key: pytest.approx(value, abs=1e-5) for key, value in row.items()} == other
    alone, mine = (tiny.results(run) for run in (stage, f"{stage}-{mode}"))
    measured = [key for key in alone if key.startswith("eval_") and not key.endswith(("second", "runtime"))]
    assert "eval_loss" in measured
    expected = {key: alone[key] for key in measured}
    assert {key: mine[key] for key in measured} == pytest.approx(expected, rel=1e-5, abs=2e-5)
