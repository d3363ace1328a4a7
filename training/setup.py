"""What a training run is made of, built from its options, cheap mistakes first.

    inputs = setup.read(config, world)                      # folders, config.json, tokenizer, template
    data, model, stage, state = setup.build(inputs)         # rows, weights, and what a checkpoint holds

Nothing here knows of the loop. The stage is made in make_stage.py.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import kernels
import quant
from architectures.config import ModelConfig, scale_rope
from checkpoints.hub import ModelOptions, resolve_adapters, resolve_model
from checkpoints.huggingface import load_config
from checkpoints.peft import read_adapter_config
from checkpoints.source import check_adapters, is_adapter, tokenizer_folder
from checkpoints.trainable import freeze, parameter_status, trainable_report
from data import DataOptions, Prepared, load_datasets
from generation.generate import context_limit
from generation.sampling import GenerateOptions
from lora import LoraOptions, adapted_names
from model import Decoder
from options import rules
from options.config import Config
from options.errors import UserError, refuse
from parallel.fsdp import distribute
from parallel.options import ParallelOptions
from parallel.world import World
from pipeline.batch import BatchLoader
from pipeline.report import describe_example
from pipeline.sources import HubAccess
from pipeline.store import ExampleStore
from pipeline.streaming import StreamingLoader
from quant import QuantOptions
from quant.linear import quantisation_report, quantised_linears
from stages import STAGES, WRITES
from stages.dpo import PreferenceOptions
from stages.grpo import GRPOOptions
from stages.kto import KTOOptions, add_mismatches
from stages.ppo import PPOOptions
from stages.reference import ReferenceOptions
from stages.rewards import RewardOptions, RewardSource
from stages.rm import RewardModelOptions
from stages.rollouts import prompts_of
from stages.stage import Stage
from templates import TemplateOptions, get_template, marks_split_up
from text.tokenizer import Tokenizer
from training import layout, memory, run_folder
from training.forecast import Forecast, choose_parallel, largest_row
from training.make_stage import (
    folders_beside,
    make_reward_ahead,
    make_stage,
    notices,
    rollout_sizes,
    wanted_files,
)
from training.measure import check_metric
from training.options import OptimOptions, TrainOptions
from training.predict import Predictor, ScorePredictor, TextPredictor
from training.trackers import check_services
from training.weights import build_model, start_of_run

SECTIONS = [
    *(TrainOptions, ModelOptions, QuantOptions, DataOptions, TemplateOptions, LoraOptions, OptimOptions),
    *(RewardModelOptions, PreferenceOptions, KTOOptions, ReferenceOptions, RewardOptions, GRPOOptions),
    *(PPOOptions, GenerateOptions, ParallelOptions),
]
NO_TRAINING_SET = {"dataset": (), "interleave_probs": (), "mix_strategy": "concat"}


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, known before a row or a weight is read."""

    config: Config
    world: World
    source: Path  # folder of the model
    model_config: ModelConfig  # its config.json
    resume: Path | None  # the checkpoint that the run continues
    tokenizer: Tokenizer
    template: object | None
    reward: RewardSource | None  # functions or a server

    @property
    def options(self) -> TrainOptions:
        return self.config[TrainOptions]

    @property
    def output_dir(self) -> Path:
        return Path(self.options.output_dir)


@dataclass(frozen=True)
class Data:
    """The rows of a run, and how many updates are made of them."""

    prepared: Prepared
    loader: BatchLoader | StreamingLoader | None  # None: nothing is trained
    eval_loaders: dict[str, BatchLoader]
    predictor: Predictor | None
    batches_per_draw: int  # micro-batches that are drawn from the loader at once, on each rank
    updates_per_draw: int  # that the stage makes of them
    steps_per_epoch: int | None  # updates of one pass over the data; None for a stream
    total_steps: int
    fingerprint: dict[str, str]  # every setting and file that decides the weights

    @property
    def names(self) -> list[str]:
        """Of the training's data sets."""
        return [] if self.prepared.train is None else self.prepared.train.datasets

    def batches_drawn(self, step: int) -> int:
        """On each rank, for the updates up to `step`."""
        return -(-step // self.updates_per_draw) * self.batches_per_draw

    def epoch(self, step: int) -> float:
        return step / (self.steps_per_epoch or max(self.total_steps, 1))


def read(config: Config, world: World) -> Inputs:
    """All that is cheap, so that a mistake in options and folders shows at once. Raises UserError."""
    options = config[TrainOptions]
    ranks = options.plan_ranks or world.size
    for notice in (*config.notices, *notices(config, ranks)):
        world.print(f"note: {notice}")
    idle = not (options.trains or options.do_eval or options.do_predict)  # as a file of defaults says
    refuse(idle, "do_train: false, and neither do_eval nor do_predict is set, so there is nothing to do")
    check_services(options.services)
    if options.tf32 is not None:
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    kernels.require_attention(config[ModelOptions].flash_attn, world.device, options.compute_dtype)
    alone = "optim_in_backward: gradients of several ranks are summed behind the backward pass; drop it"
    refuse(config[OptimOptions].optim_in_backward and ranks > 1, f"{alone} (parallel=fsdp shares gradients)")
    if options.trains and not options.plan:
        run_folder.require_common_disk(Path(options.output_dir), world)
    resume, source = find_start(config, world)
    if resume is not None:
        written = run_folder.read_state(resume / run_folder.STATE_FILE)["fingerprint"]
        config = layout.fitted(config, world, resume, written)
    model_config = load_config(source)
    refuse_on_quantised(config, source, model_config)
    check_shares(config, source, ranks)
    check_names(config, model_config)
    folder = tokenizer_folder(source, resolve_adapters(config[ModelOptions], wanted_files(config)))
    tokenizer, template = Tokenizer.from_folder(folder, source), None
    if folder != source:
        world.print(f"note: tokens and chat template are those saved with {folder}")
    if tokenizer.notice:
        world.print(f"note: {tokenizer.notice}")
    if options.stage != "pt" or config[TemplateOptions].template is not None:  # plain text needs none
        wanted = config[TemplateOptions]
        template = get_template(wanted.template, tokenizer.chat_template, wanted.default_system)
        if marks := marks_split_up(template, tokenizer):
            letters = f"{', '.join(marks)} are no tokens of this model, so they are split into letters"
            world.print(f"note: template {template.name}: {letters}; is it another model's?")
    reward = make_reward_ahead(config, tokenizer)
    return Inputs(config, world, source, model_config, resume, tokenizer, template, reward)


def build(inputs: Inputs) -> tuple[Data, Decoder, Stage, dict | None]:
    """All that is heavy: data, model on its device, stage, and the state of the checkpoint to continue."""
    world, state = inputs.world, None
    data = load_data(inputs)
    shares = why_not_shared(inputs)
    config = choose_parallel(inputs.config, inputs.source, world, data, shares)
    if inputs.resume is not None:
        asked = data.fingerprint, world, config[DataOptions].group_by_length, data.updates_per_draw
        state = run_folder.read_checkpoint(inputs.resume, *asked)
    # dropout and noise differ between ranks; adapters do not, for they have a generator of their own
    torch.manual_seed(inputs.options.seed + world.data_rank)
    own: dict[str, torch.Tensor] = {}
    model = build_model(config, inputs.source, world, own)
    world.print(describe_model(config, model, world))
    given = config, model, inputs.tokenizer, inputs.template, data.prepared, world
    again = partial(start_of_run, config, inputs.source, world)
    stage = make_stage(*given, reward=inputs.reward, own=own, again=again)
    distribute(model, world, config[ParallelOptions])
    own.clear()  # what is still needed the stage has
    if data.loader is not None:  # now that a reference and a reward model have taken their memory
        world.print(choose_recomputation(model, data.loader, config, world))
    return data, model, stage, state


def find_start(config: Config, world: World) -> tuple[Path | None, Path]:
    """(checkpoint to continue or None, model folder); refuses to overwrite what the run starts from."""
    options, output_dir = config[TrainOptions], Path(config[TrainOptions].output_dir)
    resume, overwrite = None, options.overwrite_output_dir
    check_adapters(config[ModelOptions], wanted_files(config))
    if options.plan:
        return None, resolve_model(config[ModelOptions], wanted_files(config))
    if options.trains:
        again = run_folder.begun_before(output_dir, world)
        overwrite = overwrite and not again
        found = run_folder.find_resume(output_dir, options.resume_from_checkpoint, overwrite, again)
        # one listing for all: nodes may see the disk differently for a moment
        resume = run_folder.newest_whole([Path(p) for p in world.gather(list(map(str, found)))[0]], world)
    source = resolve_model(config[ModelOptions])
    remedy = f"set adapter_name_or_path={source} and model_name_or_path to the model it was trained on"
    refuse(is_adapter(source), f"model_name_or_path: {source} is an adapter; {remedy}")
    if options.trains:
        adapters = resolve_adapters(config[ModelOptions])
        trained_on = adapters[-1] if adapters and not config[LoraOptions].create_new_adapter else None
        sources = {"adapter_name_or_path": adapters, "model_name_or_path": [source]} | folders_beside(config)
        run_folder.refuse_to_destroy(output_dir, overwrite and resume is None, sources, trained_on)
    run_folder.refuse_foreign(output_dir, named_files(config))
    return resume, source


def named_files(config: Config) -> set[Path]:
    """What the options name and may lie in output_dir before the run: its configuration, data, adapter."""
    keys = ("dataset", "eval_dataset", "tokenized_path", "cache_dir", "adapter_name_or_path", "reward_file")
    given = [config.values[key] for key in keys]
    names = [name for value in given for name in (value if isinstance(value, tuple) else [value]) if name]
    return {Path(name).expanduser().resolve() for name in (*names, *config.origins.values())}


def refuse_on_quantised(config: Config, source: Path, model_config: ModelConfig) -> None:
    """What options/rules.py says of quantization_bit, for a checkpoint that is quantised already."""
    stored = model_config.hf.get("quantization_config")
    if not stored:
        return
    kind, base = config[LoraOptions].finetuning_type, f"{source} is quantised ({stored.get('quant_method')})"
    remedy = "which random weights are not; remove quantization_config there"
    refuse(config[TrainOptions].train_from_scratch, f"train_from_scratch: {base}, {remedy}")
    remedy = "its weights have no gradient; set finetuning_type=lora, or start from a 16-bit model"
    refuse(kind != "lora", f"finetuning_type: {kind}, but {base}: {remedy}")


def why_not_shared(inputs: Inputs) -> str | None:
    """What speaks against parallel=fsdp, as options/rules.py and check_shares have it."""
    config, rewards = inputs.config, inputs.config[RewardOptions]
    shared = config.changed(ParallelOptions, parallel="fsdp")
    for found in rules.broken(shared.values, dict.fromkeys(shared.values, "default")):
        return found.partition(": ")[2]
    if config[TrainOptions].stage in WRITES and rewards.reward_model and rewards.reward_model_type == "lora":
        return "reward_model_type: lora lies on whole layers"
    try:
        check_shares(shared, inputs.source, inputs.world.size)
    except UserError as error:
        return str(error)
    return None


def check_shares(config: Config, source: Path, ranks: int) -> None:
    """UserError where ranks cannot share the model that trains, or one beside it, as the options say."""
    options, beside = config[ParallelOptions], folders_beside(config)
    bits = [
        config.values[f"{key}_quantization_bit"] for key in ("ref_model", "reward_model") if key in beside
    ]
    wanted = quant.from_options(config[QuantOptions]) or any(bits)
    old = torch.__version__ < "2.13" and ranks > 1 and options.parallel in ("fsdp", "hsdp")
    folders = [source, *(beside[key][0] for key in ("ref_model", "reward_model") if key in beside)]
    for folder in (folder for folder in folders if not is_adapter(folder)):
        found = load_config(folder)
        check_sizes(options, found, str(folder))
        coded = f"tp_size: {folder} is quantised, and codes are not cut over ranks; set tp_size=1"
        refuse(options.tp_size > 1 and found.hf.get("quantization_config"), f"{coded} (parallel=fsdp)")
        codes, remedy = wanted or found.hf.get("quantization_config"), "take 2.13, or parallel=ddp"
        refuse(old and codes, f"parallel: torch {torch.__version__} cannot share codes over ranks; {remedy}")
    for folder in resolve_adapters(config[ModelOptions], wanted_files(config)):
        dora = options.tp_size > 1 and read_adapter_config(folder).get("use_dora")
        refuse(dora, f"tp_size: {folder} is a DoRA adapter, whose norms need whole rows; set tp_size=1")


def check_sizes(options: ParallelOptions, model: ModelConfig, name: str) -> None:
    """UserError where ranks cannot share the layers or the rows of this model."""
    counts = model.num_heads, model.num_kv_heads, model.intermediate_size
    fit = ", ".join(str(each) for each in range(2, counts[1] + 1) if not any(n % each for n in counts))
    found = "{} heads, {} key and value heads and an MLP of {}".format(*counts)
    uneven = any(count % options.tp_size for count in counts)
    has = f"tp_size: {options.tp_size} does not divide {found}, as {name} has"
    refuse(uneven, f"{has} ({fit or 'nothing else'} would); set such a size")
    kinds = {kind for layer in range(model.num_layers) for kind in model.kinds(layer)}
    more = ", ".join(kinds - {"attention", "mlp"})
    refuse(options.tp_size > 1 and more, f"tp_size: it cuts attention and mlp, {name} has {more}; drop it")
    heads = model.num_kv_heads // options.tp_size
    fit = ", ".join(str(size) for size in range(2, heads + 1) if heads % size == 0) or "no other"
    found = f"cp_size: {options.cp_size} does not divide the {heads} key and value heads of {name}"
    uneven = options.cp_mode == "ulysses" and heads % options.cp_size > 0
    refuse(uneven, f"{found} ({fit} would); set such a size, or cp_mode=ring, which takes any")
    dynamic = "cp_size: rope_scaling dynamic goes by lengths of whole texts, of which ranks have parts"
    stretched = options.cp_size > 1 and model.rope.kind == "dynamic"
    refuse(stretched, f"{dynamic}; set rope_scaling=yarn, or drop cp_size")


def check_names(config: Config, model_config: ModelConfig) -> None:
    """UserError for a name in lora_target, additional_target or freeze's keys that this model lacks.
    It would be found out with the weights, which are read after the data."""
    options, kind = config[LoraOptions], config[LoraOptions].finetuning_type
    goes_on = config[ModelOptions].adapter_name_or_path and not options.create_new_adapter
    if kind == "full" or goes_on:
        return
    model = Decoder(model_config, device="meta")
    adapted_names(model, options) if kind == "lora" else freeze(model, options)


def data_options(config: Config) -> DataOptions:
    """DataOptions, but where nothing trains and nothing else is held out, `dataset` is what is evaluated."""
    options = config[DataOptions]
    held_out = options.eval_dataset or options.val_size or options.tokenized_path
    if config[TrainOptions].trains or held_out or not options.dataset:
        return options
    return replace(options, eval_dataset=options.dataset, **NO_TRAINING_SET)


def load_data(inputs: Inputs) -> Data:
    """The rows as tokens, the loaders over them, and how many updates the run makes."""
    config, options, world = inputs.config, inputs.options, inputs.world
    prepared = prepare_data(inputs)
    predictor = make_predictor(inputs, prepared)
    place, loader = {"rank": world.data_rank, "world": world.data_size}, None
    if options.stage in WRITES:
        place["collate"] = partial(prompts_of, tokenizer=inputs.tokenizer)
    draw, updates = rollout_sizes(config)
    if options.trains:
        rows = options.per_device_train_batch_size
        how = {"rows_per_batch": rows, "rows_per_update": rows * draw * world.data_size, "seed": options.seed}
        loader = prepared.train_loader(config[DataOptions], **how, **place)
    rows = options.per_device_eval_batch_size
    eval_loaders = prepared.eval_loaders(config[DataOptions], rows_per_batch=rows, **place)
    if (options.evaluation_strategy != "no" or options.do_eval or options.do_predict) and not eval_loaders:
        saved = config[DataOptions].tokenized_path
        remedy = "set val_size or eval_dataset" if saved is None else f"make {saved} anew with such a set"
        found = "there is no evaluation data" if saved is None else "the tokenised data has no evaluation set"
        raise UserError(f"{'evaluation_strategy' if saved is None else 'tokenized_path'}: {found}; {remedy}")
    check_metric(options, STAGES[options.stage], eval_loaders, () if predictor is None else predictor.names)
    draws, total_steps = None if loader is None else loader.draws_per_epoch(draw), 0
    steps_per_epoch = None if draws is None else draws * updates
    if loader is not None:
        total_steps = options.max_steps
        if total_steps <= 0:  # as the Hugging Face trainer counts them
            total_steps = max(1, math.ceil(options.num_train_epochs * steps_per_epoch))
    fingerprint = run_folder.fingerprint(config, world, describe_inputs(config, inputs.source, prepared))
    sizes = draw, updates, steps_per_epoch, total_steps
    return Data(prepared, loader, eval_loaders, predictor, *sizes, fingerprint)


def prepare_data(inputs: Inputs) -> Prepared:
    """Tokenise, report what was lost, and show the first example."""
    config, options, world, tokenizer = inputs.config, inputs.options, inputs.world, inputs.tokenizer
    asked, model_options = data_options(config), config[ModelOptions]
    texts, kind = options.predict_with_generate, None
    if texts and options.only_predicts and not asked.val_size and asked.tokenized_path is None:
        # then rows without an answer are welcome, and what the training set holds does not matter
        kind, asked = "prompt", replace(asked, **NO_TRAINING_SET)
    if options.stage in WRITES and not options.only_predicts:
        asked = leave_room(inputs, asked)
    hub = HubAccess(model_options.hf_hub_token, model_options.ms_hub_token, model_options.cache_dir)
    run = {"seed": options.seed, "is_main": world.is_main, "cache_dir": model_options.cache_dir, "hub": hub}
    run |= {"enable_thinking": config[TemplateOptions].enable_thinking, "prompts": texts, "kind": kind}
    if asked.tokenized_path is not None:  # a rank that comes late would find what rank 0 has saved
        run["is_saved"] = world.gather(Path(asked.tokenized_path).exists())[0]
    prepared = load_datasets(asked, inputs.template, tokenizer, options.stage, **run)
    world.print(prepared.report)
    first = prepared.first_example()
    if first is not None:
        world.print(f"\nthe first example: {describe_example(first, tokenizer, prepared.kind)}\n")
    # not where texts alone are asked for
    if prepared.kind == "rated" and config[KTOOptions].needs_mismatches:
        add_mismatches(prepared, asked.cutoff_len)
    return prepared


def leave_room(inputs: Inputs, options: DataOptions) -> DataOptions:
    """cutoff_len such that the model takes a prompt and the text that is written to it: longer prompts are
    left out and counted as any that are longer, before the first step, or when a stream brings them."""
    takes, new = {"the model": context_of(inputs)}, inputs.config[GenerateOptions].max_new_tokens
    for key, folders in folders_beside(inputs.config).items():  # these read prompt and answer too
        whole = [folder for folder in folders if (folder / "config.json").is_file()]
        takes |= {f"the {key} {folder}": context_of(inputs, load_config(folder)) for folder in whole}
    limit, who = min((tokens, name) for name, tokens in takes.items())
    found = f"{who} takes {limit} tokens with the answer, and max_new_tokens is {new}"
    refuse(limit - new < 2, f"max_new_tokens: no room for a prompt: {found}; lower it")
    if options.cutoff_len <= limit - new:
        return options
    inputs.world.print(f"note: cutoff_len is {limit - new} here: {found}")
    return replace(options, cutoff_len=limit - new)


def context_of(inputs: Inputs, config: ModelConfig | None = None) -> int:
    """Tokens of text that the model takes, or one of this config.json, as the run loads it."""
    scaling, cutoff_len = inputs.config[ModelOptions].rope_scaling, inputs.config[DataOptions].cutoff_len
    config = config or inputs.model_config
    return context_limit(scale_rope(config, scaling, cutoff_len) if scaling else config)


def describe_inputs(config: Config, source: Path, prepared: Prepared) -> dict[str, str]:
    """What the run is made from where the options' names do not say it: data, weights, reward's program."""
    output_dir, described = Path(config[TrainOptions].output_dir).resolve(), {"training data": "streamed"}
    if isinstance(prepared.train, ExampleStore):
        tokens = int(prepared.train.lengths.sum())
        described["training data"] = f"{len(prepared.train)} examples of {tokens} tokens"
        described["content of training data"] = prepared.train.digest()
    adapters = resolve_adapters(config[ModelOptions], wanted_files(config))
    folders = {"model_name_or_path": [source], "adapter_name_or_path": adapters}
    for key, named in (folders | folders_beside(config)).items():
        others = [folder for folder in named if folder.resolve() != output_dir]  # not what it trains in place
        patterns = (*run_folder.WEIGHTS, "config.json")
        files = (path for folder in others for pattern in patterns for path in folder.glob(pattern))
        described[f"content of {key}"] = run_folder.digest(files)
    program = config[RewardOptions].reward_file
    if program is not None and Path(program).expanduser().is_file():
        described["content of reward_file"] = run_folder.digest([Path(program).expanduser()])
    return described


def make_predictor(inputs: Inputs, prepared: Prepared) -> Predictor | None:
    """What answers the rows of the evaluation sets; None if the run asks for no such thing."""
    options = inputs.options
    shared = {"rows_per_batch": options.per_device_eval_batch_size, "world": inputs.world}
    if options.predict_with_generate and prepared.prompts:
        texts = prepared.prompts, inputs.tokenizer, inputs.template, inputs.config[GenerateOptions]
        return TextPredictor(*texts, seed=options.seed, context=context_of(inputs), **shared)
    if options.do_predict and options.stage == "rm":
        return ScorePredictor(prepared.eval, **shared)
    return None


def describe_model(config: Config, model: Decoder, world: World) -> str:
    """What trains, what is quantised, and which kernels serve it."""
    status = parameter_status(model) if config[LoraOptions].print_param_status else []
    quantised = [quantisation_report(model)] if quantised_linears(model) else []
    chosen = kernels.choices(world.device, model.runtime.flash_attn)
    return "\n".join([*status, trainable_report(model), *quantised, chosen])


def make_plan(inputs: Inputs) -> str:
    """What the run would take, without its weights; see plan.py."""
    data = load_data(inputs)
    refuse(data.loader is None, "plan: there is nothing to plan without training; drop plan, or do_eval")
    return Forecast(inputs.config, inputs.source, inputs.world, data).report(
        inputs.world, why_not_shared(inputs)
    )


def choose_recomputation(model: Decoder, loader, config: Config, world: World) -> str:
    """Tell the model what its blocks keep for the backward pass; gives a line that says so."""
    options = config[TrainOptions]
    spread = memory.Spread.of(config[ParallelOptions], world.size, world.device)
    tokens, optim = largest_row(loader, config, world.device), config[OptimOptions]
    asked = optim.optim, spread, optim.optim_in_backward, world.device.type
    need = memory.need(model, tokens, *asked)
    if options.compiles:  # compiled blocks drop what is cheap by themselves or not at all
        need = replace(need, selective=need.everything)
        kind = {"backend": options.torch_compile_backend or "inductor", "mode": options.torch_compile_mode}
        for block in model.layers:
            block.compile(**kind)
    # the least of all ranks: those that share layers or rows have to run the same blocks again
    free = -world.max_over_ranks(-int(memory.free_bytes(world.device)))[0]
    layers = model.config.num_layers
    model.runtime.recompute, line = memory.plan(options.recomputation, need, layers, world.device, free)
    return line
