"""Reward models of which ranks hold shares, where a rank has nothing to score; plans of ranks that differ."""

import pytest
import torch
from stage_runs import stage_keys, write_stage_data
from tiny_runs import (
    assert_same_weights,
    fork_ranks,
    start_ranks,
    start_ranks_in_turn,
    tiny_runs,
    wait_for_all,
)

import train
from training import memory

SGD = {"optim": "sgd", "learning_rate": 0.05, "lora_rank": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("rewards")) as made:
        write_stage_data(made, count=11)
        yield made


def test_a_rank_without_an_answer_asks_the_reward_model_too(tiny):
    """11 rows in groups of 8 on 4 ranks: in the second draw the last rank has none. Shares of the model are
    gathered for the texts and for their scores, or block by block."""
    judges = {"full": {"finetuning_type": "full"}, "lora": {"lora_rank": 3}}
    for kind, keys in judges.items():
        assert tiny.train(f"judge {kind}", **stage_keys(tiny, "rm", **keys, max_steps=1)) == 0
    keys = stage_keys(tiny, "ppo", **SGD, max_steps=4, num_train_epochs=None) | {"reward_file": None}
    shares = {"parallel": "fsdp", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    words, runs = [], [(kind, gathers) for kind in judges for gathers in (True, False)]
    of = {kind: {"reward_model": tiny.folder / f"judge {kind}", "reward_model_type": kind} for kind in judges}
    for kind, gathers in runs:
        words.append(
            tiny.words(f"{kind} {gathers}", **keys | of[kind] | shares, gather_for_generation=gathers)
        )
    ranks = start_ranks_in_turn(words, tiny.folder / "four-output", 4)
    for kind in judges:
        assert tiny.train(kind, **keys | of[kind], per_device_train_batch_size=8) == 0
    wait_for_all(ranks, 300)
    for kind, gathers in runs:
        assert tiny.losses(f"{kind} {gathers}") == pytest.approx(tiny.losses(kind), abs=3e-5)
        mine, alone = tiny.weights(f"{kind} {gathers}"), tiny.weights(kind)
        assert_same_weights(mine, alone, tolerance=3e-6)


def test_a_value_head_in_fp32_trains_beside_weights_in_bf16(tiny):
    keys = stage_keys(tiny, "rm", finetuning_type="full", pure_bf16=True, max_steps=3, num_train_epochs=None)
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    runs = [tiny.words(f"bf16-{mode}", **keys, **rows, parallel=mode) for mode in ("ddp", "fsdp")]
    ranks = start_ranks_in_turn(runs, tiny.folder / "bf16-output", 2)
    assert tiny.train("bf16", **keys, per_device_train_batch_size=8) == 0
    wait_for_all(ranks, 200)
    for mode in ("ddp", "fsdp"):
        assert tiny.losses(f"bf16-{mode}") == pytest.approx(tiny.losses("bf16"), abs=3e-3)
        norms = [tiny.losses(name, "grad_norm") for name in (f"bf16-{mode}", "bf16")]
        assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_norms_in_fp32_beside_weights_in_bf16_are_refused_over_ranks(tiny):
    keys = {"finetuning_type": "full", "pure_bf16": True, "upcast_layernorm": True}
    ranks = start_ranks(tiny.words("norms", **keys), tiny.folder / "norms-output")
    assert [rank.wait(60) for rank in ranks] == [2, 2]
    assert "pure_bf16: bfloat16 and float32 train side by side" in ranks[0].text()


def crowded(words: list[str]) -> int:
    """In a rank: one of them has less free memory than the other."""
    free = memory.free_bytes

    def less(device: torch.device) -> float:
        world = torch.distributed.get_rank()
        return 2.0**29 + 2**19 if world == 1 else free(device)

    memory.free_bytes = less
    return train.main(words)


def test_ranks_that_share_layers_run_the_same_blocks_again(tiny):
    keys = stage_keys(tiny, "sft", **SGD, max_steps=2, num_train_epochs=None)
    rows = {"per_device_train_batch_size": 8, "tp_size": 2}
    ranks = fork_ranks(crowded, (tiny.words("crowded", **keys, **rows),), tiny.folder / "crowded-output", 2)
    assert tiny.train("roomy", **keys, per_device_train_batch_size=8) == 0
    wait_for_all(ranks, 120)
    assert "2 of 2 blocks" in ranks[0].text()
    assert tiny.losses("crowded") == pytest.approx(tiny.losses("roomy"), abs=3e-5)
