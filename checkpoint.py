"""Reading and writing models and adapters in the layouts of the ecosystem: safetensors, Hugging Face, PEFT.

Loading is strict: every tensor of the model is set exactly once and every tensor of the files is used or named in a
drop rule (architectures.py). Tensors stream one at a time from the memory-mapped file -> cast -> device, so the host
never holds a second copy of the model. Nothing is ever unpickled.

    model = load_model("models/SmolLM2-135M-Instruct", dtype=torch.bfloat16)
    save_model(model, "out", source_folder="models/SmolLM2-135M-Instruct", shard_gigabytes=5)
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from architectures import ModelConfig, config_from_hf, from_hf_name, scale_rope, to_hf_name
from lora import LoraLinear, LoraOptions, full_modules, lora_layers, merge_for_good, prepare_trainable, replace_module
from model import Decoder, initialize_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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


@dataclass(frozen=True)
class ModelOptions:
    model_name_or_path: Annotated[str | None, "model folder, or a hub id such as Qwen/Qwen2.5-7B"] = None
    adapter_name_or_path: Annotated[tuple[str, ...], "adapter folders; all but the last are merged"] = ()
    model_revision: Annotated[str, "branch, tag or commit of a hub model"] = "main"
    cache_dir: Annotated[str | None, "where hub downloads are kept"] = None
    hf_hub_token: Annotated[str | None, "token for gated Hugging Face models"] = None
    ms_hub_token: Annotated[str | None, "token for ModelScope (with USE_MODELSCOPE_HUB=1)"] = None
    rope_scaling: Annotated[
        Literal["none", "linear", "dynamic", "yarn", "llama3"] | None, "stretch the rotary embedding to longer texts"
    ] = None
    infer_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "dtype for chat and export; auto = the checkpoint's"
    ] = "auto"


# Finding the folder


def resolve_model(options: ModelOptions) -> Path:
    """The local folder of `model_name_or_path`, downloaded from a hub first if it is an id. Raises ValueError."""
    name = options.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path: missing; give a model folder or a hub id such as Qwen/Qwen2.5-0.5B")
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ValueError(f"model_name_or_path: {name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"model_name_or_path: no folder {name}, and it is not a hub id (owner/name) either")
    if os.environ.get("USE_MODELSCOPE_HUB", "0") in ("1", "true", "True"):
        return _download_modelscope(name, options)
    return _download_hugging_face(name, options)


def _download_hugging_face(name: str, options: ModelOptions) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=options.model_revision,
            cache_dir=options.cache_dir,
            token=options.hf_hub_token,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model_name_or_path: no folder {name} here, and it could not be fetched from the Hugging Face hub at "
            f"revision {options.model_revision} ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return Path(folder)


def _download_modelscope(name: str, options: ModelOptions) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise ValueError(
            f"model_name_or_path: USE_MODELSCOPE_HUB is set and {name} is no local folder: pip install modelscope"
        ) from error
    if options.ms_hub_token:
        HubApi().login(options.ms_hub_token)
    revision = "master" if options.model_revision == "main" else options.model_revision
    return Path(snapshot_download(name, revision=revision, cache_dir=options.cache_dir))


# Reading a model


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError names the file and the line."""
    if not path.is_file():
        raise ValueError(f"{path}: file not found; is {path.parent} a complete model or adapter folder?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); the file is damaged, fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def load_config(folder: str | Path) -> ModelConfig:
    """Switches of the model in this folder; ValueError names the file."""
    path = Path(folder) / "config.json"
    try:
        return config_from_hf(read_json(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{Path(folder)}/{text}") from error


def checkpoint_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that config.json names (`dtype` or the older `torch_dtype`); fp32 if it names none."""
    name = config.hf.get("dtype") or config.hf.get("torch_dtype") or "float32"
    return DTYPES.get(str(name).removeprefix("torch."), torch.float32)


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
    missing = dict(model.named_parameters())
    for file, hf_name, tensor in stream_tensors(folder):
        name = from_hf_name(config, hf_name)
        if name is None:
            continue
        if name not in missing:
            known = name in dict(model.named_parameters())
            fault = "stands twice in the files" if known else "has no place in the model that config.json describes"
            raise ValueError(f"{file}: tensor {hf_name} {fault}")
        expected = tuple(missing.pop(name).shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{file}: tensor {hf_name} has shape {tuple(tensor.shape)}, config.json asks for {expected}")
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


def stream_tensors(folder: str | Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """(file, name, tensor) of every tensor in the folder's safetensors files, one at a time, memory-mapped."""
    for path in weight_files(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    yield path, name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error}); fetch it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; ValueError with the way out for folders that have none."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX}: key weight_map missing; fetch the file again")
        names = sorted(set(index["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{folder / INDEX}: {name} points outside the folder; refused")
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: named in {INDEX} but not there; the download is incomplete")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise ValueError(
            f"{folder}: only {pickles[0]} found. A .bin file is a pickle, which can run any code when it is read, so it "
            "is refused. Take the model's safetensors revision, or convert it once in an environment you trust: "
            "transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder}: holds an adapter, not a model; give it as adapter_name_or_path")
    raise ValueError(f"{folder}: no {SINGLE} or {INDEX}; is it a model folder?")


# Writing a model


def save_model(model: Decoder, folder: str | Path, source_folder: str | Path | None, shard_gigabytes: float = 5.0) -> None:
    """Write the decoder in Hugging Face layout: shards, index, config.json, and the source's tokenizer files."""
    config = model.config
    tensors = ((to_hf_name(config, name), tensor) for name, tensor in model_tensors(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = write_shards(folder, tensors, shard_gigabytes)
    write_model_json(folder, dict(config.hf), dtype)
    if source_folder is not None:
        copy_side_files(Path(source_folder), folder)


def model_tensors(model: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a decoder without adapters; with adapters every linear's merged weight."""
    layers = lora_layers(model)
    for name, parameter in model.named_parameters():
        owner = next((layer for layer in layers if name.startswith(layer + ".")), None)
        if owner is None:
            yield name, parameter.detach()
        elif name == f"{owner}.base.weight":
            yield f"{owner}.weight", layers[owner].merged_weight().detach()
        elif name == f"{owner}.base.bias":
            yield f"{owner}.bias", parameter.detach()


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_gigabytes: float) -> torch.dtype:
    """Write (name, tensor) pairs as safetensors shards of at most this many GB (1e9 bytes); give back their main dtype.

    Only one shard is held in memory. One shard -> model.safetensors, more -> numbered files and an index.
    """
    limit = shard_gigabytes * 1e9
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = 0
    bytes_of: dict[torch.dtype, int] = {}

    def flush() -> None:
        path = folder / f".shard-{len(shards):05d}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        shards.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + size
        if held and held_bytes + size > limit:
            flush()
            held_bytes = 0
        held[name] = tensor.cpu().contiguous()
        held_bytes += size
        total_bytes += size
    flush()
    dtype = max(bytes_of, key=bytes_of.get)
    for stale in [*folder.glob("model-*.safetensors"), folder / SINGLE, folder / INDEX]:
        stale.unlink(missing_ok=True)
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return dtype
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return dtype


def write_model_json(folder: Path, hf: dict, dtype: torch.dtype) -> None:
    """config.json with the dtype of the weights."""
    hf.pop("torch_dtype", None)
    hf["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer files, chat template and generation_config.json."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


# Adapters in PEFT's format


PEFT_PREFIX = "base_model.model."

# Settings of peft's LoRA that change the mathematics and are not built here: key -> the value that means "off".
UNSUPPORTED_ADAPTER_KEYS = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "megatron_config": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def save_adapter(model: Decoder, folder: str | Path, base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = lora_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapter")
    first = next(iter(layers.values()))
    full = [to_hf_name(model.config, f"{name}.weight").removesuffix(".weight") for name in full_modules(model)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout_probability,
        "target_modules": _peft_targets(model, layers),
        "modules_to_save": full or None,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "use_rslora": first.rslora,
        "use_dora": first.magnitude is not None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    save_file(adapter_state(model), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft_targets(model: Decoder, layers: dict[str, LoraLinear]) -> list[str]:
    """The short names if every linear of that name has an adapter, else the full names of those that do."""
    short = {name.rpartition(".")[2] for name in layers}
    kinds = (torch.nn.Linear, LoraLinear)
    same_name = {n for n, m in model.named_modules() if isinstance(m, kinds) and n.rpartition(".")[2] in short}
    if same_name == set(layers):
        return sorted(short)
    return [to_hf_name(model.config, f"{name}.weight").removesuffix(".weight") for name in layers]


def adapter_state(model: Decoder) -> dict[str, torch.Tensor]:
    """Tensors of a model's adapter under PEFT's names, fully trained modules included."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_tensors(model)}


def _adapter_tensors(model: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """(PEFT's name, our parameter) of everything that belongs to the adapter."""
    for name, layer in lora_layers(model).items():
        full = PEFT_PREFIX + to_hf_name(model.config, f"{name}.weight").removesuffix(".weight")
        yield f"{full}.lora_A.weight", layer.lora_a
        yield f"{full}.lora_B.weight", layer.lora_b
        if layer.magnitude is not None:
            yield f"{full}.lora_magnitude_vector", layer.magnitude
    for module in full_modules(model):
        for name, parameter in model.get_submodule(module).named_parameters(recurse=False):
            yield PEFT_PREFIX + to_hf_name(model.config, f"{module}.{name}"), parameter


def load_adapter(
    model: Decoder,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    dropout_probability: float = 0.0,
) -> None:
    """Wrap the model's linears with the PEFT adapter in this folder; it trains, everything else is frozen.

    Which linears: those the file has tensors for. Fully trained modules (modules_to_save) replace the model's. Raises
    ValueError naming file and key when the adapter is of another kind or another model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    model.requires_grad_(False)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_adapter_tensors(folder).items():
        module, part = split_adapter_name(model.config, key, folder)
        found.setdefault(module, {})[part] = tensor
    for module, parts in found.items():
        if "lora_A" in parts or "lora_B" in parts:
            _attach(model, module, parts, config, folder, (dtype, dropout_probability))
            continue
        for part, tensor in parts.items():
            parameter = _parameter(model, f"{module}.{part}", folder)
            _check_shape(folder, f"{module}.{part}", tensor, parameter)
            parameter.data.copy_(tensor)
            parameter.requires_grad_(True)


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json of a LoRA adapter; ValueError for what would silently mean something else here."""
    if not folder.is_dir():
        raise ValueError(f"adapter_name_or_path: no folder {folder}")
    config = read_json(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA adapters are known")
    for key, off in UNSUPPORTED_ADAPTER_KEYS.items():
        if config.get(key, off) not in (off, None, False, [], {}):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; merge that adapter with peft first")
    return config


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder}: only adapter_model.bin found, a pickle, which can run any code when it is read; load it once "
                "with peft in an environment you trust and save it again (peft writes safetensors)"
            )
        raise ValueError(f"{path}: file not found; is {folder} a complete adapter folder?")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); fetch it again") from error


def split_adapter_name(config: ModelConfig, key: str, folder: Path) -> tuple[str, str]:
    """PEFT's tensor name -> (our module name, lora_A | lora_B | magnitude | weight | bias)."""
    if not key.startswith(PEFT_PREFIX):
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: tensor {key} does not start with {PEFT_PREFIX}")
    name = key.removeprefix(PEFT_PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    for ending, part in (
        (".lora_A.weight", "lora_A"),
        (".lora_B.weight", "lora_B"),
        (".lora_magnitude_vector", "magnitude"),
        (".lora_magnitude_vector.weight", "magnitude"),
    ):
        if name.endswith(ending):
            module = from_hf_name(config, name.removesuffix(ending) + ".weight")
            return (module or "lm_head.weight").removesuffix(".weight"), part
    if ".lora_" in name:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: tensor {key} is of a kind of adapter that is not supported")
    ours = from_hf_name(config, name)
    if ours is None:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {key} trains a head of its own, but this model's head is tied")
    module, _, part = ours.rpartition(".")
    return module, part


def adapter_scale_alpha(config: dict, module: str) -> float:
    """lora_alpha of this module, by alpha_pattern (matched at the end of the name) or the common value."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith("." + pattern) or pattern.endswith("." + module):
            return float(alpha)
    return float(config.get("lora_alpha") or 8)


def _attach(model: Decoder, module: str, parts: dict, config: dict, folder: Path, kind: tuple) -> None:
    dtype, dropout_probability = kind
    weights = folder / ADAPTER_WEIGHTS
    missing = {"lora_A", "lora_B"} - parts.keys()
    if config.get("use_dora"):
        missing |= {"magnitude"} - parts.keys()
    if missing:
        raise ValueError(f"{weights}: {module} lacks {', '.join(sorted(missing))}; the file is incomplete")
    try:
        base = model.get_submodule(module)
    except AttributeError as error:
        raise ValueError(
            f"{weights}: adapts {module}, which this model does not have; the adapter was trained on "
            f"{config.get('base_model_name_or_path') or 'another model'}"
        ) from error
    if not hasattr(base, "in_features"):
        raise ValueError(f"{weights}: adapts {module}, a {type(base).__name__}; only linears are supported")
    layer = LoraLinear(
        base,
        parts["lora_A"].shape[0],
        adapter_scale_alpha(config, module),
        dropout_probability=dropout_probability,
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        dtype=dtype,
    )
    pairs = [("lora_A", layer.lora_a), ("lora_B", layer.lora_b), ("magnitude", layer.magnitude)]
    for part, parameter in pairs:
        if parameter is not None:
            _check_shape(folder, f"{module}.{part}", parts[part], parameter)
            parameter.data.copy_(parts[part])
    replace_module(model, module, layer.train(model.training))


def _parameter(model: Decoder, name: str, folder: Path) -> torch.nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {name} has no place in this model") from error


def _check_shape(folder: Path, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    if tuple(tensor.shape) != tuple(parameter.shape):
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS}: {name} has shape {tuple(tensor.shape)}, this model asks for "
            f"{tuple(parameter.shape)}; the adapter was trained on another model"
        )


def prepare_adapters(
    model: Decoder,
    folders: Iterable[str],
    options: LoraOptions,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Set what trains, starting from the given adapters: all but the last are merged, the last trains on.

    With options.create_new_adapter all are merged and a fresh one is added; without folders see lora.prepare_trainable.
    """
    folders = list(folders)
    merged = folders if options.create_new_adapter else folders[:-1]
    for folder in merged:
        load_adapter(model, folder)
        merge_for_good(model)
    if folders and not options.create_new_adapter:
        load_adapter(model, folders[-1], dtype, options.lora_dropout)
    else:
        prepare_trainable(model, options, generator, dtype)


def merge_adapters(model: Decoder, folders: Iterable[str]) -> None:
    """For inference: every adapter merged into the weights, in order."""
    for folder in folders:
        load_adapter(model, folder)
        if lora_layers(model):
            merge_for_good(model)
    model.requires_grad_(False)


def save_trained(model: Decoder, folder: Path, source_folder: Path, base_name: str, shard_gigabytes: float = 5.0) -> None:
    """What training changed: the adapter if there is one, else the whole model."""
    if lora_layers(model):
        save_adapter(model, folder, base_name)
    else:
        save_model(model, folder, source_folder, shard_gigabytes)


@torch.no_grad()
def restore_trained(model: Decoder, folder: Path) -> None:
    """Copy back what save_trained wrote, into a model that was prepared the same way. Raises ValueError."""
    if lora_layers(model):
        tensors, targets = read_adapter_tensors(folder).items(), dict(_adapter_tensors(model))
    else:
        tensors = ((name, tensor) for _, name, tensor in stream_tensors(folder))
        targets = {to_hf_name(model.config, name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in tensors:
        if name not in targets:
            raise ValueError(f"{folder}: tensor {name} is not part of what this run trains; was another option changed?")
        target = targets.pop(name)
        if target.shape != tensor.shape:
            raise ValueError(f"{folder}: tensor {name} has shape {tuple(tensor.shape)}, this run has {tuple(target.shape)}")
        target.copy_(tensor)
    if targets:
        raise ValueError(f"{folder}: tensor {next(iter(targets))} is missing; was lora_target changed since?")
