"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

Names in the file are peft's: base_model.model.<Hugging Face name of the linear>.lora_A.weight, lora_B.weight,
lora_magnitude_vector, and the plain name for modules that train in full (modules_to_save). Which linears have
an adapter is read from the file's tensors; the configuration gives the scale. What would silently mean
something else here than in peft is refused by name.

    load_adapter(model, "saves/run")      # trains on, or stays beside the weights
    merge_adapters(model, ["a", "b"])     # into the weights, in order
    apply_adapters(model, ["a", "b"])     # for inference: the same, but beside weights that are quantised
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from architectures.config import ModelConfig, from_hf_name, to_hf_name
from architectures.find import HEAD_NAMES, ends_with, is_linear
from checkpoints.safetensors_files import (
    PICKLE,
    file_notes,
    file_tensors,
    read_json,
    refuse_not_finite,
    staged,
    write_json,
    write_tensors,
)
from checkpoints.trainable import prepare_trainable
from kernels.launch import say_once
from kernels.linear import LinearLayer
from lora import LoraLinear, LoraOptions, full_modules, lora_layers, merge_for_good, replace_module
from model import Decoder
from options import json_reader
from options.errors import UserError, located, refuse
from options.json_fields import NUMBER, Field, check
from options.limits import bounded
from parallel.fsdp import whole
from quant.linear import QuantLinear, quantised_linears

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

# Settings of peft's LoRA that change the mathematics and are not built here.
UNSUPPORTED_ADAPTER_KEYS = (
    "bias", "fan_in_fan_out", "lora_bias", "layer_replication", "megatron_config", "use_qalora",
    "alora_invocation_tokens", "target_parameters", "trainable_token_indices", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
HEADS = {"SEQ_CLS": "a score head (classifier or score)", "TOKEN_CLS": "a classifier of tokens"}
HEADS |= {"QUESTION_ANS": "a head that finds spans"}
OFF = ("none", None, False, [], {})  # what they say when they are not used
FIELDS = {  # what the keys that are read here may hold
    "r": Field(int, 1, 2**20),
    "lora_alpha": Field(NUMBER, -1e6, 1e6),
    "layers_to_transform": Field(int | list, null=True, items=int),
    "lora_dropout": Field(NUMBER, 0, 1, null=True),
    "modules_to_save": Field(list, null=True),
    "base_model_name_or_path": Field(str, null=True),
}
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # of modules that have another number
FIELDS |= dict.fromkeys(PATTERNS, Field(dict, null=True))
FIELDS |= dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), Field(str | list, null=True))
FIELDS |= dict.fromkeys(("use_dora", "use_rslora", "ensure_weight_tying"), Field(bool, null=True))
# Ways to start A and B that take something out of the base weight; peft repeats that when it loads such an
# adapter.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
PARTS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
ADAPTER_PARTS = set(PARTS.values())  # every other part of a module is a tensor of the module itself
# our name of a part -> peft's; a parameter that LoraLinear has beside them keeps its name
PEFT_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
FROZEN = "frozen"  # note of the file: names of tensors that did not train, where others did, as JSON


# Writing


def save_adapter(model: Decoder, folder: str | Path, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors as peft reads them; an old one stays until then."""
    if not lora_layers(model):
        raise ValueError("save_adapter: the model has no adapter")
    state = adapter_state(dict(adapter_parameters(model)), model.config)
    write_adapter(folder, state, adapter_config(model, base_name), frozen_parts(model))


def write_adapter(folder: str | Path, state: dict[str, torch.Tensor], config: dict, notes: dict) -> None:
    """state, config, notes: of adapter_state, adapter_config, frozen_parts."""
    with staged(folder) as staging:
        write_tensors(staging / ADAPTER_WEIGHTS, state, notes)
        write_json(staging / ADAPTER_CONFIG, config)


def frozen_parts(model: Decoder) -> dict[str, str]:
    """The note of what did not train beside what did, as A of LoRA-FA; none in a usual adapter."""
    trains = {name: parameter.requires_grad for name, parameter in adapter_parameters(model)}
    frozen = [name for name, trained in trains.items() if not trained]
    return {FROZEN: json.dumps(frozen)} if 0 < len(frozen) < len(trains) else {}


def adapter_config(model: Decoder, base_name: str) -> dict:
    """What adapter_config.json says of this model's adapter."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    named = {_hf_module(model.config, name): layer for name, layer in layers.items()}
    full = [_hf_module(model.config, name) for name in full_modules(model)]
    tied = model.config.tied_head and "embed_tokens" in full_modules(model)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name}
    config |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
    config |= {"use_rslora": first.rslora, "use_dora": first.magnitude is not None}
    ranks = {n: layer.rank for n, layer in named.items() if layer.rank != first.rank}
    alphas = {n: _whole(layer.alpha) for n, layer in named.items() if layer.alpha != first.alpha}
    config |= {"r": first.rank, "lora_alpha": _whole(first.alpha)}
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    config |= {"lora_dropout": first.dropout_probability, "target_modules": _peft_targets(model, layers)}
    modules = [*full, "lm_head"] if tied else full or None
    return config | {"modules_to_save": modules, "ensure_weight_tying": tied}


def _hf_module(config: ModelConfig, name: str) -> str:
    return to_hf_name(config, f"{name}.weight").removesuffix(".weight")


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha  # readers of adapter_config.json expect an int


def _peft_targets(model: Decoder, layers: dict[str, LoraLinear]) -> list[str]:
    """The short names if every linear of that name has an adapter, else the full names of those that do."""
    short = {name.rpartition(".")[2] for name in layers}
    alike = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in short}
    if {name for name, m in alike.items() if isinstance(m, torch.nn.Linear | LinearLayer)} == set(layers):
        return sorted(short)
    return [_hf_module(model.config, name) for name in layers]


def adapter_state(shares: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Whole tensors of adapter_parameters, of which this rank may have shares, or copies of them."""
    state = {name: whole(tensor).cpu().contiguous() for name, tensor in shares.items()}
    embedding = PEFT_PREFIX + to_hf_name(config, "embed_tokens.weight")
    if config.tied_head and embedding in state:
        state[PEFT_PREFIX + "lm_head.weight"] = state[embedding].clone()  # peft asks for it under both names
    return state


def adapter_parameters(model: Decoder) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(PEFT's name, our parameter) of everything that belongs to the adapter."""
    for name, layer in lora_layers(model).items():
        full = PEFT_PREFIX + _hf_module(model.config, name)
        for part, parameter in layer.named_parameters(recurse=False):
            yield f"{full}.{PEFT_PARTS.get(part, part)}", parameter
    for module in full_modules(model):
        for name, parameter in model.get_submodule(module).named_parameters(recurse=False):
            yield PEFT_PREFIX + to_hf_name(model.config, f"{module}.{name}"), parameter


# Reading


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder as read: nothing of a model yet."""

    folder: Path
    config: dict  # adapter_config.json
    # our name of the module -> lora_A | lora_B | magnitude | weight | bias -> tensor
    modules: dict[str, dict[str, torch.Tensor]]
    frozen: set[tuple[str, str]] = field(default_factory=set)  # (module, part) that did not train

    def fault(self, text: str) -> UserError:
        base = self.config.get("base_model_name_or_path") or "an unnamed model"
        return UserError(f"{self.folder / ADAPTER_WEIGHTS}: {text}; the adapter was trained on {base}")

    def in_full(self, name: str) -> bool:
        """modules_to_save: as in peft this Hugging Face name, or one it lies in, ends with one of them."""
        parts, ends = name.split("."), tuple(self.config.get("modules_to_save") or ())
        return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts) + 1))


def load_adapter(
    model: Decoder, folder: str | Path, dtype=torch.float32, dropout: float = 0.0
) -> dict[str, torch.Tensor]:
    """Put the PEFT adapter in this folder on the model; it trains, everything else is frozen. Gives the
    base's own values of what trains in full, by name.

    dtype is that of all that trains, the modules trained in full (modules_to_save) included. Other whole
    tensors in the file (peft adds the embedding and the head where the head has an adapter) replace the
    model's and stay frozen. Raises UserError naming file and tensor when the adapter is of a kind that is not
    built here, or of another model; the model is then unchanged.
    """
    file = read_adapter(folder, model)
    if lora_layers(model):
        raise ValueError(f"{folder}: the model has an adapter already; merge it first (merge_for_good)")
    adapted = [module for module, parts in file.modules.items() if "lora_A" in parts or "lora_B" in parts]
    layers = {module: adapted_linear(model, module, file, dtype, dropout) for module in adapted}
    whole = []  # (name, parameter, its new value, whether it trains)
    for module, parts in file.modules.items():
        trains = module not in adapted and file.in_full(_hf_module(model.config, module))
        own = dict(layers[module].named_parameters(recurse=False)) if module in layers else {}
        for part in sorted(parts.keys() - ADAPTER_PARTS - own.keys()):
            parameter = whole_parameter(model, f"{module}.{part}", parts[part], file)
            trained = trains and (module, part) not in file.frozen
            whole.append((f"{module}.{part}", parameter, parts[part], trained))
    model.requires_grad_(False)
    own = {name: parameter.data for name, parameter, _, trains in whole if trains}
    for _, parameter, tensor, trains in whole:
        parameter.data = tensor.to(parameter.device, dtype if trains else parameter.dtype, copy=True)
        parameter.requires_grad_(trains)
    for module, layer in layers.items():
        replace_module(model, module, layer.train(model.training))
    return own


def read_adapter(folder: str | Path, model: Decoder) -> AdapterFile:
    """Configuration and tensors of a PEFT adapter, under our names: what peft would put on this model (of
    which the shapes suffice). UserError for what is not built here."""
    folder = Path(folder)
    file, path = AdapterFile(folder, read_adapter_config(folder), {}), folder / ADAPTER_WEIGHTS
    for key, tensor in read_adapter_tensors(folder).items():
        module, part = _split_name(model.config, key, path)
        refuse_not_finite(tensor, f"{path}: tensor {key}")
        file.modules.setdefault(module, {})[part] = tensor
    note = f"{path}: its note of frozen tensors"
    frozen = json_reader.parse(file_notes(path).get(FROZEN, "[]"), note, expected=list)
    refuse(not Field(list).allows(frozen), f"{note} is {frozen!r}, expected a list of names")
    file.frozen.update(_split_name(model.config, key, path) for key in frozen)
    if not file.modules:
        raise file.fault("holds no tensor")
    if model.config.tied_head:
        _join_tied_head(file)
    _keep_what_is_chosen(file, model)
    return file


@bounded(f"{ADAPTER_CONFIG}: a pattern of target_modules or the like", "write the names of the modules")
def _keep_what_is_chosen(file: AdapterFile, model: Decoder) -> None:
    """The configuration chooses, the file has to have that; what it has besides peft leaves out, and so do
    we, with a word."""
    modules = dict(model.named_modules())
    for name in [name for name in modules if name.endswith(".base") or name.startswith("v_head") or not name]:
        del modules[name]  # no part of the model itself
    names = {name: _hf_module(model.config, name) for name in modules}
    chosen = {name for name in modules if is_linear(modules[name]) and is_target(file.config, names[name])}
    adapted = {name for name, parts in file.modules.items() if parts.keys() & {"lora_A", "lora_B"}}
    if missing := [name for name in modules if name in chosen - adapted]:
        more = f" and {len(missing) - 1} more linears" if len(missing) > 1 else ""
        raise file.fault(f"has no tensors of {missing[0]}{more}, which {ADAPTER_CONFIG} chooses here")
    for name in (name for name in modules if name not in file.modules and file.in_full(names[name])):
        if next(modules[name].parameters(recurse=False), None) is not None:
            raise file.fault(f"holds no tensor of {name}, but {ADAPTER_CONFIG} lists it in modules_to_save")
    unused = sorted(name for name in adapted - chosen if name in modules and is_linear(modules[name]))
    if not chosen and len(unused) == len(file.modules):
        raise file.fault(f"holds tensors of {unused[0]}, which {ADAPTER_CONFIG} does not choose")
    for name in unused:
        for part in file.modules[name].keys() & ADAPTER_PARTS:
            del file.modules[name][part]
    if unused:
        found = f"{unused[0]} and {len(unused) - 1} more" if len(unused) > 1 else unused[0]
        say_once(f"note: {file.folder}: {ADAPTER_CONFIG} does not choose {found}; left out, as peft does")


def is_target(config: dict, name: str) -> bool:
    """Whether adapter_config.json gives the linear with this Hugging Face name an adapter; by peft's rules
    (tuners_utils.check_target_module_exists), down to where a name, its end, or a regex is meant."""
    excluded, targets = config.get("exclude_modules") or (), config.get("target_modules")
    whole, around = config.get("modules_to_save") or (), (r"(^|.*\.)", r"($|\..*)")
    within = any(_match("modules_to_save", each, name, *around) for each in whole)
    if within or _fits("exclude_modules", excluded, name):
        return False
    if targets is None:
        targets = ["q_proj", "v_proj"]  # peft's choice for every architecture here
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return name not in HEAD_NAMES
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return _fits("target_modules", targets, name)
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    around = (r"(?:^|.*?\.)", r"\.(?P<layer>\d+)\.") if patterns else (r".*?\.", r"\.(?P<layer>\d+)\.")
    tried = (_match("layers_pattern", each, name, *around) for each in patterns or [r"[^.]*"])
    found = next(filter(None, tried), None)
    wanted = layers if isinstance(layers, list) else [layers]
    return _fits("target_modules", targets, name) and found is not None and int(found["layer"]) in wanted


def _fits(key: str, names: str | list[str], name: str) -> bool:
    """A text is a regex for the whole name, a list holds names or their ends."""
    if isinstance(names, str):
        return _match(key, names, name, match=re.fullmatch) is not None
    return any(ends_with(name, each) for each in names)


def _match(key: str, pattern: str, name: str, before="", after="", match=re.match) -> re.Match | None:
    try:
        return match(f"{before}{pattern}{after}", name)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{ADAPTER_CONFIG}: {key}: {pattern!r} is no pattern ({error})") from error


def _join_tied_head(file: AdapterFile) -> None:
    """In a tied model the head is the embedding: peft writes both, and they must be one."""
    head, embedding = file.modules.pop("lm_head", {}), file.modules.get("embed_tokens", {})
    merged = "export.py merges it (adapter_name_or_path=, export_dir=)"
    remedy = f"this model's head is tied to embed_tokens; {merged}"
    if "lora_A" in head or "lora_B" in head:
        raise file.fault(f"adapts lm_head alone, but {remedy}")
    if "weight" in head and "weight" not in embedding:
        raise file.fault(f"trains lm_head alone, but {remedy}")
    if "weight" in embedding and "weight" not in head and not file.config.get("ensure_weight_tying"):
        raise file.fault(f"trains embed_tokens alone (no ensure_weight_tying), but {remedy}")
    if "weight" in head and not torch.equal(head["weight"], embedding["weight"]):
        raise file.fault(f"trains embed_tokens and lm_head apart, but {remedy}")


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json of a LoRA adapter; UserError for what would silently mean something else here."""
    folder = Path(folder)
    refuse(not folder.is_dir(), f"adapter_name_or_path: no folder {folder}")
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA adapters are known")
    if (task := str(config.get("task_type"))) in HEADS:
        found = f"task_type {task}: it ends in {HEADS[task]} in place of a language model's head"
        raise UserError(f"{path}: {found}; a reward model here is made by stage=rm")
    for key in UNSUPPORTED_ADAPTER_KEYS:
        if (value := config.get(key)) not in OFF:
            raise UserError(f"{path}: {key}={value!r} is not supported; merge that adapter with peft first")
    check(config, FIELDS, f"{path}: ")
    with located(str(folder)):
        for key, common in PATTERNS.items():
            for pattern, value in (config.get(key) or {}).items():
                _match(key, pattern, "", "(", ")")
                check({common: value}, FIELDS, f"{ADAPTER_CONFIG}: of {key} {pattern} ")
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            if isinstance(config.get(key), str):
                _match(key, config[key], "", "(", ")")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING_INITS):
        found = f"init_lora_weights={start!r}: such an adapter belongs on a changed base model"
        way = "(save_pretrained with path_initial_model_for_weight_conversion)"
        raise UserError(f"{path}: {found}; save it as plain LoRA with peft {way}, or merge it there")
    return config


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the adapter by its name in the file; UserError with the way out if there is none."""
    folder = Path(folder)
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        return dict(file_tensors(path))
    if (folder / "adapter_model.bin").is_file():
        remedy = "load it once with peft in an environment you trust and save it again (as safetensors)"
        raise UserError(f"{folder}: only adapter_model.bin found, {PICKLE}; {remedy}")
    raise UserError(f"{path}: file not found; is {folder} a complete adapter folder?")


def _split_name(config: ModelConfig, key: str, path: Path) -> tuple[str, str]:
    """PEFT's tensor name -> (our module name, lora_A | lora_B | magnitude | weight | bias)."""
    if not key.startswith(PEFT_PREFIX):
        hint = "is it of another kind of model?"
        raise UserError(f"{path}: tensor {key} does not start with {PEFT_PREFIX}; {hint}")
    name = key.removeprefix(PEFT_PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    ending = next((ending for ending in PARTS if name.endswith(ending)), None)
    if ending is None and ".lora_" in name:
        raise UserError(f"{path}: tensor {key} is of a kind of adapter that is not supported")
    hf_module, part = (name.removesuffix(ending), PARTS[ending]) if ending else name.rpartition(".")[::2]
    ours = from_hf_name(config, f"{hf_module}.weight")
    return (ours or f"{hf_module}.weight").removesuffix(".weight"), part  # None: a tied head, _join_tied_head


@bounded(f"{ADAPTER_CONFIG}: a pattern of rank_pattern or alpha_pattern", "write the names of the modules")
def _by_pattern(config: dict, patterns_key: str, common_key: str, module: str) -> float:
    """The value of the first pattern that fits the end of a Hugging Face name, as peft's get_pattern_key."""
    value = config.get(common_key, 8)  # peft's default of both
    for pattern, other in (config.get(patterns_key) or {}).items():
        if _match(patterns_key, pattern, module, r"(.*\.)?(", ")$"):
            value = other
            break
    return value


def adapted_linear(
    model: Decoder, module: str, file: AdapterFile, dtype: torch.dtype, dropout: float = 0.0, base=None
) -> LoraLinear:
    """The model's linear, or `base` in its place, with the file's update around it; the model itself is not
    changed yet."""
    parts, dora = file.modules[module], bool(file.config.get("use_dora"))
    wanted = ("lora_A", "lora_B", "magnitude") if dora else ("lora_A", "lora_B")
    if missing := set(wanted) - parts.keys():
        raise file.fault(f"{module} lacks {', '.join(sorted(missing))}, so the file is incomplete")
    try:
        base = base or model.get_submodule(module)
    except AttributeError as error:
        raise file.fault(f"adapts {module}, which this model does not have") from error
    if not is_linear(base):
        raise file.fault(f"adapts {module}, a {type(base).__name__}; only linears are supported")
    name = _hf_module(model.config, module)
    rank = _by_pattern(file.config, "rank_pattern", "r", name)
    alpha = float(_by_pattern(file.config, "alpha_pattern", "lora_alpha", name))
    kind = {"rslora": bool(file.config.get("use_rslora")), "dora": dora}
    shapes = dict(zip(wanted, [(rank, base.in_features), (base.out_features, rank), (base.out_features,)]))
    for part in sorted(parts.keys() & ADAPTER_PARTS):
        if part not in shapes:
            kinds = ", ".join(shapes)
            raise file.fault(f"{module}.{part} does not belong to an adapter of this kind ({kinds})")
        _check_shape(f"{module}.{part}", parts[part], shapes[part], file)
    unused = torch.Generator()  # the start is overwritten: leave the global generator alone
    layer = LoraLinear(base, rank, alpha, dropout_probability=dropout, dtype=dtype, generator=unused, **kind)
    for name, parameter in layer.named_parameters(recurse=False):
        part = {"lora_a": "lora_A", "lora_b": "lora_B"}.get(name, name)
        if part not in parts:
            raise file.fault(f"{module} lacks {part}, so the file is incomplete")
        _check_shape(f"{module}.{part}", parts[part], tuple(parameter.shape), file)
        parameter.data.copy_(parts[part])
        if (module, part) in file.frozen:
            parameter.requires_grad_(False)
    return layer


def whole_parameter(model: Decoder, name: str, tensor: torch.Tensor, file: AdapterFile) -> torch.nn.Parameter:
    """The model's parameter that this tensor of the file replaces."""
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise file.fault(f"holds {name}, which this model does not have") from error
    _check_shape(name, tensor, tuple(parameter.shape), file)
    return parameter


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], file: AdapterFile) -> None:
    if tuple(tensor.shape) != expected:
        found = tuple(tensor.shape)
        raise file.fault(f"{name} has shape {found}, this model and {ADAPTER_CONFIG} ask for {expected}")


# Several adapters


def prepare_adapters(
    model: Decoder,
    folders: Iterable[str | Path],
    options: LoraOptions,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Set what trains, starting from the given adapters: all but the last are merged, the last trains on, and
    the values that load_adapter replaced in full for it are given back.

    With options.create_new_adapter all are merged and a fresh one is added; without folders see
    prepare_trainable. Raises UserError if something would have to be merged into quantised weights.
    """
    merged, trained = divide_adapters(model, list(folders), options)
    merge_adapters(model, merged)
    if trained:
        return load_adapter(model, trained[0], dtype, options.lora_dropout)
    prepare_trainable(model, options, generator, dtype)
    return {}


def divide_adapters(model: Decoder, folders: list, options: LoraOptions) -> tuple[list, list]:
    """(the given adapters that are merged, the one that trains on or none)."""
    trained = folders[-1:] if options.finetuning_type == "lora" and not options.create_new_adapter else []
    merged = folders[: len(folders) - len(trained)]
    if merged and quantised_linears(model):
        fault = "would have to be merged into quantised weights before another one is trained"
        remedy = "merge it with export.py and train on the result, or train it on alone"
        raise UserError(f"adapter_name_or_path: {folders[0]} {fault}; {remedy}")
    return merged, trained


@torch.no_grad()
def merge_adapters(model: Decoder, folders: Iterable[str | Path], into_codes: bool = True) -> dict:
    """Every adapter merged into the weights, in order, in the weights' own dtypes; nothing trains then.

    into_codes=False leaves quantised weights alone: -> name -> what belongs beside it, one of all the ranks.
    """
    beside: dict[str, LoraLinear] = {}
    for folder in folders:
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        load_adapter(model, folder)
        for name, layer in lora_layers(model).items():
            if isinstance(layer.base, QuantLinear) and not into_codes:
                replace_module(model, name, layer.base)
                with located(f"adapter_name_or_path: {folder}"):
                    beside[name] = stacked(beside.get(name), layer)
        if lora_layers(model):
            merge_for_good(model)
        for name, parameter in model.named_parameters():
            # a quantised weight has become one that has no dtype there
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    model.requires_grad_(False)
    return beside


def apply_adapters(model: Decoder, folders: Iterable[str | Path]) -> None:
    """Every adapter in use, in order, for inference: merged into dense weights, beside quantised ones, where
    several become one (the 16-bit weights would be what quantising has saved). Nothing trains afterwards."""
    beside = merge_adapters(model, folders, into_codes=False)
    for name, layer in beside.items():
        layer.freeze_adapter(layer.base.dtype)
        replace_module(model, name, layer.eval())
    model.requires_grad_(False)


def stacked(first: LoraLinear | None, second: LoraLinear) -> LoraLinear:
    """One adapter that does what two on the same base do together: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1;
    A2]."""
    if first is None:
        return second
    if first.magnitude is not None or second.magnitude is not None:
        raise UserError(
            "DoRA's row lengths are of the whole weight, so such an adapter cannot lie beside another one on "
            "a quantised base; merge them with export.py first, or load the base in 16 bit "
            "(quantization_bit=null)"
        )
    rank = first.rank + second.rank
    both = LoraLinear(second.base, rank, rank, dtype=second.lora_a.dtype, generator=torch.Generator())
    both.lora_a.data = torch.cat([first.lora_a.data, second.lora_a.data])
    both.lora_b.data = torch.cat([first.scale * first.lora_b.data, second.scale * second.lora_b.data], dim=1)
    return both.train(second.training)
