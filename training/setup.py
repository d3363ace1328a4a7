"""What a training run is made of, built from its options: where it starts, data, loaders, model, plan.

train.py calls these in order; each gives one part and knows nothing of the loop. The stage is made in
stages.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import kernels
import quant
from architectures.layers import RMSNorm
from checkpoints.hub import ModelOptions, resolve_adapters, resolve_model
from checkpoints.huggingface import chosen_quantization, load_config, load_model, random_model, save_trained
from checkpoints.peft import prepare_adapters, read_adapter_config
from checkpoints.source import RUN_CONFIG, check_adapters, is_adapter
from checkpoints.value_head import ValueHead, has_value_head, load_value_head
from data import DataOptions, Prepared, load_datasets
from generation.sampling import GenerateOptions
from lora import LoraOptions, parameter_status, quantised_linears, trainable_report
from model import Decoder
from options import config as configuration
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, BatchLoader
from pipeline.report import describe_example
from pipeline.sources import HubAccess
from pipeline.store import ExampleStore
from quant import QuantOptions
from stages import STAGES, WRITES
from stages.dpo import PreferenceOptions
from stages.grpo import GRPOOptions
from stages.kto import KTOOptions, add_mismatches
from stages.ppo import PPOOptions
from stages.reference import ReferenceOptions
from stages.rewards import RewardOptions
from stages.rm import RewardModelOptions
from stages.rollouts import TOGETHER, prompts_of
from templates import TemplateOptions, get_template
from text.tokenizer import Tokenizer
from training import memory, plan, run_folder
from training.make_stage import folders_beside, rollout_sizes
from training.options import OptimOptions, TrainOptions
from training.predict import Predictor, ScorePredictor, TextPredictor

SECTIONS = [
    TrainOptions,
    ModelOptions,
    QuantOptions,
    DataOptions,
    TemplateOptions,
    LoraOptions,
    OptimOptions,
    RewardModelOptions,
    PreferenceOptions,
    KTOOptions,
    ReferenceOptions,
    RewardOptions,
    GRPOOptions,
    PPOOptions,
    GenerateOptions,
]
HEAD_START = 0.1  # share of trl's random start of a value head; see start_value_head


def find_start(config: configuration.Config) -> tuple[Path | None, Path]:
    """(checkpoint to continue or None, model folder); refuses to overwrite what the run starts from."""
    options, output_dir = config[TrainOptions], Path(config[TrainOptions].output_dir)
    resume, overwrite = None, options.overwrite_output_dir
    check_adapters(config[ModelOptions])
    if options.plan:
        return None, resolve_model(config[ModelOptions])
    if options.trains:
        resume = run_folder.find_resume(output_dir, options.resume_from_checkpoint, overwrite)
    source = resolve_model(config[ModelOptions])
    if is_adapter(source):
        raise ValueError(
            f"model_name_or_path: {source} is an adapter; set adapter_name_or_path={source} and "
            "model_name_or_path to "
            "the model that it was trained on"
        )
    if options.trains:
        adapters = resolve_adapters(config[ModelOptions])
        trained_on = adapters[-1] if adapters and not config[LoraOptions].create_new_adapter else None
        sources = {"adapter_name_or_path": adapters, "model_name_or_path": [source]} | folders_beside(config)
        run_folder.refuse_to_destroy(output_dir, overwrite and resume is None, sources, trained_on)
    return resume, source


def refuse_on_quantised(config: configuration.Config, source: Path) -> None:
    """What option_rules say of quantization_bit, for a checkpoint that is quantised already. Raises
    ValueError."""
    stored = load_config(source).hf.get("quantization_config")
    if not stored:
        return
    kind, method = config[LoraOptions].finetuning_type, stored.get("quant_method")
    base = f"{source} is quantised ({method})"
    if config[TrainOptions].train_from_scratch:
        raise ValueError(
            f"train_from_scratch: {base}, which random weights are not; remove quantization_config there"
        )
    if kind != "lora":
        raise ValueError(
            f"finetuning_type: {kind}, but {base}: its weights have no gradient; set finetuning_type=lora, "
            "or start "
            "from a 16-bit model"
        )


def prepare_data(
    config: configuration.Config, source: Path, template, tokenizer: Tokenizer, world: World
) -> Prepared:
    """Tokenise, report what was lost, show the first example, and see that the model knows every token id."""
    options, data_options, model_options = config[TrainOptions], config[DataOptions], config[ModelOptions]
    texts, kind = options.predict_with_generate, None
    if texts and options.only_predicts and not data_options.val_size and data_options.tokenized_path is None:
        # then rows without an answer are welcome, and what the training set holds does not matter
        kind, data_options = (
            "prompt",
            replace(data_options, dataset=(), interleave_probs=(), mix_strategy="concat"),
        )
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
        stores = [
            store for store in (prepared.train, *prepared.eval.values()) if isinstance(store, ExampleStore)
        ]
        largest = max((int(part.tokens.max()) for store in stores for part in store.parts), default=0)
        if data_options.streaming:
            largest = tokenizer.vocab_size - 1
        if largest >= known:
            raise ValueError(
                f"model_name_or_path: {source}: tokenizer.json makes token ids up to {largest}, but "
                "config.json has "
                f"vocab_size {known}; the tokenizer is of another model"
            )
    if options.stage == "kto" and config[KTOOptions].needs_mismatches:
        add_mismatches(prepared, data_options.cutoff_len)
    return prepared


def describe_inputs(config: configuration.Config, source: Path, prepared: Prepared) -> dict[str, str]:
    """What the run is made from, where a name in the options does not say it: data, weights, the reward's
    program."""
    output_dir, described = Path(config[TrainOptions].output_dir).resolve(), {"training data": "streamed"}
    if isinstance(prepared.train, ExampleStore):
        tokens = int(prepared.train.lengths.sum())
        described["training data"] = f"{len(prepared.train)} examples of {tokens} tokens"
        described["content of training data"] = prepared.train.digest()
    folders = {"model_name_or_path": [source], "adapter_name_or_path": resolve_adapters(config[ModelOptions])}
    for key, named in (folders | folders_beside(config)).items():
        named = [
            folder for folder in named if folder.resolve() != output_dir
        ]  # what a run trains on in its place
        described[f"content of {key}"] = run_folder.digest(
            path
            for folder in named
            for pattern in (*run_folder.WEIGHTS, "config.json")
            for path in folder.glob(pattern)
        )
    program = config[RewardOptions].reward_file
    if program is not None and Path(program).expanduser().is_file():
        described["content of reward_file"] = run_folder.digest([Path(program).expanduser()])
    return described


def pick_template(config: configuration.Config, tokenizer: Tokenizer):
    """The chat template; plain-text pretraining needs none."""
    options = config[TemplateOptions]
    if config[TrainOptions].stage == "pt" and options.template is None:
        return None
    return get_template(options.template, tokenizer.chat_template, options.default_system)


def make_loaders(
    prepared: Prepared, options: TrainOptions, data_options: DataOptions, tokenizer: Tokenizer, world: World
):
    """The training loader (None if only evaluating) and one loader per evaluation set."""
    place = {"rank": world.rank, "world": world.size}
    if options.stage in WRITES:
        place["collate"] = partial(prompts_of, tokenizer=tokenizer)
    loader = None
    if options.trains:
        rows = options.per_device_train_batch_size
        loader = prepared.train_loader(data_options, rows_per_batch=rows, seed=options.seed, **place)
    eval_loaders = prepared.eval_loaders(
        data_options, rows_per_batch=options.per_device_eval_batch_size, **place
    )
    if (options.evaluation_strategy != "no" or options.do_eval or options.do_predict) and not eval_loaders:
        raise ValueError("evaluation_strategy: there is no evaluation data; set val_size or eval_dataset")
    return loader, eval_loaders


def check_metric(
    options: TrainOptions, eval_loaders: dict[str, BatchLoader], predictor: Predictor | None
) -> None:
    """ValueError when what decides which checkpoint is best is not measured."""
    generated = () if predictor is None else predictor.names
    names = evaluation_names(options.stage, eval_loaders, generated)
    if options.evaluation_strategy != "no" and options.metric not in names:
        raise ValueError(
            f"metric_for_best_model: {options.metric} is not measured; there are {', '.join(names)}"
        )


def evaluation_names(
    stage: str, eval_loaders: dict[str, BatchLoader], generated: tuple[str, ...] = ()
) -> list[str]:
    """Names of what an evaluation measures, without the speeds.  generated: of what it measures of generated
    texts."""
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
            prepared.prompts,
            tokenizer,
            template,
            config[GenerateOptions],
            seed=options.seed,
            rows_per_batch=options.per_device_eval_batch_size,
            world=world,
        )
    if options.do_predict and options.stage == "rm":
        return ScorePredictor(prepared.eval, rows_per_batch=options.per_device_eval_batch_size, world=world)
    return None


def steps_per_epoch(sizes: tuple[int, int], loader) -> int | None:
    """Updates of one pass over the data; None for a stream. The last draw of a pass may be smaller.

    sizes: of make_stage.rollout_sizes.
    """
    (micro_batches, updates), per_epoch = sizes, loader.batches_per_epoch
    return None if per_epoch is None else math.ceil(per_epoch / micro_batches) * updates


def count_steps(options: TrainOptions, sizes: tuple[int, int], loader) -> int:
    """Updates of the whole run, as the Hugging Face trainer counts them."""
    if loader is None:
        return 0
    if options.max_steps > 0:
        return options.max_steps
    per_epoch = steps_per_epoch(sizes, loader)
    if per_epoch is None:
        raise ValueError(
            "max_steps: streaming has no known length, so max_steps has to say how many updates to do"
        )
    return max(1, math.ceil(options.num_train_epochs * per_epoch))


def build_model(config: configuration.Config, source: Path, world: World) -> Decoder:
    """Weights on the device, in the dtypes that the precision options ask for, with what trains marked."""
    options, model_options, lora_options = config[TrainOptions], config[ModelOptions], config[LoraOptions]
    compute = options.compute_dtype
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
        world.print(
            f"note: lora_dropout {lora_options.lora_dropout:g} is not used: stage {options.stage} compares "
            "log-probabilities, to which dropout would add noise"
        )
        lora_options = replace(lora_options, lora_dropout=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    adapters = resolve_adapters(model_options)
    for folder in adapters:
        base, name = (
            read_adapter_config(folder).get("base_model_name_or_path") or "",
            model_options.model_name_or_path,
        )
        if base and Path(base).name != Path(name).name:  # the same model may lie in several places
            world.print(f"note: the adapter {folder} was trained on {base}, and lies on {name} here")
    prepare_adapters(model, adapters, lora_options, generator, trained)
    for parameter in model.parameters():
        # frozen weights in the compute dtype, trained ones in full precision
        if id(parameter) not in norms:
            parameter.data = parameter.data.to(trained if parameter.requires_grad else compute)
    if STAGES[options.stage].has_value_head:
        if options.stage == "rm" and not options.trains:
            require_value_head((adapters or [source])[-1])
        model.v_head = start_value_head(model, source, adapters, generator, world)
    model.runtime.compute_dtype = compute
    model.runtime.flash_attn = model_options.flash_attn
    model.runtime.embedding_noise = options.neftune_noise_alpha or 0.0
    return model


def describe_model(config: configuration.Config, model: Decoder, world: World) -> str:
    """What trains, what is quantised, and which kernels serve it."""
    lines = parameter_status(model) if config[LoraOptions].print_param_status else []
    lines.append(trainable_report(model))
    if quantised_linears(model):
        lines.append(quant.report(model))
    return "\n".join([*lines, kernels.choices(world.device, config[ModelOptions].flash_attn)])


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
    folder = adapters[-1] if adapters else source
    if has_value_head(folder):
        load_value_head(head, folder)
        world.print(f"the value head starts from {folder}")
    return head


def require_value_head(folder: Path) -> None:
    """ValueError where scores would be those of a random value head."""
    if not has_value_head(folder):
        raise ValueError(
            f"do_train: false, but there is no value_head.safetensors in {folder}, so scores would be "
            "random; name a "
            "reward model as adapter_name_or_path or model_name_or_path, or train one"
        )


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
    cache = 0.0
    if options.stage in WRITES:
        new, answers = config[GenerateOptions].max_new_tokens, answers_of(config)
        texts = min(TOGETHER, loader.most_examples() * rollout_sizes(config)[0] * answers)
        cache = plan.cache_bytes(model.config, texts, int(lengths.max()), new, options.compute_dtype.itemsize)
        lengths = lengths + new
        share = new / lengths.mean()
    peak = plan.predict_peak(
        model, chosen, need, plan.largest_file(source), world.device, beside, cache=cache
    )
    bound = plan.bound_speed(model, chosen, lengths, share, tokens, world.device)
    text = plan.report(peak, bound, memory.free_bytes(world.device), tokens, world.device)
    if options.stage in WRITES:
        text += "\n  (of the updates; to it comes the time in which the model writes the texts that it learns from,"
        text += f"\n  {texts} at once, whose cache takes up to {cache / plan.GIB:.2f} GiB)"
    return f"{trainable_report(model)}\n{line}\n\n{text}"


def bytes_beside(config: configuration.Config, model: Decoder) -> dict[str, float]:
    """Weights that a run holds beside those of the model it trains, by what they are for; see make_reference
    and make_reward. What serves only before the first update is not counted."""
    options, found, beside = config[TrainOptions], {}, folders_beside(config)
    live = options.stage in WRITES or config[DataOptions].streaming
    needs = {"dpo": config[PreferenceOptions].needs_reference, "grpo": config[GRPOOptions].beta > 0}
    held = []
    if config[RewardOptions].reward_model_type == "full":
        held.append(("reward model", "reward_model", config[RewardOptions].reward_model_quantization_bit))
    if live and needs.get(options.stage, options.stage in ("kto", "ppo")):
        held.append(("reference", "ref_model", config[ReferenceOptions].ref_model_quantization_bit))
        if "ref_model" not in beside and config[LoraOptions].finetuning_type != "lora":
            found["reference"] = float(
                sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            )
    for name, key, bits in held:
        for folder in beside.get(key, ()):
            quantization = quant.in_bits(bits, config[QuantOptions], f"{key}_quantization_bit")
            second = plan.skeleton(folder, load_config(folder), options.compute_dtype, quantization)
            found[name] = plan.weight_bytes(second)
    return found


def answers_of(config: configuration.Config) -> int:
    """Texts that a stage of WRITES writes to each prompt."""
    return config[GRPOOptions].num_generations if config[TrainOptions].stage == "grpo" else 1


def largest_row(loader, config: configuration.Config, world: World) -> int:
    """Tokens of the largest micro-batch, with what pads the row; of a stage that writes texts, with all of
    these."""
    tokens, stage = loader.most_tokens(), config[TrainOptions].stage
    if stage in WRITES:
        tokens += loader.most_examples() * config[GenerateOptions].max_new_tokens
        tokens *= answers_of(config)
    multiple = ROW_MULTIPLE[world.device.type]
    return -(-tokens // multiple) * multiple


def choose_recomputation(model: Decoder, loader, config: configuration.Config, world: World) -> str:
    """Tell the model what its blocks keep for the backward pass; gives a line that says so."""
    options = config[TrainOptions]
    need = memory.need(model, largest_row(loader, config, world), config[OptimOptions].optim, world.size)
    if options.compiles:
        need = need.without_selective()
        for block in model.layers:
            block.compile(
                backend=options.torch_compile_backend or "inductor", mode=options.torch_compile_mode
            )
    free = memory.free_bytes(world.device)
    layers = model.config.num_layers
    model.runtime.recompute, line = memory.plan(options.recomputation, need, layers, world.device, free)
    return line


def weight_writer(
    model: Decoder, source: Path, tokenizer: Tokenizer, template, config
) -> Callable[[Path], None]:
    """A function that writes what the user loads later: weights, tokenizer, chat template, resolved
    configuration."""
    base_name = config[ModelOptions].model_name_or_path

    def save(folder: Path) -> None:
        save_trained(model, folder, source, base_name)
        tokenizer.save(folder)
        if config[TemplateOptions].template is not None and template is not None:
            (folder / "chat_template.jinja").write_text(template.to_jinja(), encoding="utf-8")
        config.save(folder / RUN_CONFIG)

    return save
