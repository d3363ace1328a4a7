"""AWQ and AQLM layers: values against their formulas in numpy, from tensors packed value by value in
Python."""

import numpy as np
import pytest
import torch

from quant import from_config

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_words(values: np.ndarray) -> torch.Tensor:
    """values (rows, outputs) -> (rows, outputs / 8) int32, output by output."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for row, column in np.ndindex(words.shape):
        for place, output in enumerate(ORDER):
            words[row, column] |= np.uint32(values[row, 8 * column + output] << 4 * place)
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize("group", [-1, 16, 24, 200])
def test_awq_values_are_those_of_the_formula_and_go_back_into_the_file(group):
    outputs, inputs = 40, 48
    random = np.random.default_rng(0)
    group_of = np.arange(inputs) // (inputs if group == -1 else group)
    codes, zeros = (
        random.integers(0, 16, (inputs, outputs)),
        random.integers(0, 16, (group_of[-1] + 1, outputs)),
    )
    scales = random.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    expected = ((codes - zeros[group_of]).astype(np.float32) * scales.astype(np.float32)[group_of]).T
    tensors = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": torch.from_numpy(scales)}
    format = from_config(
        {"quant_method": "awq", "bits": 4, "group_size": group, "version": "GEMM", "zero_point": True}
    )
    layer = format.read(tensors, (outputs, inputs), None, torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), torch.from_numpy(expected))
    assert torch.equal(layer.dequantize(), torch.from_numpy(expected).bfloat16())
    again = layer.tensors()
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert from_config(layer.format.config()) == format


def test_more_awq_outputs_than_are_turned_at_a_time():
    codes = np.random.default_rng(1).integers(0, 16, (8, 1032))
    tensors = {
        "qweight": awq_words(codes),
        "qzeros": torch.zeros(1, 129, dtype=torch.int32),
        "scales": torch.ones(1, 1032, dtype=torch.float16),
    }
    layer = from_config({"quant_method": "awq", "group_size": -1}).read(
        tensors, (1032, 8), None, torch.float32
    )
    assert torch.equal(layer.dequantize(), torch.from_numpy(codes.T).float())
    assert torch.equal(layer.tensors()["qweight"], tensors["qweight"])


def aqlm_settings(codebooks: int, bits: int, out_group: int, in_group: int) -> dict:
    sizes = {"out_group_size": out_group, "in_group_size": in_group}
    return {"quant_method": "aqlm", "num_codebooks": codebooks, "nbits_per_codebook": bits, **sizes}


@pytest.mark.parametrize(
    "codebooks, bits, out_group, in_group", [(1, 16, 1, 8), (2, 8, 1, 8), (3, 11, 4, 2), (1, 5, 2, 3)]
)
def test_aqlm_values_are_sums_of_codebook_vectors(codebooks, bits, out_group, in_group):
    outputs, inputs = 4 * 7, 24 * 5
    random = np.random.default_rng(0)
    numbers = random.integers(0, 2**bits, (outputs // out_group, inputs // in_group, codebooks))
    numbers[0, 0, 0], numbers[0, 1, 0] = 2**bits - 1, 0
    books = random.normal(size=(codebooks, 2**bits, out_group, in_group)).astype(np.float16)
    scales = random.uniform(0.5, 2, (outputs // out_group, 1, 1, 1)).astype(np.float16)
    expected = np.zeros((outputs, inputs), np.float32)
    for row, column in np.ndindex(numbers.shape[:2]):
        vector = sum(books[c, numbers[row, column, c]].astype(np.float32) for c in range(codebooks))
        place = (
            slice(row * out_group, (row + 1) * out_group),
            slice(column * in_group, (column + 1) * in_group),
        )
        expected[place] = vector * scales[row, 0, 0, 0].astype(np.float32)
    signed = np.where(numbers >= 2 ** (bits - 1), numbers - 2**bits, numbers)
    tensors = {
        "codes": torch.from_numpy(signed).to(torch.int8 if bits <= 8 else torch.int16),
        "codebooks": torch.from_numpy(books),
        "scales": torch.from_numpy(scales),
    }
    format = from_config(aqlm_settings(codebooks, bits, out_group, in_group))
    layer = format.read(tensors, (outputs, inputs), None, torch.float32)
    torch.testing.assert_close(layer.dequantize(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(layer.tensors()[name], tensors[name]) for name in tensors)
    assert from_config(format.config()) == format


@pytest.mark.parametrize("codebooks, bits", [(1, 16), (2, 8)])
def test_aqlm_values_are_those_of_the_vendor(codebooks, bits):
    utils = pytest.importorskip("aqlm.utils", reason="pip install --no-deps aqlm")
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2**bits, (40, 9, codebooks), generator=generator)
    tensors = {
        "codes": utils.pack_int_data(numbers.clone(), bits),
        "codebooks": torch.randn(codebooks, 2**bits, 1, 8, generator=generator).half(),
        "scales": torch.rand(40, 1, 1, 1, generator=generator).half(),
    }
    layer = from_config(aqlm_settings(codebooks, bits, 1, 8)).read(tensors, (40, 72), None, torch.float32)
    theirs = utils._dequantize_weight(
        utils.unpack_int_data(tensors["codes"], bits), tensors["codebooks"].float(), tensors["scales"].float()
    )
    torch.testing.assert_close(layer.dequantize(), theirs, rtol=1e-6, atol=1e-6)
