"""What to load for chat and export: a model folder, a hub id, a .gguf file, an adapter, or the folder of a
run.

A run folder says by itself what it needs: adapter_config.json names the base model, run_config.yaml (the
resolved options of the run) the chat template, the stretched rope, how the base was quantised and the
adapters that lay under the trained one. Options that the user gives beat those of the run.

    source = find_source(ModelOptions(model_name_or_path="saves/demo"), TemplateOptions(), given=())
    model, tokenizer, template = load_source(source, dtype=None, device="cpu")
    load_head(model, source)    # of a reward model: stages.rm.score_dialogues(model, ...) needs it
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import quant
from architectures.config import ModelConfig, scale_rope
from checkpoints.hub import WANTED_FILES, ModelOptions, resolve_adapters, resolve_model
from checkpoints.huggingface import load_config, load_model
from checkpoints.peft import ADAPTER_CONFIG, apply_adapters
from checkpoints.safetensors_files import EXPORT_RECORD, read_json
from checkpoints.value_head import VALUE_HEAD, ValueHead, has_value_head, load_value_head
from model import Decoder
from options.config import read_values
from options.errors import UserError, refuse
from options.json_fields import Field, check
from quant import QuantOptions
from quant.linear import Format
from templates import TEMPLATES, TemplateOptions, get_template
from text.tokenizer import Tokenizer

RUN_CONFIG = "run_config.yaml"  # the resolved configuration of a run, beside its result
# what the keys of it that are read here may hold
TEXT_OF_A_RUN = "template default_system rope_scaling model_name_or_path quantization_method"
RUN_FIELDS = dict.fromkeys(TEXT_OF_A_RUN.split(), Field(str, null=True))
RUN_FIELDS |= dict.fromkeys(("enable_thinking", "create_new_adapter"), Field(bool, null=True))
RUN_FIELDS |= dict.fromkeys(("cutoff_len", "quantization_bit"), Field(int, null=True))
RUN_FIELDS |= {"adapter_name_or_path": Field(str | list, null=True)}


@dataclass(frozen=True)
class Source:
    base: Path  # model folder
    adapters: tuple[Path, ...]  # in the order in which they are merged
    tokenizer: Path  # folder
    template: TemplateOptions
    rope_scaling: str | None
    cutoff_len: int | None  # tokens; decides the factor of rope_scaling
    notices: tuple[str, ...]  # what was taken from a run; for the user
    quantization: QuantOptions = QuantOptions()  # of the base while it is read


def find_source(
    model: ModelOptions, template: TemplateOptions, given: Container, quantization: QuantOptions | None = None
) -> Source:
    """Everything to load. given: keys that the user set (they beat the run's). quantization: how the base is
    to be quantised; an adapter's run says it where the user does not; None: not at all. Raises UserError
    naming the key."""
    name, adapters = model.model_name_or_path, resolve_adapters(model)
    if name and is_adapter(Path(name)):
        adapters.insert(0, Path(name))
        name = None
    for folder in adapters:
        missing = f"adapter_name_or_path: {folder} holds no {ADAPTER_CONFIG}; give an adapter folder"
        refuse(not is_adapter(folder), missing)
    run_folder = adapters[-1] if adapters else Path(name or "")
    run, said = read_run(run_folder), f"as {run_folder / RUN_CONFIG} says"
    notices = []
    expanded: list[Path] = []
    for folder in adapters:
        below = adapters_below(read_run(folder), Path(name) if name else None)
        below = _without(below, [folder])  # a folder that names itself lies under nothing
        unnamed = [path for path in below if path not in adapters]
        notices += [f"{folder} was trained on top of {path}, which is merged first" for path in unnamed]
        expanded += [path for path in (*below, folder) if path not in expanded]
    if name or not adapters:
        base = resolve_model(model)
    else:
        name = str(read_json(expanded[0] / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        notices.append(f"base model {name}, as {expanded[0]} says")
        base = _resolve_base(replace(model, model_name_or_path=name), expanded[0])
    beside = base / "adapter"  # what export.py keeps of a merge that 4 bits could not hold
    if not adapters and is_adapter(beside):
        both = f"model_name_or_path={beside} takes both"
        notices.append(f"{beside} belongs to these codes and is left out; {both}")
    # one of the checkpoint's by name: the run has saved it as the only one
    saved = run.get("template") not in TEMPLATES and (run_folder / "tokenizer_config.json").is_file()
    for key in ("template", "default_system", "enable_thinking"):
        if key not in given and run.get(key) is not None and not (key == "template" and saved):
            template = replace(template, **{key: run[key]})
    if run and template.template and "template" not in given:
        notices.append(f"template {template.template}, {said}")
    if quantization is not None and adapters and not any(item.name in given for item in fields(QuantOptions)):
        known = {item.name: run[item.name] for item in fields(QuantOptions) if run.get(item.name) is not None}
        quantization = QuantOptions(**known)
        if (codes := quant.from_options(quantization)) is not None:
            notices.append(f"the base is quantised to {codes.describe()}, {said} (quantization_bit)")
    scaling, cutoff_len = model.rope_scaling, None
    # a full model's config.json has it
    if "rope_scaling" not in given and adapters and run.get("rope_scaling"):
        scaling, cutoff_len = run["rope_scaling"], run.get("cutoff_len")
    scaling = None if scaling == "none" else scaling
    tokenizer, codes = tokenizer_folder(base, expanded), quantization or QuantOptions()
    return Source(base, tuple(expanded), tokenizer, template, scaling, cutoff_len, tuple(notices), codes)


def tokenizer_folder(base: Path, adapters: Sequence[Path]) -> Path:
    """That of the last adapter which brings a tokenizer: its tokens, ends and chat template were trained."""
    return next((each for each in reversed(adapters) if (each / "tokenizer.json").is_file()), base)


def load_source(
    source: Source, dtype: torch.dtype | None, device: str, quantization: Format | None = None
) -> tuple[Decoder, Tokenizer, object]:
    """Model with its adapters merged (beside the weights if these are quantised), tokenizer, chat template.

    dtype None = the checkpoint's.
    """
    tokenizer = Tokenizer.from_folder(source.tokenizer, source.base)
    options = source.template
    template = get_template(options.template, tokenizer.chat_template, options.default_system)
    model = load_model(source.base, dtype, device, source.rope_scaling, source.cutoff_len, quantization)
    apply_adapters(model, source.adapters)
    return model, tokenizer, template


def load_head(model: Decoder, source: Source) -> None:
    """Give the model the value head that lies beside its last adapter with one, or beside the base."""
    folder = value_head_folder(source)
    if folder is None:
        names = ", ".join(map(str, (*source.adapters, source.base)))
        raise UserError(f"no {VALUE_HEAD} in {names}, so this is no reward model (stage rm trains one)")
    head = ValueHead(model.config.hidden_size, model.embed_tokens.weight.device)
    load_value_head(head, folder)
    model.v_head = head.requires_grad_(False)


def value_head_folder(source: Source) -> Path | None:
    folders = (*reversed(source.adapters), source.base)
    return next((folder for folder in folders if has_value_head(folder)), None)


def scaled_config(source: Source) -> ModelConfig:
    """The base model's switches, with the rope stretched as it will be used."""
    config = load_config(source.base)
    return scale_rope(config, source.rope_scaling, source.cutoff_len) if source.rope_scaling else config


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def read_run(folder: Path) -> dict:
    """The resolved options of the run that wrote this folder, {} if no run did. UserError names the file."""
    path = folder / RUN_CONFIG
    try:
        run = read_values(path) if path.is_file() else {}
        check(run, RUN_FIELDS, f"{path}: ")
        return run
    except UserError as error:
        raise UserError(f"{error}; remove it and give template and adapters yourself") from error


def adapters_below(run: dict, base: Path | None = None) -> list[Path]:
    """Adapters that the run merged into its base before it trained its own, but for those in `base`."""
    names = run.get("adapter_name_or_path") or []
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    below = [Path(name) for name in (names if run.get("create_new_adapter") else names[:-1])]
    return _without(below, merged_into(base) if base is not None else [])


def _without(paths: list[Path], known: list) -> list[Path]:
    return [path for path in paths if not any(_same_place(path, each) for each in known)]


def merged_into(base: Path) -> list[str]:
    """The adapters whose updates are in the weights of this folder, as export.py's records say."""
    found: list[str] = []
    seen: set[Path] = set()
    while (record := base / EXPORT_RECORD).is_file() and base.resolve() not in seen:
        seen.add(base.resolve())
        told = read_json(record)
        adapters, below = told.get("adapters") or [], told.get("base") or ""
        texts = {"adapters": Field(list, null=True), "base": Field(str, null=True)}
        check(told, texts, f"{record}: ")
        found += adapters
        base = Path(below) if below else base
    return found


def check_adapters(options: ModelOptions, wanted=WANTED_FILES) -> None:
    """UserError if an adapter to train on was itself trained on top of one that is not named before it."""
    folders, base = resolve_adapters(options, wanted), options.model_name_or_path
    for number, folder in enumerate(folders):
        missing = f"adapter_name_or_path: {folder} holds no adapter ({ADAPTER_CONFIG})"
        whole = "a whole model is given as model_name_or_path"
        refuse(not (folder / ADAPTER_CONFIG).is_file(), f"{missing}; {whole}")
        run = read_run(folder)
        if not _same_place(run.get("model_name_or_path"), base):
            continue  # whoever made the other base may have merged those below into it
        if missing := _without(adapters_below(run, Path(base)), folders[:number]):
            fault = f"was trained on top of {', '.join(map(str, missing))}, without which it means nothing"
            names = ",".join(map(str, [*folders[:number], *missing, folder]))
            raise UserError(f"adapter_name_or_path: {folder} {fault}; give adapter_name_or_path={names}")


def _same_place(one: str | Path | None, other: str | Path | None) -> bool:
    """Whether both name the same folder, or the same id of a hub."""
    if not one or not other:
        return False
    return str(one) == str(other) or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _resolve_base(model: ModelOptions, adapter: Path) -> Path:
    remedy, file = f"give model_name_or_path=BASE adapter_name_or_path={adapter}", adapter / ADAPTER_CONFIG
    refuse(not model.model_name_or_path, f"model_name_or_path: {file} does not name its base model; {remedy}")
    try:
        return resolve_model(model)
    except UserError as error:
        more = f"That is the base model {file} names; if it is elsewhere, {remedy}"
        raise UserError(f"{error}. {more}") from error
