"""HQQ: packing and values against numpy and the vendor's code, the fit against plain rounding, layers in
files."""

import numpy as np
import pytest
import torch

from quant import from_config
from quant.hqq import PACKED, HQQFormat, fit, pack

BITS = [8, 6, 5, 4, 3, 2, 1]
PLACES = {8: [0], 6: [0], 5: [0], 4: [4, 0], 3: range(27, -1, -3), 2: [6, 4, 2, 0], 1: range(7, -1, -1)}


def weights(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers with a few outliers, as trained weights are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator) * 0.05
    return torch.where(torch.rand(outputs, inputs, generator=generator) < 0.01, 6 * values, values)


def settings(bits: int, group: int, axis: int) -> dict:
    return HQQFormat(bits, group, axis).config()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_values_are_those_of_the_formula(bits, axis):
    outputs, inputs, group = 24, 40, 8 if axis == 1 else 24
    random = np.random.default_rng(0)
    count = outputs * inputs // group
    codes = random.integers(0, 2**bits, (count, group) if axis == 1 else (group, count))
    place = (count, 1) if axis == 1 else (1, count)
    scale, zero = (random.uniform(0.5, 2, place).astype(np.float16) for _ in range(2))
    expected = ((codes.astype(np.float32) - zero) * scale).reshape(outputs, inputs)
    packed = np.zeros((-(-len(codes) // PACKED[bits]), codes.shape[1]), np.int32 if bits == 3 else np.uint8)
    for part, shift in enumerate(PLACES[bits]):
        rows = codes[part * len(packed) : (part + 1) * len(packed)]
        packed[: len(rows)] |= (rows << shift).astype(packed.dtype)
    tensors = {"W_q": packed, "scale": scale, "zero": zero}
    tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    layer = from_config(settings(bits, group, axis)).read(tensors, (outputs, inputs), None, torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), torch.from_numpy(expected))
    assert torch.equal(layer.dequantize(), torch.from_numpy(expected).bfloat16())
    written = layer.tensors()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    other = HQQFormat(8 if bits != 8 else 4, 16, 1)  # what the layer's own tensors say beats config.json
    again = other.read(written, (outputs, inputs), None, torch.bfloat16)
    assert torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_packed_rows_are_those_of_the_quantiser(bits):
    weight = weights(30, 64)
    layer = HQQFormat(bits, 64).quantise(weight, None, torch.float32) if bits == 3 else None
    layer = layer or HQQFormat(bits, 16).quantise(weight, None, torch.float32)
    codes, scale, zero = fit(weight.reshape(-1, layer.layer.group_size), bits)
    expected = ((codes.float() - zero.float()) * scale.float()).view(30, 64)
    assert torch.equal(layer.dequantize(), expected)
    if bits != 3:
        assert torch.equal(layer.codes, pack(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_the_fit_is_nearer_than_plain_rounding(bits):
    groups = weights(512, 64)
    codes, scale, zero = fit(groups, bits)
    fitted = (codes.float() - zero.float()) * scale.float()
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rounded = ((groups - low) / step).round() * step + low
    mine, plain = (groups - fitted).square().mean(1), (groups - rounded).square().mean(1)
    assert mine.mean() < (plain.mean() if bits < 6 else 1.02 * plain.mean())
    assert (mine <= 1.05 * plain + 1e-7).all()  # a scale in fp16 may cost a group a little
    assert int(codes.max()) < 2**bits


def test_groups_of_one_number_and_of_zeros_are_exact_and_nan_is_refused():
    weight = torch.zeros(4, 64)
    weight[1], weight[2] = 3.0, -0.125
    layer = HQQFormat(4, 64).quantise(weight, None, torch.float32)
    assert torch.equal(layer.dequantize(), weight)
    weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        HQQFormat(4, 64).quantise(weight, None, torch.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [5.0, -300.0])
def test_groups_of_close_numbers_far_from_zero_stay_near(offset, bits):
    """Their zero, in codes, would not fit fp16."""
    weight = offset + 1e-4 * weights(4, 64)
    error = HQQFormat(bits, 64).quantise(weight, None, torch.float32).dequantize() - weight
    assert error.abs().max() <= 1e-3 * abs(offset)


def test_bits_a_weight_and_smaller_groups_for_small_layers():
    assert HQQFormat(4, 64).quantise(weights(128, 256), None, torch.bfloat16).bits_per_weight == 4.5
    assert HQQFormat(1, 64).quantise(weights(128, 256), None, torch.bfloat16).bits_per_weight == 1.5
    small = HQQFormat(4, 64).quantise(weights(12, 24), None, torch.bfloat16)  # 4.5 groups of 64
    assert small.layer.group_size == 16 and small.dequantize().shape == (12, 24)
    with pytest.raises(ValueError, match="its 9 weights do not divide into groups of 8"):
        HQQFormat(4, 64).quantise(weights(3, 3), None, torch.bfloat16)


def vendor():
    module = pytest.importorskip("hqq.core.quantize", reason="the vendor's code: pip install hqq")
    return module.Quantizer


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_the_vendors_layers_are_read_and_ours_by_the_vendor(bits, axis):
    quantizer = vendor()
    weight = weights(48, 80)
    codes, meta = quantizer.quantize(
        weight, bits, group_size=16, axis=axis, device="cpu", compute_dtype=torch.float32
    )
    tensors = {"W_q": codes, "scale": meta["scale"], "zero": meta["zero"]}
    layer = from_config(settings(bits, 16, axis)).read(tensors, (48, 80), None, torch.float32)
    theirs = quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    assert torch.equal(layer.dequantize(), theirs)
    mine = HQQFormat(bits, 16).quantise(weight, None, torch.float32)
    meta |= {"axis": 1, "scale": mine.scale.float(), "zero": mine.zero.float(), "group_size": 16}
    read = quantizer.dequantize(mine.codes, meta | {"compute_dtype": torch.float32})
    assert torch.equal(mine.dequantize(), read)
    if axis == 1:
        assert (weight - mine.dequantize()).square().mean() <= 1.02 * (weight - theirs).square().mean()


@pytest.mark.parametrize("bits", BITS)
def test_the_vendors_module_loads_our_tensors_and_we_load_its(bits):
    vendor()
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    mine = HQQFormat(bits, 16).quantise(weights(48, 80), None, torch.float32)
    theirs = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    theirs.load_state_dict({name: tensor.clone() for name, tensor in mine.tensors().items()})
    assert torch.equal(theirs.dequantize(), mine.dequantize())
    linear = torch.nn.Linear(80, 48, bias=False)
    made = HQQLinear(linear, BaseQuantizeConfig(bits, 16, axis=0), compute_dtype=torch.float16, device="cpu")
    tensors = {name: tensor.data for name, tensor in made.state_dict().items()}
    read = HQQFormat(4, 64).read(tensors, (48, 80), None, torch.float16)
    torch.testing.assert_close(
        read.dequantize(), made.dequantize(), rtol=2e-3, atol=2e-3
    )  # theirs rounds twice
