"""What a run learns: its stage, with the reference policy and the reward that the stage needs, built from
options.

A stage learns of the reference and of the reward only what its constructor takes; which one they are is
chosen here.
"""

from collections.abc import Iterable
from pathlib import Path

import quant
from checkpoints.hub import ModelOptions, resolve_folder
from checkpoints.huggingface import chosen_quantization, load_model
from checkpoints.peft import ADAPTER_CONFIG, apply_adapters
from checkpoints.source import RUN_CONFIG, adapters_below, is_adapter, read_run
from data import DataOptions, Prepared, default_cache_dir
from generation.sampling import GenerateOptions
from lora import LoraOptions
from model import Decoder
from options import config as configuration
from parallel.world import World
from pipeline.store import ExampleStore
from quant import QuantOptions
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
from training.options import TrainOptions


def unused_keys(config: configuration.Config) -> list[str]:
    """What was given, differs from its default, and does nothing in this stage."""
    stage, unused = config[TrainOptions].stage, []
    for name, option in config.options.items():
        idle = option.does_nothing(stage)
        idle |= name == "simpo_gamma" and config[PreferenceOptions].pref_loss != "simpo"
        if idle and config.values[name] != option.default:
            unused.append(name)
    return unused


def folders_beside(config: configuration.Config) -> dict[str, list[Path]]:
    """The models and adapters that the stage needs beside the model that trains, by the keys that name them.

    Raises ValueError for one that is not there, and for bits that no format has.
    """
    run, held_to, reward = config[TrainOptions], config[ReferenceOptions], config[RewardOptions]
    named: dict[str, tuple[str, ...]] = {}
    if held_to.ref_model is not None and not run.only_predicts:
        named |= {"ref_model": (held_to.ref_model,), "ref_model_adapters": held_to.ref_model_adapters}
        quant.in_bits(held_to.ref_model_quantization_bit, config[QuantOptions], "ref_model_quantization_bit")
    if (
        run.stage in WRITES
        and reward.reward_model
        and reward.reward_model_type != "api"
        and not run.only_predicts
    ):
        named |= {
            "reward_model": (reward.reward_model,),
            "reward_model_adapters": reward.reward_model_adapters,
        }
        quant.in_bits(
            reward.reward_model_quantization_bit, config[QuantOptions], "reward_model_quantization_bit"
        )
    return {
        key: [resolve_folder(key, name, "main", config[ModelOptions]) for name in names]
        for key, names in named.items()
    }


def notices(config: configuration.Config) -> list[str]:
    """What a user should know of the options before the run begins."""
    unused = unused_keys(config)
    return [f"stage {config[TrainOptions].stage} does not use {', '.join(unused)}"] if unused else []


def rollout_sizes(config: configuration.Config) -> tuple[int, int]:
    """(micro-batches that are drawn from the data at once, updates that are made of them)."""
    run = config[TrainOptions]
    options = {"grpo": config[GRPOOptions], "ppo": config[PPOOptions]}.get(run.stage)
    if options is None:
        return run.gradient_accumulation_steps, 1
    return run.gradient_accumulation_steps * options.groups_per_rollout, options.updates_per_rollout


def make_stage(
    config: configuration.Config,
    model: Decoder,
    tokenizer: Tokenizer,
    template,
    prepared: Prepared,
    world: World,
    *,
    reward: RewardSource | None = None,
) -> Stage:
    """The stage that the options ask for. The model holds the weights that the run starts from, even if it
    resumes.

    reward: what make_reward_ahead gave.
    """
    if config[TrainOptions].only_predicts:
        return Stage()  # no loss is asked for, so no reference, no reward
    run, preference = config[TrainOptions], config[PreferenceOptions].for_stage(config[TrainOptions].stage)
    kind = STAGES[run.stage]
    if kind is PairPreference and preference.pref_loss == "orpo":
        kind = OddsRatio
    if kind is RewardModel:
        return RewardModel(config[RewardModelOptions])
    if issubclass(kind, PairPreference):
        held_to = None
        if preference.needs_reference:
            held_to = make_reference(config, model, tokenizer, prepared, world, preference.ld_alpha)
        return kind(preference, held_to, world)
    if kind is RatedPreference:
        held_to = make_reference(config, model, tokenizer, prepared, world)
        return kind(config[KTOOptions], preference.pref_beta, preference.pref_ftx or 0.0, held_to, world)
    if not issubclass(kind, RolloutStage):
        return kind()
    options, more = config[GRPOOptions], {}
    if kind is PPO:
        options = config[PPOOptions]
        more = {"group_size": run.gradient_accumulation_steps, "output_dir": Path(run.output_dir)}
    needs_reference = kind is PPO or options.beta
    return kind(
        options,
        how_to_write(config[GenerateOptions], tokenizer, template, world),
        reward or make_reward(config, model, tokenizer),
        tokenizer=tokenizer,
        stop_ids=tokenizer.stop_ids,
        reference=make_reference(config, model, tokenizer, None, world) if needs_reference else None,
        seed=run.seed,
        world=world,
        **more,
    )


def how_to_write(options: GenerateOptions, tokenizer: Tokenizer, template, world: World) -> GenerateOptions:
    """Options of the sampling in a stage that learns from its own texts, which end where the template says.

    Says on rank 0 where the texts will not be samples of the policy whose probabilities are learnt.
    """
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    bent = [
        f"{key}={getattr(options, key)}" for key, value in neutral.items() if getattr(options, key) != value
    ]
    if bent:
        world.print(
            f"note: texts are sampled with {', '.join(bent)}, which the probabilities of the loss leave out; "
            "for exact "
            "policy gradients set " + " ".join(f"{key}={value:g}" for key, value in neutral.items())
        )
    return ending_with(options, template, tokenizer)


def make_reference(
    config: configuration.Config,
    model: Decoder,
    tokenizer: Tokenizer,
    prepared: Prepared | None,
    world: World,
    ld_alpha: float | None = None,
) -> Reference:
    """The policy that training is held to, given the model with the weights it starts from.

    prepared: the texts that it is asked for, if they are known ahead; None: the model writes them (ppo,
    grpo). ld_alpha: as in heads.answer_sums.
    """
    options, run = config[ReferenceOptions], config[TrainOptions]
    live = prepared is None or not computes_ahead(config, prepared, world)
    if options.ref_model is not None:
        beside = folders_beside(config)
        (folder,), adapters = beside["ref_model"], beside["ref_model_adapters"]
        if is_adapter(folder):
            raise ValueError(
                f"ref_model: {folder} is an adapter; set ref_model=BASE ref_model_adapters={folder}, or "
                "train on it "
                "with create_new_adapter=true, and the start is the reference"
            )
        refuse_other_tokenizer("ref_model", folder, tokenizer)
        for number, adapter in enumerate(adapters):
            refuse_other_base("ref_model_adapters", adapter, adapters[:number], "name them in front of it")
        bits = options.ref_model_quantization_bit
        made = Reference(second_model(config, "ref_model", folder, adapters, bits, model), ld_alpha)
        world.print(f"reference: {' + '.join(map(str, (folder, *adapters)))}")
    else:
        made = Reference(reference.start_policy(model, live), ld_alpha)
        text = "the weights that the run starts from" + (", a frozen copy" if live else "")
        if made.policy is None:
            text = "the model with its adapters off"
            if config[ModelOptions].adapter_name_or_path and not config[LoraOptions].create_new_adapter:
                text += ", so without what the given adapter learned; create_new_adapter=true takes it in"
        world.print(f"reference: {text}")
    if live:
        return made
    stores = {} if prepared.train is None or not run.trains else {"train": prepared.train}
    if run.do_eval or run.evaluation_strategy != "no":
        stores |= {f"evaluation set {name}": store for name, store in prepared.eval.items()}
    cache = Path(config[ModelOptions].cache_dir or default_cache_dir()) / "reference"
    rows, afresh = run.per_device_eval_batch_size, config[DataOptions].overwrite_cache
    reference.precompute(made, model, stores, rows, cache, world, afresh)
    return Reference(None, ld_alpha)  # every batch brings its own now


def computes_ahead(config: configuration.Config, prepared: Prepared, world: World) -> bool:
    """Whether the reference's log-probabilities are computed before training: where that is no more work than
    beside it, so not for a stream, nor for fewer updates than a pass over the data takes, unless the options
    say so."""
    ahead, run = config[ReferenceOptions].precompute_ref_log_probs, config[TrainOptions]
    if (
        ahead is not None
        or not isinstance(prepared.train, ExampleStore)
        or prepared.packing
        or run.max_steps <= 0
    ):
        return not config[DataOptions].streaming if ahead is None else ahead
    per_update = run.per_device_train_batch_size * run.gradient_accumulation_steps * world.size
    return run.max_steps * per_update >= len(prepared.train)


def make_reward_ahead(config: configuration.Config, tokenizer: Tokenizer) -> RewardSource | None:
    """The reward of a stage that writes texts where functions or a server give it, so that a mistake there
    shows before any weight is read; None where there is none, or a model gives it. Raises ValueError,
    StopRun."""
    options, run = config[RewardOptions], config[TrainOptions]
    if run.stage not in WRITES or run.only_predicts or run.plan:
        return None
    if options.reward_file:
        return FunctionReward(options.reward_file, options.reward_funcs, options.reward_weights)
    if options.reward_model is None:
        raise ValueError("reward_file: missing; name a Python file with reward functions, or a reward_model")
    if options.reward_model_type != "api":
        return None
    server = ApiReward(options.reward_model, tokenizer, options.reward_api_timeout)
    server.ask_once()
    return server


def make_reward(config: configuration.Config, model: Decoder, tokenizer: Tokenizer) -> RewardSource:
    """The model that says what the answers of `model` are worth, by the options. Raises ValueError."""
    options, beside = config[RewardOptions], folders_beside(config)
    (folder,), adapters = beside["reward_model"], beside["reward_model_adapters"]
    if options.reward_model_type == "full":
        if is_adapter(folder):
            raise ValueError(
                f"reward_model: {folder} is an adapter; set reward_model_type=lora, or reward_model=BASE "
                f"reward_model_adapters={folder}"
            )
        refuse_other_tokenizer("reward_model", folder, tokenizer)
        for number, adapter in enumerate(adapters):
            refuse_other_base("reward_model_adapters", adapter, adapters[:number], "name them in front of it")
        second = second_model(
            config, "reward_model", folder, adapters, options.reward_model_quantization_bit, model
        )
        return ModelReward(second, [*reversed(adapters), folder])
    if not is_adapter(folder):
        raise ValueError(
            f"reward_model: {folder} is no adapter, as reward_model_type=lora has it; set "
            "reward_model_type=full"
        )
    if (folder / "tokenizer.json").is_file():
        refuse_other_tokenizer("reward_model", folder, tokenizer)
    merged = config[ModelOptions].adapter_name_or_path
    merged = merged if config[LoraOptions].create_new_adapter else merged[:-1]
    remedy = (
        f"start this run from the same ones with create_new_adapter=true, or set reward_model_type=full "
        f"reward_model=BASE reward_model_adapters=THEM,{folder}"
    )
    refuse_other_base("reward_model", folder, merged, remedy)
    return AdapterReward(model, folder)


def refuse_other_base(key: str, adapter: Path, merged: Iterable[str], remedy: str) -> None:
    """ValueError unless the adapter was trained on top of just these adapters, as far as its folder tells."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{key}: {adapter} holds no adapter ({ADAPTER_CONFIG}); name the folder of one")
    below, here = [
        [Path(name).expanduser().resolve() for name in names]
        for names in (adapters_below(read_run(adapter)), merged)
    ]
    if below != here and (adapter / RUN_CONFIG).is_file():
        on, found = ("+".join(map(str, each)) or "no other adapter" for each in (below, here))
        raise ValueError(
            f"{key}: {adapter} was trained on the base with {on}, here it would lie on {found}; {remedy}"
        )


def second_model(
    config: configuration.Config,
    key: str,
    folder: Path,
    adapters: Iterable[Path],
    bits: int | None,
    model: Decoder,
) -> Decoder:
    """A frozen model beside the one that trains, with adapters, in its compute dtype and on its device.

    key: the option that names it, for messages.  bits: quantise it; None or 0 = as the files have it.
    """
    options, model_options = config[TrainOptions], config[ModelOptions]
    wanted = quant.in_bits(bits, config[QuantOptions], f"{key}_quantization_bit")
    try:
        format, _ = chosen_quantization(folder, wanted)
        scaling = None if model_options.rope_scaling == "none" else model_options.rope_scaling
        device = model.embed_tokens.weight.device
        dtype = options.compute_dtype
        second = load_model(folder, dtype, device, scaling, config[DataOptions].cutoff_len, format)
        apply_adapters(second, adapters)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    second.runtime.compute_dtype, second.runtime.flash_attn = dtype, model.runtime.flash_attn
    return second.eval().requires_grad_(False)


def refuse_other_tokenizer(key: str, folder: Path, tokenizer: Tokenizer) -> None:
    """ValueError unless the model that option `key` names reads the same token ids as the one that trains."""
    other = Tokenizer.from_folder(folder)
    mine, theirs = tokenizer.vocabulary(), other.vocabulary()
    if mine == theirs:
        return
    differing = next(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    raise ValueError(
        f"{key}: {folder} has another tokenizer: token {differing!r} is {theirs.get(differing)} there and "
        f"{mine.get(differing)} in the trained model; both see the same token ids, so take a model of the "
        "same family"
    )
