"""GPTQ checkpoints of 2, 3, 4 and 8 bits: groups of inputs with a scale and a zero.  Frantar et al., arXiv
2210.17323.

w = scale[group] * (q - zero[group]), a group being `group_size` inputs in a row (-1: all), or those that
g_idx puts together where the inputs were sorted (act-order). In a file the codes are packed along the inputs
into int32 words, qweight (in * bits / 32, out), the zeros along the outputs, qzeros (groups, out * bits /
32), both as one stream of bits from the lowest bit of the first word on: at 3 bits values cross from word to
word.

checkpoint_format gptq holds every zero less one, gptq_v2 as it is. The subtraction is one of whole words, so
that the zero 0 borrows from its neighbour; adding again to whole words undoes it. At 3 bits there are two
dialects of the former: AutoGPTQ takes one from each zero; GPTQModel, which transformers loads with, has the
constants of the words in another order, which is no subtraction of ones. What is written at 3 bits is
therefore gptq_v2.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from options.errors import UserError
from quant.grouped import GroupedLinear, pack, unpack
from quant.linear import Format, refuse_others, take, take_finite

BITS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # bits: the word whose values are all 1
SWAPPED = (0x24924924, 0x92492492, 0x49249249)  # what GPTQModel takes from every three words of 3-bit zeros


@dataclass(frozen=True)
class GPTQFormat(Format):
    """swapped: a 3-bit checkpoint_format gptq of GPTQModel without symmetry (files with it show it
    themselves)."""

    method: ClassVar[str] = "gptq"
    marker: ClassVar[str] = "qweight"
    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    version: str = "gptq"
    swapped: bool = False

    def __post_init__(self):
        if self.bits not in BITS:
            raise UserError(f"bits: {self.bits}; GPTQ has 2, 3, 4 and 8")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size: {self.group_size} is neither -1 nor above 0")
        if self.version not in ("gptq", "gptq_v2"):
            raise UserError(f"checkpoint_format: {self.version!r} is not read; gptq and gptq_v2 are")

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else math.ceil(in_features / self.group_size)

    def read(self, tensors, shape, bias, dtype) -> "GPTQLinear":
        outputs, inputs = shape
        refuse_others(tensors, ("qweight", "qzeros", "scales", "g_idx"))
        if inputs * self.bits % 32 or outputs * self.bits % 32:
            raise UserError(
                f"qweight: {self.bits}-bit codes of {outputs} x {inputs} weights do not fill 32-bit words"
            )
        groups = self.groups(inputs)
        codes = take(tensors, "qweight", (inputs * self.bits // 32, outputs), [torch.int32])
        zeros = take(tensors, "qzeros", (groups, outputs * self.bits // 32), [torch.int32])
        scales = take_finite(tensors, "scales", (groups, outputs))
        group_of = None
        if "g_idx" in tensors:
            group_of = take(tensors, "g_idx", (inputs,), [torch.int32, torch.int64]).int()
            low, high = int(group_of.min()), int(group_of.max())
            if low < 0 or high >= groups:
                raise UserError(f"g_idx names groups {low} to {high}; config.json asks for 0 to {groups - 1}")
        elif self.desc_act and groups > 1:
            raise UserError(
                "g_idx is missing, which says the order of inputs (desc_act); fetch the checkpoint again"
            )
        if self.version == "gptq":
            zeros = self._plain_zeros(zeros)
        return GPTQLinear(self, codes.T.contiguous(), zeros.clone(), scales.clone(), group_of, bias, dtype)

    def _plain_zeros(self, stored: Tensor) -> Tensor:
        """Packed zeros as they are, from those of checkpoint_format gptq."""
        if self.bits != 3:
            return _add_words(stored, [ONES[self.bits]])
        one_by_one = pack(unpack(stored, 3) + 1 & 7, 3)
        by_words = _add_words(stored, SWAPPED)
        if not self.sym:
            return by_words if self.swapped else one_by_one
        for zeros in (one_by_one, by_words):
            if (unpack(zeros, 3) == 4).all():
                return zeros
        raise UserError(
            "qzeros is not that of a symmetric 3-bit layer (sym in config.json): not all zeros are 4"
        )

    def config(self) -> dict:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "checkpoint_format": self.written_version,
        }

    @property
    def written_version(self) -> str:
        """checkpoint_format of what GPTQLinear.tensors gives."""
        return "gptq_v2" if self.bits == 3 else self.version

    def describe(self) -> str:
        order = ", act-order" if self.desc_act else ""
        return f"GPTQ {self.bits} bits, group {'of all' if self.group_size == -1 else self.group_size}{order}"


class GPTQLinear(GroupedLinear):
    """Groups of inputs that may have been sorted; scales are fp16 as a rule."""

    @classmethod
    def from_integers(
        cls,
        format: GPTQFormat,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        group_of: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "GPTQLinear":
        """codes (out, in) and zeros (out, groups) whole numbers from 0 to 2^bits - 1, scales (out, groups),
        group_of (in,): the group of each input, None for groups in a row. zeros None: symmetric, the middle,
        2^(bits - 1).

        Scales are kept in fp16, as GPTQ's loaders hold them. Raises UserError where the numbers do not fit.
        """
        outputs, inputs = codes.shape
        groups, bits = format.groups(inputs), format.bits
        if inputs % 32 or outputs % 32:
            raise UserError(
                f"GPTQ packs multiples of 32 inputs and outputs; this linear has {inputs} and {outputs}"
            )
        if zeros is None:
            zeros = torch.full((outputs, groups), 2 ** (bits - 1), device=codes.device)
        for name, tensor, shape in (
            ("scales", scales, (outputs, groups)),
            ("zeros", zeros, (outputs, groups)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} for {shape} (outputs, groups)")
        for name, tensor in (("codes", codes), ("zeros", zeros)):
            if int(tensor.min()) < 0 or int(tensor.max()) >= 2**bits:
                raise ValueError(
                    f"{name}: {int(tensor.min())} to {int(tensor.max())} are not {bits}-bit numbers"
                )
        scales = scales.T.to(torch.float16).contiguous()
        if not scales.isfinite().all():
            raise UserError("scales: too large for fp16, in which a GPTQ checkpoint holds them")
        group_of = None if group_of is None else group_of.int()
        return cls(format, pack(codes, bits), pack(zeros.T, bits), scales, group_of, bias, dtype)

    def integers(self) -> tuple[Tensor, Tensor]:
        """codes (out, in) and zeros (out, groups), int32: from_integers the other way."""
        return unpack(self.codes, self.format.bits), unpack(self.zeros, self.format.bits).T

    def tensors(self) -> dict[str, Tensor]:
        zeros = self.zeros
        if self.format.written_version == "gptq":
            zeros = _add_words(zeros, [-ONES[self.format.bits]])
        group_of = self.groups_in_a_row(self.device) if self.group_of is None else self.group_of
        return {
            "qweight": self.codes.T.contiguous(),
            "qzeros": zeros,
            "scales": self.scales,
            "g_idx": group_of,
        }


def from_config(settings: dict) -> GPTQFormat:
    """The format of a checkpoint's quantization_config. Raises UserError starting with the key."""
    if settings.get("dynamic"):
        raise UserError("dynamic: settings of single modules are not read; quantise with one setting for all")
    if settings.get("pack_dtype", "int32") != "int32":
        raise UserError(f"pack_dtype: {settings['pack_dtype']} is not read; int32 is")
    maker = (settings.get("meta") or {}).get("quantizer") or ()
    return GPTQFormat(
        bits=settings["bits"],
        group_size=settings.get("group_size", 128),
        desc_act=bool(settings.get("desc_act")),
        sym=settings.get("sym", True),
        version=settings.get("checkpoint_format") or settings.get("format") or "gptq",
        swapped=settings["bits"] == 3 and any("gptqmodel" in str(name) for name in maker),
    )


def _add_words(packed: Tensor, constants) -> Tensor:
    """Constants, taken in turn along the last dimension, added to int32 words; what overflows is dropped."""
    turn = torch.tensor(list(constants), device=packed.device).repeat(packed.shape[-1] // len(constants))
    return (packed.long() + turn).to(torch.int32)
