"""GPTQ: packing against streams of bits in Python's integers, values against the formula in numpy."""

import numpy as np
import pytest
import torch

from options.errors import UserError
from quant import from_config
from quant.gptq import GPTQFormat, GPTQLinear, pack, unpack


def stream(words: np.ndarray, bits: int) -> list[int]:
    """int32 words as one little-endian number, cut into values."""
    number = int.from_bytes(words.astype("<i4").tobytes(), "little")
    return [number >> place & (2**bits - 1) for place in range(0, 32 * words.size, bits)]


def integers(bits: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


def scales_of(groups: int, outputs: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)


def dense(codes, zeros, scales, group_of) -> np.ndarray:
    """w = s (q - z), fp32: codes (out, in), zeros and scales (groups, out), group_of (in,)."""
    values = codes.T.astype(np.float32) - zeros[group_of].astype(np.float32)
    return (values * scales.astype(np.float32)[group_of]).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_one_stream_of_bits_and_goes_both_ways(bits):
    values = integers(bits, 3, 5, 96)
    words = pack(torch.from_numpy(values), bits)
    assert words.dtype is torch.int32 and words.shape == (3, 5, 96 * bits // 32)
    assert [stream(row, bits) for row in words.view(15, -1).numpy()] == values.reshape(15, 96).tolist()
    assert torch.equal(unpack(words, bits), torch.from_numpy(values).int())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 32, 40, 200])
@pytest.mark.parametrize("order", ["in a row", "act-order"])
def test_values_are_those_of_the_formula(bits, group, order):
    outputs, inputs = 64, 160
    format = GPTQFormat(bits=bits, group_size=group, desc_act=order == "act-order")
    groups = format.groups(inputs)
    group_of = np.arange(inputs) // (inputs if group == -1 else group)
    if order == "act-order":
        group_of = np.random.default_rng(2).permutation(group_of)
    codes, zeros, scales = (
        integers(bits, outputs, inputs),
        integers(bits, groups, outputs),
        scales_of(groups, outputs),
    )
    expected = dense(codes, zeros, scales, group_of)
    made = GPTQLinear.from_integers(
        format,
        *(torch.from_numpy(each) for each in (codes, scales.T, zeros.T, group_of)),
        dtype=torch.float32,
    )
    assert torch.equal(made.dequantize(), torch.from_numpy(expected))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(made.dequantize(dtype), torch.from_numpy(expected).to(dtype))
    table = made.bytes_for_decoding(torch.bfloat16)
    assert (table is not None) == (bits < 8 and (order == "in a row" or groups == 1))
    if table is not None:
        torch.testing.assert_close(table.dense(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)
    again = format_of(made).read(made.tensors(), (outputs, inputs), None, torch.float32)
    assert torch.equal(again.dequantize(), torch.from_numpy(expected))
    for mine, other in zip(again.integers(), (codes, zeros.T)):
        assert torch.equal(mine, torch.from_numpy(other).int())


def format_of(layer: GPTQLinear) -> GPTQFormat:
    return from_config({**layer.format.config(), "sym": False})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_file_holds_zeros_less_one_on_whole_words(bits):
    zeros = integers(bits, 2, 64)  # with zeros that are 0, which borrow from the next
    layer = GPTQLinear.from_integers(
        GPTQFormat(bits=bits, group_size=32, sym=False),
        torch.from_numpy(integers(bits, 64, 64)),
        torch.ones(64, 2),
        torch.from_numpy(zeros.T),
    )
    ones = sum(1 << place for place in range(0, 32, bits))
    for row, stored in zip(zeros, layer.tensors()["qzeros"].numpy().astype(np.uint32)):
        plain = [word - ones & 0xFFFFFFFF for word in words_of(row, bits)]
        assert stored.tolist() == plain


def words_of(values, bits: int) -> list[int]:
    number = sum(int(value) << bits * place for place, value in enumerate(values))
    return [number >> place & 0xFFFFFFFF for place in range(0, bits * len(values), 32)]


@pytest.mark.parametrize("constants", ["AutoGPTQ", "GPTQModel"])
def test_both_dialects_of_symmetric_3_bit_zeros_are_read(constants):
    made = GPTQLinear.from_integers(
        GPTQFormat(bits=3, group_size=32), torch.from_numpy(integers(3, 64, 64)), torch.rand(64, 2)
    )
    tensors, settings = made.tensors(), made.format.config()
    assert settings["checkpoint_format"] == "gptq_v2"
    assert stream(tensors["qzeros"].numpy(), 3) == [4] * 128
    words = words_of([3] * 32, 3)
    if constants == "GPTQModel":
        taken = [0x24924924, 0x92492492, 0x49249249]
        words = [word - constant & 0xFFFFFFFF for word, constant in zip(words_of([4] * 32, 3), taken)]
    tensors["qzeros"] = torch.tensor([words * 2] * 2).to(torch.int32)
    read = from_config({**settings, "checkpoint_format": "gptq"}).read(tensors, (64, 64), None, torch.float32)
    assert torch.equal(read.dequantize(), made.dequantize())
    tensors["qzeros"] = tensors["qzeros"] + 8
    with pytest.raises(ValueError, match="^qzeros stands for the zeros .* instead of 4 alone"):
        from_config({**settings, "checkpoint_format": "gptq"}).read(tensors, (64, 64), None, torch.float32)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_that_contradict_a_symmetric_file_are_refused_at_every_width(bits, version):
    """checkpoint_format gptq holds them less one: with the other one's name all values are off by a step."""
    sizes, middle = (64, 64), 2 ** (bits - 1)
    made = GPTQLinear.from_integers(
        GPTQFormat(bits, 32, version=version), torch.from_numpy(integers(bits, *sizes)), torch.rand(64, 2)
    )
    plain = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": True,
        "checkpoint_format": version,
    }
    stored = middle - 1 if version == "gptq" else middle
    tensors = made.tensors() | {"qzeros": pack(torch.full((2, 64), stored), bits)}
    assert torch.equal(
        from_config(plain).read(tensors, sizes, None, torch.float32).dequantize(), made.dequantize()
    )
    for wrong in (middle if version == "gptq" else middle - 1, 0):
        qzeros = pack(torch.full((2, 64), stored), bits)
        qzeros[1, -1:] = pack(torch.full((1, 64), wrong), bits)[0, -1:]  # one word is enough
        for found in (qzeros, pack(torch.full((2, 64), wrong), bits)):
            with pytest.raises(UserError, match=rf"^qzeros stands for .* instead of {middle} alone.*sym"):
                from_config(plain).read(tensors | {"qzeros": found}, sizes, None, torch.float32)
            if bits != 3:  # without symmetry any zero is one
                from_config({**plain, "sym": False}).read(
                    tensors | {"qzeros": found}, sizes, None, torch.float32
                )
