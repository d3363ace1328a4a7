"""The base model with its adapters merged in, one tensor at a time, whatever format the base is in.

    merge = Merge(config, [Adapter(config, folder) for folder in adapters], dtype=None, device="cpu")
    for hf_name, tensor in merge.tensors(base_folder): ...         # dense, for a checkpoint of 16 bit
    model = merge.model(base_folder)                               # the same as a Decoder

W' = W + s B A in fp32 for every adapter in order, rounded once at the end (LoRA, arXiv 2106.09685); DoRA
(arXiv 2402.09353) gives each row of the sum its trained length. A quantised base is dequantised on the way.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from architectures.config import ModelConfig, to_hf_name
from checkpoints.huggingface import block_linears, checkpoint_dtype, set_parameter, stream_weights
from checkpoints.peft import ADAPTER_PARTS, adapted_linear, read_adapter, whole_parameter
from conversion.requantise import Piece
from lora import LoraLinear
from model import Decoder
from options.errors import located
from quant.linear import QuantLinear

EMBEDDING, HEAD = "embed_tokens", "lm_head"


class Adapter:
    """A PEFT adapter, ready to be merged into one tensor at a time. Reading it checks everything against the
    model's shapes: UserError names the first tensor that does not fit."""

    def __init__(self, config: ModelConfig, folder: Path):
        # read as if the head had a weight of its own: an adapter may give it one
        untied = replace(config, tied_head=False)
        skeleton = Decoder(untied, device="meta")  # shapes only
        self.file = read_adapter(folder, skeleton)
        self.layers: dict[str, LoraLinear] = {}
        for module, parts in self.file.modules.items():
            if "lora_A" in parts or "lora_B" in parts:
                self.layers[module] = adapted_linear(skeleton, module, self.file, torch.float32)
            for part in parts.keys() - ADAPTER_PARTS:
                whole_parameter(skeleton, f"{module}.{part}", parts[part], self.file)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """One of the model's tensors after this adapter; fp32 where an update was added."""
        module, _, part = name.rpartition(".")
        parts = self.file.modules.get(module, {})
        if part in parts:  # trained in full; or, where the head has an adapter, the base that peft stores
            tensor = parts[part].to(tensor.device)
        return self._merged(module, parts, tensor) if module in self.layers and part == "weight" else tensor

    def _merged(self, module: str, parts: dict[str, Tensor], weight: Tensor) -> Tensor:
        layer = self.layers[module]
        shape_only = layer.base.weight
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
        for part in parts.keys() & ADAPTER_PARTS:
            values = parts[part].to(weight.device, torch.float32)
            setattr(layer, part.lower(), nn.Parameter(values, requires_grad=False))
        merged = layer.merged_weight()
        layer.base.weight = shape_only
        if not torch.isfinite(merged).all():
            raise self.file.fault(f"the merged {module} is not finite, so the adapter is broken")
        return merged

    @property
    def unties(self) -> bool:
        """Whether a tied head and the embedding differ after this adapter, as peft reads it: a module that it
        does not name keeps the base's weight. Both trained in full and equal is how a tied pair is stored."""
        embedding, head = self.file.modules.get(EMBEDDING, {}), self.file.modules.get(HEAD, {})
        if not head and (not embedding or self.file.config.get("ensure_weight_tying")):
            return False
        pair = "weight" in embedding and "weight" in head
        return not (pair and torch.equal(embedding["weight"], head["weight"]))


class Merge:
    """The base model's tensors with every adapter applied, dense, one at a time."""

    def __init__(self, config: ModelConfig, adapters: list[Adapter], dtype, device, quantization=None):
        """dtype: None = each tensor's own. quantization: a Format, to put a 16-bit base's linears into codes
        first, as training did."""
        self.config, self.adapters, self.dtype, self.device = config, adapters, dtype, device
        self.quantization = quantization
        self.unties = config.tied_head and any(adapter.unties for adapter in adapters)
        skeleton = Decoder(config, device="meta")
        self.shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        self.linears = set(block_linears(skeleton))

    def size_bytes(self) -> int:
        """What the files will take: an estimate by the checkpoint's own dtype where none is asked for."""
        numbers = sum(torch.Size(shape).numel() for shape in self.hf_shapes().values())
        return numbers * (self.dtype or checkpoint_dtype(self.config)).itemsize

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every tensor that `tensors` gives."""
        shapes = {to_hf_name(self.config, name): shape for name, shape in self.shapes.items()}
        return shapes | ({f"{HEAD}.weight": self.shapes[f"{EMBEDDING}.weight"]} if self.unties else {})

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, merged dense tensor on the CPU), whatever format the base is in. UserError for
        missing, extra and misshapen tensors."""
        for piece in self.pieces(folder):
            yield to_hf_name(self.config, piece.name), piece.rounded(self.dtype)

    def model(self, folder: Path) -> Decoder:
        """The merged model itself, dense."""
        config = replace(self.config, tied_head=False) if self.unties else self.config
        model = Decoder(config, device="meta")
        for piece in self.pieces(folder):
            set_parameter(model, piece.name, nn.Parameter(piece.rounded(self.dtype).to(self.device), False))
        return model.eval()

    def pieces(self, folder: Path) -> Iterator[Piece]:
        """Every tensor of the merged model, not yet rounded, on self.device."""
        for name, value in stream_weights(folder, self.config, checkpoint_dtype(self.config)):
            if isinstance(value, QuantLinear):
                value = value.to(self.device)
                if value.bias is not None:
                    bias = self._merged(f"{name}.bias", value.bias.detach())
                    yield Piece(f"{name}.bias", bias, value.dtype)
                # fp32 until the adapters are in, so that it is rounded once
                weight = self._merged(f"{name}.weight", value.dequantize(torch.float32))
                yield Piece(f"{name}.weight", weight, value.dtype, True, value)
                continue
            tensor, module = value.to(self.device), name.removesuffix(".weight")
            if self.quantization is not None and module in self.linears:
                yield self._first_quantised(name, tensor)
                continue
            yield Piece(name, self._merged(name, tensor), value.dtype)
            if self.unties and name == f"{EMBEDDING}.weight":
                yield Piece(f"{HEAD}.weight", self._merged(f"{HEAD}.weight", tensor), value.dtype)

    def _first_quantised(self, name: str, weight: Tensor) -> Piece:
        """Adapters were trained on the codes, so they belong on these; without any the weight is wanted."""
        if not self.adapters:
            return Piece(name, weight, weight.dtype, True)
        with located(name):
            base = self.quantization.quantise(weight, None, weight.dtype)
        return Piece(name, self._merged(name, base.dequantize(torch.float32)), weight.dtype, True, base)

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        for adapter in self.adapters:
            tensor = adapter.apply(name, tensor)
        return tensor
