"""What a run learns: its stage, with the reference policy and the reward that it needs, built from options.

Of these a stage knows only what its constructor takes; which ones they are is chosen here.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import quant
from checkpoints.hub import WANTED_FILES, WITHOUT_WEIGHTS, ModelOptions, resolve_folder
from checkpoints.huggingface import chosen_quantization, load_model
from checkpoints.peft import ADAPTER_CONFIG, apply_adapters
from checkpoints.shares import Shares
from checkpoints.source import RUN_CONFIG, adapters_below, is_adapter, read_run
from data import DataOptions, Prepared, default_cache_dir
from generation.sampling import GenerateOptions
from lora import LoraOptions, full_modules, lora_layers
from model import Decoder
from options.config import Config
from options.errors import UserError, located, refuse
from parallel.fsdp import distribute
from parallel.options import ParallelOptions
from parallel.tensor import cut_linears
from parallel.world import World
from pipeline.store import ExampleStore
from quant import QuantOptions
from quant.linear import quantised_linears
from stages import STAGES, WRITES, reference
from stages.dpo import PairPreference, PreferenceOptions
from stages.grpo import GRPOOptions
from stages.kto import KTOOptions, RatedPreference
from stages.orpo import OddsRatio
from stages.ppo import PPO, PPOOptions
from stages.reference import Reference, ReferenceOptions
from stages.rewards import AdapterReward, ApiReward, FunctionReward, ModelReward, RewardOptions, RewardSource
from stages.rm import RewardModel, RewardModelOptions
from stages.rollouts import ending_with
from stages.stage import RolloutStage, Stage
from text.tokenizer import Tokenizer
from training.options import OptimOptions, TrainOptions


def notices(config: Config, ranks: int = 1) -> list[str]:
    """What a user should know of the options before the run begins: which were given, differ from their
    default, and do nothing in this stage, or on so many ranks."""
    stage, optim, reasons = config[TrainOptions].stage, config[OptimOptions], {}
    for name, option in config.options.items():
        changed, reason = config.values[name] != option.default, option.unread(config.values)
        if option.does_nothing(stage):
            reason = f"stage {stage}" if changed else None
        elif name not in config.given or config.values[name] in (None, ()):
            continue
        reasons.setdefault(reason, []).append(name)
    reasons.pop(None, None)
    spread = config[ParallelOptions]
    if spread.engine(ranks)[1] == 1 and not spread.fsdp_offload and (ranks == 1 or spread.parallel == "ddp"):
        alone = ranks == 1 and spread.parallel == "fsdp"
        unread = {"parallel": alone, "fsdp_reshard_after_forward": not spread.fsdp_reshard_after_forward}
        unread |= {"gather_for_generation": not spread.gather_for_generation}
        reason = "one process (torchrun starts more)" if alone else f"parallel={spread.parallel}"
        reasons.setdefault(reason, []).extend(key for key, given in unread.items() if given)
    run, data = config[TrainOptions], config[DataOptions]
    if run.evaluation_strategy == "no" and not run.do_eval and run.trains:
        unseen = {"val_size": data.val_size, "eval_dataset": data.eval_dataset}
        unseen |= {"predict_with_generate": run.predict_with_generate}
        given = [key for key, value in unseen.items() if value and not run.do_predict]
        reasons.setdefault("evaluation_strategy=no", []).extend(given)
    by_epochs = [key for key in ("evaluation_strategy", "save_strategy") if config.values[key] == "epoch"]
    if data.streaming and by_epochs:
        reasons["streaming=true, whose epochs have no known end but the last update,"] = by_epochs
    if optim.warmup_steps and optim.warmup_ratio and optim.lr_scheduler_type != "constant":
        reasons[f"warmup_steps={optim.warmup_steps:g}"] = ["warmup_ratio"]
    return [f"{reason} does not use {', '.join(names)}" for reason, names in reasons.items() if names]


def folders_beside(config: Config) -> dict[str, list[Path]]:
    """The models and adapters that the stage needs beside the model that trains, by the keys that name them.

    Raises UserError for one that is not there, and for bits that no format has.
    """
    run, reward, needed = config[TrainOptions], config[RewardOptions], []
    if config[ReferenceOptions].ref_model is not None:
        needed.append("ref_model")
    if run.stage in WRITES and reward.reward_model and reward.reward_model_type != "api":
        needed.append("reward_model")
    named: dict[str, tuple[str, ...]] = {}
    for key in [] if run.only_predicts else needed:
        bits = f"{key}_quantization_bit"
        quant.in_bits(config.values[bits], config[QuantOptions], bits)
        named |= {key: (config.values[key],), f"{key}_adapters": config.values[f"{key}_adapters"]}
    how = "main", config[ModelOptions], wanted_files(config)
    return {key: [resolve_folder(key, each, *how) for each in named[key]] for key in named}


def wanted_files(config: Config) -> list[str]:
    """What is fetched of a model on a hub: a plan reads no weights."""
    return WITHOUT_WEIGHTS if config[TrainOptions].plan else WANTED_FILES


def rollout_sizes(config: Config) -> tuple[int, int]:
    """(micro-batches that are drawn from the data at once, updates that are made of them)."""
    run = config[TrainOptions]
    options = {"grpo": config[GRPOOptions], "ppo": config[PPOOptions]}.get(run.stage)
    if options is None:
        return run.gradient_accumulation_steps, 1
    return run.gradient_accumulation_steps * options.groups_per_rollout, options.updates_per_rollout


def make_stage(
    config: Config,
    model: Decoder,
    tokenizer,
    template,
    prepared: Prepared,
    world: World,
    *,
    reward=None,
    own: dict | None = None,
    again: Callable[[], Decoder] | None = None,
) -> Stage:
    """The stage that the options ask for. The model holds the weights that the run starts from, even if it
    resumes. reward: what make_reward_ahead gave. own, again: as make_reference takes them."""
    run = config[TrainOptions]
    if run.only_predicts:
        return Stage()  # no loss is asked for, so no reference, no reward
    kind, preference = STAGES[run.stage], config[PreferenceOptions].for_stage(run.stage)
    if kind is PairPreference and preference.pref_loss == "orpo":
        kind = OddsRatio

    def held_to(texts: Prepared | None, ld_alpha: float | None = None) -> Reference:
        return make_reference(config, model, tokenizer, texts, world, ld_alpha, own, again)

    if kind is RewardModel:
        return RewardModel(config[RewardModelOptions])
    if issubclass(kind, PairPreference):
        needed = preference.needs_reference
        return kind(preference, held_to(prepared, preference.ld_alpha) if needed else None, world)
    if kind is RatedPreference:
        beta, ftx = preference.pref_beta, preference.pref_ftx or 0.0
        return RatedPreference(config[KTOOptions], beta, ftx, held_to(prepared), world)
    if not issubclass(kind, RolloutStage):
        return kind()
    options = config[PPOOptions if kind is PPO else GRPOOptions]
    shared = {"tokenizer": tokenizer, "stop_ids": tokenizer.stop_ids, "seed": run.seed, "world": world}
    reward = reward or make_reward(config, model, tokenizer, world)  # whose adapter has whole tensors
    shared["reference"] = held_to(None) if kind is PPO or options.beta else None
    generation = how_to_write(config[GenerateOptions], tokenizer, template, world)
    if kind is PPO:
        shared |= {"group_size": run.gradient_accumulation_steps, "output_dir": Path(run.output_dir)}
    return kind(options, generation, reward, **shared)


def how_to_write(options: GenerateOptions, tokenizer: Tokenizer, template, world: World) -> GenerateOptions:
    """Options of the sampling in a stage that learns from its own texts, which end where the template says.

    Says on rank 0 where the texts will not be samples of the policy whose probabilities are learnt.
    """
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    found = {key: getattr(options, key) for key in neutral}
    bent = ", ".join(f"{key}={value}" for key, value in found.items() if value != neutral[key])
    remedy = " ".join(f"{key}={value:g}" for key, value in neutral.items())
    if bent:
        note = f"note: texts are sampled with {bent}, which the probabilities of the loss leave out"
        world.print(f"{note}; for exact policy gradients set {remedy}")
    return ending_with(options, template, tokenizer)


def make_reference(
    config: Config,
    model: Decoder,
    tokenizer: Tokenizer,
    prepared: Prepared | None,
    world: World,
    ld_alpha=None,
    own: dict | None = None,
    again: Callable[[], Decoder] | None = None,
) -> Reference:
    """The policy that training is held to, given the model with the weights it starts from.

    prepared: the texts it is asked for, if known ahead; None: the model writes them (ppo, grpo).
    ld_alpha: as in logprobs.answer_sums.  own: see reference.start_policy.  again: reads the start of the run
    once more, where ranks have shares of the model, which are not copied.
    """
    run = config[TrainOptions]
    live = prepared is None or not computes_ahead(config, prepared, world)
    if config[ReferenceOptions].ref_model is not None:
        otherwise = "train on it with create_new_adapter=true, and the start is the reference"
        second, folders = second_model(config, "ref_model", model, tokenizer, world, otherwise)
        made, text = Reference(second, ld_alpha), " + ".join(map(str, folders))
    else:
        alone = lora_layers(model) and not full_modules(model)  # adapters train
        if config[ParallelOptions].shares_weights(world.size) and not alone and (live or own):
            made = Reference(again(), ld_alpha)
            made.policy.runtime = replace(model.runtime, context=made.policy.runtime.context)
        else:
            made = Reference(reference.start_policy(model, live, own), ld_alpha)
        text = "the weights that the run starts from" + (", a frozen copy" if live else "")
        if made.policy is None or own:
            text = "the model with its adapters off" + (f" and its own {', '.join(own)}" if own else "")
            if config[ModelOptions].adapter_name_or_path and not config[LoraOptions].create_new_adapter:
                text += ", so without what the given adapter learned; create_new_adapter=true takes it in"
    world.print(f"reference: {text}")
    for each in (made.policy or model, model):
        distribute(each, world, config[ParallelOptions])
    if live:
        return made
    stores = {} if prepared.train is None or not run.trains else {"train": prepared.train}
    if run.do_eval or run.evaluation_strategy != "no":
        stores |= {f"evaluation set {name}": store for name, store in prepared.eval.items()}
    cache = Path(config[ModelOptions].cache_dir or default_cache_dir()) / "reference"
    rows, afresh = run.per_device_eval_batch_size, config[DataOptions].overwrite_cache
    reference.precompute(made, model, stores, rows, cache, world, afresh)
    return Reference(None, ld_alpha, ahead=True)


def computes_ahead(config: Config, prepared: Prepared, world: World) -> bool:
    """Whether the reference's log-probabilities are computed before training: where that is no more work than
    beside it, so not for a stream, nor for fewer updates than a pass over the data takes, unless the options
    say so."""
    ahead, run = config[ReferenceOptions].precompute_ref_log_probs, config[TrainOptions]
    if ahead is not None:
        return ahead
    if not isinstance(prepared.train, ExampleStore) or prepared.packing or run.max_steps <= 0:
        return not config[DataOptions].streaming
    per_update = run.per_device_train_batch_size * run.gradient_accumulation_steps * world.data_size
    return run.max_steps * per_update >= len(prepared.train)


def make_reward_ahead(config: Config, tokenizer: Tokenizer) -> RewardSource | None:
    """The reward of a stage that writes texts where functions or a server give it, so that a mistake there
    shows before any weight is read; None where there is none, or a model gives it. Raises UserError,
    StopRun."""
    options, run = config[RewardOptions], config[TrainOptions]
    if run.stage not in WRITES or run.only_predicts or run.plan:
        return None
    if options.reward_file:
        return FunctionReward(options.reward_file, options.reward_funcs, options.reward_weights)
    if options.reward_model is None:
        raise UserError("reward_file: missing; name a Python file with reward functions, or a reward_model")
    if options.reward_model_type != "api":
        return None
    server = ApiReward(options.reward_model, tokenizer, options.reward_api_timeout)
    server.ask_once()
    return server


def make_reward(config: Config, model: Decoder, tokenizer: Tokenizer, world: World) -> RewardSource:
    """The model that says what the answers of `model` are worth, by the options. Raises UserError."""
    if config[RewardOptions].reward_model_type == "full":
        otherwise = "set reward_model_type=lora"
        second, (folder, *adapters) = second_model(config, "reward_model", model, tokenizer, world, otherwise)
        return ModelReward(second, [*reversed(adapters), folder])
    (folder,) = folders_beside(config)["reward_model"]
    text = f"reward_model: {folder} is no adapter, as lora needs; set reward_model_type=full"
    refuse(not is_adapter(folder), text)
    if (folder / "tokenizer.json").is_file():
        refuse_other_tokenizer("reward_model", folder, tokenizer)
    merged = config[ModelOptions].adapter_name_or_path
    merged = merged if config[LoraOptions].create_new_adapter else merged[:-1]
    apart = f"reward_model_type=full reward_model=BASE reward_model_adapters=THEM,{folder}"
    remedy = f"start this run from the same ones with create_new_adapter=true, or set {apart}"
    refuse_other_base("reward_model", folder, merged, remedy)
    reward = AdapterReward(model, folder)
    spread = config[ParallelOptions]
    found = f"{folder} replaces whole tensors, of which ranks hold shares (parallel={spread.parallel})"
    refuse(reward.whole and spread.shares_weights(world.size), f"reward_model: {found}; set {apart}")
    if world.tensor > 1:
        cut_linears(reward.layers, world)
    return reward


def second_model(
    config: Config, key: str, model: Decoder, tokenizer: Tokenizer, world: World, otherwise: str
) -> tuple[Decoder, list[Path]]:
    """The frozen model that option `key` names, and the folders it was made of: with `key`_adapters on it,
    quantised to `key`_quantization_bit (none or 0 = as the files have it), in the compute dtype and on the
    device of the model that trains. otherwise: what else to do with an adapter in its place."""
    (folder,), adapters = (folders_beside(config)[name] for name in (key, f"{key}_adapters"))
    remedy = f"{otherwise}, or set {key}=BASE {key}_adapters={folder}"
    refuse(is_adapter(folder), f"{key}: {folder} is an adapter; {remedy}")
    refuse_other_tokenizer(key, folder, tokenizer)
    for number, adapter in enumerate(adapters):
        refuse_other_base(f"{key}_adapters", adapter, adapters[:number], "name them in front of it")
    bits, model_options = f"{key}_quantization_bit", config[ModelOptions]
    wanted = quant.in_bits(config.values[bits], config[QuantOptions], bits)
    scaling = None if model_options.rope_scaling == "none" else model_options.rope_scaling
    device, dtype = world.device, config[TrainOptions].compute_dtype
    spread = config[ParallelOptions]
    with located(key):
        format, _ = chosen_quantization(folder, wanted)
        how = folder, dtype, device, scaling, config[DataOptions].cutoff_len, format
        shares = Shares(*how) if spread.shares_weights(world.size) else None
        if shares is not None and not (adapters and quantised_linears(shares.model)):
            shares.merge(adapters)
            shares.model.requires_grad_(False)
            second = shares.load(world, spread)
        else:
            second = load_model(*how)
            apply_adapters(second, adapters)
    second.runtime.compute_dtype, second.runtime.flash_attn = dtype, model.runtime.flash_attn
    distribute(second.eval().requires_grad_(False), world, spread)
    return second, [folder, *adapters]


def refuse_other_base(key: str, adapter: Path, merged: Iterable[str], remedy: str) -> None:
    """UserError unless the adapter was trained on top of just these adapters, as far as its folder tells."""
    missing = not (adapter / ADAPTER_CONFIG).is_file()
    refuse(missing, f"{key}: {adapter} holds no adapter ({ADAPTER_CONFIG}); name the folder of one")
    both = adapters_below(read_run(adapter)), merged
    below, here = ([Path(name).expanduser().resolve() for name in names] for names in both)
    if below != here and (adapter / RUN_CONFIG).is_file():
        on, found = ("+".join(map(str, each)) or "no other adapter" for each in (below, here))
        where = f"{adapter} was trained on the base with {on}, here it would lie on {found}"
        raise UserError(f"{key}: {where}; {remedy}")


def refuse_other_tokenizer(key: str, folder: Path, tokenizer: Tokenizer) -> None:
    """UserError unless the model that option `key` names reads the same token ids as the one that trains."""
    mine, theirs = tokenizer.vocabulary(), Tokenizer.from_folder(folder).vocabulary()
    if mine == theirs:
        return
    differing = next(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    found = f"{theirs.get(differing)} there and {mine.get(differing)} in the trained model"
    remedy = "both see the same ids, so take one of the same family"
    raise UserError(f"{key}: {folder} has another tokenizer: token {differing!r} is {found}; {remedy}")
