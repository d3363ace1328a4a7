"""The estimate covers what torch keeps, and the plan follows from it."""

import pytest
import torch

from architectures import config_from_hf
from checkpoints import trainable
from kernels.recompute import Plan
from lora import LoraOptions
from model import Decoder
from tests.kernels.test_recompute import LAYERS, kept_bytes, make_model
from training import memory

GIB = 2**30
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
CPU = torch.device("cpu")


def large(method: str) -> Decoder:
    """Llama-2-7B without its numbers, as train.py prepares it under bf16."""
    model = Decoder(config_from_hf(LLAMA_7B), dtype=torch.bfloat16, device="meta")
    trainable.prepare_trainable(
        model, LoraOptions(finetuning_type=method, lora_rank=16, num_layer_trainable=2)
    )
    if method != "lora":
        model.float()
    model.runtime.compute_dtype = torch.bfloat16
    return model


@pytest.fixture(scope="module")
def lora_7b():
    return large("lora")


def decided(model, tokens: int, free_gib: float, policy: str = "auto") -> tuple[Plan, str]:
    return memory.plan(policy, memory.need(model, tokens), model.config.num_layers, CPU, free_gib * GIB)


@pytest.mark.parametrize("method", ["lora", "full", "dropout", "dora"])
@pytest.mark.parametrize("tokens", [512, 3072])
def test_the_estimate_covers_what_a_forward_pass_keeps(method, tokens):
    """Without slack and reserve: at least what torch holds, at most that and a third."""
    model = make_model(method)
    need = memory.need(model, tokens)
    selective, full = Plan(selective=LAYERS), Plan(full=LAYERS)
    for plan, blocks in ((Plan(), need.everything), (selective, need.selective), (full, need.full)):
        outside = tokens * 4 * (16 + 4 * 48)  # rotation tables, the last norm
        kept = kept_bytes(model, plan, tokens)
        assert 0.75 * kept <= LAYERS * blocks + outside <= 1.45 * kept, plan


def test_a_7b_lora_on_80_gb_computes_nothing_twice(lora_7b):
    weights = 13.5e9
    plan, line = decided(lora_7b, 8192, (80e9 - weights) / GIB)
    assert plan == Plan()
    assert (
        line.startswith("gradient checkpointing: 0 of 32 blocks (auto: needs ")
        and " of 61.9 GiB free)" in line
    )
    # and what it keeps is what the formula says: 131.6 KB per token and block, and little else
    assert 32 * 8192 * 131.6e3 < memory.need(lora_7b, 8192).of(0, 0) < 32 * 8192 * 131.6e3 * 1.15


def test_on_24_gb_some_blocks_run_again_and_the_others_drop_what_is_cheap(lora_7b):
    plan, line = decided(lora_7b, 8192, (24e9 - 13.5e9) / GIB)
    assert 16 < plan.full < 32 and plan.full + plan.selective == 32
    need = memory.need(lora_7b, 8192)
    assert need.of(plan.full, plan.selective) <= 24e9 - 13.5e9 < need.of(plan.full - 1, plan.selective + 1)
    assert f"{plan.full} of 32 blocks, norms and activations of {plan.selective} (auto: needs 9." in line


def test_between_the_two_only_what_is_cheap_is_dropped(lora_7b):
    plan, line = decided(lora_7b, 8192, 32)
    assert plan.full == 0 and 0 < plan.selective < 32
    assert "0 of 32 blocks, norms and activations of" in line


def test_where_nothing_fits_all_blocks_run_again_and_it_is_said(lora_7b):
    plan, line = decided(lora_7b, 8192, 1)
    assert plan == Plan(full=32)
    assert "32 of 32 blocks" in line and "may be too much: lower per_device_train_batch_size" in line


def test_memory_grows_with_the_tokens_of_a_micro_batch_and_with_what_is_trained(lora_7b):
    none = [memory.need(lora_7b, tokens).of(0, 0) for tokens in (2048, 4096, 8192)]
    assert none[2] - none[1] == pytest.approx(2 * (none[1] - none[0]), rel=0.02)
    full = memory.need(large("full"), 2048)
    weights = sum(parameter.numel() for parameter in large("full").parameters())
    assert full.fixed > 12 * weights  # fp32 gradients and both moments of Adam
    assert memory.need(large("full"), 2048, "sgd").fixed < full.fixed - 7.9 * weights
    copies = (full.everything - memory.need(lora_7b, 2048).everything) * 32
    assert copies == pytest.approx(2 * weights, rel=0.1)  # the blocks' weights in bf16 beside the fp32 ones
    two = memory.Spread(ranks=2)
    assert memory.need(lora_7b, 2048, spread=two).fixed > memory.need(lora_7b, 2048).fixed


def test_blocks_without_a_backward_pass_keep_nothing():
    need = memory.need(large("freeze"), 8192)
    assert need.blocks == 2
    plan, line = memory.plan("auto", need, 32, CPU, 0.0)
    assert plan == Plan(full=32) and "2 of 32 blocks" in line


@pytest.mark.parametrize(
    ("policy", "plan", "words"),
    [
        ("none", Plan(), "0 of 32 blocks (none"),
        ("selective", Plan(selective=32), "0 of 32 blocks, norms and activations of 32 (selective"),
        ("full", Plan(full=32), "32 of 32 blocks (full"),
        ("offload", Plan(full=32), "32 of 32 blocks (offload"),  # on a CPU the inputs are there already
    ],
)
def test_a_policy_that_is_asked_for_is_taken(lora_7b, policy, plan, words):
    for free in (0.5, 500):
        found, line = decided(lora_7b, 8192, free, policy)
        assert found == plan and words in line


def test_free_memory_of_this_machine_is_a_likely_number():
    assert 2**26 < memory.free_bytes(CPU) < 2**50
