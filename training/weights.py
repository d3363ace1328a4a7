"""The model that a run trains: its weights in the dtypes that the options ask for, with what trains marked.

    model = build_model(config, source, world, own)

Where ranks hold shares of the weights, none ever holds all of them: what trains, and which adapters there
are, is decided on an outline without numbers (plan.skeleton); then one block after the other is read, becomes
what it is in the outline, and is cut and sharded before the next one. What cannot be done so says why_whole.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

import kernels
import quant
from architectures.layers import RMSNorm
from checkpoints.hub import ModelOptions, resolve_adapters
from checkpoints.huggingface import block_of, chosen_quantization, load_config, load_model, random_model
from checkpoints.peft import (
    ADAPTER_PARTS,
    AdapterFile,
    adapted_linear,
    prepare_adapters,
    read_adapter,
    read_adapter_config,
)
from checkpoints.value_head import ValueHead, has_value_head, load_value_head
from data import DataOptions
from lora import LoraLinear, LoraOptions, lora_layers, replace_module
from model import Decoder
from options.config import Config
from options.errors import refuse
from parallel.fsdp import Engine, distribute
from parallel.options import ParallelOptions
from parallel.world import World
from quant import QuantOptions
from quant.linear import quantised_linears
from stages import STAGES, WRITES
from stages.dpo import PreferenceOptions
from stages.grpo import GRPOOptions
from stages.reference import ReferenceOptions
from stages.rewards import RewardOptions
from training import plan
from training.make_stage import wanted_files
from training.options import TrainOptions

HEAD_START = 0.1  # share of trl's random start of a value head; see start_value_head


def build_model(config: Config, source: Path, world: World, own: dict | None = None) -> Decoder:
    """Weights on the device, in the dtypes that the precision options ask for, with what trains marked; of a
    run whose ranks share weights, this rank's shares.

    own: takes up the base's values of what a given adapter trains in full, for the reference.
    """
    options, model_options, lora_options = config[TrainOptions], config[ModelOptions], config[LoraOptions]
    if lora_options.lora_dropout and not STAGES[options.stage].uses_dropout:
        unused = f"lora_dropout {lora_options.lora_dropout:g} is not used: stage {options.stage}"
        world.print(f"note: {unused} compares log-probabilities, to which dropout would add noise")
        lora_options = replace(lora_options, lora_dropout=0.0)
    adapters = resolve_adapters(model_options, wanted_files(config))
    name = model_options.model_name_or_path
    for folder in adapters:
        base = read_adapter_config(folder).get("base_model_name_or_path") or ""
        if base and Path(base).name != Path(name).name:  # the same model may lie in several places
            world.print(f"note: the adapter {folder} was trained on {base}, and lies on {name} here")
    generator, types = torch.Generator().manual_seed(options.seed), Types.of(config)
    lora = lora_options, generator, types.trained
    if options.plan:
        asked = quant.from_options(config[QuantOptions]), model_options.hf_hub_token
        model = plan.skeleton(source, load_config(source), types.frozen, *asked)
        adapters, lora_options = plan.without_weights(model, adapters, lora_options)
        prepare_adapters(model, adapters, lora_options, *lora[1:])
        types.cast(model)
    elif parts := shared_parts(config, source, adapters, lora, world):
        model = read_model(config, source, world, parts)
    else:
        model = read_model(config, source, world)
        replaced = prepare_adapters(model, adapters, *lora)
        if own is not None:
            own |= replaced
        types.cast(model)
        for block in model.layers if world.size > 1 else ():
            refuse_mixed(block)
    if STAGES[options.stage].has_value_head:
        if options.stage == "rm" and not options.trains:  # else scores would be those of a random head
            folder = (adapters or [source])[-1]
            missing = f"there is no value_head.safetensors in {folder}, so scores would be random"
            remedy = "name a reward model as adapter_name_or_path or model_name_or_path, or train one"
            refuse(not has_value_head(folder), f"do_train: false, but {missing}; {remedy}")
        model.v_head = start_value_head(model, source, adapters, generator, world)
    model.runtime.compute_dtype = types.compute
    model.runtime.flash_attn = kernels.require_attention(
        model_options.flash_attn, world.device, types.compute
    )
    model.runtime.embedding_noise = options.neftune_noise_alpha or 0.0
    if not options.plan and parts:
        distribute(model, world, config[ParallelOptions], parts.engine)
    return model


@dataclass(frozen=True)
class Types:
    """dtypes: frozen weights in the compute dtype, trained ones in full precision."""

    compute: torch.dtype
    frozen: torch.dtype  # while it is not known yet what trains
    trained: torch.dtype
    wide_norms: bool | None  # those stay as they are read; None: of a quantised model

    @classmethod
    def of(cls, config: Config) -> "Types":
        options = config[TrainOptions]
        compute, trained = options.compute_dtype, torch.bfloat16 if options.pure_bf16 else torch.float32
        frozen = compute if config[LoraOptions].finetuning_type == "lora" else trained
        return cls(compute, frozen, trained, options.upcast_layernorm)

    def cast(self, model: Decoder, part: str | None = None) -> None:
        """The parameters of the model, or of one part of it (huggingface.block_of)."""
        wide = quantised_linears(model) if self.wide_norms is None else self.wide_norms
        norms = {id(module.weight) for module in model.modules() if wide and isinstance(module, RMSNorm)}
        for name, parameter in model.named_parameters():
            if part in (None, block_of(name)) and id(parameter) not in norms:
                parameter.data = parameter.data.to(self.trained if parameter.requires_grad else self.compute)


def read_model(config: Config, source: Path, world: World, parts: "Parts | None" = None) -> Decoder:
    """The base, as load_model gives it, or random_model where the options ask for that."""
    options, types, scaling = config[TrainOptions], Types.of(config), config[ModelOptions].rope_scaling
    if options.train_from_scratch:
        return random_model(source, types.frozen, world.device, options.seed)
    quantization, notice = chosen_quantization(source, quant.from_options(config[QuantOptions]))
    if notice is not None:
        world.print(f"note: {notice}")
    norms = torch.float32 if options.upcast_layernorm is not False else None
    how = None if scaling == "none" else scaling, config[DataOptions].cutoff_len, quantization, norms
    return load_model(source, types.frozen, world.device, *how, ready=parts)


# Where ranks hold shares


@dataclass(frozen=True)
class Parts:
    """Called by load_model with each part of a model that has been read: makes it what it is in the outline,
    and has the engine take a block."""

    outline: Decoder  # prepared as the model shall be, on the meta device
    adapter: AdapterFile | None  # that the run goes on with
    types: Types
    engine: Engine

    def __call__(self, model: Decoder, part: str) -> None:
        inside = {name: layer for name, layer in lora_layers(self.outline).items() if block_of(name) == part}
        for name, layer in inside.items():
            made = again(layer, model.get_submodule(name))
            if self.adapter is not None:
                made = adapted_linear(model, name, self.adapter, made.lora_a.dtype, layer.dropout_probability)
            replace_module(model, name, made.train(layer.training))
        for module, tensors in self.adapter.modules.items() if self.adapter is not None else ():
            for name in tensors.keys() - ADAPTER_PARTS if block_of(f"{module}.") == part else ():
                parameter = model.get_parameter(f"{module}.{name}")
                parameter.data = tensors[name].to(parameter.device, parameter.dtype, copy=True)
        for name, parameter in model.named_parameters():
            if block_of(name) == part:
                parameter.requires_grad_(self.outline.get_parameter(name).requires_grad)
        self.types.cast(model, part)
        if part:
            refuse_mixed(model.get_submodule(part))
            self.engine.take_block(model.get_submodule(part))


def refuse_mixed(block: torch.nn.Module) -> None:
    """UserError where what trains in it has several dtypes, of which ranks could not sum the gradients."""
    trained = (each for each in block.parameters() if each.requires_grad)
    kinds = sorted({f"{each.dtype}".removeprefix("torch.") for each in trained})
    mixed = f"pure_bf16: {' and '.join(kinds)} train side by side, and ranks sum gradients of one kind"
    refuse(len(kinds) > 1, f"{mixed}; set upcast_layernorm=false, or bf16=true in place of pure_bf16")


def again(layer: LoraLinear, base: torch.nn.Module) -> LoraLinear:
    """An adapter that starts as this one did, around another base."""
    kind = {"dropout_probability": layer.dropout_probability, "rslora": layer.rslora}
    kind |= {"dora": layer.magnitude is not None, "dtype": layer.lora_a.dtype}
    generator = torch.Generator().manual_seed(layer.seed)
    return LoraLinear(base, layer.rank, layer.alpha, generator=generator, **kind)


def shared_parts(
    config: Config, source: Path, adapters: list[Path], lora: tuple, world: World
) -> Parts | None:
    """What makes shares of a model while it is read; None where each rank reads all of it first.
    lora: as prepare_adapters takes it."""
    spread, types = config[ParallelOptions], Types.of(config)
    if not spread.shares_weights(world.size):
        return None
    if why := why_whole(config, adapters):
        world.print(f"note: each rank reads the whole model before it keeps a share of it: {why}")
        return None
    quantization, _ = chosen_quantization(source, quant.from_options(config[QuantOptions]))
    outline = plan.skeleton(source, load_config(source), types.frozen, quantization)
    file = read_adapter(adapters[0], outline) if adapters else None
    prepare_adapters(outline, adapters, *lora)
    return Parts(outline, file, types, Engine(world, spread))


def why_whole(config: Config, adapters: list[Path]) -> str | None:
    """Why a run needs the whole model at once, if it does."""
    options, lora_options = config[TrainOptions], config[LoraOptions]
    if options.train_from_scratch:
        return "train_from_scratch draws it at once"
    trained = lora_options.finetuning_type == "lora" and not lora_options.create_new_adapter
    if len(adapters) > trained:
        return "adapters are merged into it (export.py merges them once)"
    if options.only_predicts:
        return None
    rewards = config[RewardOptions]
    if options.stage in WRITES and rewards.reward_model and rewards.reward_model_type == "lora":
        return "an adapter that rewards is laid on it (reward_model_type=full)"
    needs = {"dpo": config[PreferenceOptions].needs_reference, "grpo": config[GRPOOptions].beta > 0}
    reference = needs.get(options.stage, options.stage in ("kto", "ppo"))
    whole = lora_options.finetuning_type != "lora" or lora_options.additional_target
    whole = whole or any(read_adapter_config(folder).get("modules_to_save") for folder in adapters)
    if reference and whole and config[ReferenceOptions].ref_model is None:
        return "a copy of it may be the reference (ref_model names one)"
    return None


# The value head


def start_value_head(
    model: Decoder, source: Path, adapters: list[Path], generator: torch.Generator, world: World
) -> ValueHead:
    """That of a reward model, where one lies beside the last adapter, or beside the model if there is none.

    Else a tenth of trl's random start: hidden states are long vectors, so with the whole of it the values of
    a pair would differ by noise of about 1, which takes a hundred updates to unlearn.
    """
    head = ValueHead(model.config.hidden_size, world.device, generator)
    for parameter in head.parameters():
        parameter.data.mul_(HEAD_START)
    folder = (adapters or [source])[-1]
    if has_value_head(folder):
        load_value_head(head, folder)
        world.print(f"the value head starts from {folder}")
    return head
