"""A model of which each rank keeps a share, read by shares: no rank ever holds more of it.

    shares = Shares(folder, torch.bfloat16, world.device)
    shares.prepare(adapters, lora_options)        # shares.model may be changed: it lies on the meta device
    model = shares.load(world, options)

The model is distributed without numbers and gets memory for what this rank keeps. Then tensors stream from
the mapped files, and of each a rank reads, casts or quantises its own rows: pages of the others are not
touched. One tensor at a time is made whole where rows of it are not enough: a linear that HQQ quantises, one
that GPTQ, AWQ or EETQ stored in an order of their own, one that an adapter is merged into, random weights.
"""

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from architectures.config import to_hf_name
from architectures.layers import Linear, RMSNorm
from checkpoints import peft
from checkpoints.huggingface import as_read, block_linears, random_weights, stream_weights
from checkpoints.safetensors_files import refuse_not_finite
from lora import LoraLinear, LoraOptions, first_a, lora_layers, replace_module
from model import Decoder
from options.errors import UserError, fitting, located
from options.progress import Bar
from parallel.fsdp import allot, assign, local, own_part, own_rows, whole_shape
from parallel.options import ParallelOptions
from parallel.world import World
from quant.linear import QuantLinear, Rows


class Shares:
    """What load_model reads with the same arguments, in the making.

    model   without numbers, until `load`; what has some before (a value head) keeps them
    seed    of random weights in place of those of the files
    """

    def __init__(
        self, folder, dtype, device, scaling=None, cutoff_len=None, quantization=None, norms=None, seed=None
    ):
        self.folder, self.device, self.quantization, self.seed = folder, device, quantization, seed
        self.config, self.dtype = as_read(folder, dtype, scaling, cutoff_len, quantization)
        self.merged, self.trained = [], None  # adapters' files
        self.place, self.faults = "", []
        self.model = model = Decoder(self.config, dtype=self.dtype, device="meta").eval()
        self.inside = block_linears(model)
        for name, layer in self._coded():
            replace_module(model, name, layer)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.data = module.weight.data.to(norms or self.dtype)
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}  # that are read

    def _coded(self) -> Iterator[tuple[str, QuantLinear]]:
        """The linears of the blocks that will be quantised, or are in the files, without numbers."""
        made: dict[tuple[int, int], QuantLinear] = {}
        for name in self.inside if self.quantization is not None else ():
            linear = self.model.get_submodule(name)
            if (shape := tuple(linear.weight.shape)) not in made:  # of zeros it is like of other numbers
                with located(f"{self.folder}: tensor {to_hf_name(self.config, name)}.weight"):
                    zeros = torch.zeros(shape, dtype=self.dtype)
                    made[shape] = self.quantization.quantise(zeros, None, self.dtype).to("meta")
            layer = copy.deepcopy(made[shape])
            layer.bias = linear.bias
            yield name, layer
        if self.config.hf.get("quantization_config"):
            for name, value in self._weights():
                if isinstance(value, QuantLinear) and name in self.inside:
                    yield name, value.to("meta")

    def _weights(self) -> Iterator[tuple[str, Tensor | QuantLinear]]:
        if self.seed is not None:
            return random_weights(self.config, self.dtype, self.device, self.seed)
        return stream_weights(self.folder, self.config, self.dtype, self._found)

    def _found(self, tensor: Tensor, place: str) -> None:
        self.place = place  # for what is found wrong with those rows of it that are read

    def merge(self, folders: Iterable[Path]) -> None:
        """Adapters that are merged into the weights, in order. Raises UserError."""
        for folder in folders:
            self.merged.append(peft.read_adapter(folder, self.model))
            peft.load_adapter(copy.deepcopy(self.model), folder)  # refuses what does not fit

    def prepare(self, folders: list, options: LoraOptions, generator=None, dtype=torch.float32) -> dict:
        """As prepare_adapters; the values that it gives back are without numbers."""
        merged, trained = peft.divide_adapters(self.model, folders, options)
        self.merge(merged)
        self.trained = peft.read_adapter(trained[0], self.model) if trained else None
        return peft.prepare_adapters(self.model, trained, options, generator, dtype)

    @fitting("the model", "take a smaller one, more ranks, or set quantization_bit=4")
    @torch.no_grad()
    def load(self, world: World, options: ParallelOptions) -> Decoder:
        """The model, distributed, with this rank's numbers. What is wrong with the rows of one rank, all
        ranks say. Raises UserError."""
        model = self.model
        known = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_meta}
        allot(model, world, options)
        silent = self.quantization is None or not world.is_main
        try:
            for each in Bar(self._weights(), "quantising", len(self.dtypes), unit="tensor", disable=silent):
                self._put(*each)
            self._put_adapters()
        except UserError as error:
            if self.quantization is not None:  # others may wait for this rank's scales
                raise
            self.faults.append(str(error))
        for fault in filter(None, world.gather(self.faults[:1])):
            raise UserError(*fault)
        for name, value in known.items():
            assign(model.get_parameter(name), value)
        if self.trained is None:
            self._put_magnitudes()
        return model

    def _base(self, name: str) -> nn.Module:
        module = self.model.get_submodule(name)
        return module.base if isinstance(module, LoraLinear) else module

    def _put(self, name: str, value: Tensor | QuantLinear) -> None:
        """What stream_weights gives, to its place."""
        owner, _, part = name.rpartition(".")
        if isinstance(value, QuantLinear) and name not in self.inside:  # head, embedding
            assign(self._base(name).weight, value.to(self.device).dequantize(self.dtype))
        elif isinstance(value, QuantLinear):
            base = self._base(name)
            for part, number in (*value.named_buffers(), *value.named_parameters()):
                assign(getattr(base, part), number if number.dim() else number.view(1))
        elif self.quantization is not None and owner in self.inside and part == "weight":
            base = self._base(owner)
            with located(f"{self.folder}: tensor {to_hf_name(self.config, name)}"):
                made = self.quantization.quantise_part(value, self.dtype, self._rows(base.codes))
            for part, number in made.items():
                local(getattr(base, part)).copy_(number)
        else:
            target = getattr(self._base(owner), part)
            read = self._read(own_part(target, self._merged(owner, part, value)))
            local(target).copy_(read.to(self.dtypes[name]))

    def _read(self, numbers: Tensor) -> Tensor:
        """Of a file, as they are; zeros for those that are not finite, with which no rank waits for this one
        until all say so."""
        try:
            refuse_not_finite(numbers, self.place)
        except UserError as error:
            self.faults.append(str(error))
            return torch.zeros_like(numbers)
        return numbers

    def _rows(self, like: DTensor) -> Rows:
        def joined(part: Tensor, count: int) -> Tensor:
            how = {"run_check": False, "shape": torch.Size([count]), "stride": (1,)}
            return DTensor.from_local(part, like.device_mesh, like.placements, **how).full_tensor()

        return Rows(partial(own_rows, like), lambda numbers: self._read(numbers).to(self.device), joined)

    def _merged(self, owner: str, part: str, value: Tensor) -> Tensor:
        """A tensor of the base with all adapters merged into it, as merge_adapters does; it may be whole."""
        for file in self.merged:
            parts = file.modules.get(owner, {})
            if part in parts.keys() - peft.ADAPTER_PARTS:
                value = parts[part]
            if part == "weight" and parts.keys() & peft.ADAPTER_PARTS:
                linear = Linear(value.shape[1], value.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(self._read(value).to(self.device, self.dtype, copy=True))
                with located(owner):
                    layer = peft.adapted_linear(self.model, owner, file, torch.float32, base=linear)
                    value = layer.merged_base().weight.data
        return value

    def _put_adapters(self) -> None:
        """What of adapters needs no base: new ones start, and a given one goes on."""
        for layer in lora_layers(self.model).values() if self.trained is None else ():
            generator = torch.Generator().manual_seed(layer.seed)
            assign(layer.lora_a, first_a(*whole_shape(layer.lora_a), generator))
            local(layer.lora_b).zero_()
        for name, parts in self.trained.modules.items() if self.trained is not None else ():
            for part, tensor in parts.items():
                module = self.model.get_submodule(name) if part in peft.ADAPTER_PARTS else self._base(name)
                own = {"lora_A": "lora_a", "lora_B": "lora_b"}.get(part, part)
                assign(getattr(module, own), tensor)

    def _put_magnitudes(self) -> None:
        """DoRA's start is a norm of whole rows: of one block at a time, while ranks hold all of it."""
        left = {layer for layer in lora_layers(self.model).values() if layer.magnitude is not None}
        for part in (*self.model.layers, self.model) if left else ():
            layers = [module for module in part.modules() if module in left]
            left.difference_update(layers)
            part.unshard()
            norms = [layer.updated_norm() for layer in layers]
            part.reshard()
            for layer, norm in zip(layers, norms):
                assign(layer.magnitude, norm)
