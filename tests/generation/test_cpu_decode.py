"""The straight line for one token (CPU): it is taken after the layout for decoding, and equals the
modules."""

import copy
import dataclasses

import pytest
import torch
from kernel_checks import relative_error
from torch import nn

import kernels
from architectures.config import ModelConfig
from architectures.layers import RMSNorm
from architectures.rope import Rope
from generation import cpu_decode
from generation.cache import KVCache
from generation.layout import lay_out_for_decoding
from lora import LoraLinear, lora_off
from model import FEED_FORWARD, Attention, Block, Decoder, initialize_weights
from quant.eetq import EETQFormat
from quant.gptq import GPTQFormat, GPTQLinear
from quant.int8 import Int8Format
from quant.nf4 import NF4Format

SIZES = {"vocab_size": 97, "hidden_size": 60, "intermediate_size": 77, "num_layers": 3, "max_positions": 96}
SIZES |= {"num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "sliding_windows": (None, None, None)}
SIZES |= {"norm_eps": 1e-5, "rope": Rope(theta=1e4), "initializer_range": 0.3}
KINDS = {
    "plain": {},
    "biases, tied head": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied_head": True},
    "windows, as many key heads as query heads": {"sliding_windows": (7, None, 1), "num_kv_heads": 6},
    "another activation, wide heads": {"activation": "gelu_tanh", "head_dim": 16, "num_kv_heads": 1},
}


def decoder(kind, dtype):
    model = Decoder(ModelConfig(**(SIZES | KINDS[kind])), dtype=dtype).eval()
    initialize_weights(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases and norms that do nothing would prove nothing
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
                )
    return model


def token_by_token(model, tokens):
    """Hidden rows (T, E), and what the cache holds."""
    cache, rows = KVCache(model.config, 1, len(tokens), model.embed_tokens.weight.dtype), []
    with torch.inference_mode():
        for place, token in enumerate(tokens):
            borders = torch.tensor([0, 1], dtype=torch.int32)
            rows.append(cpu_decode.forward(model, token[None], torch.tensor([place]), borders, 1, cache))
    assert cache.lengths == [len(tokens)]
    return torch.cat(rows), cache.storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_modules(kind, dtype, monkeypatch):
    model = decoder(kind, dtype)
    tokens = torch.randint(97, (13,), generator=torch.Generator().manual_seed(1))
    exact = token_by_token(copy.deepcopy(model).double(), tokens)
    by_modules = token_by_token(model, tokens)
    lay_out_for_decoding(model)
    for block in model.layers:  # whoever took the long way would fail
        monkeypatch.setattr(block, "forward", None)
    for found, plain, truth in zip(token_by_token(model, tokens), by_modules, exact):
        assert relative_error(found, truth) <= 2 * relative_error(plain, truth) + 1e-6


def test_is_not_taken_with_gradients_or_for_several_rows():
    model = decoder("plain", torch.float32)
    lay_out_for_decoding(model)
    rows = torch.zeros(2, 60)
    with torch.no_grad():
        assert model.runtime.one_row.serves(rows[:1]) and not model.runtime.one_row.serves(rows)
        assert not model.runtime.one_row.serves(rows[:1].double())
    assert not model.runtime.one_row.serves(rows[:1])


def test_a_tied_head_is_turned_in_place_of_being_held_twice():
    model = decoder("biases, tied head", torch.float32)
    weight = model.embed_tokens.weight.clone()
    lay_out_for_decoding(model)
    assert torch.equal(model.embed_tokens.weight, weight) and model.embed_tokens.weight.stride() == (1, 97)
    assert model.head_weight() is model.embed_tokens.weight


# Quantised


class GPTQ:
    """Rounded to the nearest, over all inputs of a row or by groups of 64, with zeros that differ or are the
    same."""

    def __init__(self, bits, sym):
        self.bits, self.sym = bits, sym

    def quantise(self, weight, bias, dtype):
        outputs, inputs = weight.shape
        group = 64 if inputs % 64 == 0 else inputs
        parts, top = weight.float().view(outputs, -1, group), 2**self.bits - 1
        low, high = parts.amin(2), parts.amax(2)
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / top).half().float()
        zeros = (
            torch.full_like(scales, 2 ** (self.bits - 1))
            if self.sym
            else (-low / scales).round().clamp(0, top)
        )
        codes = (parts / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, top).view(outputs, inputs)
        chosen = GPTQFormat(bits=self.bits, group_size=group)
        return GPTQLinear.from_integers(chosen, codes.int(), scales, zeros.int(), None, bias, dtype)


FORMATS = {"LLM.int8": Int8Format(), "int8": EETQFormat(), "nf4": NF4Format(), "fp4": NF4Format("fp4", False)}
VENDORS = {
    "gptq": GPTQ(4, False),
    "gptq symmetric": GPTQ(3, True),
    "gptq 8": GPTQ(8, True),
    "8 zeros": GPTQ(8, False),
}
BLOCKS_OF_64 = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "num_heads": 3,
    "num_kv_heads": 1,
}


def quantised(kind, chosen, dtype, adapters=False, **sizes):
    """The model with its blocks' linears quantised, and the same with what they stand for as plain
    linears."""
    model = Decoder(ModelConfig(**(SIZES | KINDS[kind] | sizes)), dtype=dtype).eval()
    initialize_weights(model, torch.Generator().manual_seed(3))
    dense = copy.deepcopy(model).double()
    for name, linear in list(model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            layer = chosen.quantise(linear.weight.detach(), linear.bias, dtype)
            weight = layer.dequantize(torch.float64)
            if adapters and "k_proj" not in name:
                layer = LoraLinear(layer, 3, 6.0, generator=torch.Generator().manual_seed(len(name)))
                nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(len(name)))
                weight += 2 * layer.lora_b.double() @ layer.lora_a.double()
            parent, _, leaf = name.rpartition(".")
            setattr(model.layers.get_submodule(parent), leaf, layer.eval())
            dense.layers.get_submodule(name).weight.data = weight
    return model, dense


@pytest.mark.parametrize("adapters", [False, True], ids=["", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("sizes", [{}, BLOCKS_OF_64], ids=["odd", "of 64"])
def test_quantised_layers_take_the_straight_line_too(sizes, chosen, dtype, adapters, monkeypatch):
    model, dense = quantised("biases, tied head", FORMATS[chosen], dtype, adapters, **sizes)
    tokens = torch.randint(97, (13,), generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(dense).to(dtype)
    exact, by_modules = token_by_token(dense, tokens), token_by_token(plain, tokens)
    lay_out_for_decoding(model)
    in_bytes = "int8" in chosen or (dtype is torch.bfloat16 and bool(sizes))
    assert model.runtime.one_row.wide == in_bytes  # the others have their weights expanded
    for block in model.layers:
        monkeypatch.setattr(block, "forward", None)
    # the sums of bytes hold x * zero on the way, numbers some times larger than x * weight
    allowed = 1e-5 if in_bytes else 1e-6
    for found, rounded, truth in zip(token_by_token(model, tokens), by_modules, exact):
        assert relative_error(found, truth) <= 2 * relative_error(rounded, truth) + allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", VENDORS)
def test_whole_numbers_in_groups_are_read_as_bytes(chosen, dtype):
    sizes = BLOCKS_OF_64 | {"num_heads": 4, "num_kv_heads": 2}
    model, dense = quantised("biases, tied head", VENDORS[chosen], dtype, **sizes)
    tokens = torch.randint(97, (9,), generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(dense).to(dtype)
    exact, by_modules = token_by_token(dense, tokens), token_by_token(plain, tokens)
    lay_out_for_decoding(model)
    assert model.runtime.one_row.wide == (chosen != "8 zeros")
    for found, rounded, truth in zip(token_by_token(model, tokens), by_modules, exact):
        assert relative_error(found, truth) <= 2 * relative_error(rounded, truth) + 1e-5


def test_an_adapter_that_changed_or_is_off_is_left_to_the_modules():
    model, _ = quantised("plain", Int8Format(), torch.float32, adapters=True)
    model.requires_grad_(False)
    lay_out_for_decoding(model)
    row = torch.zeros(1, 60)
    with torch.no_grad():
        assert model.runtime.one_row.serves(row)
        with lora_off(model):
            assert not model.runtime.one_row.serves(row)
        assert model.runtime.one_row.serves(row)
        model.layers[1].mlp.up_proj.lora_b.mul_(2)
        assert not model.runtime.one_row.serves(row)


def test_an_adapter_that_is_not_just_added_is_left_to_the_modules():
    model, _ = quantised("plain", Int8Format(), torch.float32)
    model.layers[0].mlp.up_proj = LoraLinear(model.layers[0].mlp.up_proj, 3, 6.0, dora=True)
    lay_out_for_decoding(model)
    assert model.runtime.one_row is None


# Decoders that are not what the straight line knows


def one_plus_weight(self, x, delta, dtype):
    total = x if delta is None else x + delta
    return kernels.rms_norm(total.to(dtype), self.weight, self.eps, 1.0), total


def capped(self, x, cos, sin, context):
    q, k, v = self.project(x, cos, sin, context)
    out = context.cache.attend(self.layer, q, k, v, context, self.window, self.scale)
    return self.o_proj(torch.tanh(out.flatten(-2)))


block_forward = Block.forward


def half_added(self, *row):
    x, delta = block_forward(self, *row)
    return x, 0.5 * delta


EDITS = {  # what somebody writes in one place only: (class, method, what it is then)
    "norms of 1 + weight": (RMSNorm, "of_sum", one_plus_weight),
    "a cap on what attention gives": (Attention, "forward", capped),
    "a share of the update": (Block, "forward", half_added),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_a_decoder_that_was_changed_decodes_as_it_computes(edit, dtype, monkeypatch):
    monkeypatch.setattr(*EDITS[edit])
    model = decoder("biases, tied head", dtype)
    tokens = torch.randint(97, (9,), generator=torch.Generator().manual_seed(1))
    expected = token_by_token(model, tokens)
    lay_out_for_decoding(model)
    assert model.runtime.one_row is None
    for found, plain in zip(token_by_token(model, tokens), expected):
        assert relative_error(found, plain.double()) < (1e-5 if dtype is torch.float32 else 0.02)


@dataclasses.dataclass(frozen=True)
class WiderConfig(ModelConfig):
    softcap: float = 0.0


def test_a_switch_that_the_straight_line_does_not_know_is_left_to_the_modules():
    for softcap, taken in ((0.0, True), (30.0, False)):
        model = Decoder(WiderConfig(**SIZES, softcap=softcap)).eval()
        initialize_weights(model, torch.Generator().manual_seed(3))
        lay_out_for_decoding(model)
        assert (model.runtime.one_row is not None) == taken
    model = Decoder(ModelConfig(**SIZES, qk_norm=True)).eval()
    lay_out_for_decoding(model)
    assert model.runtime.one_row is None


class Doubled(nn.Module):
    def __init__(self, config, layer, **factory):
        super().__init__()

    def forward(self, x):
        return 2 * x


def test_another_kind_of_layer_is_left_to_the_modules(monkeypatch):
    monkeypatch.setitem(FEED_FORWARD, "doubled", Doubled)
    model = Decoder(ModelConfig(**SIZES, feed_forward_kinds=("mlp", "doubled", "mlp"))).eval()
    initialize_weights(model, torch.Generator().manual_seed(3))
    tokens = torch.randint(97, (9,), generator=torch.Generator().manual_seed(1))
    expected, _ = token_by_token(model, tokens)
    lay_out_for_decoding(model)
    assert model.runtime.one_row is None
    torch.testing.assert_close(token_by_token(model, tokens)[0], expected, atol=1e-4, rtol=1e-4)
