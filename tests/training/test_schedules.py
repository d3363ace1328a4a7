"""Schedules against transformers, and the options of the optimizer that make no sense."""

import math

import pytest
import torch
from torch import nn

from training import schedules
from training.options import RAMPS, OptimOptions


def schedule_of(options: OptimOptions, total_steps: int, steps: int) -> list[float]:
    return [schedules.schedule(step, options, total_steps) for step in range(steps)]


def test_a_step_reads_no_text(monkeypatch):
    options = OptimOptions(lr_scheduler_type="cosine", lr_scheduler_kwargs='{"num_cycles": 2}')
    wanted = schedule_of(options, 9, 9)
    monkeypatch.setattr("options.json_reader.json", None)
    assert schedule_of(options, 9, 9) == wanted


def transformers_schedule(kind, rate, warmup, total_steps, steps, kwargs) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(kind, optimizer, warmup, total_steps, kwargs)
    factors = []
    for _ in range(steps):
        factors.append(scheduler.lr_lambdas[0](scheduler.last_epoch))
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("total_steps", [1, 17, 123])
@pytest.mark.parametrize(
    "kind, text, kwargs",
    [
        ("linear", None, {}),
        ("cosine", None, {}),
        ("cosine", '{"num_cycles": 1.7}', {"num_cycles": 1.7}),
        ("cosine_with_restarts", None, {}),
        ("cosine_with_restarts", '{"num_cycles": 3}', {"num_cycles": 3}),
        ("cosine_with_min_lr", '{"min_lr": 1e-6}', {"min_lr": 1e-6}),
        ("cosine_with_min_lr", '{"min_lr_rate": 0.1}', {"min_lr_rate": 0.1}),
        ("polynomial", None, {}),
        ("polynomial", '{"power": 2.5, "lr_end": 1e-6}', {"power": 2.5, "lr_end": 1e-6}),
        ("constant", None, {}),
        ("constant_with_warmup", None, {}),
        ("inverse_sqrt", None, {}),
        ("inverse_sqrt", '{"timescale": 50}', {"timescale": 50}),
    ],
)
def test_schedule_equals_transformers(kind, text, kwargs, total_steps, warmup):
    if warmup >= total_steps and kind == "polynomial":
        pytest.skip("transformers divides by zero here")
    options = OptimOptions(
        lr_scheduler_type=kind, lr_scheduler_kwargs=text, warmup_steps=warmup, learning_rate=3e-4
    )
    steps = total_steps + 3  # a few beyond the end as well
    expected = transformers_schedule(kind, 3e-4, warmup, total_steps, steps, kwargs)
    assert schedule_of(options, total_steps, steps) == pytest.approx(expected, abs=1e-12, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize("warmup_type", RAMPS)
@pytest.mark.parametrize("decay_type", RAMPS)
@pytest.mark.parametrize("stable", [None, 20])
def test_warmup_stable_decay_equals_transformers(warmup_type, decay_type, stable):
    import json

    kwargs = {
        "num_decay_steps": 31,
        "warmup_type": warmup_type,
        "decay_type": decay_type,
        "min_lr_ratio": 0.07,
    }
    if stable is not None:
        kwargs["num_stable_steps"] = stable
    options = OptimOptions(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=json.dumps(kwargs), warmup_steps=11
    )
    expected = transformers_schedule("warmup_stable_decay", 5e-5, 11, 123, 126, kwargs)
    assert schedule_of(options, 123, 126) == pytest.approx(expected, abs=1e-12, rel=1e-12)


def test_polynomial_survives_a_run_that_is_all_warmup():
    options = OptimOptions(lr_scheduler_type="polynomial", warmup_steps=5)
    assert schedules.schedule(4, options, 5) == 0.8
    assert schedules.schedule(6, options, 5) == pytest.approx(1e-7 / 5e-5)


def test_warmup_ratio_rounds_up():
    assert schedules.warmup_length(OptimOptions(warmup_ratio=0.1), 101) == 11
    assert (
        schedules.warmup_length(OptimOptions(warmup_steps=0.05), 101) == 6
    )  # transformers 5 spells the ratio so
    assert schedules.warmup_length(OptimOptions(), 101) == 0
    assert schedules.warmup_length(OptimOptions(warmup_ratio=1.0), 7) == 7


@pytest.mark.parametrize(
    "values, message",
    [
        ({"learning_rate": -1e-4}, "learning_rate: -0.0001 is not a finite number of at least 0"),
        ({"learning_rate": math.nan}, "learning_rate: nan"),
        ({"weight_decay": math.inf}, "weight_decay: inf"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"adam_beta2": 1.0}, "adam_beta2: 1.0 is not in"),
        ({"warmup_ratio": 5}, "warmup_ratio: 5 .* warmup_steps"),
        ({"warmup_steps": 2.5}, "warmup_steps: 2.5"),
        ({"lr_scheduler_kwargs": "{power: 2}"}, "lr_scheduler_kwargs: .*: not JSON .* write "),
        ({"lr_scheduler_kwargs": "[1]"}, "found a list, expected a JSON object"),
        ({"lr_scheduler_kwargs": '{"power": 2}'}, "linear has no 'power'; it knows none"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"cycles": 2}'},
            "'cycles'; it knows num_cycles",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": "2"}'}, "num_cycles='2'"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 1}'},
            "lr_end=1 must be below",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": '{"timescale": 0}'}, "timescale=0"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": '{"num_decay_steps": 5, "decay_type": "exp"}',
            },
            "decay_type='exp'; known are linear",
        ),
    ],
)
def test_bad_options_name_the_key(values, message):
    with pytest.raises(ValueError, match=message):
        OptimOptions(**values)


def test_decay_phase_longer_than_the_run_is_refused():
    kwargs = '{"num_decay_steps": 90}'
    options = OptimOptions(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs, warmup_steps=11
    )
    with pytest.raises(ValueError, match="num_decay_steps=90 and 11 warm-up steps do not fit into 100"):
        schedules.schedule(0, options, 100)
