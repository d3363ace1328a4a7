"""What every quantised linear layer is, whatever its format, and what a format is.

A layer stands in the place of an nn.Linear: in_features, out_features, bias, forward; and dequantize(), which
is all that adapters, merges and exports ask of it. Its numbers are buffers, so that no cast of parameters
touches them, and `dtype` is that of the values it stands for. A product for training writes the dense weight
into one buffer that all layers share, uses it and forgets it, forward and once more in the backward pass: it
is never saved.

A format is what the layers of one model have in common: how they are made from 16-bit weights or from a
checkpoint's tensors, and what config.json says of them. Each file of this folder has one of each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import kernels
from options.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what scales of a checkpoint may be
NOT_FINITE = "holds NaN or infinity; the file is damaged, fetch it again"
SMALL_BATCH = 16  # up to here a product reads the codes themselves, where a kernel for that exists


class QuantLinear(nn.Module):
    """A frozen linear layer whose weight (out, in) is held in another form than numbers one by one.

    bias (out,) or None stays a parameter in `dtype`. A format implements `fill` and `tensors`; `product` and
    `from_codes` where it has a faster way than the dense weight.
    """

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def fill(self, out: Tensor) -> None:
        """Write the weight that the codes stand for into out (out, in), computed in fp32 and rounded to its
        dtype."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this layer beside the bias, by the part of the name after the
        module's."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor | None:
        """x (T, in) -> x W^T (T, out) in x's dtype without the dense weight, for any T, in training too (the
        backward pass takes the dense weight); None: the dense way."""
        return None

    def waits(self, rows: int) -> bool:
        """Whether a product of so many rows waits for a GPU, so that no CUDA graph can hold it."""
        return False

    def from_codes(
        self, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float
    ) -> Tensor | None:
        """small_batch of the rows that it serves; None where this format has no faster way than the dense
        weight."""
        return None

    def bytes_for_decoding(self, dtype: torch.dtype) -> kernels.Bytes | None:
        """The weight in one byte a number, for one row at a time on a CPU, where that is as good as dense
        numbers in `dtype`; None: it is expanded."""
        return None

    def small_batch(
        self, x: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scale: float = 0.0
    ) -> Tensor | None:
        """x (T, in) with T <= SMALL_BATCH -> x W^T + bias + scale (x A^T) B^T (T, out), straight from the codes.

        None where a gradient may be asked for, for more rows, and where the dense weight is the faster way.
        """
        if torch.is_grad_enabled() or x.dim() != 2 or x.shape[0] > SMALL_BATCH:
            return None
        return self.from_codes(x, lora_a, lora_b, scale)

    @classmethod
    def several_from_codes(cls, x: Tensor, parts: list[kernels.LoraPart]) -> list[Tensor] | None:
        """from_codes for several layers of this format, with one input, in fewer launches; None: one by
        one."""
        return None

    @staticmethod
    def small_batch_of(x: Tensor, parts: list[kernels.LoraPart]) -> list[Tensor] | None:
        """small_batch for several layers with one input; None where that is no faster than one by one."""
        kinds = {type(part.weight) for part in parts}
        if torch.is_grad_enabled() or x.dim() != 2 or x.shape[0] > SMALL_BATCH or len(kinds) > 1:
            return None
        return kinds.pop().several_from_codes(x, parts)

    @staticmethod
    def fused(x: Tensor, layers: list[nn.Module]) -> list[Tensor]:
        """[layer(x) for layer in layers], see model.project_together. An adapter among them sees to all of
        them."""
        for layer in layers:
            if not isinstance(layer, QuantLinear) and hasattr(layer, "fused"):
                return layer.fused(x, layers)
        results = None
        if all(isinstance(layer, QuantLinear) for layer in layers):
            parts = [kernels.LoraPart(layer, layer.bias, None, None, 0.0) for layer in layers]
            results = QuantLinear.small_batch_of(x, parts)
        return [layer(x) for layer in layers] if results is None else results

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The weight (out, in) in `dtype` (None: self.dtype); written into `out` if that is given."""
        if out is None:
            shape = (self.out_features, self.in_features)
            out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        with torch.no_grad():
            self.fill(out)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype; gradient for x alone."""
        rows = x.reshape(-1, self.in_features)
        result = self.small_batch(rows)
        if result is None:
            result = kernels.lora_linear(rows, self, self.bias, None, None, 0.0)
        return result.view(*x.shape[:-1], self.out_features)

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def storage_bytes(self) -> int:
        """Bytes of the codes and all that belongs to them; without the bias."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.storage_bytes / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.bits_per_weight:.3f} bits a weight"


@dataclass(frozen=True)
class Format:
    """The settings that all quantised layers of a model share. Equal settings are equal formats.

    method   config.json's quantization_config.quant_method
    marker   the part of a tensor's name, after the module's, that only a layer of this format has in a checkpoint
    """

    method: ClassVar[str]
    marker: ClassVar[str]

    def quantise(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
        """A layer from the dense weight (out, in), on its device; dtype is that of the values. ValueError if
        it cannot be."""
        raise UserError(f"quantization_method: {self.method} needs a checkpoint that is quantised already")

    def read(
        self, tensors: dict[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear:
        """A layer from a checkpoint's tensors (by the part of their names after the module's; they may lean
        on the file) of a linear with weight shape (out, in). ValueError starts with the name of the tensor
        that is wrong."""
        raise NotImplementedError

    def config(self) -> dict:
        """What transformers expects under quantization_config in config.json."""
        raise NotImplementedError

    def config_for(self, dtype: torch.dtype) -> dict:
        """config() of a model whose values and products are in `dtype`, where a format says so there."""
        return self.config()

    def describe(self) -> str:
        """A few words for the user: 'nf4, double quantisation'."""
        raise NotImplementedError


def report(model: nn.Module) -> str:
    """'base: 210 linears in nf4, double quantisation, 4.127 bits a weight, 0.05 GiB'."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    formats = dict.fromkeys(layer.format.describe() for layer in layers)
    size = sum(layer.storage_bytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = f"{8 * size / weights:.3f} bits a weight, {size / 2**30:.2f} GiB"
    return f"base: {len(layers)} linears in {' and '.join(formats)}, {bits}"


def take(
    tensors: dict[str, Tensor], name: str, shape: Iterable[int], dtypes: Iterable[torch.dtype]
) -> Tensor:
    """The tensor of this name, with this shape and one of these dtypes; ValueError says what was found
    instead."""
    if name not in tensors:
        raise UserError(f"{name} is missing; the checkpoint is incomplete, fetch it again")
    tensor, shape, dtypes = tensors[name], tuple(shape), tuple(dtypes)
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        raise UserError(f"{name} is {found}; config.json asks for {wanted} {shape}")
    return tensor


def take_finite(
    tensors: dict[str, Tensor], name: str, shape: Iterable[int], dtypes: Iterable[torch.dtype] = FLOATS
) -> Tensor:
    """`take`, and ValueError for NaN and infinity."""
    tensor = take(tensors, name, shape, dtypes)
    if not tensor.isfinite().all():
        raise UserError(f"{name} {NOT_FINITE}")
    return tensor


def refuse_others(tensors: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for a tensor that is no part of a layer of this format."""
    for name in tensors:
        if name not in known:
            raise UserError(f"{name} has no place in a layer that is quantised as config.json says")


def row_chunks(out: Tensor) -> Iterator[slice]:
    """Rows of out (out, in) to fill one after the other: what is computed between stays in a CPU's cache, and
    small beside the weights on a GPU."""
    size = max(1, (2**18 if out.device.type == "cpu" else 2**24) // out.shape[1])
    return (slice(start, start + size) for start in range(0, out.shape[0], size))
