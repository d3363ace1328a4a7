"""GPTQ checkpoints of 2, 3, 4 and 8 bits, a scale and a zero for a group.  Frantar et al., arXiv 2210.17323.

w = scale[group] * (q - zero[group]), a group being `group_size` inputs in a row (-1: all), or those that
g_idx puts together where the inputs were sorted (act-order). In a file the codes are packed along the inputs
into int32 words, qweight (in * bits / 32, out), the zeros along the outputs, qzeros (groups, out * bits /
32), both as one stream of bits from the first word's lowest on: at 3 bits values cross between words.

checkpoint_format gptq holds every zero less one, gptq_v2 as it is. The subtraction is one of whole words, so
that the zero 0 borrows from its neighbour; adding again to whole words undoes it. At 3 bits there are two
dialects of the former: AutoGPTQ takes one from each zero; GPTQModel, which transformers loads with, has the
constants of the words in another order, no subtraction of ones. So at 3 bits gptq_v2 is written.
"""

import reprlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from options.errors import UserError, refuse
from quant.grouped import GroupedFormat, GroupedLinear, pack, unpack
from quant.linear import picked, refuse_others, take

BITS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # bits: the word whose values are all 1
SWAPPED = (0x24924924, 0x92492492, 0x49249249)  # what GPTQModel takes from every three words of 3-bit zeros


@dataclass(frozen=True)
class GPTQFormat(GroupedFormat):
    """swapped: 3-bit checkpoint_format gptq of GPTQModel without symmetry (with it, the file tells)."""

    method: ClassVar[str] = "gptq"
    marker: ClassVar[str] = "qweight"
    desc_act: bool = False
    sym: bool = True
    version: str = "gptq"
    swapped: bool = False

    def __post_init__(self):
        super().__post_init__()
        refuse(self.bits not in BITS, f"bits: {self.bits}; GPTQ has 2, 3, 4 and 8")
        if self.version not in ("gptq", "gptq_v2"):
            raise UserError(f"checkpoint_format: {self.version!r} is not read; gptq and gptq_v2 are")

    def read(self, tensors, shape, bias, dtype) -> "GPTQLinear":
        outputs, inputs = shape
        refuse_others(tensors, ("qweight", "qzeros", "scales", "g_idx"))
        codes, zeros, scales = self._take(tensors, shape, (inputs * self.bits // 32, outputs))
        group_of, groups = None, len(scales)
        if "g_idx" in tensors:
            group_of = take(tensors, "g_idx", (inputs,), torch.int32, torch.int64).int()
            low, high = int(group_of.min()), int(group_of.max())
            if low < 0 or high >= groups:
                raise UserError(f"g_idx names groups {low} to {high}; config.json asks for 0 to {groups - 1}")
        elif self.desc_act and groups > 1:
            raise UserError("g_idx is missing, the order of inputs (desc_act); fetch the checkpoint again")
        zeros = self._plain_zeros(zeros) if self.version == "gptq" else zeros.clone()
        if self.sym and not (unpack(zeros, self.bits) == 2 ** (self.bits - 1)).all():
            found = unpack(zeros, self.bits).unique().tolist()
            wanted = f"instead of {2 ** (self.bits - 1)} alone, as sym (true) in config.json asks for"
            remedy = "if they are right, sym is false or checkpoint_format another (gptq_v2 = as they are)"
            raise UserError(f"qzeros stands for the zeros {reprlib.repr(found)} {wanted}; {remedy}")
        return GPTQLinear(self, codes.T.contiguous(), zeros, scales, group_of, bias, dtype)

    def _plain_zeros(self, stored: Tensor) -> Tensor:
        """Packed zeros as they are, from those of checkpoint_format gptq."""
        if self.bits != 3:
            return _add_words(stored, [ONES[self.bits]])
        by_words = _add_words(stored, SWAPPED)
        swapped = bool((unpack(by_words, 3) == 4).all()) if self.sym else self.swapped
        return by_words if swapped else pack(unpack(stored, 3) + 1 & 7, 3)

    def config(self) -> dict:
        sizes = {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size}
        return sizes | {"desc_act": self.desc_act, "sym": self.sym, "checkpoint_format": self.written_version}

    def config_for(self, dtype: torch.dtype, dense: list[str] = (), coded: list[str] = ()) -> dict:
        if set(dense) <= {"lm_head"}:  # every linear of the blocks is in codes, which is what readers assume
            return self.config()
        return self.config() | {"modules_in_block_to_quantize": [picked(coded, dense)]}

    @property
    def written_version(self) -> str:
        """checkpoint_format of what GPTQLinear.tensors gives."""
        return "gptq_v2" if self.bits == 3 else self.version

    def describe(self) -> str:
        return f"{super().describe()}{', act-order' if self.desc_act else ''}"


class GPTQLinear(GroupedLinear):
    """Groups of inputs that may have been sorted; scales are fp16 as a rule."""

    @classmethod
    def from_integers(
        cls, format: GPTQFormat, codes, scales, zeros=None, group_of=None, bias=None, dtype=torch.float32
    ) -> "GPTQLinear":
        """codes (out, in) and zeros (out, groups) whole numbers from 0 to 2^bits - 1, scales (out, groups),
        group_of (in,): the group of each input, None for groups in a row. zeros None: the middle.

        Scales are kept in fp16, as GPTQ's loaders hold them. Raises UserError where the numbers do not fit.
        """
        outputs, inputs = codes.shape
        groups, bits = format.groups(inputs), format.bits
        if inputs % 32 or outputs % 32:
            raise UserError(f"GPTQ packs multiples of 32 inputs and outputs; here are {inputs}, {outputs}")
        if zeros is None:
            zeros = torch.full((outputs, groups), 2 ** (bits - 1), device=codes.device)
        for name, tensor in (("scales", scales), ("zeros", zeros)):
            if tuple(tensor.shape) != (outputs, groups):
                raise ValueError(f"{name}: {tuple(tensor.shape)} for {(outputs, groups)} (outputs, groups)")
        for name, tensor in (("codes", codes), ("zeros", zeros)):
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= 2**bits:
                raise ValueError(f"{name}: {low} to {high} are not {bits}-bit numbers")
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
        words = self.codes.T.contiguous()
        return {"qweight": words, "qzeros": zeros, "scales": self.scales, "g_idx": group_of}


def from_config(settings: dict) -> GPTQFormat:
    """The format of a checkpoint's quantization_config. Raises UserError starting with the key."""
    if settings.get("dynamic"):
        raise UserError("dynamic: settings of single modules are not read; quantise with one setting for all")
    if settings.get("pack_dtype", "int32") != "int32":
        raise UserError(f"pack_dtype: {settings['pack_dtype']} is not read; int32 is")
    maker = str((settings.get("meta") or {}).get("quantizer"))
    return GPTQFormat(
        bits=settings["bits"],
        group_size=settings.get("group_size", 128),
        desc_act=bool(settings.get("desc_act")),
        sym=settings.get("sym", True),
        version=settings.get("checkpoint_format") or settings.get("format") or "gptq",
        swapped=settings["bits"] == 3 and "gptqmodel" in maker,
    )


def _add_words(packed: Tensor, constants) -> Tensor:
    """Constants, taken in turn along the last dimension, added to int32 words; what overflows is dropped."""
    turn = torch.tensor(list(constants), device=packed.device).repeat(packed.shape[-1] // len(constants))
    return (packed.long() + turn).to(torch.int32)
