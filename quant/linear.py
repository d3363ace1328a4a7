"""What every quantised linear layer is, whatever its format, and what a format is.

A layer stands in the place of an nn.Linear (kernels/linear.LinearLayer); dequantize() is all that adapters,
merges and exports ask of it. Its numbers are buffers, so that no cast of parameters touches them, and `dtype`
is that of the values it stands for. A product for training writes the dense weight into one buffer that all
layers share, uses it and forgets it, forward and once more in the backward pass: it is never saved.

A format is what the layers of one model have in common: how they are made from 16-bit weights or from a
checkpoint's tensors, and what config.json says of them. Each file of this folder has one of each.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import kernels
from kernels.linear import LinearLayer, Part
from options.errors import NOT_FINITE, UserError, refuse

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what scales of a checkpoint may be


class QuantLinear(LinearLayer):
    """A frozen linear layer whose weight (out, in) is held in another form than numbers one by one.

    shape (out, in); bias (out,) or None stays a parameter in `dtype`; buffers, tensors or None, are what the
    weight is made of. A kind of layer implements `fill` and `tensors`; and what LinearLayer offers, where it
    has a faster way than the dense weight.
    """

    def __init__(self, format: "Format", shape: tuple[int, int], bias, dtype: torch.dtype, **buffers):
        super().__init__()
        self.format, self.dtype = format, dtype
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def fill(self, out: Tensor) -> None:
        """Write the weight that the codes stand for into out (out, in): fp32, rounded to out's dtype."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of this layer beside the bias, by the part of the name after the module's."""
        raise NotImplementedError

    def part(self) -> Part:
        return Part(self, self.bias, table=self.table, layer=self)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The weight (out, in) in `dtype` (None: self.dtype); written into `out` if that is given."""
        if out is None:
            size = self.out_features, self.in_features
            out = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        with torch.no_grad():
            if not out.is_meta:
                self.fill(out)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype; gradient for x alone."""
        return kernels.linears(x, [self.part()])[0]

    def numbers(self) -> list[Tensor]:
        """What the weight is made of: buffers, which are parameters where the layer is sharded."""
        return [*self.buffers(), *(value for name, value in self.named_parameters() if name != "bias")]

    @property
    def device(self) -> torch.device:
        return next(iter(self.numbers())).device

    @property
    def storage_bytes(self) -> int:
        """Bytes of the codes and all that belongs to them; without the bias."""
        return sum(number.numel() * number.element_size() for number in self.numbers())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.storage_bytes / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.bits_per_weight:.3f} bits a weight"


class Rows(NamedTuple):
    """What one of several ranks keeps of tensors that are cut along their first dimension."""

    of: Callable[[int], slice]  # of so many rows
    read: Callable[[Tensor], Tensor]  # numbers that lean on a file, on the device and known to be finite
    joined: Callable[[Tensor, int], Tensor]  # each rank's part of a vector of so many numbers -> all of it


@dataclass(frozen=True)
class Format:
    """The settings that all quantised layers of a model share. Equal settings are equal formats.

    method   config.json's quantization_config.quant_method
    marker   the part of a tensor's name, after the module's, that only a layer of this format has in a file
    skip_key where config.json lists the linears that are not in codes
    by_rows  whether rows of what a layer holds are made of the same rows of the weight alone
    """

    method: ClassVar[str]
    marker: ClassVar[str]
    skip_key: ClassVar[str] = "modules_to_not_convert"
    by_rows: ClassVar[bool] = False

    def quantise(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
        """A layer from the dense weight (out, in), on its device; dtype: of the values. Raises UserError."""
        raise UserError(f"quantization_method: {self.method} needs a checkpoint that is quantised already")

    def quantise_part(self, weight: Tensor, dtype: torch.dtype, rows: Rows) -> dict[str, Tensor]:
        """A rank's rows of all that `quantise` would make of the weight (out, in), which leans on a file, by
        name: the same numbers bit by bit. All ranks call it. Raises UserError."""
        read = rows.read(weight[rows.of(len(weight))] if self.by_rows else weight)
        found = self.quantise(read, None, dtype).named_buffers()
        return {name: made if self.by_rows else made[rows.of(len(made))] for name, made in found}

    def read(self, tensors: dict[str, Tensor], shape: tuple[int, int], bias, dtype) -> QuantLinear:
        """A layer from a checkpoint's tensors (by the part of their names after the module's) of a linear
        with weight shape (out, in); it may lean on the file as they do. Raises UserError, naming the
        tensor."""
        raise NotImplementedError

    def config(self) -> dict:
        """What transformers expects under quantization_config in config.json."""
        raise NotImplementedError

    def config_for(self, dtype: torch.dtype, dense: list[str] = (), coded: list[str] = ()) -> dict:
        """config() of a model whose values and products are in `dtype`. dense, coded: the Hugging Face names
        of its linears that are not in codes, which the file has to say, and of those that are."""
        return self.config() | {self.skip_key: picked(dense, coded)}

    def describe(self) -> str:
        """A few words for the user: 'nf4, double quantisation'."""
        raise NotImplementedError


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def picked(names: Iterable[str], others: Iterable[str], short: Callable = last_part) -> list[str]:
    """These names as config.json lists modules: by their ends (short), where no other has the same one."""
    taken = set(map(short, others))
    return sorted({name if short(name) in taken else short(name) for name in names})


def quantised_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Quantised layers by name, also those under an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def quantisation_report(model: nn.Module) -> str:
    """'base: 210 linears in nf4, double quantisation, 4.127 bits a weight, 0.05 GiB'."""
    layers = quantised_linears(model).values()
    formats = dict.fromkeys(layer.format.describe() for layer in layers)
    size = sum(layer.storage_bytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = f"{8 * size / weights:.3f} bits a weight, {size / 2**30:.2f} GiB"
    return f"base: {len(layers)} linears in {' and '.join(formats)}, {bits}"


def take(tensors: dict[str, Tensor], name: str, shape: tuple, *dtypes: torch.dtype) -> Tensor:
    """The tensor of this name, with this shape and one of these dtypes. Raises UserError, also for NaN."""
    refuse(name not in tensors, f"{name} is missing; the checkpoint is incomplete, fetch it again")
    tensor = tensors[name]
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
        wanted = " or ".join(name_of(dtype) for dtype in dtypes)
        found = f"{name_of(tensor.dtype)} {tuple(tensor.shape)}"
        raise UserError(f"{name} is {found}; config.json asks for {wanted} {tuple(shape)}")
    refuse(tensor.is_floating_point() and not tensor.isfinite().all(), f"{name} {NOT_FINITE}")
    return tensor


def name_of(dtype: torch.dtype) -> str:
    """'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def refuse_others(tensors: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for a tensor that is no part of a layer of this format."""
    for name in tensors:
        refuse(name not in known, f"{name} has no place in a layer that is quantised as config.json says")


def row_chunks(out: Tensor) -> Iterator[slice]:
    """Rows of out (out, in) to fill in turn: what is computed between stays in a CPU's cache, and is small
    beside the weights on a GPU."""
    size = max(1, (2**18 if out.device.type == "cpu" else 2**24) // out.shape[1])
    return (slice(start, start + size) for start in range(0, out.shape[0], size))
