"""The layout for decoding: the decoder's own forward gives for one token on a CPU what it gave before, and
what it gives for the whole row; its products come from the tables."""

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
from generation.cache import KVCache
from generation.layout import lay_out_for_decoding
from lora import LoraLinear, lora_off
from model import FEED_FORWARD, Attention, Block, Decoder, initialize_weights
from quant.eetq import EETQFormat
from quant.gptq import GPTQFormat, GPTQLinear
from quant.int8 import Int8Format
from quant.linear import QuantLinear
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
            rows.append(model(token[None], torch.tensor([place]), borders, 1, cache))
    assert cache.lengths == [len(tokens)]
    return torch.cat(rows), cache.storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_gives_what_it_gave_before_the_layout(kind, dtype, monkeypatch):
    model = decoder(kind, dtype)
    tokens = torch.randint(97, (13,), generator=torch.Generator().manual_seed(1))
    exact = token_by_token(copy.deepcopy(model).double(), tokens)
    by_modules = token_by_token(model, tokens)
    lay_out_for_decoding(model)
    monkeypatch.setattr(kernels, "linear", None)  # a product that passed its table would fail
    for found, plain, truth in zip(token_by_token(model, tokens), by_modules, exact):
        assert relative_error(found, truth) <= 2 * relative_error(plain, truth) + 1e-6


def test_a_laid_out_model_still_trains():
    plain, model = decoder("biases, tied head", torch.float32), decoder("biases, tied head", torch.float32)
    lay_out_for_decoding(model)
    tokens, borders = torch.arange(7), torch.tensor([0, 7], dtype=torch.int32)
    for each in (plain, model):
        each(tokens, tokens, borders, 7).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-3, rtol=1e-4)
    with torch.no_grad():  # and the tables follow what an optimizer writes
        for parameter in [*plain.parameters(), *model.parameters()]:
            parameter.mul_(0.5)
    for found, wanted in zip(token_by_token(model, tokens), token_by_token(plain, tokens)):
        torch.testing.assert_close(found, wanted)


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


def is_in_bytes(model):
    tables = [module.table for module in model.layers.modules() if isinstance(module, QuantLinear)]
    assert None not in tables
    return all(table.weight is None for table in tables)


@pytest.mark.parametrize("adapters", [False, True], ids=["", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("sizes", [{}, BLOCKS_OF_64], ids=["odd", "of 64"])
def test_quantised_layers_are_read_from_tables_too(sizes, chosen, dtype, adapters, monkeypatch):
    model, dense = quantised("biases, tied head", FORMATS[chosen], dtype, adapters, **sizes)
    tokens = torch.randint(97, (13,), generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(dense).to(dtype)
    exact, by_modules = token_by_token(dense, tokens), token_by_token(plain, tokens)
    lay_out_for_decoding(model)
    in_bytes = "int8" in chosen or (dtype is torch.bfloat16 and bool(sizes))
    assert is_in_bytes(model) == in_bytes  # the others have their weights expanded
    monkeypatch.setattr(QuantLinear, "dequantize", None)
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
    assert is_in_bytes(model) == (chosen != "8 zeros")
    for found, rounded, truth in zip(token_by_token(model, tokens), by_modules, exact):
        assert relative_error(found, truth) <= 2 * relative_error(rounded, truth) + 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_may_change_be_switched_off_or_be_more_than_a_sum(dora):
    model, _ = quantised("plain", NF4Format(), torch.float32, adapters=True)
    if dora:
        model.layers[0].mlp.up_proj = LoraLinear(model.layers[0].mlp.up_proj.base, 3, 6.0, dora=True).eval()
    model.requires_grad_(False)
    laid_out, tokens = copy.deepcopy(model), torch.arange(5)
    lay_out_for_decoding(laid_out)

    def same():
        pairs = zip(token_by_token(laid_out, tokens), token_by_token(model, tokens))
        return all(relative_error(found, plain.double()) < 1e-5 for found, plain in pairs)

    assert same()
    with lora_off(model):
        assert not same()
        with lora_off(laid_out):
            assert same()
    for each in (model, laid_out):
        each.layers[1].mlp.up_proj.lora_b.data.mul_(2)
    assert same()


# Decoders that somebody changed


attention_forward, block_forward = Attention.forward, Block.forward


def one_plus_weight(self, x, delta, dtype):
    total = x if delta is None else x + delta
    return kernels.rms_norm(total.to(dtype), self.weight, self.eps, 1.0), total


def capped(self, x, *row):
    return torch.tanh(attention_forward(self, x, *row))


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
def test_a_decoder_that_was_changed_decodes_as_it_trains(edit, dtype, monkeypatch):
    monkeypatch.setattr(*EDITS[edit])
    decodes_as_it_trains(decoder("biases, tied head", dtype))


def decodes_as_it_trains(model):
    """Token by token in the layout, what the forward pass of training gives for the whole row."""
    tokens = torch.randint(97, (9,), generator=torch.Generator().manual_seed(1))
    row = tokens, torch.arange(9), torch.tensor([0, 9], dtype=torch.int32), 9
    with torch.no_grad():
        truth, trained = copy.deepcopy(model).double()(*row), model(*row)
    lay_out_for_decoding(model)
    found, _ = token_by_token(model, tokens)
    assert relative_error(found, truth) <= 2 * relative_error(trained, truth) + 1e-6


@dataclasses.dataclass(frozen=True)
class WiderConfig(ModelConfig):
    softcap: float = 0.0


class CappedBlock(Block):
    def __init__(self, config, layer, **factory):
        super().__init__(config, layer, **factory)
        self.softcap = config.softcap

    def forward(self, *row):
        x, delta = super().forward(*row)
        return x, self.softcap * torch.tanh(delta / self.softcap) if self.softcap else delta


@pytest.mark.parametrize("switch", [{}, {"softcap": 0.5}, {"qk_norm": True}], ids=str)
def test_a_switch_that_the_layout_does_not_know_is_in_decoding_too(switch, monkeypatch):
    monkeypatch.setattr("model.Block", CappedBlock)
    model = Decoder(WiderConfig(**SIZES, **switch)).eval()
    initialize_weights(model, torch.Generator().manual_seed(3))
    decodes_as_it_trains(model)


class Doubled(nn.Module):
    def __init__(self, config, layer, **factory):
        super().__init__()

    def forward(self, x):
        return 2 * x


def test_another_kind_of_layer_is_left_as_it_is(monkeypatch):
    monkeypatch.setitem(FEED_FORWARD, "doubled", Doubled)
    model = Decoder(ModelConfig(**SIZES, feed_forward_kinds=("mlp", "doubled", "mlp"))).eval()
    initialize_weights(model, torch.Generator().manual_seed(3))
    decodes_as_it_trains(model)
