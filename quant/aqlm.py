"""AQLM checkpoints: groups of weights are sums of codebook vectors.  Egiazarian et al., arXiv 2401.06118.

w[output group, input group] = scale[output group] * sum over codebooks c of codebook[c, code[c]], where a
vector has out_group_size x in_group_size (1 x 8 as a rule) numbers. In a file codes (out / og, in / ig,
codebooks), int8 or int16 that mean unsigned numbers; codebooks (codebooks, 2^bits, og, ig); scales (out / og,
1, 1, 1). Usual are 1 codebook of 16 bits and 2 of 8, both 2 bits a weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from options.errors import UserError, refuse
from quant.linear import FLOATS, Format, QuantLinear, picked, refuse_others, row_chunks, take


@dataclass(frozen=True)
class AQLMFormat(Format):
    """code_bits: of the number of a vector within its codebook."""

    method: ClassVar[str] = "aqlm"
    marker: ClassVar[str] = "codes"
    codebooks: int = 1
    code_bits: int = 16
    in_group: int = 8
    out_group: int = 1

    def __post_init__(self):
        refuse(not 1 <= self.code_bits <= 16, f"nbits_per_codebook: {self.code_bits} is not from 1 to 16")
        for key in ("num_codebooks", "in_group_size", "out_group_size"):
            if self.config()[key] < 1:
                raise UserError(f"{key}: {self.config()[key]} is not at least 1")

    def read(self, tensors, shape, bias, dtype) -> "AQLMLinear":
        (outputs, inputs), bits = shape, self.code_bits
        refuse_others(tensors, ("codes", "codebooks", "scales"))
        if outputs % self.out_group or inputs % self.in_group:
            vector = f"{self.out_group} x {self.in_group}"
            raise UserError(f"codes: {outputs} x {inputs} weights do not divide into vectors of {vector}")
        shape = (outputs // self.out_group, inputs // self.in_group, self.codebooks)
        codes = take(tensors, "codes", shape, torch.int8 if bits <= 8 else torch.int16)
        vectors = (self.codebooks, 2**bits, self.out_group, self.in_group)
        books = take(tensors, "codebooks", vectors, *FLOATS)
        scales = take(tensors, "scales", (shape[0], 1, 1, 1), *FLOATS)
        low, high = int(codes.min()), int(codes.max())
        if low < -(2 ** (bits - 1)) or high >= 2**bits:
            raise UserError(f"codes holds {low} to {high}, more than the {bits} bits of config.json")
        return AQLMLinear(self, (outputs, inputs), bias, dtype, codes=codes, codebooks=books, scales=scales)

    def config(self) -> dict:
        return {
            "quant_method": "aqlm",
            "num_codebooks": self.codebooks,
            "nbits_per_codebook": self.code_bits,
            "in_group_size": self.in_group,
            "out_group_size": self.out_group,
        }

    def config_for(self, dtype: torch.dtype, dense: list[str] = (), coded: list[str] = ()) -> dict:
        # transformers 5 compares these with names of modules, all before it with names of weights
        weights = [f"{name}.weight" for name in ("model.embed_tokens", *dense)]
        return self.config() | {"linear_weights_not_to_quantize": [*picked(dense, coded), *weights]}

    def describe(self) -> str:
        return f"AQLM {self.codebooks}x{self.code_bits}, vectors of {self.out_group} x {self.in_group}"


class AQLMLinear(QuantLinear):
    """Its buffers are a file's tensors, codes, codebooks and scales, in the shapes of this page's head."""

    def fill(self, out: Tensor) -> None:
        count, size, *vector = self.codebooks.shape
        table = self.codebooks.float().view(count * size, -1)
        first = torch.arange(0, count * size, size, dtype=torch.int32, device=out.device)  # of every codebook
        grouped = out.view(-1, vector[0] * out.shape[1])  # (out / og, og * in)
        for rows in row_chunks(grouped):
            # a file holds the upper half of the numbers as negative ones
            codes = self.codes[rows].int().bitwise_and_(2**self.format.code_bits - 1) + first
            values = F.embedding_bag(codes.flatten(0, 1), table, mode="sum")
            values = values.view(codes.shape[0], codes.shape[1], *vector).mul_(self.scales[rows].float())
            grouped[rows] = values.transpose(1, 2).reshape(codes.shape[0], -1)  # (rows, og, in / ig, ig)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "codebooks": self.codebooks, "scales": self.scales}


def from_config(settings: dict) -> AQLMFormat:
    """The format of a checkpoint's quantization_config. Raises UserError starting with the key."""
    return AQLMFormat(
        codebooks=settings.get("num_codebooks", 1),
        code_bits=settings.get("nbits_per_codebook", 16),
        in_group=settings.get("in_group_size", 8),
        out_group=settings.get("out_group_size", 1),
    )
