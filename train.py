"""Train a model: every stage, every tuning method, one loop.

    python train.py configs/demo.yaml
    torchrun --nproc_per_node 2 train.py configs/sft_lora.yaml learning_rate=1e-4
    python train.py --help

Reading order: main -> run (what is built, in order) -> train (the loop) -> update (one optimizer step). The loop sums the
losses of an accumulation group, divides once by the number of tokens of all micro-batches and ranks, and looks at
results on the host only on logging steps.
"""

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

import config as configuration
import kernels
import optim
import parallel
import runs
from batches import Batch, BatchLoader, StreamingLoader
from checkpoint import (
    ModelOptions,
    load_model,
    prepare_adapters,
    random_model,
    resolve_model,
    restore_trained,
    save_trained,
)
from data import DataOptions, Prepared, TokenizedDataSaved, load_datasets
from lora import LoraOptions, trainable_report
from model import Decoder
from monitor import Monitor, write_json
from objectives import STAGES
from optim import OptimOptions
from parallel import World
from templates import TemplateOptions, get_template
from tokenizer import Tokenizer

RUN_CONFIG = "run_config.yaml"  # the resolved configuration; chat.py and export.py read it


@dataclass(frozen=True)
class TrainOptions:
    stage: Annotated[Literal["pt", "sft"], "pretraining on plain text, or supervised fine-tuning on dialogues"] = "sft"
    do_train: Annotated[bool | None, "train; default: yes, unless only do_eval is set"] = None
    do_eval: Annotated[bool, "evaluate once more at the end"] = False
    output_dir: Annotated[str | None, "folder of the run: checkpoints, logs, the result"] = None
    overwrite_output_dir: Annotated[bool, "start anew even if output_dir holds checkpoints to resume from"] = False
    resume_from_checkpoint: Annotated[str | None, "a checkpoint folder, true (the newest) or false (start anew)"] = None
    per_device_train_batch_size: Annotated[int, "examples (or packed rows) per device and micro-batch"] = 8
    per_device_eval_batch_size: Annotated[int, "the same for evaluation"] = 8
    gradient_accumulation_steps: Annotated[int, "micro-batches per update"] = 1
    num_train_epochs: Annotated[float, "passes over the data"] = 3.0
    max_steps: Annotated[int, "updates; above 0 it beats num_train_epochs"] = -1
    bf16: Annotated[bool, "bf16 compute, fp32 trainable weights"] = False
    fp16: Annotated[bool, "fp16 compute with loss scaling, fp32 trainable weights"] = False
    pure_bf16: Annotated[bool, "everything in bf16, trainable weights too"] = False
    gradient_checkpointing: Annotated[
        bool | None, "recompute activations in the backward pass; default: on a GPU yes, on a CPU no"
    ] = None
    neftune_noise_alpha: Annotated[float | None, "noise on the embeddings while training; 5 is typical"] = None
    train_from_scratch: Annotated[bool, "random weights; the model folder gives config.json and tokenizer"] = False
    seed: Annotated[int, "seed of adapters, dropout and, without data_seed, of the data order"] = 42
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    ddp_timeout: Annotated[int, "seconds that ranks wait for one another"] = 1800
    logging_steps: Annotated[int, "updates between log lines"] = 500
    logging_first_step: Annotated[bool, "log the first update too"] = False
    report_to: Annotated[tuple[str, ...], "none, tensorboard, wandb, mlflow"] = ("none",)
    run_name: Annotated[str | None, "name of the run in report_to services; default: output_dir"] = None
    plot_loss: Annotated[bool, "write training_loss.png"] = False
    save_strategy: Annotated[Literal["steps", "epoch", "no"], "when checkpoints are written"] = "steps"
    save_steps: Annotated[int, "updates between checkpoints"] = 500
    save_total_limit: Annotated[int | None, "keep at most this many checkpoints (the best one stays)"] = None
    save_only_model: Annotated[bool, "checkpoints without optimizer state; they cannot be resumed"] = False
    evaluation_strategy: Annotated[Literal["no", "steps", "epoch"], "when to evaluate during training"] = "no"
    eval_steps: Annotated[int | None, "updates between evaluations; default: logging_steps"] = None
    load_best_model_at_end: Annotated[bool, "finish with the checkpoint that evaluated best"] = False
    metric_for_best_model: Annotated[str, "what decides which is best; eval_loss, or eval_<set>_loss"] = "eval_loss"
    greater_is_better: Annotated[bool | None, "default: no for losses and perplexities, else yes"] = None
    early_stopping_steps: Annotated[int | None, "stop after this many evaluations without a gain"] = None

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir: missing; name a folder for the run, for example output_dir=saves/first")
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")
        for key in ("logging_steps", "save_steps", "eval_steps", "early_stopping_steps", "save_total_limit"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: {self.num_train_epochs} must be above 0 (or set max_steps)")

    @property
    def trains(self) -> bool:
        return not self.do_eval if self.do_train is None else self.do_train

    @property
    def services(self) -> tuple[str, ...]:
        return tuple(name for name in self.report_to if name not in ("none", ""))

    def better(self, value: float, best: float | None) -> bool:
        name = self.metric_for_best_model
        greater = self.greater_is_better
        if greater is None:
            greater = not name.endswith(("loss", "perplexity"))
        return best is None or (value > best if greater else value < best)


class StopRun(Exception):
    """The run cannot go on; the message is for the user."""


@dataclass
class Progress:
    """What has to survive a kill beside weights, optimizer and random numbers."""

    step: int = 0  # updates done
    tokens: int = 0  # trained through by all ranks, prompt tokens included
    best_metric: float | None = None
    best_checkpoint: str | None = None
    stale_evaluations: int = 0  # evaluations since the last gain
    window_steps: int = 0  # updates since the last log line ...
    window_loss: float = 0.0  # ... and the sum of their losses on this rank; only exact on logging steps and checkpoints
    history: list[dict] = field(default_factory=list)


@dataclass
class Run:
    """The parts of one run, built by `run` and used by the functions below."""

    options: TrainOptions
    optim_options: OptimOptions
    world: World
    model: Decoder
    stage: object
    loader: BatchLoader | StreamingLoader
    eval_loaders: dict[str, BatchLoader]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    gradient_sum: parallel.GradientSum
    monitor: Monitor
    progress: Progress
    total_steps: int
    output_dir: Path
    save_result: Callable[[Path], None]  # weights and tokenizer as the user will load them
    fingerprint: dict
    names: list[str]  # of the data sets, for messages
    asked_to_stop: list[int] = field(default_factory=list)  # signals received

    @property
    def steps_per_epoch(self) -> float | None:
        per_epoch = self.loader.batches_per_epoch
        return None if per_epoch is None else per_epoch / self.options.gradient_accumulation_steps

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch if self.steps_per_epoch else step / max(self.total_steps, 1)


SECTIONS = [TrainOptions, ModelOptions, DataOptions, TemplateOptions, LoraOptions, OptimOptions]


def main(argv: list[str]) -> int:
    try:
        config = configuration.load(argv, SECTIONS, program="train.py", description=__doc__.splitlines()[0])
    except configuration.ConfigError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    try:
        world = parallel.start(config[TrainOptions].device, config[TrainOptions].ddp_timeout)
        return run(config, world)
    except TokenizedDataSaved as done:
        print(done, flush=True)
        return 0
    except (StopRun, ValueError, OSError) as error:
        if os.environ.get("ANVIL_TRACEBACK"):
            raise
        print(f"train.py: {error}\n(set ANVIL_TRACEBACK=1 to see where)", file=sys.stderr, flush=True)
        return 1 if isinstance(error, StopRun) else 2
    finally:
        parallel.stop()


def run(config: configuration.Config, world: World) -> int:
    """Build everything in the order in which mistakes are cheapest, then train, evaluate, save. Gives the exit status."""
    options, data_options = config[TrainOptions], config[DataOptions]
    for notice in config.notices:
        world.print(f"note: {notice}")
    output_dir = Path(options.output_dir)
    resume = runs.find_resume(output_dir, options.resume_from_checkpoint, options.overwrite_output_dir)
    source = resolve_model(config[ModelOptions])
    tokenizer = Tokenizer.from_folder(source)
    template = pick_template(config, tokenizer)
    prepared = load_datasets(
        data_options,
        template,
        tokenizer,
        options.stage,
        seed=options.seed,
        is_main=world.is_main,
        enable_thinking=config[TemplateOptions].enable_thinking,
    )
    world.print(prepared.report)
    loader, eval_loaders = make_loaders(prepared, options, data_options, world)
    torch.manual_seed(options.seed + world.rank)  # dropout and noise differ between ranks, adapters do not (generator)
    model = build_model(config, source, world)
    world.print(trainable_report(model))
    world.print(kernels.choices(world.device))
    output_dir.mkdir(parents=True, exist_ok=True)
    total_steps = count_steps(options, loader)
    run_name = options.run_name or str(output_dir)
    this = Run(
        options=options,
        optim_options=config[OptimOptions],
        world=world,
        model=model,
        stage=STAGES[options.stage](),
        loader=loader,
        eval_loaders=eval_loaders,
        optimizer=optim.make_optimizer(model, config[OptimOptions]) if options.trains else None,
        scaler=torch.amp.GradScaler(world.device.type, enabled=options.fp16),
        gradient_sum=parallel.GradientSum(model, world),
        monitor=Monitor(output_dir, total_steps, options.services, run_name, world.is_main),
        progress=Progress(),
        total_steps=total_steps,
        output_dir=output_dir,
        save_result=result_writer(model, source, tokenizer, template, config),
        fingerprint=fingerprint(config, world, prepared),
        names=prepared.train.datasets if prepared.train is not None else [],
    )
    if world.is_main:
        runs.remove_leftovers(output_dir)
        config.save(output_dir / RUN_CONFIG)
    if resume is not None and options.trains:
        restore(this, resume)
    status = 0
    if options.trains:
        status = train(this)
    if options.do_eval and eval_loaders and status == 0:
        results = evaluate(this)
        world.print("  ".join(f"{name} {value:.4f}" for name, value in results.items()))
        this.monitor.save_results("eval", results)
    this.monitor.close()
    return status


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
    if (options.evaluation_strategy != "no" or options.do_eval) and not eval_loaders:
        raise ValueError("evaluation_strategy: there is no evaluation data; set val_size or eval_dataset")
    return loader, eval_loaders


def count_steps(options: TrainOptions, loader) -> int:
    """Updates of the whole run."""
    if loader is None:
        return 0
    if options.max_steps > 0:
        return options.max_steps
    if loader.batches_per_epoch is None:
        raise ValueError("max_steps: streaming has no known length, so max_steps has to say how many updates to do")
    return max(1, math.ceil(options.num_train_epochs * loader.batches_per_epoch / options.gradient_accumulation_steps))


def build_model(config: configuration.Config, source: Path, world: World) -> Decoder:
    """Weights on the device, in the dtypes that the precision options ask for, with what trains marked."""
    options, model_options, lora_options = config[TrainOptions], config[ModelOptions], config[LoraOptions]
    compute = torch.float32
    if options.bf16 or options.pure_bf16:
        compute = torch.bfloat16
    elif options.fp16:
        compute = torch.float16
    frozen = compute if lora_options.finetuning_type == "lora" or options.pure_bf16 else torch.float32
    trained = torch.bfloat16 if options.pure_bf16 else torch.float32
    if options.train_from_scratch:
        model = random_model(source, frozen, world.device, options.seed)
    else:
        scaling = None if model_options.rope_scaling == "none" else model_options.rope_scaling
        cutoff_len = config[DataOptions].cutoff_len
        model = load_model(source, frozen, world.device, scaling, cutoff_len)
    generator = torch.Generator().manual_seed(options.seed)
    prepare_adapters(model, model_options.adapter_name_or_path, lora_options, generator, trained)
    for parameter in model.parameters():
        # frozen weights in the compute dtype, trained ones in full precision
        parameter.data = parameter.data.to(trained if parameter.requires_grad else compute)
    model.compute_dtype = compute
    recompute = options.gradient_checkpointing
    model.gradient_checkpointing = world.device.type == "cuda" if recompute is None else recompute
    model.embedding_noise = options.neftune_noise_alpha or 0.0
    return model


def result_writer(model: Decoder, source: Path, tokenizer: Tokenizer, template, config) -> Callable[[Path], None]:
    """A function that writes what the user loads later: weights, tokenizer, chat template, resolved configuration."""
    base_name = config[ModelOptions].model_name_or_path

    def save(folder: Path) -> None:
        save_trained(model, folder, source, base_name)
        tokenizer.save(folder)
        if config[TemplateOptions].template is not None and template is not None:
            (folder / "chat_template.jinja").write_text(template.to_jinja(), encoding="utf-8")
        config.save(folder / RUN_CONFIG)

    return save


def fingerprint(config: configuration.Config, world: World, prepared: Prepared) -> dict:
    """What a resumed run must share with the interrupted one, or its data position would mean other examples."""
    keys = (
        "stage", "model_name_or_path", "finetuning_type", "dataset", "template", "cutoff_len", "packing", "streaming",
        "group_by_length", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed",
    )  # fmt: skip
    values, data = {key: str(config.values[key]) for key in keys}, config[DataOptions]
    examples = "streamed" if data.streaming or prepared.train is None else str(len(prepared.train))
    return values | {"number of processes": str(world.size), "training examples": examples}


# The loop


def train(this: Run) -> int:
    """Update until total_steps; log, evaluate, save when due. Gives the exit status (128 + signal when interrupted)."""
    options, world, progress, model = this.options, this.world, this.progress, this.model
    accumulation = options.gradient_accumulation_steps
    if progress.step >= this.total_steps:
        raise StopRun(
            f"output_dir: {this.output_dir} is already trained to step {progress.step} of {this.total_steps}; raise "
            "num_train_epochs or max_steps to go on, or set overwrite_output_dir=true to start anew"
        )
    this.monitor.open_bar()
    model.train()
    batches = this.loader.batches(start=progress.step * accumulation)
    health = Health(world, this.names)
    clock = Clock(progress.tokens)
    window_loss = torch.tensor(progress.window_loss, dtype=torch.float64, device=world.device)
    started, tokens_at_start = time.monotonic(), progress.tokens
    with catch_signals(this.asked_to_stop):
        while progress.step < this.total_steps:
            group = [next(batches) for _ in range(accumulation)]
            loss, norm = update(this, group)
            progress.step += 1
            progress.window_steps += 1
            window_loss += loss
            step = progress.step
            clock.tokens += sum(batch.tokens.shape[0] for batch in group if batch.sources)
            health.watch(step, loss, group)
            stop = world.any(bool(this.asked_to_stop))
            last = step == this.total_steps or stop
            due_save, due_eval, due_log, on_demand = what_is_due(this, step, last)
            if due_log or due_save or due_eval or last:
                health.check()
                progress.window_loss = window_loss.item()
            if due_log:
                log_training(this, clock, norm)
                window_loss.zero_()
            early = False
            if due_eval:
                model.eval()
                early = judge(this, evaluate(this))
                model.train()
            this.monitor.advance()
            if due_save or stop or (early and options.save_strategy != "no") or on_demand:
                progress.tokens = clock.tokens_of_all_ranks(world)
                path = save_checkpoint(this)
                if on_demand and world.is_main:
                    (this.output_dir / SAVE_REQUEST).unlink(missing_ok=True)
                if stop:
                    this.monitor.close()
                    name = signal.Signals(max(this.asked_to_stop, default=signal.SIGTERM)).name
                    world.print(f"{name}: stopped after step {step}; run the same command to continue from {path}")
                    return 128 + max(this.asked_to_stop, default=signal.SIGTERM)
            if early:
                world.print(f"early stop: no gain in {options.early_stopping_steps} evaluations")
                break
    progress.tokens = clock.tokens_of_all_ranks(world)
    finish(this, time.monotonic() - started, progress.tokens - tokens_at_start)
    return 0


def update(this: Run, group: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over an accumulation group.

    Gives this rank's share of the mean loss and the gradient norm, both () on the device.
    """
    device, stage = this.world.device, this.stage
    group = [batch.to(device) for batch in group]
    total = torch.tensor(float(sum(stage.weight(batch) for batch in group)), device=device)
    total = this.world.sum(total).clamp_(min=1)
    loss = torch.zeros((), device=device)
    for number, batch in enumerate(group, start=1):
        with this.gradient_sum(number == len(group)):
            value, _ = stage.loss(this.model, batch)
            value = value / total
            this.scaler.scale(value).backward()
        loss += value.detach()
    this.scaler.unscale_(this.optimizer)
    trainable = [parameter for parameter in this.model.parameters() if parameter.requires_grad]
    norm = optim.clip_gradients(trainable, this.optim_options.max_grad_norm)
    optim.set_learning_rate(this.optimizer, optim.schedule(this.progress.step, this.optim_options, this.total_steps))
    this.scaler.step(this.optimizer)
    this.scaler.update()
    this.optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def evaluate(this: Run) -> dict[str, float]:
    """Mean loss and perplexity on every evaluation set, over all ranks. The model's mode is the caller's."""
    was_training = this.model.training
    this.model.eval()
    results: dict[str, float] = {}
    for name, loader in this.eval_loaders.items():
        sums = torch.zeros(2, dtype=torch.float64, device=this.world.device)
        batches = loader.batches()
        for _ in range(loader.batches_per_epoch):
            batch = next(batches).to(this.world.device)
            value, _ = this.stage.loss(this.model, batch)
            sums += torch.stack([value.double(), torch.tensor(float(this.stage.weight(batch)), device=value.device)])
        total, count = this.world.sum(sums).tolist()
        mean = total / max(count, 1)
        prefix = "eval_" if len(this.eval_loaders) == 1 else f"eval_{name}_"
        results[f"{prefix}loss"] = mean
        results[f"{prefix}perplexity"] = math.exp(min(mean, 700))
    if len(this.eval_loaders) > 1:
        losses = [value for name, value in results.items() if name.endswith("_loss")]
        results["eval_loss"] = sum(losses) / len(losses)
    this.model.train(was_training)
    return results


SAVE_REQUEST = "SAVE"  # `touch output_dir/SAVE` asks a running training for a checkpoint


def what_is_due(this: Run, step: int, last: bool) -> tuple[bool, bool, bool, bool]:
    """(save, evaluate, log, save on demand) after this step. Saving the best model needs its checkpoint."""
    options = this.options
    ends_epoch = int(this.epoch(step) + 1e-9) > int(this.epoch(step - 1) + 1e-9)

    def due(strategy: str, every: int) -> bool:
        return (strategy == "steps" and step % every == 0) or (strategy == "epoch" and ends_epoch)

    evaluates = bool(this.eval_loaders) and due(options.evaluation_strategy, options.eval_steps or options.logging_steps)
    saves = due(options.save_strategy, options.save_steps)
    logs = step % options.logging_steps == 0 or (step == 1 and options.logging_first_step) or last
    request = this.world.is_main and (this.output_dir / SAVE_REQUEST).exists()
    return saves, evaluates, logs, this.world.any(request)


def log_training(this: Run, clock: "Clock", norm: torch.Tensor) -> None:
    """Average loss since the last line, learning rate, gradient norm, speed of all ranks, peak memory."""
    progress, world = this.progress, this.world
    numbers = torch.tensor([progress.window_loss, clock.tokens_since_log()], dtype=torch.float64, device=world.device)
    loss, tokens = world.sum(numbers).tolist()
    rate = optim.schedule(progress.step - 1, this.optim_options, this.total_steps) * this.optim_options.learning_rate
    values = {
        "loss": loss / max(progress.window_steps, 1),
        "learning_rate": rate,
        "grad_norm": norm.item(),
        "tokens_per_second": round(tokens / clock.seconds_since_log(), 1),
        "peak_memory": round(peak_memory_gb(world.device), 3),
    }
    progress.window_steps, progress.window_loss = 0, 0.0
    clock.reset()
    this.monitor.log(progress.step, this.epoch(progress.step), values)


def judge(this: Run, results: dict[str, float]) -> bool:
    """Log an evaluation, remember the best; True when early stopping says enough."""
    options, progress = this.options, this.progress
    this.monitor.log(progress.step, this.epoch(progress.step), results)
    name = options.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in results:
        raise StopRun(f"metric_for_best_model: {name} is not measured; there are {', '.join(results)}")
    if options.better(results[name], progress.best_metric):
        progress.best_metric, progress.stale_evaluations = results[name], 0
        progress.best_checkpoint = f"checkpoint-{progress.step}"
    else:
        progress.stale_evaluations += 1
    return options.early_stopping_steps is not None and progress.stale_evaluations >= options.early_stopping_steps


def finish(this: Run, seconds: float, tokens: int) -> None:
    """Load the best weights if asked, write the result, the numbers of the run and the plot."""
    options, progress, world = this.options, this.progress, this.world
    this.monitor.close()
    if options.load_best_model_at_end and progress.best_checkpoint:
        best = this.output_dir / progress.best_checkpoint
        if best.is_dir():
            restore_trained(this.model, best)
            world.print(f"best: {best}, {options.metric_for_best_model} {progress.best_metric:.4f}")
        else:
            world.print(f"note: the best evaluation was at {best.name}, which was not saved; the last weights stay")
    losses = [entry["loss"] for entry in this.monitor.history if "loss" in entry]
    if world.is_main:
        this.save_result(this.output_dir)
        write_json(this.output_dir / "trainer_state.json", trainer_state(this))
        results = {
            "epoch": round(this.epoch(progress.step), 4),
            "train_loss": sum(losses) / max(len(losses), 1),
            "train_runtime": round(seconds, 2),
            "train_tokens_per_second": round(tokens / seconds, 1),
            "train_steps": progress.step,
            "peak_memory": round(peak_memory_gb(world.device), 3),
        }
        this.monitor.save_results("train", results)
        if options.plot_loss:
            this.monitor.plot()
    world.barrier()
    world.print(f"saved to {this.output_dir}")


def trainer_state(this: Run) -> dict:
    """The Hugging Face trainer's trainer_state.json."""
    progress = this.progress
    return {
        "global_step": progress.step,
        "max_steps": this.total_steps,
        "epoch": round(this.epoch(progress.step), 4),
        "num_input_tokens_seen": progress.tokens,
        "best_metric": progress.best_metric,
        "best_model_checkpoint": progress.best_checkpoint,
        "log_history": this.monitor.history,
    }


# Checkpoints


def save_checkpoint(this: Run) -> Path:
    """Write checkpoint-<step>, complete or not at all."""
    this.progress.history = this.monitor.history

    def write(folder: Path) -> None:
        this.save_result(folder)
        write_json(folder / "trainer_state.json", trainer_state(this))
        state = {"progress": asdict(this.progress), "fingerprint": this.fingerprint}
        if not this.options.save_only_model:
            state |= {"optimizer": this.optimizer.state_dict(), "scaler": this.scaler.state_dict()}
        torch.save(state, folder / runs.STATE_FILE)

    rank_state = runs.rank_state(this.world.device)
    try:
        path = runs.write_checkpoint(this.output_dir, this.progress.step, this.world, write, rank_state)
    except OSError as error:
        raise StopRun(error.strerror) from error
    if this.world.is_main:
        runs.rotate(this.output_dir, this.options.save_total_limit, kept_checkpoint(this))
    return path


def self_best(this: Run) -> str | None:
    return this.progress.best_checkpoint if this.options.load_best_model_at_end else None


def restore(this: Run, folder: Path) -> None:
    """Everything back as it was when the checkpoint was written; refuses a run whose data order would differ."""
    state = runs.read_state(folder / runs.STATE_FILE)
    changed = [
        f"{key} was {state['fingerprint'].get(key)}, is {value}"
        for key, value in this.fingerprint.items()
        if state["fingerprint"].get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{folder}: cannot be continued with other settings: {'; '.join(changed)}. Restore them, choose another "
            "output_dir, or set overwrite_output_dir=true to start anew"
        )
    if "optimizer" not in state:
        raise ValueError(
            f"{folder}: saved with save_only_model, so there is no optimizer state to continue from; "
            "set overwrite_output_dir=true, or give the folder as adapter_name_or_path or model_name_or_path"
        )
    restore_trained(this.model, folder)
    this.optimizer.load_state_dict(state["optimizer"])
    this.scaler.load_state_dict(state["scaler"])
    this.progress = Progress(**state["progress"])
    runs.restore_rank_state(folder, this.world)
    this.monitor.resume(this.progress.step, this.progress.history)
    this.world.print(f"resuming {folder} at step {this.progress.step} of {this.total_steps}")


# Small instruments


class Health:
    """Finds the first loss that is not a number without waiting for the device at every step."""

    def __init__(self, world: World, names: list[str]):
        self.world, self.names = world, names
        self.first_bad = torch.zeros((), dtype=torch.int64, device=world.device)  # step, 0 = none yet
        self.seen: list[tuple[int, list[tuple[int, int]]]] = []  # (step, sources) since the last check

    def watch(self, step: int, loss: torch.Tensor, group: list[Batch]) -> None:
        bad = ~torch.isfinite(loss) & (self.first_bad == 0)
        self.first_bad = torch.where(bad, step, self.first_bad)
        self.seen.append((step, [source for batch in group for source in batch.sources]))

    def check(self) -> None:
        """Raises StopRun on every rank, on the guilty one with the rows. Called before anything is saved."""
        step = int(self.first_bad.item())
        if self.world.any(step > 0):
            if not step:
                raise StopRun("the loss of another rank is not a finite number")
            rows = dict(self.seen)[step]
            listed = ", ".join(f"{self.names[dataset]} row {row}" for dataset, row in rows[:16])
            more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
            raise StopRun(
                f"the loss is not a finite number at step {step}; rows of that update: {listed}{more}. Nothing was saved "
                "after it. Look at these rows, lower learning_rate, or use bf16 instead of fp16"
            )
        self.seen.clear()


class Clock:
    """Tokens and seconds since the last log line, and tokens since the beginning."""

    def __init__(self, tokens_before: int):
        self.tokens_before = tokens_before  # of all ranks, before this process started
        self.tokens = 0  # of this rank, in this process
        self.reset()

    def reset(self) -> None:
        self.mark, self.mark_tokens = time.monotonic(), self.tokens

    def tokens_since_log(self) -> int:
        return self.tokens - self.mark_tokens

    def seconds_since_log(self) -> float:
        return max(time.monotonic() - self.mark, 1e-9)

    def tokens_of_all_ranks(self, world: World) -> int:
        count = torch.tensor(self.tokens, dtype=torch.int64, device=world.device)
        return self.tokens_before + int(world.sum(count).item())


@contextmanager
def catch_signals(received: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a checkpoint after the current step; a second SIGINT ends the process at once."""

    def note(number, frame) -> None:
        if number in received:
            signal.signal(number, signal.SIG_DFL)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory_gb(device: torch.device) -> float:
    """GB (1e9 bytes): of the GPU's allocator, or of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
