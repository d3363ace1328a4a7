"""The kernels of 4-bit weights equal their references: written out to the bit, products of 1 to 16 rows by
the rule."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as, random

import kernels
import lora
from architectures import config_from_hf
from kernels import nf4
from kernels.linear import Part
from kernels.nf4 import (
    Codes,
    dequantise_reference,
    dequantise_triton,
    small_batch_reference,
    small_batch_triton,
)
from model import Decoder, initialize_weights
from quant.nf4 import NF4Format

pytest.importorskip("triton")


def codes_of(count, double, seed=0):
    """A weight of `count` random codes, with scales of many sizes. The table has no order that could hide a
    mistake."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // 64)
    codes = torch.randint(256, (-(-count // 2),), dtype=torch.uint8, generator=generator).to(DEVICE)
    table = random(16, seed=seed)
    if not double:
        return Codes(codes, random(blocks, seed=seed + 1).exp(), table)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator).to(DEVICE)
    nested = random(-(-blocks // 256), seed=seed + 2).exp(), random(256, seed=seed + 3)
    return Codes(codes, absmax, table, *nested, torch.tensor(0.37, device=DEVICE))


def part_of(outputs, inputs, double, rank, bias, seed=0):
    low = (
        (random(rank, inputs, seed=seed + 5), random(outputs, rank, seed=seed + 6)) if rank else (None, None)
    )
    vector = random(outputs, seed=seed + 7) if bias else None
    return Part(codes_of(outputs * inputs, double, seed), vector, *low, 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 321), (64, 64), (130, 257)])
def test_weights_are_written_out_to_the_bit(shape, double, dtype):
    weight = codes_of(shape[0] * shape[1], double)
    found, expected = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    dequantise_triton(weight, found)
    dequantise_reference(weight, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("double", [False, True])
def test_nothing_is_written_behind_the_weight(double):
    memory = torch.full((40 * 33 + 200,), 9.0, device=DEVICE)
    dequantise_triton(codes_of(40 * 33, double), memory[: 40 * 33].view(40, 33))
    assert memory[40 * 33 :].eq(9.0).all() and not memory[: 40 * 33].eq(9.0).any()


# in, outputs of the parts, double quantisation, rank, bias
PRODUCTS = [
    (64, (1,), False, 0, False),
    (64, (33,), True, 3, True),
    (192, (70, 6, 65), True, 0, True),
    (320, (20, 64), False, 5, False),
    (1088, (9,), True, 16, False),  # odd turns, divided
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("inputs, sizes, double, rank, bias", PRODUCTS)
def test_products_of_a_few_rows(inputs, sizes, double, rank, bias, rows, dtype):
    parts = [part_of(size, inputs, double, rank, bias, seed=10 * place) for place, size in enumerate(sizes)]
    parts = [with_tables_of(parts[0], part) for part in parts]

    def kernel(x):
        found = small_batch_triton(x, [cast(part, x.dtype) for part in parts])
        assert [result.shape for result in found] == [(rows, size) for size in sizes]
        return found

    def reference(x):
        return [small_batch_reference(x, cast(part, x.dtype)) for part in parts]

    assert_as_exact_as(kernel, reference, [random(rows, inputs, seed=3)], dtype, ())


def with_tables_of(first, part):
    """As the layers of one model have them."""
    tables = {name: getattr(first.weight, name) for name in ("table", "nested_table")}
    return part._replace(weight=part.weight._replace(**tables))


def cast(part, dtype):
    """bias as a layer holds it, in the dtype of the values; adapters and scales stay fp32; all of it fp64 as
    oracle."""
    if dtype is not torch.float64:
        return part._replace(bias=None if part.bias is None else part.bias.to(dtype))
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in part]
    return Part(*wide)._replace(weight=part.weight)


@pytest.mark.parametrize("differs", ["table", "rank", "double", "bias", "adapter dtype", "four of them"])
def test_parts_that_differ_are_launched_apart_and_equal_themselves(differs):
    first = part_of(20, 128, True, 4, False)
    other = {
        "table": part_of(20, 128, True, 4, False, 1),
        "rank": with_tables_of(first, part_of(20, 128, True, 0, False, 1)),
        "double": part_of(9, 128, False, 4, False, 2),
        "bias": with_tables_of(first, part_of(9, 128, True, 4, True, 2)),
        "adapter dtype": first._replace(lora_a=first.lora_a.half(), lora_b=first.lora_b.half()),
        "four of them": first,
    }[differs]
    parts, x = [first, first, other, first], random(3, 128)
    together = small_batch_triton(x, parts)
    for found, part in zip(together, parts, strict=True):
        assert torch.equal(found, small_batch_triton(x, [part])[0])


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_do_not_lie_together(rows):
    part = part_of(20, 128, False, 2, False)
    for x in (random(2 * rows, 300)[::2, 5:133], random(128, 2 * rows).T[:rows]):
        expected = small_batch_triton(x.contiguous(), [part])[0]
        assert torch.equal(small_batch_triton(x, [part])[0], expected)


def test_inputs_are_divided_when_outputs_are_few(monkeypatch):
    """The other tests would also pass with a single split if the launcher chose that."""
    sizes = []
    monkeypatch.setattr(nf4, "run", lambda kernel, grid, *rest, **more: sizes.append((kernel.__name__, grid)))
    small_batch_triton(random(2, 1088), [part_of(9, 1088, True, 0, False)])
    assert sizes[0][0] == "_some_rows_kernel" and sizes[0][1][1] > 1 and sizes[1][0] == "_add_kernel"


def test_what_the_kernels_do_not_serve():
    assert "scales of 64" in nf4.unsupported(random(1, 96)) and "float64" in nf4.unsupported(
        random(1, 64).double()
    )
    assert "17 rows" in nf4.unsupported(random(17, 64)) and nf4.unsupported(random(16, 64)) is None
    assert "0 rows" in nf4.unsupported(random(0, 64))
    assert "contiguous" in nf4.unsupported_fill(random(6, 4).T) and nf4.unsupported_fill(random(6, 4)) is None


# The layers of quant/ on these kernels

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attention_bias": True,
}  # fmt: skip


def quantised_decoder(format, rank):
    """A decoder with its blocks' linears in 4 bits, and adapters on them if there is a rank, but for
    k_proj."""
    model = Decoder(config_from_hf(CONFIG)).to(DEVICE).eval()
    initialize_weights(model, torch.Generator().manual_seed(0))
    for name, module in list(model.layers.named_modules(prefix="layers")):
        if isinstance(module, torch.nn.Linear):
            layer = format.quantise(module.weight.detach(), module.bias, torch.float32)
            lora.replace_module(model, name, layer)
    if rank:
        targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        lora.add_lora(model, lora.LoraOptions(lora_rank=rank, lora_target=targets))
        for place, layer in enumerate(lora.lora_layers(model).values()):
            layer.lora_b.data = random(*layer.lora_b.shape, seed=place, scale=0.3)
    return model


@torch.no_grad()
def logits_of(model, rows):
    tokens = torch.arange(3, 3 + rows, device=DEVICE)
    borders = torch.tensor([0, rows], dtype=torch.int32, device=DEVICE)
    return model.logits(model(tokens, torch.arange(rows, device=DEVICE), borders, rows))


@pytest.mark.parametrize("table, double", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_quantised_model_decodes_from_its_codes(monkeypatch, table, double, rank, rows):
    """q/k/v and gate/up in one launch each (with k_proj bare: q, k, v in one each); the dense weight is never
    made."""
    model, launches = quantised_decoder(NF4Format(table, double), rank), []
    monkeypatch.setattr(kernels, "_MODE", "reference")
    monkeypatch.setattr(kernels, "_REFERENCE", True)
    expected = logits_of(model, rows)
    monkeypatch.setattr(kernels, "_MODE", "triton")
    monkeypatch.setattr(kernels, "_REFERENCE", False)

    def run(kernel, grid, *rest, **more):
        launches.append(kernel.__name__)
        return real(kernel, grid, *rest, **more)

    real = nf4.run
    monkeypatch.setattr(nf4, "run", run)
    found = logits_of(model, rows)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    products = 2 * (4 if rank == 0 else 6)
    assert launches.count("_one_row_kernel" if rows == 1 else "_some_rows_kernel") == products
    assert "_dequantise_kernel" not in launches


def test_more_rows_and_training_take_the_dense_weight(monkeypatch):
    monkeypatch.setattr(kernels, "_MODE", "triton")
    model = quantised_decoder(NF4Format("nf4", True), 3)
    layer, x = model.layers[0].mlp.gate_proj.base, random(17, 64)
    expected = torch.nn.functional.linear(x, layer.dequantize())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    x = random(2, 64).requires_grad_(True)
    layer(x).sum().backward()  # few rows, but with a gradient
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, -1))


@pytest.mark.parametrize("shape", [(64, 128), (3, 7)])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_is_filled_by_the_kernel_to_the_bit(monkeypatch, double, shape):
    layer = NF4Format("nf4", double).quantise(random(*shape), None, torch.float32)
    expected = layer.dequantize()
    monkeypatch.setattr(kernels, "_MODE", "triton")
    monkeypatch.setattr(type(layer), "scales", None)  # the way without a kernel begins there
    assert torch.equal(layer.dequantize(), expected)
