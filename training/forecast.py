"""What a run takes on each rank, asked before its weights are read: for plan=true, and for parallel=auto.

    forecast = Forecast(config, source, world, data)
    forecast.of(config[ParallelOptions], tokens).total      # bytes, for a micro-batch of so many tokens
    print(forecast.report())

The models stand without their numbers (plan.skeleton); memory.py and plan.py have the formulas, here stands
which of them a run asks for.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

import quant
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import load_config
from checkpoints.trainable import trainable_report
from data import DataOptions
from generation.sampling import GenerateOptions
from kernels.recompute import Plan
from lora import LoraOptions
from model import Decoder
from options.config import Config
from parallel.options import ParallelOptions
from parallel.tensor import cut
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE
from pipeline.store import ExampleStore
from quant import QuantOptions
from stages import WRITES
from stages.dpo import PreferenceOptions
from stages.grpo import GRPOOptions
from stages.reference import ReferenceOptions
from stages.rewards import RewardOptions
from stages.rollouts import TOGETHER
from training import memory, plan
from training.make_stage import computes_ahead, folders_beside
from training.options import OptimOptions, TrainOptions
from training.weights import build_model


@dataclass(frozen=True)
class Answer:
    """For one way to spread the run, and one size of its micro-batches."""

    peak: dict[str, float]  # bytes by part at the fullest moment of a rank, on its device
    chosen: Plan  # what runs again
    line: str  # that says so
    host: float  # bytes that are in host memory in place of the device's

    @property
    def total(self) -> float:
        """Bytes that the run takes beyond what the process has now."""
        return sum(self.peak.values()) - self.peak.get("process", 0.0)


class Forecast:
    """The outline of a run's model and of those beside it, and the sizes of its rows."""

    def __init__(self, config: Config, source: Path, world: World, data, device: torch.device | None = None):
        """data: setup.Data, which trains. device: where the ranks compute, if it is another than here."""
        options, shares = config[TrainOptions], config[ParallelOptions]
        self.config, self.data, self.device = config, data, device or world.device
        self.ranks = options.plan_ranks or world.size
        self.model = build_model(config.changed(TrainOptions, plan=True), source, world)
        self.trained = trainable_report(self.model)
        ranks = {"size": self.ranks, "tensor": shares.tp_size, "context": shares.cp_size}
        world = replace(world, **ranks, groups={"tensor": None})
        cut(self.model, world)
        self.beside = models_beside(config, self.model, data.prepared, world)
        self.tokens = largest_row(data.loader, config, self.device)
        self.file = 0.0 if options.train_from_scratch else plan.largest_file(source, self.model)
        self.available = memory.free_bytes(self.device, options.plan_ranks or 1)

    def of(self, shares: ParallelOptions, tokens: int) -> Answer:
        """With weights and rows spread like this (and cut as the options say), at `tokens` a micro-batch."""
        options, optim = self.config[TrainOptions], self.config[OptimOptions]
        spread = memory.Spread.of(shares, self.ranks, self.device)
        beside = {name: plan.weight_bytes(model, spread) for name, model in self.beside.items()}
        held = plan.weight_bytes(self.model, spread) + sum(beside.values())
        asked = optim.optim, spread, optim.optim_in_backward, self.device.type
        need = memory.need(self.model, tokens, *asked)
        free = self.available - (0.0 if spread.away else held)
        layers = self.model.config.num_layers
        chosen, line = memory.plan(options.recomputation, need, layers, self.device, free)
        kind = {"spread": spread, "accumulates": options.gradient_accumulation_steps > 1}
        kind |= {"writing": self.written(spread)}
        here = {} if spread.away else beside
        if "reference" in beside:  # asked alone, it never goes back to its share of what is outside of blocks
            policy = self.beside["reference"] if hasattr(self.beside["reference"], "layers") else self.model
            here = here | {"reference's ends": spread.ends(policy)}
        asked = self.file, self.device, here
        peak = plan.predict_peak(self.model, chosen, need, *asked, **kind)
        return Answer(peak, chosen, line, held + need.host if spread.away else 0.0)

    @cached_property
    def texts(self) -> list[tuple[int, int, int]]:
        """(texts that are written at once, tokens of the longest prompt, tokens of a text) in a rollout, and
        in an evaluation; nothing for one that scores."""
        config, data, found = self.config, self.data, []
        options, new = config[TrainOptions], config[GenerateOptions].max_new_tokens
        if options.stage in WRITES:
            count = data.loader.most_examples() * data.batches_per_draw * answers_of(config)
            found.append((min(TOGETHER, count), int(self.lengths.max()), new))
        if data.predictor is not None:
            named = getattr(data.predictor, "prompts", {}).values()
            longest = max((len(prompt.ids) for prompts in named for prompt in prompts), default=0)
            found.append((min(TOGETHER, options.per_device_eval_batch_size), longest, new * bool(longest)))
        return found

    def written(self, spread: memory.Spread) -> list[dict[str, float]]:
        """What comes to the weights while texts are written or scored, by one model at a time."""
        size, found = self.config[TrainOptions].compute_dtype.itemsize, []
        for texts in self.texts:
            cache = plan.cache_bytes(self.model.config, *texts, size)
            found.append({"gathered weights": spread.for_texts(self.model), "cache of the texts": cache})
        scores = [model for name, model in self.beside.items() if name == "reward model"]
        return found + [{"gathered weights": spread.for_texts(model)} for model in scores]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of the training set's segments; of a stream, what they have at most."""
        rows = self.data.prepared.train
        known = isinstance(rows, ExampleStore)
        return rows.segment_lengths if known else np.full(1, self.config[DataOptions].cutoff_len)

    def choice(self, world: World, refused: str | None = None) -> tuple[dict[str, object], str]:
        """parallel=auto decided, on all ranks alike, and a line that says so; nothing where it is not asked:
        the least sharing that fits every rank, with the margin of gradient_checkpointing=auto. refused: why
        nothing can be shared."""
        shares = self.config[ParallelOptions]
        ranks = shares.data(self.ranks) * shares.cp_size  # of the engine
        if shares.parallel != "auto" or ranks == 1:
            return {}, ""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        free, fewest = world.max_over_ranks(-int(self.available), -here)  # nodes may differ
        self.available = free = -float(free)
        node = -fewest // shares.tp_size
        ways = [{"parallel": "ddp"}, {"parallel": "hsdp", "dp_shard_size": node}, {"parallel": "fsdp"}]
        if not 1 < node < ranks or ranks % node:
            del ways[1]
        answers = (self.of(replace(shares, **way), self.tokens) for way in ways)
        sizes = [int(memory.SLACK * answer.total + memory.RESERVE_BYTES) for answer in answers]
        sizes = world.max_over_ranks(*sizes)
        fit = [number for number, size in enumerate(sizes) if size <= free] or [len(ways) - 1]
        chosen = 0 if refused else fit[0]
        tried = zip(ways[: chosen + 1], sizes)
        needs = ", ".join(f"{way['parallel']} {size / plan.GIB:.1f}" for way, size in tried)
        line = (
            f"parallel=auto is {ways[chosen]['parallel']}: of {free / plan.GIB:.1f} GiB free it takes {needs}"
        )
        if refused and fit[0]:
            line += f"; shares would be less, but {refused}"
        elif sizes[chosen] > free:
            line += "; that may be too much: lower per_device_train_batch_size or cutoff_len"
        return ways[chosen], line

    def report(self, world: World, refused: str | None = None) -> str:
        """What plan=true prints. refused: see choice."""
        config, options, tokens = self.config, self.config[TrainOptions], self.tokens
        way, choice = self.choice(world, refused)
        shares, rows = replace(config[ParallelOptions], **way), options.per_device_train_batch_size
        answer, of_texts = self.of(shares, tokens), ""
        lengths, known = self.lengths, isinstance(self.data.prepared.train, ExampleStore)
        share = self.data.prepared.train.trained_share if known else 1.0
        segments, new = len(self.data.prepared.first_example().segments), 0
        if options.stage in WRITES:
            (texts, _, new), *_ = self.texts
            cache = self.written(memory.Spread())[0]["cache of the texts"]
            lengths, share, segments = lengths + new, new / (lengths + new).mean(), answers_of(config)
            written = f"from,\n  {texts} at once, whose cache takes up to {cache / plan.GIB:.2f} GiB)"
            time = "the time in which the model writes the texts that it learns"
            of_texts = f"\n  (of the updates; to it comes {time} {written}"
        bound = plan.bound_speed(self.model, answer.chosen, lengths, share, tokens, self.device)
        text = plan.report(answer.peak, bound, self.available, tokens, self.device)
        if answer.host:
            inside = f"{answer.host / plan.GIB:.2f} GiB of shares, gradients, optimizer state"
            text += f"\n  in host memory, for each rank: {inside}"
        if options.async_save:
            spread = memory.Spread.of(shares, self.ranks, self.device)
            copies = memory.copied(self.model, config[OptimOptions].optim, spread) / plan.GIB
            text += f"\n  in host memory, while a checkpoint is written: {copies:.2f} GiB of copies more"
        if self.ranks > 1:
            text = text.replace("\n", f" {plan.describe(shares, self.ranks)}\n", 1)
        most = plan.largest_that_fits(lambda tokens: self.of(shares, tokens).total <= self.available)
        text += "\n" + plan.suggestion(most, tokens, rows, segments, new)
        return "\n".join(filter(None, [self.trained, choice, answer.line, f"\n{text}{of_texts}"]))


def choose_parallel(config: Config, source: Path, world: World, data, refused: str | None = None) -> Config:
    """The options with parallel=auto decided. data: setup.Data; refused: see Forecast.choice."""
    shares = config[ParallelOptions]
    if shares.parallel != "auto" or shares.data(world.size) * shares.cp_size == 1 or data.loader is None:
        return config
    forecast = Forecast(config, source, replace(world, rank=1), data)  # of a rank that says nothing
    way, line = forecast.choice(world, refused)
    world.print(line)
    return config.changed(ParallelOptions, **way)


def models_beside(config: Config, model: Decoder, prepared, world: World) -> dict[str, nn.Module]:
    """What a run holds beside the model that it trains, by what it is for, without numbers; see
    make_reference and make_reward. What serves only before the first update is not counted."""
    options, found, beside, held = config[TrainOptions], {}, folders_beside(config), []
    live = options.stage in WRITES or not computes_ahead(config, prepared, world)
    needs = {"dpo": config[PreferenceOptions].needs_reference, "grpo": config[GRPOOptions].beta > 0}
    if config[RewardOptions].reward_model_type == "full":
        held.append(("reward model", "reward_model", config[RewardOptions].reward_model_quantization_bit))
    if live and needs.get(options.stage, options.stage in ("kto", "ppo")):
        held.append(("reference", "ref_model", config[ReferenceOptions].ref_model_quantization_bit))
        if "ref_model" not in beside and config[LoraOptions].finetuning_type != "lora":
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            found["reference"] = nn.ParameterList(nn.Parameter(p.detach(), False) for p in trained)
    for name, key, bits in held:
        for folder in beside.get(key, ()):
            quantization = quant.in_bits(bits, config[QuantOptions], f"{key}_quantization_bit")
            codes = quantization, config[ModelOptions].hf_hub_token
            found[name] = plan.skeleton(folder, load_config(folder), options.compute_dtype, *codes)
            cut(found[name].requires_grad_(False), world)
    return found


def answers_of(config: Config) -> int:
    """Texts that a stage of WRITES writes to each prompt."""
    return config[GRPOOptions].num_generations if config[TrainOptions].stage == "grpo" else 1


def largest_row(loader, config: Config, device: torch.device) -> int:
    """Tokens of the largest micro-batch, with what pads the row; where a stage writes texts, with these."""
    tokens = loader.most_tokens()
    if config[TrainOptions].stage in WRITES:
        tokens += loader.most_examples() * config[GenerateOptions].max_new_tokens
        tokens *= answers_of(config)
    multiple = ROW_MULTIPLE[device.type]
    return -(-tokens // multiple) * multiple
