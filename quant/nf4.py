"""NF4 and FP4: blocks of 64 weights as 4-bit codes of a table and one scale.  Dettmers et al., arXiv 2305.14314.

w = table[code] * absmax[block], blocks along the flattened weight, two codes a byte with the first weight in the high
four bits. Double quantisation (sec. 3): the scales, less their mean, in 8 bits of a dynamic table with one fp32 scale
per 256. Codes, scales and values are bit-equal to bitsandbytes', whose checkpoint layout is read and written.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.linear import Format, QuantLinear

BLOCK = 64
TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip


@dataclass(frozen=True)
class NF4Format(Format):
    method: ClassVar[str] = "bitsandbytes"
    marker: ClassVar[str] = "weight.absmax"
    table: str = "nf4"
    double: bool = True

    def quantise(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "NF4Linear":
        codes, absmax = quantize_4bit(weight, self.table)
        return NF4Linear(self, tuple(weight.shape), codes, absmax, bias, dtype)

    def describe(self) -> str:
        return f"{self.table}{', double quantisation' if self.double else ''}"


class NF4Linear(QuantLinear):
    """codes (out * in / 2,) uint8; absmax (blocks,) fp32."""

    def __init__(self, format: NF4Format, shape, codes: Tensor, absmax: Tensor, bias, dtype):
        super().__init__(*shape, bias, dtype)
        self.format = format
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def fill(self, out: Tensor) -> None:
        table = torch.tensor(TABLES[self.format.table], device=out.device)
        pairs = torch.stack((self.codes >> 4, self.codes & 15), dim=1).flatten()  # the first weight is the high half
        values = table[pairs.int()].view(-1, BLOCK) * self.absmax[:, None]
        out.copy_(values.view(-1)[: out.numel()].view_as(out))


def quantize_4bit(weight: Tensor, table: str) -> tuple[Tensor, Tensor]:
    """weight -> codes (ceil(numel / 2),) uint8 and absmax (blocks,) fp32; the nearest table entry."""
    flat = weight.float().flatten()
    missing = -flat.numel() % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).flatten()
    levels, order = torch.tensor(TABLES[table], device=flat.device).sort()
    nearest = order[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)].to(torch.uint8)
    return (nearest[0::2] << 4) | nearest[1::2], absmax
