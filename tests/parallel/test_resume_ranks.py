"""A run that goes on with other ranks and in other modes trains what one that never stopped trains."""

import pytest
from stage_runs import METHODS, stage_keys, write_stage_data
from tiny_runs import start_ranks_in_turn, tiny_runs, wait_for_all

import train

FSDP, HSDP = {"parallel": "fsdp"}, {"parallel": "hsdp", "dp_shard_size": 2}
CONTEXT = {"parallel": "fsdp", "cp_size": 2}
# name -> stage, method, keys, modes of its three parts: on 2 ranks, on 1, on 4
CHAINS = {
    "lora": ("sft", "lora", {}, {"parallel": "ddp"}, HSDP),
    "full": ("sft", "full", {}, FSDP, FSDP),
    "qlora": ("sft", "qlora", {}, {"parallel": "ddp"}, FSDP),
    "context": ("sft", "lora", {}, FSDP, CONTEXT),
    "stream": ("sft", "lora", {"streaming": True, "buffer_size": 7}, FSDP, FSDP),
    "lengths": ("sft", "lora", {"group_by_length": True}, FSDP, {"parallel": "ddp"}),
    "kto": ("kto", "lora", {}, FSDP, HSDP),
    "grpo": ("grpo", "lora", {}, FSDP, FSDP),
}
LIMIT = 1e-4  # of losses: AdamW divides small gradients by their size


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("resume-ranks")) as made:
        write_stage_data(made, 19)
        yield made


def keys_of(tiny, name: str) -> dict:
    stage, method, keys, *_ = CHAINS[name]
    lasting = {"num_train_epochs": None, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "seed": 3}
    return stage_keys(tiny, stage, **METHODS[method] | lasting | {"per_device_train_batch_size": 4} | keys)


def part(tiny, name: str, steps: int, mode: dict) -> list[str]:
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "logging_steps": 1}
    return tiny.words(name, **keys_of(tiny, name) | saved | mode)


def test_runs_go_on_with_2_then_1_then_4_ranks_in_other_modes(tiny, capsys):
    """19 rows, 8 of them an update: the third ends an epoch."""
    words = [part(tiny, name, 2, chain[3]) for name, chain in CHAINS.items()]
    wait_for_all(start_ranks_in_turn(words, tiny.folder / "two", 2), 900)
    for name in CHAINS:
        one = {"per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 1}
        assert tiny.train(f"{name}-whole", **keys_of(tiny, name) | one) == 0
        assert train.main(part(tiny, name, 4, {})) == 0
    words = [part(tiny, name, 6, chain[4]) for name, chain in CHAINS.items()]
    ranks = start_ranks_in_turn(words, tiny.folder / "four", 4)
    wait_for_all(ranks, 900)
    far = {}
    for name in CHAINS:
        mine, others = tiny.losses(name), tiny.losses(f"{name}-whole")
        assert mine.keys() == others.keys() == set(range(1, 7))
        far[name] = max(abs(mine[step] - others[step]) for step in mine)
        assert tiny.results(name)["train_loss"] == pytest.approx(
            tiny.results(f"{name}-whole")["train_loss"], abs=LIMIT
        )
    assert {name: worst for name, worst in far.items() if not worst < LIMIT} == {}, far
    said = ranks[0].text()
    assert "2 ranks trained on 8 rows an update" not in said  # the second part was trained by one
    assert "1 ranks trained on 8 rows an update, and so do 4 here: per_device_train_batch_size is 2 " in said
    assert "2 ranks trained on 8 rows an update, and so do 1 here" in capsys.readouterr().out
