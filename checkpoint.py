"""Reading and writing models in the Hugging Face layout, and what a run trained.

Loading is strict: every tensor of the model is set exactly once and every tensor of the files is used or named in a
drop rule (architectures.py). Tensors stream one at a time from the memory-mapped file -> cast -> device, so the host
never holds a second copy of the model. The files themselves: tensor_files.py; adapters: adapter_files.py; downloads:
hub.py. Their public names can be had from here too.

    model = load_model("models/SmolLM2-135M-Instruct", dtype=torch.bfloat16)
    save_model(model, "out", source_folder="models/SmolLM2-135M-Instruct", shard_gigabytes=5)
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_parameters,
    adapter_scale_alpha,
    adapter_state,
    load_adapter,
    merge_adapters,
    prepare_adapters,
    read_adapter,
    read_adapter_config,
    read_adapter_tensors,
    save_adapter,
    split_adapter_name,
)
from architectures import ModelConfig, config_from_hf, from_hf_name, scale_rope, to_hf_name
from hub import ModelOptions, resolve_adapters, resolve_model
from lora import lora_layers
from model import Decoder, initialize_weights
from tensor_files import read_json, staged, stream_tensors, weight_files, write_json, write_shards

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "DTYPES",
    "ModelOptions",
    "adapter_scale_alpha",
    "adapter_state",
    "checkpoint_dtype",
    "copy_side_files",
    "load_adapter",
    "load_config",
    "load_model",
    "merge_adapters",
    "model_tensors",
    "prepare_adapters",
    "random_model",
    "read_adapter",
    "read_adapter_config",
    "read_adapter_tensors",
    "read_json",
    "resolve_adapters",
    "resolve_model",
    "restore_trained",
    "save_adapter",
    "save_model",
    "save_trained",
    "set_parameter",
    "split_adapter_name",
    "stream_tensors",
    "weight_files",
    "write_model_json",
    "write_shards",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Beside the weights a model folder holds these; they are copied when a model is saved.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


# Reading


def load_config(folder: str | Path) -> ModelConfig:
    """Switches of the model in this folder; ValueError names the file."""
    path = Path(folder) / "config.json"
    hf = read_json(path)
    try:
        return config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{Path(folder)}/{error}") from error  # the message starts with config.json


def checkpoint_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that config.json names (`dtype` or the older `torch_dtype`); fp32 if it names none."""
    name = str(config.hf.get("dtype") or config.hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"config.json: dtype {name!r} is not one of {', '.join(DTYPES)}; choose one (infer_dtype)")
    return DTYPES[name]


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    rope_scaling: str | None = None,
    cutoff_len: int | None = None,
) -> Decoder:
    """The decoder in this folder with weights in `dtype` (None = the checkpoint's own) on `device`, in eval mode.

    rope_scaling, cutoff_len: see architectures.scale_rope. Raises ValueError for missing, extra, misshapen tensors.
    """
    config = load_config(folder)
    if rope_scaling:
        config = scale_rope(config, rope_scaling, cutoff_len)
    dtype = dtype or checkpoint_dtype(config)
    model = Decoder(config, dtype=dtype, device="meta")
    known = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = dict(known)
    for file, hf_name, tensor in stream_tensors(folder):
        name = from_hf_name(config, hf_name)
        if name is None:
            continue
        if name not in missing:
            fault = "stands twice in the files" if name in known else "has no place in the model of config.json"
            raise ValueError(f"{file}: tensor {hf_name} {fault}")
        expected = missing.pop(name)
        if tuple(tensor.shape) != expected:
            found = tuple(tensor.shape)
            raise ValueError(f"{file}: tensor {hf_name} has shape {found}, config.json asks for {expected}")
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: tensor {hf_name} is {tensor.dtype}; quantised files are not in this version")
        set_parameter(model, name, torch.nn.Parameter(_own(tensor, dtype, device)))
    if missing:
        names = [to_hf_name(config, name) for name in missing]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{folder}: tensors missing from the safetensors files: {', '.join(names[:4])}{more}")
    return model.eval()


def random_model(folder: str | Path, dtype: torch.dtype, device: str | torch.device, seed: int) -> Decoder:
    """Fresh weights for the config.json in this folder (option train_from_scratch)."""
    model = Decoder(load_config(folder), dtype=dtype, device=device)
    initialize_weights(model, torch.Generator(device=device).manual_seed(seed))
    return model.eval()


def set_parameter(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Put a parameter in the place of the one with this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, parameter)


def _own(tensor: torch.Tensor, dtype: torch.dtype, device) -> torch.Tensor:
    """A tensor that does not lean on the mapped file: training in place must not write there, files may vanish."""
    moved = tensor.to(device=device, dtype=dtype)
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


# Writing


def save_model(
    model: Decoder, folder: str | Path, source_folder: str | Path | None, shard_gigabytes: float = 5.0
) -> None:
    """Write the decoder in Hugging Face layout: shards, index, config.json, and the source's tokenizer files.

    Adapters are merged on the way. A model that stands in `folder` stays until the new one is written.
    """
    with staged(folder) as staging:
        tensors = ((to_hf_name(model.config, name), tensor) for name, tensor in model_tensors(model))
        dtype = write_shards(staging, tensors, shard_gigabytes)
        write_model_json(staging, model.config.hf, dtype)
        if source_folder is not None:
            copy_side_files(Path(source_folder), staging)


def model_tensors(model: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a decoder without adapters; with adapters every linear's merged weight, in the base's dtype."""
    layers = lora_layers(model)
    for name, parameter in model.named_parameters():
        owner = next((layer for layer in layers if name.startswith(layer + ".")), None)
        if owner is None:
            yield name, parameter.detach()
        elif name == f"{owner}.base.weight":
            yield f"{owner}.weight", layers[owner].merged_weight().to(parameter.dtype)
        elif name == f"{owner}.base.bias":
            yield f"{owner}.bias", parameter.detach()


def write_model_json(folder: str | Path, hf: dict, dtype: torch.dtype) -> None:
    """config.json with the dtype of the weights, under the older key too where the source had it."""
    name = str(dtype).removeprefix("torch.")
    older = {"torch_dtype": name} if "torch_dtype" in hf else {}
    write_json(Path(folder) / "config.json", {**hf, **older, "dtype": name})


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer files, chat template and generation_config.json."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


# What a run trained


def save_trained(
    model: Decoder, folder: Path, source_folder: Path, base_name: str, shard_gigabytes: float = 5.0
) -> None:
    """What training changed: the adapter if there is one, else the whole model."""
    if lora_layers(model):
        save_adapter(model, folder, base_name)
    else:
        save_model(model, folder, source_folder, shard_gigabytes)


@torch.no_grad()
def restore_trained(model: Decoder, folder: Path) -> None:
    """Copy back what save_trained wrote, into a model that was prepared the same way. Raises ValueError."""
    if lora_layers(model):
        tensors, targets = read_adapter_tensors(folder), dict(adapter_parameters(model))
        if model.config.tied_head:
            tensors.pop("base_model.model.lm_head.weight", None)  # the embedding once more, for peft
        tensors = tensors.items()
    else:
        tensors = ((name, tensor) for _, name, tensor in stream_tensors(folder))
        targets = {to_hf_name(model.config, name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in tensors:
        if name not in targets:
            raise ValueError(f"{folder}: tensor {name} is nothing that this run trains; was another option changed?")
        target = targets.pop(name)
        if target.shape != tensor.shape:
            shapes = f"shape {tuple(tensor.shape)}, this run has {tuple(target.shape)}"
            raise ValueError(f"{folder}: tensor {name} has {shapes}; was another option changed?")
        target.copy_(tensor)
    if targets:
        raise ValueError(f"{folder}: tensor {next(iter(targets))} is missing; was lora_target changed since?")
