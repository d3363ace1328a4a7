"""The model that a run trains: its weights in the dtypes that the options ask for, with what trains marked.

    model = build_model(config, source, world, own)

Where ranks hold shares of the weights, each reads its own alone (checkpoints/shares.py): what trains, and
which adapters there are, is decided before the model has numbers.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import kernels
import quant
from architectures.layers import RMSNorm
from checkpoints.hub import ModelOptions, resolve_adapters
from checkpoints.huggingface import chosen_quantization, load_config, load_model, random_model
from checkpoints.peft import divide_adapters, prepare_adapters, read_adapter_config
from checkpoints.shares import Shares
from checkpoints.value_head import ValueHead, has_value_head, load_value_head
from data import DataOptions
from lora import LoraOptions
from model import Decoder
from options.config import Config
from options.errors import refuse
from parallel.options import ParallelOptions
from parallel.world import World
from quant import QuantOptions
from quant.linear import quantised_linears
from stages import STAGES, WRITES
from stages.rewards import RewardOptions
from training import plan
from training.make_stage import wanted_files
from training.options import TrainOptions

HEAD_START = 0.1  # share of trl's random start of a value head; see start_value_head


def build_model(config: Config, source: Path, world: World, own: dict | None = None) -> Decoder:
    """Weights on the device, in the dtypes that the precision options ask for, with what trains marked; of a
    run whose ranks share weights, this rank's shares.

    own: takes up the base's values of what a given adapter trains in full, for the reference; without numbers
    where ranks share weights (start_of_run).
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
    generator, types, shares = torch.Generator().manual_seed(options.seed), Types.of(config), None
    lora = lora_options, generator, types.trained
    if options.plan:
        asked = quant.from_options(config[QuantOptions]), model_options.hf_hub_token
        model = plan.skeleton(source, load_config(source), types.frozen, *asked)
        adapters, lora_options = plan.without_weights(model, adapters, lora_options)
        prepare_adapters(model, adapters, lora_options, *lora[1:])
        types.cast(model)
    else:
        read = read_model(config, source, world)
        shares, model = (read, read.model) if isinstance(read, Shares) else (None, read)
        prepare = partial(prepare_adapters, model) if shares is None else shares.prepare
        replaced = prepare(adapters, *lora)
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
    if shares is not None:
        shares.load(world, config[ParallelOptions])
    return model


def start_of_run(config: Config, source: Path, world: World) -> Decoder:
    """The frozen policy that build_model's starts as, but for an adapter that trains; this rank's shares."""
    shares = read_model(config, source, world)
    adapters = resolve_adapters(config[ModelOptions], wanted_files(config))
    shares.merge(divide_adapters(shares.model, adapters, config[LoraOptions])[0])
    if config[LoraOptions].finetuning_type != "lora":
        shares.prepare([], config[LoraOptions])
    Types.of(config).cast(shares.model)
    shares.model.requires_grad_(False)
    return shares.load(world, config[ParallelOptions])


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

    def cast(self, model: Decoder) -> None:
        wide = quantised_linears(model) if self.wide_norms is None else self.wide_norms
        norms = {id(module.weight) for module in model.modules() if wide and isinstance(module, RMSNorm)}
        for parameter in model.parameters():
            if id(parameter) not in norms:
                parameter.data = parameter.data.to(self.trained if parameter.requires_grad else self.compute)


def read_model(config: Config, source: Path, world: World) -> Decoder | Shares:
    """The base, as load_model gives it, or random_model where the options ask for that; in the making where
    each rank reads its share."""
    options, rewards, types = config[TrainOptions], config[RewardOptions], Types.of(config)
    shared = config[ParallelOptions].shares_weights(world.size)
    if options.stage in WRITES and rewards.reward_model and not options.only_predicts:
        shared = shared and rewards.reward_model_type != "lora"  # which is laid on whole layers
    if options.train_from_scratch:
        how = source, types.frozen, world.device
        return Shares(*how, seed=options.seed) if shared else random_model(*how, options.seed)
    quantization, notice = chosen_quantization(source, quant.from_options(config[QuantOptions]))
    if notice is not None:
        world.print(f"note: {notice}")
    norms, scaling = (
        torch.float32 if options.upcast_layernorm is not False else None,
        config[ModelOptions].rope_scaling,
    )
    how = None if scaling == "none" else scaling, config[DataOptions].cutoff_len, quantization, norms
    return (Shares if shared else load_model)(source, types.frozen, world.device, *how)


def refuse_mixed(block: torch.nn.Module) -> None:
    """UserError where what trains in it has several dtypes, of which ranks could not sum the gradients."""
    trained = (each for each in block.parameters() if each.requires_grad)
    kinds = sorted({f"{each.dtype}".removeprefix("torch.") for each in trained})
    mixed = f"pure_bf16: {' and '.join(kinds)} train side by side, and ranks sum gradients of one kind"
    refuse(len(kinds) > 1, f"{mixed}; set upcast_layernorm=false, or bf16=true in place of pure_bf16")


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
