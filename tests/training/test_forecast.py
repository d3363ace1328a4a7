"""What a run is said to take on each rank, and what parallel=auto becomes by it."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import fork_ranks, tiny_runs, wait_for_all

import parallel.world
import train
from options import config as configuration
from parallel.options import ParallelOptions
from parallel.world import World
from tests.tiny_runs import assert_same_weights
from training import memory, plan, setup
from training.forecast import Forecast, choose_parallel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("forecast")) as made:
        yield made


def made_ready(tiny, size: int, **keys):
    """(options, model folder, rank 0 of so many that nobody started, data)."""
    full = {"finetuning_type": "full", "gradient_checkpointing": "none"}
    words = tiny.words("ahead", **full | keys)
    config = configuration.load(words, setup.SECTIONS, program="train.py", description="")
    alone = parallel.world.start("cpu")
    inputs = setup.read(config, alone)
    return inputs.config, inputs.source, replace(alone, size=size), setup.load_data(inputs)


def test_parallel_auto_shares_as_little_as_fits(tiny, monkeypatch, capsys):
    monkeypatch.setattr(World, "max_over_ranks", lambda world, *numbers: list(numbers))
    asked = made_ready(tiny, 8)
    forecast = Forecast(*asked)

    def needs(**way) -> float:
        total = forecast.of(ParallelOptions(**way), forecast.tokens).total
        return memory.SLACK * total + memory.RESERVE_BYTES + 1

    hsdp = {"parallel": "hsdp", "dp_shard_size": 2}
    whole, node, spread = needs(parallel="ddp"), needs(**hsdp), needs(parallel="fsdp")
    assert spread < node < whole
    cases = [(whole, 8, "ddp"), (node, 2, "hsdp"), (whole - 10, 8, "fsdp"), (spread, 2, "fsdp")]
    cases.append((1, 2, "fsdp"))
    for free, here, way in cases:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        monkeypatch.setattr(memory, "free_bytes", lambda *given, free=free: free)
        capsys.readouterr()
        chosen = choose_parallel(*asked)[ParallelOptions]
        said = capsys.readouterr().out
        assert chosen.parallel == way and (chosen.dp_shard_size == here) == (way == "hsdp")
        assert f"parallel=auto is {way}: of" in said and ("may be too much" in said) == (free == 1)
        assert "trainable" not in said and "note" not in said


def test_a_plan_of_parallel_auto_plans_what_it_becomes(tiny, monkeypatch):
    config, source, world, data = made_ready(tiny, 1, plan_ranks=4)
    room = memory.SLACK * 2.0**20 + memory.RESERVE_BYTES
    for free, way in ((2.0**40, "ddp"), (room / 4, "fsdp")):
        monkeypatch.setattr(memory, "free_bytes", lambda *given, free=free: free)
        text = Forecast(config, source, world, data).report(world)
        assert f"parallel=auto is {way}: of" in text
        assert f" {plan.describe(ParallelOptions(parallel=way), 4)}\n" in text


def test_nodes_of_different_sizes_try_the_same_ways(tiny, monkeypatch):
    asked, seen = made_ready(tiny, 12), []

    def of_all(world, *numbers):
        seen.append(numbers)
        return [max(number, -4) if number == -8 else number for number in numbers]  # 8 here, 4 elsewhere

    monkeypatch.setattr(World, "max_over_ranks", of_all)
    monkeypatch.setattr(memory, "free_bytes", lambda *given: 1.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert choose_parallel(*asked)[ParallelOptions].parallel == "fsdp"
    assert [len(numbers) for numbers in seen] == [2, 3]  # with hsdp of 4 among them


def test_parallel_auto_leaves_what_it_must(tiny, monkeypatch, capsys):
    monkeypatch.setattr(World, "max_over_ranks", lambda world, *numbers: list(numbers))
    monkeypatch.setattr(memory, "free_bytes", lambda *given: 2.0**20)
    config, source, world, data = made_ready(tiny, 4)
    chosen = choose_parallel(config, source, world, data, "optim: adamw_8bit steps whole parameters")
    assert chosen[ParallelOptions].parallel == "ddp"
    assert "; shares would be less, but optim: adamw_8bit steps whole parameters\n" in capsys.readouterr().out
    for size, keys in ((1, {}), (4, {"parallel": "ddp"}), (2, {"tp_size": 2})):
        fixed, ranks = config.changed(ParallelOptions, **keys), replace(world, size=size)
        assert choose_parallel(fixed, source, ranks, data) is fixed and not capsys.readouterr().out


def test_what_speaks_against_shares_is_known_ahead(tiny):
    def reason(**keys) -> str | None:
        words = tiny.words("ahead", **keys)
        config = configuration.load(words, setup.SECTIONS, program="train.py", description="")
        return setup.why_not_shared(setup.read(config, parallel.world.start("cpu")))

    assert reason() is None
    assert reason(optim="adamw_8bit").startswith("bitsandbytes steps whole parameters")


def test_ranks_of_a_machine_have_its_memory_between_them(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == 1000 and memory.free_bytes(cpu, 4) == 250
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_bytes(cpu) == memory.free_bytes(cpu, 4) == 500


# Ranks


def crowded(words: list[str]) -> int:
    """In a rank: a run on a machine without free memory."""
    memory.free_bytes = lambda *given: 2.0**20
    return train.main(words)


def test_what_auto_shares_trains_as_one_process_does(tiny):
    keys = {"finetuning_type": "full", "max_steps": 2, "num_train_epochs": None, "optim": "sgd"}
    words = tiny.words("crowded", **keys, per_device_train_batch_size=2)
    children = fork_ranks(crowded, (words,), tiny.folder / "crowded-output", 2)
    assert tiny.train("one", **keys) == 0
    wait_for_all(children, 120)
    assert "parallel=auto is fsdp: of 0.0 GiB free it takes ddp 0." in children[0].text()
    assert "parallel=auto" not in children[1].text()
    assert tiny.losses("crowded") == pytest.approx(tiny.losses("one"), abs=3e-5)
    assert_same_weights(tiny.weights("crowded"), tiny.weights("one"), tolerance=3e-6)
