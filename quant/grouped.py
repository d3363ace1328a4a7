"""What GPTQ and AWQ share: whole numbers packed along the inputs, one scale and zero for a group of inputs.

w = scale[group] * (q - zero[group]). A checkpoint's own order of the bits is undone by the format's file.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.byte_linear import Bytes
from options.errors import UserError
from quant.linear import FLOATS, Format, QuantLinear, row_chunks, take

MIN_GROUP = 32  # with smaller ones the sums of groups are a good part of the weights' bytes


@dataclass(frozen=True)
class GroupedFormat(Format):
    """bits: of a whole number.  group_size: inputs that share a scale and a zero, -1 = all."""

    bits: int = 4
    group_size: int = 128

    def __post_init__(self):
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size: {self.group_size} is neither -1 nor above 0")

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else math.ceil(in_features / self.group_size)

    def _take(self, tensors, shape, words: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """qweight in the shape `words`, qzeros and scales of a file, for a weight of this shape (out, in)."""
        (outputs, inputs), bits = shape, self.bits
        if inputs * bits % 32 or outputs * bits % 32:
            raise UserError(f"qweight: {outputs} x {inputs} codes of {bits} bits do not fill 32-bit words")
        codes = take(tensors, "qweight", words, torch.int32)
        zeros = take(tensors, "qzeros", (self.groups(inputs), outputs * bits // 32), torch.int32)
        return codes, zeros, take(tensors, "scales", (self.groups(inputs), outputs), *FLOATS)

    def describe(self) -> str:
        size = "of all" if self.group_size == -1 else self.group_size
        return f"{self.method.upper()} {self.bits} bits, group {size}"


class GroupedLinear(QuantLinear):
    """codes (out, in * bits / 32) int32, packed along the inputs; zeros (groups, out * bits / 32) int32,
    packed along the outputs, as they are; scales (groups, out); group_of (in,) int32, or None for groups of
    inputs in a row."""

    def __init__(self, format: GroupedFormat, codes, zeros, scales, group_of, bias, dtype):
        shape = codes.shape[0], codes.shape[1] * 32 // format.bits
        super().__init__(format, shape, bias, dtype, codes=codes, zeros=zeros, scales=scales)
        if group_of is not None and torch.equal(group_of, self.groups_in_a_row(group_of.device)):
            group_of = None
        self.register_buffer("group_of", group_of)

    def groups_in_a_row(self, device: torch.device) -> Tensor:
        """(in,) int32: the group of each input where nothing was sorted."""
        size = self.in_features if self.format.group_size == -1 else self.format.group_size
        return torch.arange(self.in_features, dtype=torch.int32, device=device) // size

    def bytes_for_decoding(self, dtype: torch.dtype) -> Bytes | None:
        bits, groups = self.format.bits, self.scales.shape[0]
        zeros = unpack(self.zeros, bits).T  # (out, groups)
        same = bool((zeros == zeros[0, 0]).all())  # else q - zero of 8 bits does not fit a byte
        if self.group_of is not None or self.in_features % groups or self.in_features < MIN_GROUP * groups:
            return None
        if bits == 8 and not same:
            return None
        codes, zero = unpack(self.codes, bits), float(zeros[0, 0])  # (out, in)
        if not same:
            codes, zero = codes.unflatten(1, (groups, -1)).sub_(zeros[:, :, None]).add_(128).flatten(1), 128.0
        return Bytes(codes.to(torch.uint8).T, zero, self.scales.float())

    def fill(self, out: Tensor) -> None:
        bits, group = self.format.bits, self.format.group_size
        scales, zeros = self.scales.T.float(), unpack(self.zeros, bits).T.float()  # (out, groups)
        in_a_row = self.group_of is None and (group == -1 or self.in_features % group == 0)
        group_of = self.groups_in_a_row(out.device) if self.group_of is None else self.group_of
        for rows in row_chunks(out):
            values = unpack(self.codes[rows], bits).float()  # (rows, in)
            zero, scale = zeros[rows], scales[rows]  # (rows, groups)
            if in_a_row:
                values = values.unflatten(1, (scales.shape[1], -1))
                values.sub_(zero[:, :, None]).mul_(scale[:, :, None])
            else:
                values.sub_(zero.index_select(1, group_of)).mul_(scale.index_select(1, group_of))
            out[rows] = values.view(-1, self.in_features)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 words (..., n * bits / 32) -> the n values in each row (..., n) int32."""
    width = 32
    if bits == 3:  # 8 values in three bytes, which is the same stream of bits
        three = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 3)).int()
        words, width = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16, 24
    shifts = torch.arange(0, width, bits, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts).bitwise_and_(2**bits - 1).flatten(-2)


def pack(values: Tensor, bits: int) -> Tensor:
    """Whole numbers (..., n) from 0 to 2^bits - 1 -> int32 words (..., n * bits / 32)."""
    width = 24 if bits == 3 else 32
    parts = values.unflatten(-1, (-1, width // bits)).unbind(-1)
    words = parts[0].int()
    for place, part in enumerate(parts[1:], 1):
        words |= part.int() << bits * place
    if bits == 3:
        words = torch.stack([words >> place & 255 for place in (0, 8, 16)], dim=-1).to(torch.uint8)
        return words.flatten(-2).view(torch.int32)
    return words
