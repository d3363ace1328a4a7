"""8-bit weights with one scale per output row: bitsandbytes' LLM.int8.  Dettmers et al., arXiv 2208.07339.

W[o, i] = codes[o, i] * absmax[o] / 127. For many rows (sec. 3) activations are in int8 with one scale per row
too; the input columns in which any value reaches the threshold (6.0) go through in 16 bit. Files hold weight,
SCB (absmax) and weight_format. eetq.py has the same layer with activations as they are.

The backward pass takes the dense weight, as bitsandbytes' does. Decoding reads the codes with the activations
as they are: memory bounds it, so int8 activations would lose digits and win nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.byte_linear import Bytes
from kernels.linear import SMALL_BATCH, Part
from options.errors import UserError, refuse
from quant.linear import Format, QuantLinear, refuse_others, row_chunks, take

LEVELS = 127  # the largest code; -128 is not used, so that codes are symmetric
ROW_MAJOR = 0  # weight_format of bitsandbytes; 1 to 3 are orders of its old CUDA kernels
PACKED_ROWS = 8  # up to here torch's int8 product is faster on a CPU than a dense one in bf16 (measured)
PACKED_SIZES = 64, 16  # it reads past the end of rows that are not multiples of this: inputs, outputs


@dataclass(frozen=True)
class Int8Format(Format):
    """threshold: activations of at least this size go through in 16 bit; 0 = none do."""

    method: ClassVar[str] = "bitsandbytes"
    marker: ClassVar[str] = "SCB"
    skip_key: ClassVar[str] = "llm_int8_skip_modules"
    by_rows: ClassVar[bool] = True
    threshold: float = 6.0

    def quantise(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "Int8Linear":
        # by way of fp16, as bitsandbytes does: its codes for the same weight are the same
        return Int8Linear(self, tuple(weight.shape), bias, dtype, **quantise_rows(weight.to(torch.float16)))

    def read(self, tensors, shape, bias, dtype) -> "Int8Linear":
        codes = take(tensors, "weight", shape, torch.int8)
        absmax = positive("SCB", take(tensors, "SCB", shape[:1], torch.float32))
        order = tensors.get("weight_format")
        if order is not None and (order.numel() != 1 or order.item() != ROW_MAJOR):
            raise UserError(f"weight_format is {order.tolist()}, not {ROW_MAJOR} (row major); save it again")
        refuse_others(tensors, ("weight", "SCB", "weight_format"))
        return Int8Linear(self, shape, bias, dtype, codes=codes, absmax=absmax)

    def parts(self, layer: "Int8Linear") -> dict[str, Tensor]:
        order = torch.tensor(ROW_MAJOR, dtype=torch.uint8)
        return {"weight": layer.codes, "SCB": layer.absmax, "weight_format": order}

    def config(self) -> dict:
        kind = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
        size = {"llm_int8_threshold": self.threshold, "llm_int8_has_fp16_weight": False}
        return kind | size | {"llm_int8_enable_fp32_cpu_offload": False}

    def describe(self) -> str:
        return "int8 (LLM.int8)"


class Int8Linear(QuantLinear):
    """codes (out, in) int8, absmax (out,) fp32: weight = codes * absmax / 127."""

    def fill(self, out: Tensor) -> None:
        scale = self._scale()[:, None]  # (out, 1)
        if out.dtype is torch.float32:
            torch.mul(self.codes, scale, out=out)
            return
        for rows in row_chunks(out):
            out[rows].copy_(self.codes[rows] * scale[rows])

    def tensors(self) -> dict[str, Tensor]:
        return self.format.parts(self)

    def product(self, x: Tensor) -> Tensor | None:
        threshold = self.format.threshold
        if threshold is None or x.shape[0] == 0 or not int8_products_are_fast(x.device):
            return None
        if x.device.type != "cpu" and not self.waits(x.shape[0]):
            return None
        return llm_int8(x, self.codes, self._scale(), threshold)

    def waits(self, rows: int) -> bool:
        # the host learns which columns have outliers; not in decoding, where that costs the most
        return self.format.threshold is not None and rows > SMALL_BATCH

    def from_codes(self, x: Tensor, parts: list[Part]) -> list[Tensor] | None:
        known = x.device.type == "cpu" and x.dtype is torch.bfloat16 and 0 < x.shape[0] <= PACKED_ROWS
        if known and all(part.weight._fits_packed for part in parts):
            return [part.weight._packed_product(x, part) for part in parts]
        return None

    @property
    def _fits_packed(self) -> bool:
        return self.in_features % PACKED_SIZES[0] == 0 and self.out_features % PACKED_SIZES[1] == 0

    def _packed_product(self, x: Tensor, part: Part) -> Tensor:
        # a scale of 1: torch's product takes scales in bf16, which would round them
        result = torch._weight_int8pack_mm(x, self.codes, x.new_ones(self.out_features))
        result = (result * self._scale()).to(x.dtype)
        if part.lora_a is not None:
            low = (x @ part.lora_a.to(x.dtype).T) * part.scale
            result = result.addmm_(low, part.lora_b.to(x.dtype).T)
        return result if part.bias is None else result.add_(part.bias)

    def bytes_for_decoding(self, dtype: torch.dtype) -> Bytes:
        codes = (self.codes.view(torch.uint8) ^ 128).T  # plus 128
        return Bytes(codes, 128.0, self._scale()[None])

    def _scale(self) -> Tensor:
        return self.absmax * (1.0 / LEVELS)  # (out,)


def from_config(settings: dict) -> Int8Format:
    """Of bitsandbytes' quantization_config with load_in_8bit. UserError starting with the key."""
    threshold = settings.get("llm_int8_threshold", 6.0)
    if settings.get("llm_int8_has_fp16_weight"):
        raise UserError("llm_int8_has_fp16_weight is true: the weights are 16 bit; drop quantization_config")
    return Int8Format(float(threshold))


def quantise_rows(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """weight (out, in) -> codes (out, in) int8 and absmax (out,) fp32, codes = round(weight * 127 / absmax).

    scale_dtype: of absmax / 127 in files; codes are those of the rounded one. UserError for infinity and NaN.
    """
    absmax = weight.abs().amax(1).float()
    if scale_dtype is not torch.float32:
        absmax = (absmax / LEVELS).to(scale_dtype).float() * LEVELS
    if not torch.isfinite(absmax).all():
        raise UserError("the weight holds numbers that are not finite, or too large for fp16")
    factor = torch.where(absmax > 0, LEVELS / absmax, 0.0)[:, None]  # rows of zeros: codes 0
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_chunks(codes):
        codes[rows] = (weight[rows].float() * factor[rows]).round_().clamp_(-LEVELS, LEVELS)
    return {"codes": codes, "absmax": absmax}


def llm_int8(x: Tensor, codes: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """x (T, in), codes (out, in) int8, scale (out,) fp32 -> x W^T (T, out) in x's dtype.  arXiv 2208.07339,
    eq. 8.

    Columns of x with a value of at least `threshold` are multiplied in x's dtype, the others in int8,
    exactly, with one scale per row of x. Which columns those are depends on all rows.
    """
    size, columns = x.abs(), None
    if threshold > 0:
        outliers = size >= threshold
        columns = outliers.any(0).nonzero().flatten()
        columns = columns if columns.numel() else None
    if columns is not None:
        size = size.masked_fill_(outliers, 0)
    absmax = size.amax(1, keepdim=True).float()  # (T, 1)
    rows = (x * (LEVELS / absmax.clamp_min(torch.finfo(torch.float32).tiny))).round_()
    if columns is not None:
        rows[:, columns] = 0
    result = int8_product(rows.to(torch.int8), codes).float()
    result = result.mul_(absmax * (1.0 / LEVELS)).mul_(scale).to(x.dtype)
    if columns is not None:
        some = (codes[:, columns] * scale[:, None]).to(x.dtype)  # (out, outliers)
        result.addmm_(x[:, columns], some.T)
    return result


def int8_products_are_fast(device: torch.device) -> bool:
    """Whether int8_product beats a dense product there: on x86 with 512-bit registers and on NVIDIA GPUs."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_supported()
    return device.type == "cuda" and torch.version.cuda is not None


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (T, in), b (out, in), both int8 -> a b^T (T, out) int32."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.T)
    # cuBLAS wants more than 16 rows and multiples of 8
    rows, inputs, outputs = max(0, 17 - a.shape[0]), -a.shape[1] % 8, -b.shape[0] % 8
    pad = torch.nn.functional.pad
    wide = torch._int_mm(pad(a, (0, inputs, 0, rows)), pad(b, (0, inputs, 0, outputs)).T)
    return wide[: a.shape[0], : b.shape[0]]


def positive(name: str, scales: Tensor) -> Tensor:
    refuse((scales < 0).any(), f"{name} holds negative scales; the file is damaged, fetch it again")
    return scales
