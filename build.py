"""What a training run is made of, built from its options: where it starts, data, loaders, model, stage, plan.

train.py calls these in order; each gives one part and knows nothing of the loop.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import config as configuration
import memory
import plan
import quant
import reference
import runs
from adapter_files import apply_adapters
from batches import ROW_MULTIPLE, BatchLoader
from checkpoint import (
    ModelOptions,
    chosen_quantization,
    load_config,
    load_model,
    prepare_adapters,
    random_model,
    resolve_adapters,
    resolve_model,
    save_trained,
)
from data import DataOptions, Prepared, default_cache_dir, load_datasets
from data_report import describe_example
from generate import split_stop_words
from grpo import GroupPolicy, GRPOOptions
from hub import resolve_folder
from inference import adapters_below, check_adapters, is_adapter, read_run
from kto import KTOOptions, RatedPreference, add_mismatches
from lora import LoraOptions, quantised_linears, trainable_report
from model import Decoder, RMSNorm
from objectives import Rhythm, Stage, TokenLoss
from optim import OptimOptions
from parallel import World
from ppo import PPO, PPOOptions
from predict import Predictor, ScorePredictor, TextPredictor
from preference import OddsRatio, PairPreference, PreferenceOptions
from quant import QuantOptions
from reference import Reference, ReferenceOptions
from reward_model import RewardModel
from rewards import AdapterReward, ApiReward, FunctionReward, ModelReward, RewardOptions, RewardSource
from runs import TrainOptions
from sampling import GenerateOptions
from sources import HubAccess
from templates import TemplateOptions, get_template
from token_store import ExampleStore
from tokenizer import Tokenizer
from value_head import ValueHead, has_value_head, load_value_head

SECTIONS = [
    TrainOptions, ModelOptions, QuantOptions, DataOptions, TemplateOptions, LoraOptions, OptimOptions,
    PreferenceOptions, KTOOptions, ReferenceOptions, RewardOptions, GRPOOptions, PPOOptions, GenerateOptions,
]  # fmt: skip
HEAD_START = 0.1  # share of trl's random start of a value head; see start_value_head
STAGES: dict[str, type[Stage]] = {
    "pt": TokenLoss,
    "sft": TokenLoss,
    "rm": RewardModel,
    "dpo": PairPreference,
    "orpo": OddsRatio,
    "kto": RatedPreference,
    "ppo": PPO,
    "grpo": GroupPolicy,
}
WRITES = ("ppo", "grpo")  # stages that learn from texts that the model writes


def find_start(config: configuration.Config) -> tuple[Path | None, Path]:
    """(checkpoint to continue or None, model folder); refuses to overwrite what the run starts from."""
    options, output_dir = config[TrainOptions], Path(config[TrainOptions].output_dir)
    resume, overwrite = None, options.overwrite_output_dir
    check_adapters(config[ModelOptions])
    if options.plan:
        return None, resolve_model(config[ModelOptions])
    if options.trains:
        resume = runs.find_resume(output_dir, options.resume_from_checkpoint, overwrite)
    source = resolve_model(config[ModelOptions])
    if options.trains:
        sources: dict[str, tuple] = {"adapter_name_or_path": config[ModelOptions].adapter_name_or_path}
        sources |= {"model_name_or_path": (source,)}
        runs.refuse_to_destroy(output_dir, overwrite and resume is None, sources)
    return resume, source


def refuse_on_quantised(config: configuration.Config, source: Path) -> None:
    """What config.RULES say of quantization_bit, for a checkpoint that is quantised already. Raises ValueError."""
    stored = load_config(source).hf.get("quantization_config")
    if not stored:
        return
    kind, method = config[LoraOptions].finetuning_type, stored.get("quant_method")
    base = f"{source} is quantised ({method})"
    if config[TrainOptions].train_from_scratch:
        raise ValueError(f"train_from_scratch: {base}, which random weights are not; remove quantization_config there")
    if kind != "lora":
        raise ValueError(
            f"finetuning_type: {kind}, but {base}: its weights have no gradient; set finetuning_type=lora, or start "
            "from a 16-bit model"
        )


def prepare_data(config: configuration.Config, source: Path, template, tokenizer: Tokenizer, world: World) -> Prepared:
    """Tokenise, report what was lost, show the first example, and see that the model knows every token id."""
    options, data_options, model_options = config[TrainOptions], config[DataOptions], config[ModelOptions]
    texts, kind = options.predict_with_generate, None
    if texts and options.only_predicts and not data_options.val_size and data_options.tokenized_path is None:
        # then rows without an answer are welcome, and what the training set holds does not matter
        kind, data_options = "prompt", replace(data_options, dataset=(), interleave_probs=(), mix_strategy="concat")
    prepared = load_datasets(
        data_options,
        template,
        tokenizer,
        options.stage,
        seed=options.seed,
        is_main=world.is_main,
        enable_thinking=config[TemplateOptions].enable_thinking,
        cache_dir=model_options.cache_dir,
        hub=HubAccess(model_options.hf_hub_token, model_options.ms_hub_token, model_options.cache_dir),
        prompts=texts,
        kind=kind,
    )
    world.print(prepared.report)
    first = prepared.first_example()
    if first is not None:
        world.print(f"\nthe first example: {describe_example(first, tokenizer, prepared.kind)}\n")
    known = load_config(source).vocab_size
    if tokenizer.vocab_size > known:  # some tokenizers hold ids that are never used; those do no harm
        stores = [store for store in (prepared.train, *prepared.eval.values()) if isinstance(store, ExampleStore)]
        largest = max((int(part.tokens.max()) for store in stores for part in store.parts), default=0)
        if data_options.streaming:
            largest = tokenizer.vocab_size - 1
        if largest >= known:
            raise ValueError(
                f"model_name_or_path: {source}: tokenizer.json makes token ids up to {largest}, but config.json has "
                f"vocab_size {known}; the tokenizer is of another model"
            )
    if options.stage == "kto" and config[KTOOptions].needs_mismatches:
        add_mismatches(prepared, data_options.cutoff_len)
    return prepared


def describe_data(prepared: Prepared) -> str:
    if not isinstance(prepared.train, ExampleStore):
        return "streamed"
    return f"{len(prepared.train)} examples of {int(prepared.train.lengths.sum())} tokens"


def pick_template(config: configuration.Config, tokenizer: Tokenizer):
    """The chat template; plain-text pretraining needs none."""
    options = config[TemplateOptions]
    if config[TrainOptions].stage == "pt" and options.template is None:
        return None
    return get_template(options.template, tokenizer.chat_template, options.default_system)


def make_loaders(prepared: Prepared, options: TrainOptions, data_options: DataOptions, world: World):
    """The training loader (None if only evaluating) and one loader per evaluation set."""
    place = {"rank": world.rank, "world": world.size}
    loader = None
    if options.trains:
        rows = options.per_device_train_batch_size
        loader = prepared.train_loader(data_options, rows_per_batch=rows, seed=options.seed, **place)
    eval_loaders = prepared.eval_loaders(data_options, rows_per_batch=options.per_device_eval_batch_size, **place)
    if (options.evaluation_strategy != "no" or options.do_eval or options.do_predict) and not eval_loaders:
        raise ValueError("evaluation_strategy: there is no evaluation data; set val_size or eval_dataset")
    return loader, eval_loaders


def check_metric(options: TrainOptions, eval_loaders: dict[str, BatchLoader], predictor: Predictor | None) -> None:
    """ValueError when what decides which checkpoint is best is not measured."""
    generated = () if predictor is None else predictor.names
    names = evaluation_names(options.stage, eval_loaders, generated)
    if options.evaluation_strategy != "no" and options.metric not in names:
        raise ValueError(f"metric_for_best_model: {options.metric} is not measured; there are {', '.join(names)}")


def evaluation_names(
    stage: str, eval_loaders: dict[str, BatchLoader], generated: tuple[str, ...] = ()
) -> list[str]:
    """Names of what an evaluation measures, without the speeds.  generated: of what it measures of generated texts."""
    sets = [f"eval_{name}_" for name in eval_loaders] if len(eval_loaders) > 1 else []
    kinds = (*STAGES[stage].evaluation_names, *generated)
    return [prefix + kind for prefix in (*sets, "eval_") for kind in kinds]


def make_predictor(
    config: configuration.Config, prepared: Prepared, template, tokenizer: Tokenizer, world: World
) -> Predictor | None:
    """What answers the rows of the evaluation sets; None if the run asks for no such thing."""
    options = config[TrainOptions]
    if options.predict_with_generate and prepared.prompts:
        return TextPredictor(
            prepared.prompts, tokenizer, template, config[GenerateOptions], seed=options.seed,
            rows_per_batch=options.per_device_eval_batch_size, world=world,
        )  # fmt: skip
    if options.do_predict and options.stage == "rm":
        return ScorePredictor(prepared.eval, rows_per_batch=options.per_device_eval_batch_size, world=world)
    return None


def make_rhythm(config: configuration.Config) -> Rhythm:
    """How many micro-batches are drawn from the data at once, and how many updates are made of them."""
    group, stage = config[TrainOptions].gradient_accumulation_steps, config[TrainOptions].stage
    if stage == "grpo":
        return Rhythm(group, config[GRPOOptions].num_iterations)
    if stage == "ppo":
        options = config[PPOOptions]
        return Rhythm(group * options.ppo_buffer_size, options.ppo_epochs * options.ppo_buffer_size)
    return Rhythm(group)


def steps_per_epoch(rhythm: Rhythm, loader) -> int | None:
    """Updates of one pass over the data; None for a stream. The last draw of a pass may be smaller."""
    per_epoch = loader.batches_per_epoch
    return None if per_epoch is None else math.ceil(per_epoch / rhythm.draw) * rhythm.updates


def count_steps(options: TrainOptions, rhythm: Rhythm, loader) -> int:
    """Updates of the whole run, as the Hugging Face trainer counts them."""
    if loader is None:
        return 0
    if options.max_steps > 0:
        return options.max_steps
    per_epoch = steps_per_epoch(rhythm, loader)
    if per_epoch is None:
        raise ValueError("max_steps: streaming has no known length, so max_steps has to say how many updates to do")
    return max(1, math.ceil(options.num_train_epochs * per_epoch))


def compute_dtype(options: TrainOptions) -> torch.dtype:
    if options.bf16 or options.pure_bf16:
        return torch.bfloat16
    return torch.float16 if options.fp16 else torch.float32


def build_model(config: configuration.Config, source: Path, world: World) -> Decoder:
    """Weights on the device, in the dtypes that the precision options ask for, with what trains marked."""
    options, model_options, lora_options = config[TrainOptions], config[ModelOptions], config[LoraOptions]
    compute = compute_dtype(options)
    frozen = compute if lora_options.finetuning_type == "lora" or options.pure_bf16 else torch.float32
    trained = torch.bfloat16 if options.pure_bf16 else torch.float32
    if options.plan:
        model = plan.skeleton(source, load_config(source), frozen, quant.from_options(config[QuantOptions]))
    elif options.train_from_scratch:
        model = random_model(source, frozen, world.device, options.seed)
    else:
        scaling = None if model_options.rope_scaling == "none" else model_options.rope_scaling
        cutoff_len = config[DataOptions].cutoff_len
        quantization, notice = chosen_quantization(source, quant.from_options(config[QuantOptions]))
        if notice is not None:
            world.print(f"note: {notice}")
        norms = torch.float32 if options.upcast_layernorm is not False else None
        model = load_model(source, frozen, world.device, scaling, cutoff_len, quantization, norms)
    wide_norms = options.upcast_layernorm
    if wide_norms is None:
        wide_norms = bool(quantised_linears(model))
    norms = {id(module.weight) for module in model.modules() if wide_norms and isinstance(module, RMSNorm)}
    if lora_options.lora_dropout and not STAGES[options.stage].uses_dropout:
        world.print(f"note: lora_dropout {lora_options.lora_dropout:g} is not used: stage {options.stage} compares "
                    "log-probabilities, to which dropout would add noise")  # fmt: skip
        lora_options = replace(lora_options, lora_dropout=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    prepare_adapters(model, resolve_adapters(model_options), lora_options, generator, trained)
    for parameter in model.parameters():
        # frozen weights in the compute dtype, trained ones in full precision
        if id(parameter) not in norms:
            parameter.data = parameter.data.to(trained if parameter.requires_grad else compute)
    if STAGES[options.stage].has_value_head:
        model.v_head = start_value_head(model, source, resolve_adapters(model_options), generator, world)
    model.compute_dtype = compute
    model.flash_attn = model_options.flash_attn
    model.embedding_noise = options.neftune_noise_alpha or 0.0
    return model


def start_value_head(
    model: Decoder, source: Path, adapters: list[Path], generator: torch.Generator, world: World
) -> ValueHead:
    """That of a reward model, where one lies beside the last adapter, or beside the model if there is none.

    Else a tenth of trl's random start: hidden states are long vectors, so with the whole of it the values of a pair
    would differ by noise of about 1, which takes a hundred updates to unlearn.
    """
    head = ValueHead(model.config.hidden_size, world.device, generator)
    for parameter in head.parameters():
        parameter.data.mul_(HEAD_START)
    folder = adapters[-1] if adapters else source
    if has_value_head(folder):
        load_value_head(head, folder)
        world.print(f"the value head starts from {folder}")
    return head


def make_plan(config: configuration.Config, source: Path, prepared: Prepared, loader, world: World) -> str:
    """What the run would take, without its weights; see plan.py."""
    options = config[TrainOptions]
    if loader is None:
        raise ValueError("plan: there is nothing to plan without training; drop plan, or do_eval")
    model = build_model(config, source, world)
    beside = bytes_beside(config, model)
    free = memory.free_bytes(world.device) - plan.weight_bytes(model) - sum(beside.values())
    tokens = largest_row(loader, config, world)
    need = memory.need(model, tokens, config[OptimOptions].optim, world.size)
    chosen, line = memory.plan(options.recomputation, need, model.config.num_layers, world.device, free)
    store = prepared.train if isinstance(prepared.train, ExampleStore) else None
    lengths = np.full(1, config[DataOptions].cutoff_len) if store is None else store.segment_lengths
    share = 1.0 if store is None else store.trained_share
    if options.stage in WRITES:
        lengths = lengths + config[GenerateOptions].max_new_tokens
        share = config[GenerateOptions].max_new_tokens / lengths.mean()
    peak = plan.predict_peak(model, chosen, need, plan.largest_file(source), world.device, beside)
    bound = plan.bound_speed(model, chosen, lengths, share, tokens, world.device)
    text = plan.report(peak, bound, memory.free_bytes(world.device), tokens, world.device)
    if options.stage in WRITES:
        text += "\n  (of the updates; to it comes the time in which the model writes the texts that it learns from)"
    return f"{trainable_report(model)}\n{line}\n\n{text}"


def bytes_beside(config: configuration.Config, model: Decoder) -> dict[str, float]:
    """Weights that a run holds beside those of the model it trains, by what they are for; see make_reference and
    make_reward. What serves only before the first update is not counted."""
    options, found = config[TrainOptions], {}
    live = options.stage in WRITES or config[DataOptions].streaming
    needs = {"dpo": config[PreferenceOptions].needs_reference, "grpo": config[GRPOOptions].beta > 0}
    named = {"reward model": config[RewardOptions].reward_model}
    if options.stage not in WRITES or config[RewardOptions].reward_model_type != "full":
        named.clear()
    if live and needs.get(options.stage, options.stage in ("kto", "ppo")):
        named["reference"] = config[ReferenceOptions].ref_model
        if named["reference"] is None and config[LoraOptions].finetuning_type != "lora":
            found["reference"] = float(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    bits = {"reward model": config[RewardOptions].reward_model_quantization_bit}
    bits["reference"] = config[ReferenceOptions].ref_model_quantization_bit
    for name, folder in named.items():
        if folder is not None and Path(folder).is_dir():
            quantization = quant.from_options(replace(config[QuantOptions], quantization_bit=bits[name]))
            second = plan.skeleton(Path(folder), load_config(folder), compute_dtype(options), quantization)
            found[name] = plan.weight_bytes(second)
    return found


def largest_row(loader, config: configuration.Config, world: World) -> int:
    """Tokens of the largest micro-batch, with what pads the row; of a stage that writes texts, with all of these."""
    tokens, stage = loader.most_tokens(), config[TrainOptions].stage
    if stage in WRITES:
        tokens += loader.most_examples() * config[GenerateOptions].max_new_tokens
        tokens *= config[GRPOOptions].num_generations if stage == "grpo" else 1
    multiple = ROW_MULTIPLE[world.device.type]
    return -(-tokens // multiple) * multiple


def choose_recomputation(model: Decoder, loader, config: configuration.Config, world: World) -> str:
    """Tell the model what its blocks keep for the backward pass; gives a line that says so."""
    options = config[TrainOptions]
    need = memory.need(model, largest_row(loader, config, world), config[OptimOptions].optim, world.size)
    if options.compiles:
        need = need.without_selective()
        for block in model.layers:
            block.compile(backend=options.torch_compile_backend or "inductor", mode=options.torch_compile_mode)
    free = memory.free_bytes(world.device)
    layers = model.config.num_layers
    model.recompute, line = memory.plan(options.recomputation, need, layers, world.device, free)
    return line


def weight_writer(model: Decoder, source: Path, tokenizer: Tokenizer, template, config) -> Callable[[Path], None]:
    """A function that writes what the user loads later: weights, tokenizer, chat template, resolved configuration."""
    base_name = config[ModelOptions].model_name_or_path

    def save(folder: Path) -> None:
        save_trained(model, folder, source, base_name)
        tokenizer.save(folder)
        if config[TemplateOptions].template is not None and template is not None:
            (folder / "chat_template.jinja").write_text(template.to_jinja(), encoding="utf-8")
        config.save(folder / runs.RUN_CONFIG)

    return save


def make_stage(
    config: configuration.Config, model: Decoder, source: Path, tokenizer: Tokenizer, template, prepared: Prepared,
    world: World,
) -> Stage:  # fmt: skip
    """The stage that the options ask for. The model holds the weights that the run starts from, even if it resumes."""
    if config[TrainOptions].only_predicts:
        return Stage()  # no loss is asked for, so no reference, no reward
    kind = STAGES[config[TrainOptions].stage]
    if issubclass(kind, PairPreference):
        preference = config[PreferenceOptions].for_stage(config[TrainOptions].stage)
        held_to = None
        if preference.needs_reference:
            held_to = make_reference(config, model, tokenizer, prepared, world, preference.ld_alpha)
        return kind(preference, held_to, world)
    if kind is RatedPreference:
        preference, held_to = config[PreferenceOptions], make_reference(config, model, tokenizer, prepared, world)
        return RatedPreference(config[KTOOptions], preference.pref_beta, preference.pref_ftx or 0.0, held_to, world)
    if kind is GroupPolicy:
        made = make_reference(config, model, tokenizer, None, world) if config[GRPOOptions].beta else None
        generation, stop_ids = how_to_write(config[GenerateOptions], tokenizer, template, world)
        return GroupPolicy(
            config[GRPOOptions], generation, make_reward(config, model, tokenizer),
            tokenizer=tokenizer, stop_ids=stop_ids, reference=made,
            seed=config[TrainOptions].seed, world=world,
        )  # fmt: skip
    if kind is PPO:
        generation, stop_ids = how_to_write(config[GenerateOptions], tokenizer, template, world)
        return PPO(
            config[PPOOptions], generation, make_reward(config, model, tokenizer),
            tokenizer=tokenizer, stop_ids=stop_ids, reference=make_reference(config, model, tokenizer, None, world),
            seed=config[TrainOptions].seed, world=world,
            group_size=config[TrainOptions].gradient_accumulation_steps,
            output_dir=Path(config[TrainOptions].output_dir),
        )  # fmt: skip
    return kind()


def how_to_write(
    options: GenerateOptions, tokenizer: Tokenizer, template, world: World
) -> tuple[GenerateOptions, tuple[int, ...]]:
    """Options of the sampling in a stage that learns from its own texts, with the template's stop words; stop ids.

    Says on rank 0 where the texts will not be samples of the policy whose probabilities are learnt.
    """
    stop_ids, words = split_stop_words(tokenizer, template.stop_words(tokenizer.eos_token))
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    bent = [f"{key}={getattr(options, key)}" for key, value in neutral.items() if getattr(options, key) != value]
    if bent:
        world.print(
            f"note: texts are sampled with {', '.join(bent)}, which the probabilities of the loss leave out; for exact "
            "policy gradients set " + " ".join(f"{key}={value:g}" for key, value in neutral.items())
        )
    return replace(options, stop=(*options.stop, *words)), (*tokenizer.stop_ids, *stop_ids)


def make_reference(
    config: configuration.Config, model: Decoder, tokenizer: Tokenizer, prepared: Prepared | None, world: World,
    ld_alpha: float | None = None,
) -> Reference:  # fmt: skip
    """The policy that training is held to, given the model with the weights it starts from.

    prepared: the texts that it is asked for, if they are known ahead; None: the model writes them (ppo, grpo).
    ld_alpha: as in heads.answer_sums.
    """
    options, run = config[ReferenceOptions], config[TrainOptions]
    live = prepared is None or not computes_ahead(config, prepared, world)
    if options.ref_model is not None:
        folder = resolve_folder("ref_model", options.ref_model, "main", config[ModelOptions])
        if is_adapter(folder):
            raise ValueError(
                f"ref_model: {folder} is an adapter; set ref_model=BASE ref_model_adapters={folder}, or train on it "
                "with create_new_adapter=true, and the start is the reference"
            )
        refuse_other_tokenizer("ref_model", folder, tokenizer)
        names = options.ref_model_adapters
        adapters = [resolve_folder("ref_model_adapters", name, "main", config[ModelOptions]) for name in names]
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
    """Whether the reference's log-probabilities are computed before training: where that is no more work than beside
    it, so not for a stream, nor for fewer updates than a pass over the data takes, unless the options say so."""
    ahead, run = config[ReferenceOptions].precompute_ref_log_probs, config[TrainOptions]
    if ahead is not None or not isinstance(prepared.train, ExampleStore) or prepared.packing or run.max_steps <= 0:
        return not config[DataOptions].streaming if ahead is None else ahead
    per_update = run.per_device_train_batch_size * run.gradient_accumulation_steps * world.size
    return run.max_steps * per_update >= len(prepared.train)


def make_reward(config: configuration.Config, model: Decoder, tokenizer: Tokenizer) -> RewardSource:
    """What the answers of `model` are worth, by the options. Raises ValueError."""
    options = config[RewardOptions]
    if options.reward_file:
        return FunctionReward(options.reward_file, options.reward_funcs, options.reward_weights)
    if options.reward_model is None:
        raise ValueError("reward_file: missing; name a Python file with reward functions, or a reward_model")
    if options.reward_model_type == "api":
        return ApiReward(options.reward_model, tokenizer, options.reward_api_timeout)
    folder = resolve_folder("reward_model", options.reward_model, "main", config[ModelOptions])
    if options.reward_model_type == "full":
        if is_adapter(folder):
            raise ValueError(
                f"reward_model: {folder} is an adapter; set reward_model_type=lora, or reward_model=BASE "
                f"reward_model_adapters={folder}"
            )
        refuse_other_tokenizer("reward_model", folder, tokenizer)
        names = options.reward_model_adapters
        adapters = [resolve_folder("reward_model_adapters", name, "main", config[ModelOptions]) for name in names]
        for number, adapter in enumerate(adapters):
            refuse_other_base("reward_model_adapters", adapter, names[:number], "name them in front of it")
        second = second_model(config, "reward_model", folder, adapters, options.reward_model_quantization_bit, model)
        return ModelReward(second, [*reversed(adapters), folder])
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
    below, here = [[Path(name).expanduser().resolve() for name in names] for names in (
        adapters_below(read_run(adapter)), merged)]  # fmt: skip
    if below != here and (adapter / runs.RUN_CONFIG).is_file():
        on, found = ("+".join(map(str, each)) or "no other adapter" for each in (below, here))
        raise ValueError(f"{key}: {adapter} was trained on the base with {on}, here it would lie on {found}; {remedy}")


def second_model(
    config: configuration.Config, key: str, folder: Path, adapters: Iterable[Path], bits: int | None, model: Decoder
) -> Decoder:
    """A frozen model beside the one that trains, with adapters, in its compute dtype and on its device.

    key: the option that names it, for messages.  bits: quantise it; None or 0 = as the files have it.
    """
    options, model_options = config[TrainOptions], config[ModelOptions]
    try:
        wanted = quant.from_options(replace(config[QuantOptions], quantization_bit=bits))
        format, _ = chosen_quantization(folder, wanted)
        scaling = None if model_options.rope_scaling == "none" else model_options.rope_scaling
        device = model.embed_tokens.weight.device
        dtype = compute_dtype(options)
        second = load_model(folder, dtype, device, scaling, config[DataOptions].cutoff_len, format)
        apply_adapters(second, adapters)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    second.compute_dtype, second.flash_attn = dtype, model.flash_attn
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
        f"{mine.get(differing)} in the trained model; both see the same token ids, so take a model of the same family"
    )
