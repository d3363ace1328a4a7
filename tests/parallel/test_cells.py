"""Many processes train what one process trains, in every mode: a part of the matrix of cells.py, which covers
every pair of a stage and a mode, and of a method and a mode."""

import itertools

import pytest
from parallel_cells import LIMIT, MODES, STAGES, Cell, methods_of, run
from stage_runs import write_stage_data
from tiny_runs import tiny_runs

ON_FOUR = ("hsdp",)


def chosen(ranks: int) -> list[Cell]:
    modes = [mode for mode in MODES if (mode in ON_FOUR) == (ranks == 4)]
    cells = [
        Cell(stage, methods_of(mode)[(number + place) % len(methods_of(mode))], mode, ranks)
        for (number, stage), (place, mode) in itertools.product(enumerate(STAGES), enumerate(modes))
    ]
    return cells + [Cell("sft", "lora", mode, ranks, dropped=True) for mode in modes]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("cells")) as made:
        write_stage_data(made, count=11)
        yield made


@pytest.mark.parametrize("ranks", [2, 4])
def test_cells_equal_one_process_and_miss_a_dropped_gradient(tiny, ranks):
    found = run(tiny, chosen(ranks))
    wrong = {cell.name: worst for cell, worst in found.items() if (worst < LIMIT) == cell.dropped}
    assert not wrong
