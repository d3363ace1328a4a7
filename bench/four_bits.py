"""Models in 4 bits for the benchmarks: ours with random weights, its 16-bit twin, and transformers' with
bitsandbytes.

All three stand for the same numbers, so their losses and tokens can be compared; codes are in memory once,
since our layers hold what bitsandbytes' do (quant/nf4.py).
"""

import torch
from torch import nn

from architectures.config import ModelConfig, to_hf_name
from lora import replace_module
from model import Decoder
from quant.linear import QuantLinear
from quant.nf4 import NF4Format, NF4Linear

FORMAT = NF4Format("nf4", True)


def random_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Decoder:
    """Random weights, the blocks' linears in NF4 with double quantisation. Made block by block: a model of
    140 GB in 16 bits never takes more than its 4-bit size and one block."""
    model = Decoder(config, dtype=dtype, device="meta")
    generator = torch.Generator(device).manual_seed(seed)
    for module in [
        model.embed_tokens,
        model.norm,
        *([] if config.tied_head else [model.lm_head]),
        *model.layers,
    ]:
        module.to_empty(device=device)
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
            elif parameter.dim() == 1:
                parameter.data.fill_(1.0)
            else:
                parameter.data.normal_(0.0, config.initializer_range, generator=generator)
        if module in model.layers:
            quantise_linears(module, dtype)
    return model.requires_grad_(False).eval()


def quantise_linears(block: nn.Module, dtype: torch.dtype) -> None:
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            bias = None if linear.bias is None else linear.bias.detach()
            replace_module(block, name, FORMAT.quantise(linear.weight.detach(), bias, dtype))


def dense_twin(model: Decoder) -> Decoder:
    """The same numbers in 16 bits, without adapters; what is not quantised is shared."""
    twin = Decoder(model.config, dtype=model.embed_tokens.weight.dtype, device="meta")
    tensors = plain_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            tensors[f"{without_base(name)}.weight"] = module.dequantize()
    twin.load_state_dict(tensors, assign=True)
    return twin.requires_grad_(False).eval()


def plain_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """Parameters by the names that they have without adapters, and without the adapters' own."""
    named = ((without_base(name), parameter.detach()) for name, parameter in model.named_parameters())
    return {name: tensor for name, tensor in named if not name.endswith((".lora_a", ".lora_b"))}


def without_base(name: str) -> str:
    return name.replace(".base.", ".").removesuffix(".base")


def packed_bytes(model: Decoder) -> int:
    """Of all codes and scales."""
    return sum(module.storage_bytes for module in model.modules() if isinstance(module, QuantLinear))


def take_linears(baseline: nn.Module, model: Decoder, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers, around the codes of ours, into transformers' model; dtype: of their
    products."""
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            path = to_hf_name(model.config, f"{without_base(name)}.weight").removesuffix(".weight")
            replace_module(baseline, path, linear_4bit(layer, dtype))
    baseline.is_loaded_in_4bit = True  # how peft finds out


def codes_and_state(layer: NF4Linear) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The codes, and what bitsandbytes makes a QuantState of."""
    tensors = layer.tensors()
    codes = tensors.pop("weight")
    return codes, {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}


def linear_4bit(layer: NF4Linear, dtype: torch.dtype):
    from bitsandbytes.nn import Linear4bit, Params4bit

    codes, state = codes_and_state(layer)
    kind = {"compute_dtype": dtype, "quant_type": layer.format.table, "device": "meta"}
    linear = Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, **kind)
    linear.weight = Params4bit.from_prequantized(codes, state, device=codes.device, module=linear)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias, requires_grad=False)
    return linear
