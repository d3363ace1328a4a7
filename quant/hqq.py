"""HQQ: groups of weights with a scale and a zero that is fitted without data.  Badri and Shaji,
"Half-Quadratic Quantization of Large Machine Learning Models", 2023; at 1 to 6 and 8 bits.

w = (q - zero[group]) * scale[group]. Given the scale, zero minimises the p-norm (p = 0.7, so that outliers
count less) of W - (q - zero) * scale, by turns with an auxiliary error E (their eq. 4 to 7):
    E    = shrink(W - (q - zero) * scale),      shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta)
    zero = mean of q - (W - E) / scale over the group,      beta grows by 1 % a turn
and of all turns' zeros a group keeps the one with the least squared error.

The flattened weight is a matrix of groups, (numel / group, group) with axis 1 and (group, numel / group) with
axis 0. In a file its first rows stand in the highest bits of W_q's rows, the next ones below them; 3-bit
codes go ten to an int32, 5- and 6-bit ones one to a byte. Beside it stand scale, zero, and every setting of
the layer as a tensor.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from options.errors import NOT_FINITE, UserError, refuse
from quant.linear import FLOATS, Format, QuantLinear, picked, refuse_others, row_chunks, take

BITS = (8, 6, 5, 4, 3, 2, 1)
PACKED = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # bits: rows of codes in one row of W_q
PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
NORM, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20  # p, and the schedule of beta, as the authors have them
LEAST_SCALE = 1 / 2e4  # smaller ones lose their bits in fp16
FARTHEST_ZERO = 2048  # up to here fp16 has all whole numbers, beyond a zero is off by more than a code
SETTINGS = "nbits group_size shape axis packing unpack_view_dtype view_as_float quant_scale quant_zero"
SETTINGS += " compute_dtype offload_meta encoded_state_dict stores_quant_config channel_wise"
SETTINGS += " optimize round_zero"


@dataclass(frozen=True)
class HQQFormat(Format):
    """What a layer is made with, and is read with where the file does not say otherwise of it.

    group_size None: all inputs (axis 1) or outputs (axis 0).
    """

    method: ClassVar[str] = "hqq"
    marker: ClassVar[str] = "W_q"
    skip_key: ClassVar[str] = "skip_modules"
    bits: int = 4
    group_size: int | None = 64
    axis: int = 1

    def __post_init__(self):
        refuse(self.bits not in BITS, f"nbits: {self.bits}; HQQ has 8, 6, 5, 4, 3, 2 and 1")
        refuse(self.axis not in (0, 1), f"axis: {self.axis} is neither 0 nor 1")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(f"group_size: {self.group_size} is not above 0")

    def quantise(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "HQQLinear":
        refuse(not weight.isfinite().all(), f"the weight {NOT_FINITE}")
        group, packed = self._fitting_group(weight.numel()), PACKED[self.bits]
        groups = weight.reshape(-1, group)
        filled_up = math.ceil(len(groups) / packed) * packed
        codes = torch.zeros(filled_up, group, dtype=torch.uint8, device=weight.device)
        scale, zero = (weight.new_empty(len(groups), 1, dtype=torch.float16) for _ in range(2))
        for rows in row_chunks(groups):
            codes[rows][: len(groups[rows])], scale[rows], zero[rows] = fit(groups[rows].float(), self.bits)
        refuse(not scale.isfinite().all(), "the weight has values that are too large for scales in fp16")
        found = {"codes": pack(codes, self.bits), "scale": scale, "zero": zero}
        return HQQLinear(self, HQQFormat(self.bits, group, 1), tuple(weight.shape), bias, dtype, **found)

    def _fitting_group(self, size: int) -> int:
        """group_size, or where a small layer cannot be packed in such groups the next smaller one."""
        count = 1 if self.bits == 3 else PACKED[self.bits]  # 3-bit rows are filled up
        wanted = self.group_size or 64
        for group in (wanted, 32, 16, 8):
            if group <= wanted and size % (group * count) == 0:
                return group
        raise UserError(f"its {size} weights do not divide into groups of 8 that pack at {self.bits} bits")

    def read(self, tensors, shape, bias, dtype) -> "HQQLinear":
        refuse_others(tensors, ("W_q", "scale", "zero", *SETTINGS.split()))
        for name in ("quant_scale", "quant_zero"):
            if _number(tensors, name, 0):
                raise UserError(f"{name} is set: scales and zeros that are quantised themselves are not read")
        if "shape" in tensors and tuple(tensors["shape"].tolist()) != shape:
            raise UserError(f"shape holds {tuple(tensors['shape'].tolist())}, config.json asks for {shape}")
        bits, axis = _number(tensors, "nbits", self.bits), _number(tensors, "axis", self.axis)
        layer = HQQFormat(bits, _number(tensors, "group_size", self.group_size), axis)
        group, packed = layer.group_size or shape[axis], PACKED[bits]
        layer, count = replace(layer, group_size=group), math.prod(shape) // group
        if count * group != math.prod(shape):
            raise UserError(f"group_size: {shape} weights do not divide into groups of {group}")
        stored = torch.int32 if bits == 3 else torch.uint8
        if "W_q" in tensors and tensors["W_q"].is_floating_point():  # view_as_float: the same bytes
            tensors = tensors | {"W_q": tensors["W_q"].contiguous().view(stored)}
        rows, columns = (count, group) if axis == 1 else (group, count)
        codes = take(tensors, "W_q", (math.ceil(rows / packed), columns), stored)
        refuse(bits != 3 and rows % packed, f"W_q: {rows} rows of codes do not pack at {bits} bits")
        place = (count, 1) if axis == 1 else (1, count)
        scale, zero = (take(tensors, name, place, *FLOATS) for name in ("scale", "zero"))
        return HQQLinear(self, layer, shape, bias, dtype, codes=codes, scale=scale, zero=zero)

    def config(self) -> dict:
        weights = {"nbits": self.bits, "channel_wise": True, "group_size": self.group_size, "optimize": True}
        weights |= {"round_zero": False, "axis": self.axis, "view_as_float": False}
        others = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
        settings = {"weight_quant_params": weights, **others}
        return {"quant_method": "hqq", "quant_config": settings}

    def config_for(self, dtype: torch.dtype, dense: list[str] = (), coded: list[str] = ()) -> dict:
        return self.config() | {self.skip_key: picked(dense, coded, _tag)}

    def describe(self) -> str:
        return f"HQQ {self.bits} bits, group {self.group_size or 'of all'}"


class HQQLinear(QuantLinear):
    """codes (rows / packed, columns) uint8 or int32, scale and zero (groups, 1) or (1, groups): as in a file.

    layer: bits, group and axis of this layer, which may differ from those of the model's format.
    """

    def __init__(self, format: HQQFormat, layer: HQQFormat, shape, bias, dtype, **buffers):
        super().__init__(format, shape, bias, dtype, **buffers)
        self.layer = layer

    def fill(self, out: Tensor) -> None:
        bits, by_rows = self.layer.bits, self.layer.axis == 1  # a scale and a zero for a row, or for a column
        size = self.codes.shape[1]
        dense = out.view(-1, size)  # axis 1: (groups, group); axis 0: (group, groups)
        for place in range(PACKED[bits]):
            for rows in row_chunks(self.codes):
                first = place * len(self.codes) + rows.start
                target = dense[first : place * len(self.codes) + min(rows.stop, len(self.codes))]
                codes = self.codes[rows][: len(target)]  # without 3-bit rows that only fill up
                values = (codes >> _shift(bits, place)).bitwise_and_(2**bits - 1).float()
                own = slice(first, first + len(target)) if by_rows else slice(1)
                target.copy_(values.sub_(self.zero[own].float()).mul_(self.scale[own].float()))

    def tensors(self) -> dict[str, Tensor]:
        bits = self.layer.bits
        names = {"packing": PACKINGS[bits], "compute_dtype": str(self.scale.dtype)}
        names["unpack_view_dtype"] = str(self.codes.dtype)
        flags = dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta", "round_zero"), 0)
        flags |= dict.fromkeys(("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize"), 1)
        numbers = {"nbits": bits, "group_size": self.layer.group_size, "axis": self.layer.axis}
        own = {"W_q": self.codes, "scale": self.scale, "zero": self.zero}
        return {
            **own,
            "shape": torch.tensor([self.out_features, self.in_features]),
            **{name: torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()},
            **{name: torch.tensor(flag, dtype=torch.uint8) for name, flag in flags.items()},
            **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in names.items()},
        }


def fit(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """groups (n, g) fp32 -> codes (n, g) uint8, scale and zero (n, 1) fp16, as the head of the file says."""
    most = 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    far = torch.maximum(-low, high) / FARTHEST_ZERO  # numbers that are close together, but not to 0
    scale = ((high - low) / most).clamp_min(LEAST_SCALE).maximum(far)
    zero = -low / scale
    same = (high == low) & (low != 0)  # a group of one number: (0 - -1) * that number
    scale = torch.where(same, low, scale).half().float()  # as it will be stored
    zero = torch.where(same, -1.0, zero)
    best_zero, best, beta = zero, torch.full_like(zero, math.inf), BETA
    for _ in range(TURNS):
        codes = (groups / scale + zero).round_().clamp_(0, most)
        error = groups - (codes - zero) * scale
        mean = error.square().mean(1, keepdim=True)  # picks a better zero than the p-norm does, by perplexity
        better = mean < best
        gained = (best - mean)[better].sum()
        best_zero, best = torch.where(better, zero, best_zero), torch.where(better, mean, best)
        if gained <= 1e-4 * best.sum():
            break
        size = error.abs()
        shrunk = (size - size.pow(NORM - 1) / beta).clamp_min_(0).mul_(error.sign())
        zero = (codes - (groups - shrunk) / scale).mean(1, keepdim=True)
        beta *= GROWTH
    zero = torch.where(same, -1.0, best_zero).half()
    codes = (groups / scale + zero.float()).round_().clamp_(0, most)
    return codes.to(torch.uint8), scale.half(), zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (rows, columns) uint8, rows a multiple of PACKED[bits] -> W_q (rows / that, columns)."""
    parts = codes.to(torch.int32 if bits == 3 else torch.uint8).chunk(PACKED[bits])
    packed = parts[0] << _shift(bits, 0)
    for place, part in enumerate(parts[1:], 1):
        packed |= part << _shift(bits, place)
    return packed


def _shift(bits: int, place: int) -> int:
    """Where in W_q's numbers the rows of the place-th part stand: the first in the highest bits."""
    return 0 if PACKED[bits] == 1 else bits * (PACKED[bits] - 1 - place)


def _number(tensors: dict[str, Tensor], name: str, default: int | None) -> int | None:
    """One of a layer's settings, as its file has it, else the default."""
    if name not in tensors:
        return default
    if tensors[name].numel() != 1:
        raise UserError(f"{name} is of shape {tuple(tensors[name].shape)}, not one number")
    return int(tensors[name])


def _tag(name: str) -> str:
    """'mlp.up_proj' of model.layers.3.mlp.up_proj: by what hqq and transformers tell linears apart."""
    return ".".join(name.split(".")[-2:])


def in_bits(bits: int, options) -> HQQFormat:
    return HQQFormat(bits)


def from_config(settings: dict) -> HQQFormat:
    """The format of a checkpoint's quantization_config. Raises UserError starting with the key."""
    given = settings["quant_config"]
    if isinstance(given, dict) and "weight_quant_params" not in given:
        given = next(iter(given.values()), {})  # one for each kind of layer, which the layers' tensors repeat
    refuse(not isinstance(given, dict), f"quant_config: {given!r} is not an object of keys and values")
    weights = given["weight_quant_params"]
    wrong = f"quant_config.weight_quant_params: {weights!r} is not an object of keys and values"
    refuse(not isinstance(weights, dict), wrong)
    return HQQFormat(weights["nbits"], weights.get("group_size", 64), weights.get("axis", 1))
