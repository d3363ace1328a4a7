"""AWQ checkpoints of 4 bits in the GEMM layout.  Lin et al., arXiv 2306.00978.

w = scale[group] * (q - zero[group]), a group being `group_size` inputs in a row (-1: all). In a file qweight
(in, out / 8), qzeros (groups, out / 8) int32 and scales (groups, out) fp16: eight outputs a word, in the
order 0 2 4 6 1 3 5 7 from the lowest four bits on. Here codes are packed along the inputs instead
(quant/grouped.py), so that a row of the weight is written at a time; a checkpoint gets its own order back.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from options.errors import UserError
from quant.grouped import GroupedFormat, GroupedLinear, pack, unpack
from quant.linear import refuse_others

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs stands in a word's first, second, ... four bits
PLACES = tuple(ORDER.index(output) for output in range(8))  # the other way
OUTPUTS = 512  # how many are turned at a time while a file is read or written


@dataclass(frozen=True)
class AWQFormat(GroupedFormat):
    method: ClassVar[str] = "awq"
    marker: ClassVar[str] = "qweight"

    def read(self, tensors, shape, bias, dtype) -> "AWQLinear":
        outputs, inputs = shape
        refuse_others(tensors, ("qweight", "qzeros", "scales"))
        words, zeros, scales = self._take(tensors, shape, (inputs, outputs // 8))
        codes = torch.empty(outputs, inputs // 8, dtype=torch.int32, device=words.device)
        for start in range(0, outputs, OUTPUTS):
            values = unpack(words[:, start // 8 : (start + OUTPUTS) // 8], 4)  # (in, some of out)
            codes[start : start + OUTPUTS] = pack(_reordered(values, PLACES).T, 4)
        zeros = pack(_reordered(unpack(zeros, 4), PLACES), 4)
        return AWQLinear(self, codes, zeros, scales, None, bias, dtype)

    def config(self) -> dict:
        settings = {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": True}
        return settings | {"version": "gemm"}


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
    return AWQFormat(group_size=settings.get("group_size", settings.get("q_group_size", 128)))
