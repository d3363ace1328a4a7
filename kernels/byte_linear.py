"""y = x W^T for one row on a CPU, W in one byte a weight: the product of decoding from quantised weights.

    W[o, i] = (codes[i, o] - zero) * scales[i // group, o]        group = in / groups inputs

The sums over a group, sum_i x[i] * (codes[i, o] - zero), are an embedding bag over rows of bytes (fbgemm's,
whose rows end with a scale and an offset of their own: here 1 and -zero), one bag for each group or each
thread's share. It reads a byte a weight at the speed of memory, as kernels/linear.matvec_by_rows reads two or
four. Measured on two cores (576 x 3072, thirty such tables in turn): 65 us, against 126 in bf16, 222 in fp32
and 111 by torch._weight_int8pack_mm; the same bag over 4-bit codes takes 105, since it unpacks them one by
one. Sums are fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear import shares_of_rows


class Bytes(NamedTuple):
    """A weight (out, in) as the formula above has it."""

    codes: Tensor  # (in, out) uint8
    zero: float
    scales: Tensor  # (groups, out) fp32

    def dense(self) -> Tensor:
        """(out, in) fp32."""
        group = self.codes.shape[0] // self.scales.shape[0]
        return ((self.codes.float() - self.zero) * self.scales.repeat_interleave(group, 0)).T


class ByteTable:
    """Weights with one input, side by side, as the bag reads them. ValueError if zeros or groups differ."""

    def __init__(self, parts: list[Bytes]):
        self.zero = parts[0].zero
        if any(part.zero != self.zero or part.scales.shape[0] != parts[0].scales.shape[0] for part in parts):
            raise ValueError("weights with different zeros or groups cannot stand in one table")
        self.scales = torch.cat([part.scales for part in parts], dim=1).contiguous()  # (groups, out)
        inputs = parts[0].codes.shape[0]
        tail = torch.tensor([1.0, -self.zero]).view(torch.uint8).expand(inputs, -1)
        self.table = torch.cat([*(part.codes for part in parts), tail], dim=1)  # (in, out + 8)
        groups = self.scales.shape[0]
        bags = groups if groups > 1 else min(torch.get_num_threads(), inputs)
        self.rows, self.starts = shares_of_rows(inputs, bags)

    def __call__(self, x: Tensor) -> Tensor:
        """x (1, in) -> (1, out) fp32."""
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.table, self.rows, self.starts, False, 0, False, x[0].float(), None, False
        )  # (bags, out)
        if self.scales.shape[0] == 1:
            return sums.sum(0, keepdim=True).mul_(self.scales)
        return sums.mul_(self.scales).sum(0, keepdim=True)


def byte_linear_reference(x: Tensor, parts: list[Bytes]) -> Tensor:
    """x (in,) fp32 through the weights side by side -> (sum of out,) fp32."""
    return torch.cat([part.dense() for part in parts]) @ x
