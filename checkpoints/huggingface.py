"""Reading and writing models in the Hugging Face layout, and what a run trained.

Loading is strict: every tensor of the model is set exactly once and every tensor of the files is used or
named in a drop rule (architectures/). Tensors stream one at a time from the memory-mapped file -> cast or
quantise -> device, so the host never holds a second copy of the model. Linears that are quantised in the
files are put together from their parts on the way (quant/).

    model = load_model("models/SmolLM2-135M-Instruct", dtype=torch.bfloat16)
    save_model(model, "out", source_folder="models/SmolLM2-135M-Instruct", shard_gigabytes=5)
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import quant
from architectures import config_from_hf
from architectures.config import ModelConfig, from_hf_name, scale_rope, to_hf_name
from architectures.layers import RMSNorm
from architectures.rope import in_both_spellings
from checkpoints import peft
from checkpoints.safetensors_files import (
    read_json,
    refuse_not_finite,
    staged,
    stream_tensors,
    write_json,
    write_shards,
)
from checkpoints.value_head import PREFIX as VALUE_HEAD_PREFIX
from checkpoints.value_head import load_value_head, save_value_head, value_head_state
from kernels.launch import say_once
from lora import lora_layers, replace_module
from model import Decoder, initialize
from options.errors import UserError, fitting, located, refuse
from options.progress import Bar
from parallel.fsdp import assign, settle, whole, whole_shape
from quant.linear import Format, QuantLinear
from text.tokenizer import TOKENIZER_FILES, Tokenizer, as_ids

EMBEDDING = "embed_tokens.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Reading


def load_config(folder: str | Path) -> ModelConfig:
    """Switches of the model in this folder; UserError names the file. Where the weights are there, they
    decide whether head and embedding are one."""
    path = Path(folder) / "config.json"
    hf = read_json(path)
    try:
        config = config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{Path(folder)}/{error}") from error  # the message starts with config.json
    if not config.tied_head or not _differ(_head_and_embedding(folder, config)):
        return config
    differs = "the head that is stored is not the embedding and is used"
    say_once(f"note: {folder}: {differs}, though config.json ties them (tie_word_embeddings)")
    return replace(config, tied_head=False, hf={**config.hf, "tie_word_embeddings": False})


def _head_and_embedding(folder: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """What the files of a tied model hold of the two, by our names; no numbers are read. Files that cannot
    be read are told of by who reads the weights."""
    untied, pair = replace(config, tied_head=False), {}
    try:
        for _, hf_name, tensor in stream_tensors(folder):
            name = from_hf_name(untied, hf_name) or ""
            if name == EMBEDDING or name.startswith("lm_head."):
                pair[name] = tensor
    except UserError:
        return {}
    return pair


def _differ(pair: dict[str, Tensor]) -> bool:
    """Whether head and embedding are both stored and not the same: as transformers 5, the numbers count."""
    if len(pair) < 2 or EMBEDDING not in pair:
        return False
    head, embedding = pair.get("lm_head.weight"), pair[EMBEDDING]
    if head is None or len(pair) > 2:
        return True  # one of them is in codes
    common = torch.promote_types(head.dtype, embedding.dtype)
    return not torch.equal(head.to(common), embedding.to(common))


def checkpoint_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that config.json names (`dtype` or the older `torch_dtype`); fp32 if it names none."""
    name = str(config.hf.get("dtype") or config.hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"config.json: dtype {name!r} is not one of {known}; choose one (infer_dtype)")
    return DTYPES[name]


@fitting("the model", "take a smaller one, or set quantization_bit=4")
def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    rope_scaling: str | None = None,
    cutoff_len: int | None = None,
    quantization: Format | None = None,
    norm_dtype: torch.dtype | None = None,
) -> Decoder:
    """The decoder in this folder, weights in `dtype` (None = the checkpoint's own) on `device`, in eval mode.

    quantization: quantise the linears of the blocks while they are read; `dtype` is then that of the values
    they stand for. A checkpoint that is quantised stays in its format, but for its head. norm_dtype: that of
    the norms' weights; None = `dtype`. rope_scaling, cutoff_len: see architectures.scale_rope. Raises
    UserError for missing, extra, misshapen tensors, and for quantising what is quantised.
    """
    config, dtype = as_read(folder, dtype, rope_scaling, cutoff_len, quantization)
    model = Decoder(config, dtype=dtype, device="meta")
    inside = block_linears(model)
    weights = stream_weights(folder, config, dtype)
    if quantization is not None:
        total = len(list(model.parameters()))
        weights = Bar(weights, "quantising", total, unit="tensor")
    biases: dict[str, Tensor] = {}
    for name, value in weights:
        owner = name.rpartition(".")[0]
        if isinstance(value, QuantLinear) and name not in inside:  # head, embedding
            set_parameter(model, f"{name}.weight", nn.Parameter(value.to(device).dequantize(dtype)))
        elif isinstance(value, QuantLinear):
            for part, number in value.named_buffers():
                setattr(value, part, _own(number, number.dtype, device))
            replace_module(model, name, value.to(device))
        elif quantization is not None and owner in inside and name.endswith(".bias"):
            biases[owner] = _own(value, dtype, device)
        elif quantization is not None and owner in inside:
            with located(f"{folder}: tensor {to_hf_name(config, name)}"):
                replace_module(model, owner, quantization.quantise(value.to(device), None, dtype))
        else:
            norm = norm_dtype and isinstance(model.get_submodule(owner), RMSNorm)
            moved = _own(value, norm_dtype if norm else dtype, device)
            set_parameter(model, name, nn.Parameter(moved))
    for name, bias in biases.items():
        model.get_submodule(name).bias = nn.Parameter(bias, requires_grad=False)
    return model.eval()


def as_read(folder, dtype, rope_scaling, cutoff_len, quantization) -> tuple[ModelConfig, torch.dtype]:
    """The switches and the dtype that load_model reads with, of what it is given. Raises UserError."""
    config = load_config(folder)
    if rope_scaling:
        config = scale_rope(config, rope_scaling, cutoff_len)
    stored = config.hf.get("quantization_config")
    if quantization is not None and stored:
        method = stored.get("quant_method")
        raise UserError(f"quantization_bit: {folder} is quantised already ({method}); drop quantization_bit")
    return config, dtype or checkpoint_dtype(config)


def block_linears(model: Decoder) -> list[str]:
    """Names of the linears that are quantised: all of the blocks."""
    modules = model.layers.named_modules(prefix="layers")
    return [name for name, module in modules if isinstance(module, nn.Linear)]


def chosen_quantization(folder: str | Path, wanted: Format | None) -> tuple[Format | None, str | None]:
    """(what load_model shall quantise with, a line for the user or None): what the options want, or nothing
    for a checkpoint in codes, which stays as it is."""
    settings = load_config(folder).hf.get("quantization_config")
    if wanted is None or not settings:
        return wanted, None
    stored = quant.from_config(settings).describe()
    return None, f"quantization_bit: ignored, {folder} is quantised already ({stored})"


def stream_weights(
    folder, config: ModelConfig, dtype, check: Callable[[Tensor, str], None] = refuse_not_finite
) -> Iterator[tuple[str, Tensor | QuantLinear]]:
    """(our name, tensor) of every parameter in the folder's files; (our name of the linear, layer) of every
    linear that is quantised there, as each is complete. Both lean on the mapped file. `dtype` is that of the
    values that layers stand for; check: gets each tensor that is given, and its place, FILE: tensor NAME.

    Raises UserError naming file and tensor for missing, extra and misshapen ones.
    """
    skeleton = Decoder(config, device="meta")
    known = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    packed = _Packed(folder, config, known, dtype)
    missing = {name: shape for name, shape in known.items() if name.rpartition(".")[0] not in packed.waiting}
    alone = config.tied_head and EMBEDDING not in _head_and_embedding(folder, config)
    for file, hf_name, tensor in stream_tensors(folder):
        name = EMBEDDING if alone and hf_name == "lm_head.weight" else from_hf_name(config, hf_name)
        if name is None:
            continue
        place = f"{file}: tensor {hf_name}"
        if (owner := packed.owner(name)) is not None:
            if (layer := packed.add(owner, name, tensor, place)) is not None:
                yield owner, layer
            continue
        if (expected := missing.pop(name, None)) is None:
            fault = "has no place in the model of config.json"
            raise UserError(f"{place} {'stands twice in the files' if name in known else fault}")
        if (found := tuple(tensor.shape)) != expected:
            codes = packed.format is not None and not tensor.is_floating_point()
            more = f", or for a quantised one, whose {packed.format.marker} is missing" if codes else ""
            raise UserError(f"{place} has shape {found}, config.json asks for {expected}{more}")
        if not tensor.is_floating_point():
            fault = f"is {tensor.dtype}, not floating point; config.json says nothing of a quantised model"
            raise UserError(f"{place} {fault} (quantization_config), or not of this tensor")
        check(tensor, place)
        yield name, tensor
    missing |= {f"{name}.{part}": () for name, parts in packed.waiting.items() for part in parts}
    if missing:
        names = [to_hf_name(config, name) for name in missing]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise UserError(f"{folder}: tensors missing from the safetensors files: {', '.join(names[:4])}{more}")


class _Packed:
    """The linears that a folder's files hold in a quantised format: collects the tensors of each.

    waiting: our name of the linear -> the parts of its tensors' names that are still to come.
    """

    def __init__(self, folder: str | Path, config: ModelConfig, known: dict[str, tuple], dtype: torch.dtype):
        self.config, self.known, self.dtype = config, known, dtype
        self.waiting: dict[str, set[str]] = {}
        self._held: dict[str, dict[str, Tensor]] = {}
        settings = config.hf.get("quantization_config")
        self.format = quant.from_config(settings) if settings else None
        if self.format is None:
            return
        linears = [name.removesuffix(".weight") for name, shape in known.items() if len(shape) == 2]
        names = [from_hf_name(config, name) for _, name, _ in stream_tensors(folder)]  # no numbers are read
        marked = {name.removesuffix(f".{self.format.marker}") for name in names if name is not None}
        self.waiting = {name: set() for name in linears if name in marked}
        for name in names:
            if name is not None and (owner := self.owner(name)) is not None:
                self.waiting[owner].add(name.removeprefix(f"{owner}."))

    def owner(self, name: str) -> str | None:
        """The quantised linear that this tensor (our name) is a part of."""
        parts = name.split(".")
        heads = (".".join(parts[:count]) for count in range(1, len(parts)))
        return next((head for head in heads if head in self.waiting), None)

    def add(self, owner: str, name: str, tensor: Tensor, place: str) -> QuantLinear | None:
        """Take one tensor, which stands at `place` (FILE: tensor NAME); the layer if it was the last one."""
        part = name.removeprefix(f"{owner}.")
        refuse(part not in self.waiting[owner], f"{place} stands twice in the files")
        self.waiting[owner].remove(part)
        held = self._held.setdefault(owner, {})
        held[part] = tensor
        if self.waiting[owner]:
            return None
        del self._held[owner]
        linear = place.removesuffix(part)
        bias = self._bias(owner, held, f"{linear}bias")
        try:
            return self.format.read(held, self.known[f"{owner}.weight"], bias, self.dtype)
        except UserError as error:
            raise UserError(f"{linear}{error}") from error

    def _bias(self, owner: str, held: dict[str, Tensor], place: str) -> Tensor | None:
        bias, expected = held.pop("bias", None), self.known.get(f"{owner}.bias")
        if expected is None and (bias is None or not bias.any()):
            return None  # some quantisers write a bias of zeros for every linear
        found = None if bias is None else tuple(bias.shape)
        refuse(found != expected, f"{place}: {found}, expected {f'shape {expected}' if expected else 'none'}")
        refuse(not bias.is_floating_point(), f"{place} is {bias.dtype}, not floating point")
        refuse_not_finite(bias, place)
        return bias.clone()


def random_model(folder: str | Path, dtype: torch.dtype, device: str | torch.device, seed: int) -> Decoder:
    """Fresh weights for the config.json in this folder (option train_from_scratch)."""
    model = Decoder(load_config(folder), dtype=dtype, device="meta")
    for name, weight in random_weights(model.config, dtype, device, seed):
        set_parameter(model, name, nn.Parameter(weight))
    return model.eval()


def random_weights(config: ModelConfig, dtype, device, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each fresh weight, one at a time."""
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in Decoder(config, dtype=dtype, device="meta").named_parameters():
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        initialize(name, weight, config, generator)
        yield name, weight


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one with this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, parameter)


def _own(tensor: Tensor, dtype: torch.dtype, device) -> Tensor:
    """A tensor that does not lean on the mapped file: training writes in place, and files may vanish."""
    moved = tensor.to(device=device, dtype=dtype)
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


# Writing


def save_model(
    model: Decoder, folder: str | Path, source_folder: str | Path | None, shard_gigabytes: float = 5.0
) -> None:
    """Write the decoder in Hugging Face layout: shards, index, config.json, and the source's tokenizer files.

    Quantised linears are written in their format's layout, adapters are merged on the way (into 16 bit where
    the base is quantised). A model that stands in `folder` stays until the new one is written.
    """
    tensors = ((to_hf_name(model.config, name), tensor) for name, tensor in model_tensors(model))
    about = model.config.hf, model.embed_tokens.weight.dtype, model_format(model)
    write_model(folder, tensors, about, source_folder, shard_gigabytes)


def write_model(folder, tensors: Iterator, about: tuple, source_folder, shard_gigabytes: float = 5.0) -> None:
    """save_model of these (name in the file, tensor). about: what write_model_json says."""
    try:
        with staged(folder) as staging:
            write_shards(staging, tensors, shard_gigabytes)
            write_model_json(staging, *about)
            if source_folder is not None:
                copy_side_files(Path(source_folder), staging)
    finally:
        deque(tensors, 0)  # where that failed other ranks are still giving their shares of the rest


def model_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a decoder: parameters, the parts of quantised linears; with adapters every linear's
    merged weight, in the base's dtype."""
    layers = lora_layers(model)
    inside = tuple(f"{name}." for name in layers)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and not name.startswith(inside):
            yield from ((f"{name}.{part}", tensor) for part, tensor in module.tensors().items())
    for name, parameter in model.named_parameters():
        if not name.startswith((*inside, VALUE_HEAD_PREFIX)):
            yield name, whole(parameter)
    for name, layer in layers.items():
        base = layer.base
        dtype = base.dtype if isinstance(base, QuantLinear) else base.weight.dtype
        yield f"{name}.weight", layer.merged_weight().to(dtype)
        if base.bias is not None:
            yield f"{name}.bias", base.bias.detach()


def model_format(model: Decoder) -> Format | None:
    """The format of the quantised linears that model_tensors gives; None if it gives none."""
    inside = tuple(f"{name}." for name in lora_layers(model))
    modules = (module for name, module in model.named_modules() if not name.startswith(inside))
    return next((module.format for module in modules if isinstance(module, QuantLinear)), None)


def write_model_json(folder: Path, hf: dict, dtype: torch.dtype, quantization: Format | None) -> None:
    """config.json of the weights that lie in this folder: their dtype, under the older key too where it was
    there, the rope in both spellings, and of a quantised model what is in codes and what is not."""
    name = str(dtype).removeprefix("torch.")
    hf = {key: value for key, value in in_both_spellings(hf).items() if key != "quantization_config"}
    if quantization is not None:
        hf["quantization_config"] = quantization.config_for(dtype, *_written_linears(folder, quantization))
    older = {"torch_dtype": name} if "torch_dtype" in hf else {}
    write_json(folder / "config.json", {**hf, **older, "dtype": name})


def _written_linears(folder: Path, format: Format) -> tuple[list[str], list[str]]:
    """Hugging Face names of a folder's linears: those that are numbers, the head with them, and those in
    codes."""
    sizes = {name: tensor.dim() for _, name, tensor in stream_tensors(folder)}  # no numbers are read
    coded = {name.removesuffix(f".{format.marker}") for name in sizes if name.endswith(f".{format.marker}")}
    weights = {name[:-7] for name, dim in sizes.items() if dim == 2 and name.endswith(".weight")}
    return sorted(weights - coded - {"model.embed_tokens"} | {"lm_head"}), sorted(coded)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer files, chat template and generation_config.json."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)
    copy_generation_config(source, target)


def copy_generation_config(source: Path, target: Path) -> None:
    name = "generation_config.json"
    if (source / name).is_file() and source.resolve() != target.resolve():
        shutil.copyfile(source / name, target / name)


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, words: tuple, chat_template: str | None = None
) -> None:
    """The tokenizer's files. words: what ends an answer of the template (none: what ended texts before), and
    so in every file that other programs look at. chat_template: a text in place of the checkpoint's own."""
    eos, ids = tokenizer.ends(words)
    tokenizer.save(folder, chat_template, None if eos == tokenizer.eos_token else eos)
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        values = read_json(path) if path.is_file() else {}
        nested = values.get("text_config")
        parts = [values, *([nested] if isinstance(nested, dict) and "eos_token_id" in nested else [])]
        wrong = [part for part in parts if ids and set(as_ids(part.get("eos_token_id"))) != set(ids)]
        for part in wrong:
            part["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids)
        # without a config: an adapter
        if wrong and (values.keys() > {"eos_token_id"} or name == "generation_config.json"):
            write_json(path, values)


# What a run trained


def trained(model: Decoder, base_name: str, take: Callable = lambda tensor: tensor) -> Callable:
    """What training changed, the adapter if there is one, else the whole model, to be written by a call with
    (folder, source_folder) on rank 0, and with None as folder on other ranks that hold shares of it. take:
    makes of each tensor what is kept of it until then, as a copy; nothing else of it changes by training."""
    settle(model)
    head = {} if model.v_head is None else value_head_state(model.v_head)
    if adapted := bool(lora_layers(model)):
        about = peft.adapter_config(model, base_name), peft.frozen_parts(model)
        named = peft.adapter_parameters(model)
    else:
        about = model.config.hf, model.embed_tokens.weight.dtype, model_format(model)
        parts = {n: p for n, p in model.named_parameters() if not n.startswith(VALUE_HEAD_PREFIX)}
        named = ((to_hf_name(model.config, name), parameter) for name, parameter in parts.items())
    head, tensors = ({name: take(each) for name, each in pairs} for pairs in (head.items(), named))

    def write(folder: Path | None, source_folder: Path) -> None:
        values = {name: whole(each) for name, each in head.items()}  # all is gathered, whatever the disk does
        if folder is None:
            deque(map(whole, tensors.values()), 0)
        elif adapted:
            peft.write_adapter(folder, peft.adapter_state(tensors, model.config), *about)
        else:
            write_model(folder, ((name, whole(each)) for name, each in tensors.items()), about, source_folder)
        if head and folder is not None:
            save_value_head(values, folder)

    return write


def require_saved(model: Decoder) -> None:
    """UserError where something trains that `trained` does not write: resuming would begin it anew."""
    if not lora_layers(model):
        return  # save_model writes all
    own = model.v_head.parameters() if model.v_head is not None else ()
    kept = {id(parameter) for parameter in (*dict(peft.adapter_parameters(model)).values(), *own)}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    for name in lost[:1]:
        where = "see adapter_parameters in checkpoints/peft.py"
        raise UserError(f"{name} trains, but no checkpoint would hold it; {where}")


@torch.no_grad()
def restore_trained(model: Decoder, folder: Path) -> None:
    """Copy back what `trained` wrote, into a model that was prepared the same way. Raises UserError."""
    settle(model)
    if lora_layers(model):
        tensors, targets = peft.read_adapter_tensors(folder), dict(peft.adapter_parameters(model))
        if model.config.tied_head:
            tensors.pop("base_model.model.lm_head.weight", None)  # the embedding once more, for peft
        tensors = tensors.items()
    else:
        tensors = ((name, tensor) for _, name, tensor in stream_tensors(folder))
        parameters = {n: p for n, p in model.named_parameters() if not n.startswith(VALUE_HEAD_PREFIX)}
        targets = {to_hf_name(model.config, name): parameter for name, parameter in parameters.items()}
    for name, tensor in tensors:
        target, fault = targets.pop(name, None), "is nothing that this run trains"
        if target is not None and (wanted := whole_shape(target)) != tensor.shape:
            target, fault = None, f"has shape {tuple(tensor.shape)}, this run has {tuple(wanted)}"
        refuse(target is None, f"{folder}: tensor {name} {fault}; was another option changed?")
        assign(target, tensor)
    if targets:
        raise UserError(f"{folder}: tensor {next(iter(targets))} is missing; was lora_target changed since?")
    if model.v_head is not None:
        load_value_head(model.v_head, folder)
