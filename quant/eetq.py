"""EETQ: 8-bit weights with one scale per output row (int8.py), activations as they are.

Files hold weight, in the order in which EETQ's CUDA kernel reads it, and weight_scales (absmax / 127, fp16).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from options.errors import UserError
from quant.int8 import LEVELS, Int8Linear, positive, quantise_rows
from quant.linear import Format, refuse_others, take

BITS = (8,)
TILE = 64  # inputs that EETQ's kernel reads of one output before it turns to its neighbour
EETQ_INPUTS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)  # their order in each group of 16


@dataclass(frozen=True)
class EETQFormat(Format):
    method: ClassVar[str] = "eetq"
    marker: ClassVar[str] = "weight_scales"
    by_rows: ClassVar[bool] = True
    threshold: ClassVar[None] = None  # no activation goes through in int8

    def quantise(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "Int8Linear":
        found = quantise_rows(weight, scale_dtype=torch.float16)
        return Int8Linear(self, tuple(weight.shape), bias, dtype, **found)

    def read(self, tensors, shape, bias, dtype) -> "Int8Linear":
        outputs, inputs = shape
        order = take(tensors, "weight", (inputs, outputs), torch.int8)
        scales = take(tensors, "weight_scales", (outputs,), torch.float16, torch.float32)
        refuse_others(tensors, ("weight", "weight_scales"))
        if inputs % TILE or outputs % 2:
            raise UserError(f"weight has {inputs} inputs, {outputs} outputs; EETQ: multiples of {TILE} and 2")
        absmax = positive("weight_scales", scales.float() * LEVELS)
        return Int8Linear(self, shape, bias, dtype, codes=from_eetq_order(order), absmax=absmax)

    def parts(self, layer: "Int8Linear") -> dict[str, Tensor]:
        outputs, inputs = layer.codes.shape
        if inputs % TILE or outputs % 2:
            raise UserError(
                f"a linear with {inputs} inputs and {outputs} outputs does not fit EETQ's layout (multiples "
                f"of {TILE} and 2); save it with quantization_method=bitsandbytes"
            )
        scales = (layer.absmax / LEVELS).to(torch.float16)
        return {"weight": to_eetq_order(layer.codes), "weight_scales": scales}

    def config(self) -> dict:
        return {"quant_method": "eetq", "weights": "int8"}

    def describe(self) -> str:
        return "int8, weights only"


def in_bits(bits: int, options) -> EETQFormat:
    return EETQFormat()


def from_config(settings: dict) -> EETQFormat:
    """The format of a checkpoint's quantization_config."""
    return EETQFormat()


def to_eetq_order(codes: Tensor) -> Tensor:
    """codes (out, in) int8 -> (in, out) int8 as EETQ's CUDA kernel reads them.

    The order of FasterTransformer's mixed products for sm_75 and later: inputs permuted within groups of 16,
    outputs in pairs that take turns every 64 inputs, codes plus 128, the middle two of four bytes exchanged.
    """
    outputs, inputs = codes.shape
    order = torch.tensor(EETQ_INPUTS)
    turned = codes.reshape(outputs, inputs // 16, 16)[:, :, order]
    pairs = turned.reshape(outputs // 2, 2, inputs // TILE, TILE).transpose(1, 2)
    fours = pairs.reshape(-1, 4)[:, [0, 2, 1, 3]]
    return (fours.view(torch.uint8) ^ 128).view(torch.int8).view(inputs, outputs)


def from_eetq_order(order: Tensor) -> Tensor:
    """The inverse of to_eetq_order: (in, out) -> (out, in)."""
    inputs, outputs = order.shape
    fours = (order.contiguous().view(torch.uint8) ^ 128).view(torch.int8).view(-1, 4)[:, [0, 2, 1, 3]]
    pairs = fours.reshape(outputs // 2, inputs // TILE, 2, TILE).transpose(1, 2)
    turned = pairs.reshape(outputs, inputs // 16, 16)
    codes = torch.empty_like(turned)
    codes[:, :, torch.tensor(EETQ_INPUTS)] = turned
    return codes.view(outputs, inputs)
