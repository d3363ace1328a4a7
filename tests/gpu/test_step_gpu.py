"""The step on a GPU: the host never waits for it between two log lines, and every policy gives the same
bits."""

import pytest
import torch
from tiny_runs import assert_same_weights, tiny_runs

import train
from training.instruments import Health

KEYS = {"device": "cuda", "cutoff_len": 256, "num_train_epochs": 4, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("step")) as made:
        yield made


@pytest.mark.parametrize(
    "keys",
    [
        {"bf16": True},
        {"fp16": True, "lora_dropout": 0.1},
        {"bf16": True, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5},
        {"bf16": True, "finetuning_type": "full", "packing": True},
        {"bf16": True, "use_dora": True, "gradient_checkpointing": "full"},
        {"bf16": True, "gradient_checkpointing": "selective"},
        {"bf16": True, "gradient_checkpointing": "offload"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_nothing_waits_for_the_gpu_between_two_log_lines(tiny, tmp_path, monkeypatch, keys):
    """From the second epoch to the log line at the end every synchronisation is an error."""
    updates, check, train_update = [], Health.check, train.update

    def update(*arguments):
        if len(updates) >= 5:
            torch.cuda.set_sync_debug_mode("error")
        updates.append((len(updates), torch.cuda.get_sync_debug_mode()))
        return train_update(*arguments)

    def watched_check(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        check(*arguments)

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(Health, "check", watched_check)
    try:
        assert tiny.train(tmp_path / "out", max_steps=12, logging_steps=12, **{**KEYS, **keys}) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [step for step, mode in updates if mode == 2] == list(range(5, 12))


def test_the_counter_sees_a_wait(tiny):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ["full", "selective", "offload", "auto"])
@pytest.mark.parametrize(
    "method", [{"lora_dropout": 0.2, "neftune_noise_alpha": 5}, {"finetuning_type": "full"}]
)
def test_every_policy_trains_the_weights_of_none(tiny, tmp_path, method, policy):
    weights, losses = [], []
    method = {"flash_attn": "triton", **method}  # torch's flash attention adds up dq in any order
    for name in ("none", policy):
        assert tiny.train(tmp_path / name, gradient_checkpointing=name, bf16=True, **KEYS, **method) == 0
        weights.append(tiny.weights(tmp_path / name))
        losses.append(tiny.losses(tmp_path / name))
    assert losses[0] == losses[1]
    assert_same_weights(*weights)
