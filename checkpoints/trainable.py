"""What trains: adapters (lora.py), some layers (freeze) or everything (full); and what to say of it.

prepare_trainable(model, LoraOptions(lora_rank=16), torch.Generator().manual_seed(42))
print(trainable_report(model))
"""

import torch
from torch import nn

from architectures.find import ends_with, find_modules, inside, last_name
from lora import LoraOptions, add_lora
from options.errors import UserError, refuse
from parallel.fsdp import whole_shape
from quant.linear import quantised_linears


def prepare_trainable(
    model: nn.Module, options: LoraOptions, generator: torch.Generator | None = None, dtype=torch.float32
) -> None:
    """Set what trains, by options.finetuning_type. dtype is that of new adapters (bf16 under pure_bf16)."""
    kind, quantised = options.finetuning_type, quantised_linears(model)
    if quantised and kind != "lora":
        found = f"{kind}, but the base is quantised ({next(iter(quantised))}, ...): codes have no gradient"
        raise UserError(f"finetuning_type: {found}; set finetuning_type=lora, or start from a 16-bit model")
    if kind == "lora":
        add_lora(model, options, generator, dtype)
    elif kind == "freeze":
        freeze(model, options)
    elif kind == "full":
        model.requires_grad_(True)
    else:
        raise ValueError(f"finetuning_type: {kind!r} is unknown; known are lora, full, freeze")


def freeze(model: nn.Module, options: LoraOptions) -> None:
    """Train name_module_trainable in num_layer_trainable layers and freeze_extra_modules; freeze the rest.

    Raises UserError when there are fewer layers or a name matches nothing.
    """
    stack_name, stack = _layer_stack(model)
    count = options.num_layer_trainable
    refuse(abs(count) > len(stack), f"num_layer_trainable: {count}, but the model has {len(stack)} layers")
    blocks = list(stack)[-count:] if count > 0 else list(stack)[:-count]
    names = [name for name, _ in model.named_modules() if name]
    outside = [name for name in names if not inside(name, [stack_name]) and not inside(stack_name, [name])]
    extra = find_modules(model, options.freeze_extra_modules, "freeze_extra_modules", outside)
    model.requires_grad_(False)
    for name in options.name_module_trainable if blocks else ():
        parts = [part for block in blocks for part in block.named_modules() if part[0]]
        matched = blocks if name == "all" else [module for path, module in parts if ends_with(path, name)]
        if not matched:
            known = ", ".join(sorted({last_name(path) for path, _ in parts}))
            found = f"no module of a layer is called {name!r}"
            raise UserError(f"name_module_trainable: {found}; there are all, {known}")
        for module in matched:
            module.requires_grad_(True)
    for name in extra:
        model.get_submodule(name).requires_grad_(True)


def _layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and ends_with(name, "layers"):
            return name, module
    raise UserError("finetuning_type: freeze needs a model whose layers are an nn.ModuleList called 'layers'")


def trainable_report(model: nn.Module) -> str:
    """'trainable 2,442,240 of 136,957,632 parameters (1.78 %)'; quantised weights by element."""
    trainable = sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
    packed = quantised_linears(model)
    named = model.named_parameters()
    total = sum(whole_shape(parameter).numel() for name, parameter in named if not inside(name, packed))
    for module in packed.values():
        total += module.in_features * module.out_features
        total += 0 if module.bias is None else module.out_features
    return f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / max(1, total):.2f} %)"


def parameter_status(model: nn.Module) -> list[str]:
    """One line per parameter, and per weight that is held in codes: name, shape, dtype or bits, device,
    trained or frozen; in the model's order."""
    rows = []
    codes = {id(number) for layer in quantised_linears(model).values() for number in layer.numbers()}
    for name, p in model.named_parameters():
        if id(p) in codes:  # of a sharded model
            continue
        rows.append((name, whole_shape(p), str(p.dtype).removeprefix("torch."), p.device, p.requires_grad))
    for name, layer in quantised_linears(model).items():
        shape = layer.out_features, layer.in_features
        rows.append((f"{name}.weight", shape, f"{layer.bits_per_weight:.3f} bits", layer.device, False))
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: place[row[0].rpartition(".")[0]])
    return [
        f"{name}  {tuple(shape)}  {kind}  {device}  {'trained' if trains else 'frozen'}"
        for name, shape, kind, device, trains in rows
    ]
