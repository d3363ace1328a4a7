"""Tiny checkpoints in the formats of GPTQ, AWQ, AQLM and HQQ, written with numpy from the formulas of each,
and the same weights in 32 bit beside them.

    quantised, twin = write_pair(tiny, "gptq", "gptq")          # two model folders
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import TinyRuns

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "attention_bias": True,
}


def words_of(values, bits: int) -> list[int]:
    """Values as one little-endian stream of bits, cut into 32-bit words."""
    number = sum(int(value) << bits * place for place, value in enumerate(values))
    return [number >> place & 0xFFFFFFFF for place in range(0, bits * len(values), 32)]


def packed(values: np.ndarray, bits: int) -> torch.Tensor:
    """(rows, n) -> int32 (rows, n * bits / 32)."""
    return torch.from_numpy(np.array([words_of(row, bits) for row in values], np.uint32).view(np.int32))


def awq_words(values: np.ndarray) -> torch.Tensor:
    """values (rows, outputs) -> (rows, outputs / 8) int32, output by output."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for row, column in np.ndindex(words.shape):
        for place, output in enumerate(AWQ_ORDER):
            words[row, column] |= np.uint32(values[row, 8 * column + output] << 4 * place)
    return torch.from_numpy(words.view(np.int32))


def scales_of(random, bits: int, *shape: int) -> np.ndarray:
    """Such that weights are about as large as a tiny model's."""
    return (random.uniform(0.5, 1, shape) * 0.3 / 2**bits).astype(np.float16)


def gptq_layer(
    random, outputs: int, inputs: int, bits: int = 4, group: int = 16, order: bool = False, first: int = 1
):
    """first: what a file's zeros are less than the zeros; 1 is checkpoint_format gptq, 0 gptq_v2."""
    group_of = np.arange(inputs) // group
    if order:
        group_of = random.permutation(group_of)
    codes, groups = random.integers(0, 2**bits, (inputs, outputs)), group_of.max() + 1
    zeros, scales = random.integers(1, 2**bits, (groups, outputs)), scales_of(random, bits, groups, outputs)
    tensors = {
        "qweight": packed(codes.T, bits).T.contiguous(),
        "qzeros": packed(zeros - first, bits),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return tensors, ((codes - zeros[group_of]).astype(np.float32) * scales.astype(np.float32)[group_of]).T


def awq_layer(random, outputs: int, inputs: int, group: int = 16):
    group_of = np.arange(inputs) // group
    codes, zeros = (
        random.integers(0, 16, (inputs, outputs)),
        random.integers(0, 16, (inputs // group, outputs)),
    )
    scales = scales_of(random, 4, *zeros.shape)
    tensors = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": torch.from_numpy(scales)}
    return tensors, ((codes - zeros[group_of]).astype(np.float32) * scales.astype(np.float32)[group_of]).T


def aqlm_layer(random, outputs: int, inputs: int, books: int = 2, bits: int = 8):
    numbers = random.integers(0, 2**bits, (outputs, inputs // 8, books))
    vectors = (0.1 * random.normal(size=(books, 2**bits, 1, 8))).astype(np.float16)
    scales = random.uniform(0.5, 2, (outputs, 1, 1, 1)).astype(np.float16)
    weight = sum(vectors[book, numbers[..., book], 0].astype(np.float32) for book in range(books))
    signed = np.where(numbers >= 2 ** (bits - 1), numbers - 2**bits, numbers)
    tensors = {
        "codes": torch.from_numpy(signed.astype(np.int8 if bits <= 8 else np.int16)),
        "codebooks": torch.from_numpy(vectors),
        "scales": torch.from_numpy(scales),
    }
    return tensors, (weight * scales[:, 0].astype(np.float32)).reshape(outputs, inputs)


def hqq_layer(random, outputs: int, inputs: int, group: int = 16):
    """4 bits, axis 1."""
    codes = random.integers(0, 16, (outputs * inputs // group, group))
    scales, zeros = (
        scales_of(random, 4, len(codes), 1),
        random.uniform(0, 15, (len(codes), 1)).astype(np.float16),
    )
    high, low = np.split(codes.astype(np.uint8), 2)
    tensors = {"W_q": high << 4 | low, "scale": scales, "zero": zeros}
    weight = (codes.astype(np.float32) - zeros) * scales
    return {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, weight.reshape(
        outputs, inputs
    )


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
HQQ_WEIGHTS = {
    "nbits": 4,
    "group_size": 16,
    "axis": 1,
    "channel_wise": True,
    "optimize": True,
    "round_zero": True,
}
AQLM = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1}
FORMATS = {  # name: (what makes a layer, its settings, quantization_config)
    "gptq": (gptq_layer, {}, GPTQ),
    "gptq act-order": (gptq_layer, {"order": True}, GPTQ | {"desc_act": True}),
    "gptq 3 bits": (gptq_layer, {"bits": 3, "first": 0}, GPTQ | {"bits": 3, "checkpoint_format": "gptq_v2"}),
    "gptq 2 bits": (gptq_layer, {"bits": 2}, GPTQ | {"bits": 2}),
    "gptq 8 bits": (gptq_layer, {"bits": 8, "group": 200}, GPTQ | {"bits": 8, "group_size": -1}),
    "awq": (
        awq_layer,
        {},
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
    ),
    "aqlm 2x8": (aqlm_layer, {}, AQLM | {"num_codebooks": 2, "nbits_per_codebook": 8}),
    "aqlm 1x12": (
        aqlm_layer,
        {"books": 1, "bits": 12},
        AQLM | {"num_codebooks": 1, "nbits_per_codebook": 12},
    ),
    "hqq": (hqq_layer, {}, {"quant_method": "hqq", "quant_config": {"weight_quant_params": HQQ_WEIGHTS}}),
}


def write_pair(tiny: TinyRuns, name: str) -> tuple[Path, Path]:
    """(folder of the quantised model, folder of its twin in fp32); random codes, all else as in a random
    model."""
    make, options, settings = FORMATS[name]
    twin = tiny.make_model(f"{name} twin", seed=4, **SIZES)
    folder = tiny.make_model(f"{name} quantised", seed=4, **SIZES)
    random = np.random.default_rng(6)
    dense = load_file(twin / "model.safetensors")
    tensors = {}
    for place, weight in dense.items():
        if place.endswith("proj.bias"):
            dense[place] = torch.from_numpy(random.normal(size=len(weight)).astype(np.float32))
        if not place.endswith("proj.weight"):
            tensors[place] = dense[place]
            continue
        parts, values = make(random, *weight.shape, **options)
        tensors |= {place.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        dense[place] = torch.from_numpy(np.ascontiguousarray(values))
    save_file(dense, twin / "model.safetensors", {"format": "pt"})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, twin
