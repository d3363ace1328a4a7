"""AWQ checkpoints of 4 bits in the GEMM layout.  Lin et al., arXiv 2306.00978.

w = scale[group] * (q - zero[group]), a group being `group_size` inputs in a row (-1: all). In a file qweight
(in, out / 8), qzeros (groups, out / 8) int32 and scales (groups, out) fp16: eight outputs a word, in the
order 0 2 4 6 1 3 5 7 from the lowest four bits on. Here codes are packed along the inputs instead
(quant/grouped.py), so that a row of the weight is written at a time; a checkpoint gets them back in its own
order.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from options.errors import UserError
from quant.grouped import GroupedLinear, pack, unpack
from quant.linear import Format, refuse_others, take, take_finite

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs stands in a word's first, second, ... four bits
PLACES = tuple(ORDER.index(output) for output in range(8))  # the other way
OUTPUTS = 512  # how many are turned at a time while a file is read or written


@dataclass(frozen=True)
class AWQFormat(Format):
    method: ClassVar[str] = "awq"
    marker: ClassVar[str] = "qweight"
    bits: ClassVar[int] = 4
    group_size: int = 128

    def __post_init__(self):
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size: {self.group_size} is neither -1 nor above 0")

    def read(self, tensors, shape, bias, dtype) -> "AWQLinear":
        outputs, inputs = shape
        refuse_others(tensors, ("qweight", "qzeros", "scales"))
        if inputs % 8 or outputs % 8:
            raise UserError(f"qweight: 4-bit codes of {outputs} x {inputs} weights do not fill 32-bit words")
        groups = 1 if self.group_size == -1 else math.ceil(inputs / self.group_size)
        words = take(tensors, "qweight", (inputs, outputs // 8), [torch.int32])
        zeros = take(tensors, "qzeros", (groups, outputs // 8), [torch.int32])
        scales = take_finite(tensors, "scales", (groups, outputs))
        codes = torch.empty(outputs, inputs // 8, dtype=torch.int32, device=words.device)
        for start in range(0, outputs, OUTPUTS):
            values = _reordered(
                unpack(words[:, start // 8 : (start + OUTPUTS) // 8], 4), PLACES
            )  # (in, some of out)
            codes[start : start + OUTPUTS] = pack(values.T, 4)
        zeros = pack(_reordered(unpack(zeros, 4), PLACES), 4)
        return AWQLinear(self, codes, zeros, scales.clone(), None, bias, dtype)

    def config(self) -> dict:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }

    def describe(self) -> str:
        return f"AWQ 4 bits, group {'of all' if self.group_size == -1 else self.group_size}"


class AWQLinear(GroupedLinear):
    def tensors(self) -> dict[str, Tensor]:
        words = torch.empty(self.in_features, self.out_features // 8, dtype=torch.int32, device=self.device)
        for start in range(0, self.out_features, OUTPUTS):
            values = unpack(self.codes[start : start + OUTPUTS], 4).T  # (in, some of out)
            words[:, start // 8 : (start + OUTPUTS) // 8] = pack(_reordered(values, ORDER), 4)
        zeros = pack(_reordered(unpack(self.zeros, 4), ORDER), 4)
        return {"qweight": words, "qzeros": zeros, "scales": self.scales}


def _reordered(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Every eight values along the last dimension in this order."""
    return values.unflatten(-1, (-1, 8))[..., list(order)].flatten(-2)


def from_config(settings: dict) -> AWQFormat:
    """The format of a checkpoint's quantization_config. Raises UserError starting with the key."""
    wanted = {"bits": 4, "version": "gemm", "zero_point": True}
    found = {
        "bits": settings.get("bits", settings.get("w_bit", 4)),
        "version": str(settings.get("version") or settings.get("format") or "gemm").lower(),
        "zero_point": settings.get("zero_point", True),
    }
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(f"{key}: {found[key]!r} is not read, {value!r} is")
    return AWQFormat(settings.get("group_size", settings.get("q_group_size", 128)))
