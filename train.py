"""Train a model: every stage, every tuning method, one loop.

    python train.py configs/demo.yaml
    torchrun --nproc_per_node 2 train.py configs/sft_lora.yaml learning_rate=1e-4
    python train.py configs/qlora.yaml plan=true        # what it would take, before any weight is read
    python train.py --help

Reading order: main -> run (what is built, in order) -> train (the loop) -> update (one optimizer step). The
loop sums the losses of an accumulation group, divides once by their weight (tokens, pairs, ...:
objectives.Stage) over all micro-batches and ranks, and looks at results on the host only when it logs,
evaluates or saves. Exit status: 0 done, 1 the run cannot go on (loss not finite, disk full), 2 a mistake in
options, files or data, 128 + n stopped by signal n with a checkpoint. `touch OUTPUT_DIR/SAVE` asks for a
checkpoint.
"""

import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import kernels
import parallel.world
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import restore_trained
from checkpoints.source import RUN_CONFIG
from data import DataOptions, TokenizedDataSaved
from model import Decoder
from options import config as configuration
from options.errors import DISK_FULL, StopRun, UserError
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, Batch, BatchLoader, StreamingLoader
from pipeline.prefetch import ahead
from stages.rewards import RewardError
from stages.rollouts import Prompt
from stages.stage import Stage
from text.tokenizer import Tokenizer
from training import host_memory, make_stage, monitor, predict, run_folder, setup
from training.monitor import Health, MetricWindow, Monitor, peak_memory_gb, write_json
from training.optimizers import clip_gradients, load_optimizer, make_optimizer, set_learning_rate
from training.options import OptimOptions, TrainOptions
from training.run_folder import Progress
from training.schedules import schedule
from training.setup import SECTIONS, steps_per_epoch


@dataclass
class Run:
    """The parts of one run, built by `run` and used by the functions below."""

    options: TrainOptions
    optim_options: OptimOptions
    world: World
    model: Decoder
    stage: Stage
    rollout_sizes: tuple[int, int]  # micro-batches drawn from the data at once, updates made of them
    loader: BatchLoader | StreamingLoader | None
    eval_loaders: dict[str, BatchLoader]
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler
    gradient_sum: parallel.world.GradientSum
    monitor: Monitor
    window: MetricWindow
    health: Health
    predictor: predict.Predictor | None
    total_steps: int
    save_weights: Callable[[Path], None]  # weights, tokenizer and settings as the user will load them
    fingerprint: dict[str, str]
    progress: Progress = field(default_factory=Progress)

    @property
    def output_dir(self) -> Path:
        return self.monitor.folder

    def epoch(self, step: int) -> float:
        return step / (steps_per_epoch(self.rollout_sizes, self.loader) or max(self.total_steps, 1))

    def out_of_patience(self) -> bool:
        patience = self.options.early_stopping_steps
        return patience is not None and self.progress.stale_evaluations >= patience


def main(argv: list[str]) -> int:
    try:
        config = configuration.load(argv, SECTIONS, program="train.py", description=__doc__.splitlines()[0])
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    options, name = config[TrainOptions], "train.py"
    try:
        world = parallel.world.start(options.device, options.ddp_timeout)
        if world.device.type == "cpu":
            host_memory.keep_freed()
        name += f" [rank {world.rank}]" if world.rank else ""
        with nullcontext() if options.plan else run_folder.lock_folder(Path(options.output_dir), world):
            return run(config, world)
    except TokenizedDataSaved as done:
        world.print(done)
        return 0
    except KeyboardInterrupt:
        print(
            f"{name}: interrupted before the first update; nothing was trained", file=sys.stderr, flush=True
        )
        return 128 + signal.SIGINT
    except (StopRun, ValueError, OSError) as error:
        if os.environ.get("ANVIL_TRACEBACK"):
            raise
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        text = (
            f"output_dir: {options.output_dir}: {error}; make room and run the same command again"
            if full
            else error
        )
        print(f"{name}: {text}\n(set ANVIL_TRACEBACK=1 to see where)", file=sys.stderr, flush=True)
        return 1 if full or isinstance(error, StopRun) else 2
    finally:
        parallel.world.stop()


def run(config: configuration.Config, world: World) -> int:
    """Build everything, cheap mistakes first, then train, evaluate, save. Gives the exit status."""
    options, output_dir = config[TrainOptions], Path(config[TrainOptions].output_dir)
    for notice in (*config.notices, *make_stage.notices(config)):
        world.print(f"note: {notice}")
    monitor.check_services(options.services)
    kernels.require_attention(config[ModelOptions].flash_attn, world.device, options.compute_dtype)
    resume, source = setup.find_start(config)
    setup.refuse_on_quantised(config, source)
    tokenizer = Tokenizer.from_folder(source)
    template = setup.pick_template(config, tokenizer)
    reward = make_stage.make_reward_ahead(config, tokenizer)
    prepared = setup.prepare_data(config, source, template, tokenizer, world)
    predictor = setup.make_predictor(config, prepared, template, tokenizer, world)
    loader, eval_loaders = setup.make_loaders(prepared, options, config[DataOptions], tokenizer, world)
    setup.check_metric(options, eval_loaders, predictor)
    rollout_sizes = make_stage.rollout_sizes(config)
    total_steps = setup.count_steps(options, rollout_sizes, loader)
    if options.plan:
        world.print(setup.make_plan(config, source, prepared, loader, world))
        return 0
    fingerprint = run_folder.fingerprint(config, world, setup.describe_inputs(config, source, prepared))
    state = None if resume is None else run_folder.read_checkpoint(resume, fingerprint, world)
    torch.manual_seed(
        options.seed + world.rank
    )  # dropout and noise differ between ranks, adapters do not (generator)
    model = setup.build_model(config, source, world)
    world.print(setup.describe_model(config, model, world))
    stage = make_stage.make_stage(config, model, tokenizer, template, prepared, world, reward=reward)
    if loader is not None:  # now that a reference and a reward model have taken their memory
        world.print(setup.choose_recomputation(model, loader, config, world))
    this = Run(
        options=options,
        optim_options=config[OptimOptions],
        world=world,
        model=model,
        stage=stage,
        rollout_sizes=rollout_sizes,
        loader=loader,
        eval_loaders=eval_loaders,
        optimizer=make_optimizer(model, config[OptimOptions]) if options.trains else None,
        scaler=torch.amp.GradScaler(world.device.type, enabled=options.fp16),
        gradient_sum=parallel.world.GradientSum(model, world),
        monitor=Monitor(output_dir, options.services, options.run_name or str(output_dir), world.is_main),
        window=MetricWindow(world),
        health=Health(world, prepared.train.datasets if prepared.train is not None else []),
        predictor=predictor,
        total_steps=total_steps,
        save_weights=setup.weight_writer(model, source, tokenizer, template, config),
        fingerprint=fingerprint,
    )
    status = 0
    if options.trains:
        if resume is not None:
            restore(this, resume, state)
            del state  # the optimizer has its own copy
        if world.is_main:
            begin_folder(config, resume, world)
        status = train(this, run_folder.read_history(resume) if resume is not None else [])
        if config[DataOptions].streaming:
            world.print(prepared.report)  # only now is it known what was dropped and cut
    if status == 0:
        measure_at_the_end(this)
    return status


def measure_at_the_end(this: Run) -> None:
    """What do_eval and do_predict ask for."""
    if this.options.do_eval and this.eval_loaders:
        show_results(this, "eval", evaluate(this))
    if this.options.do_predict:
        numbers = predict.write_predictions(this.predictor, this.model, this.output_dir, this.world)
        show_results(this, "predict", numbers)
        this.world.print(f"{this.output_dir / predict.PREDICTIONS} holds the predictions")


def show_results(this: Run, kind: str, results: dict[str, float]) -> None:
    this.world.print("  ".join(f"{name} {value:.4f}" for name, value in results.items()))
    this.monitor.save_results(kind, results)


def begin_folder(config: configuration.Config, resume: Path | None, world: World) -> None:
    """Make the output folder ready for this run, and leave the resolved configuration in it."""
    options, output_dir = config[TrainOptions], Path(config[TrainOptions].output_dir)
    for notice in run_folder.prepare_folder(output_dir, resume, options.overwrite_output_dir):
        world.print(f"note: {notice}")
    config.save(output_dir / f".tmp-{RUN_CONFIG}")
    os.replace(output_dir / f".tmp-{RUN_CONFIG}", output_dir / RUN_CONFIG)


# The loop


def train(this: Run, history: list[dict]) -> int:
    """Update until total_steps; log, evaluate, save when due. Gives the exit status (128 + n after signal
    n)."""
    options, world, progress = this.options, this.world, this.progress
    if is_finished(this):
        world.print(
            f"note: {this.output_dir} is already trained to step {progress.step}; raise num_train_epochs or "
            "max_steps "
            "to go on, or set overwrite_output_dir=true to start anew"
        )
        return 0
    this.monitor.begin(progress.step, this.total_steps, history, progress.seconds)
    this.model.train()
    with run_folder.catch_signals() as received, groups(this) as ready:
        for group in ready:
            loss, norm = update(this, group)
            progress.step += 1
            this.window.add(loss, group)
            this.monitor.advance(progress.step)
            # under fp16 an infinite gradient only means that the scaler skipped this update and halves its
            # scale
            this.health.watch(progress.step, [loss] if options.fp16 else [loss, norm], group)
            stop, on_demand = world.max_over_ranks(max(received, default=0), wants_checkpoint(this))
            due = what_is_due(this)
            if due.log or due.evaluate or due.save or on_demand or stop:
                check_health(this)
            if due.log:
                log_training(this, norm)
            if due.evaluate:
                evaluate_and_track(this)
            early = this.out_of_patience()
            if due.save or on_demand or stop or (early and options.save_strategy != "no"):
                path = save_checkpoint(this)
            if stop:
                this.monitor.close()
                name = signal.Signals(stop).name
                world.print(
                    f"{name}: stopped after step {progress.step}; the same command continues from {path}"
                )
                return 128 + stop
            if early:
                world.print(f"early stop: no gain in {options.early_stopping_steps} evaluations")
                break
        if this.window.steps:  # an early stop between two log lines
            check_health(this)
            log_training(this, norm)
    finish(this)
    return 0


def is_finished(this: Run) -> bool:
    """Trained to the end, and the result written: then there is nothing to do."""
    over = this.progress.step >= this.total_steps or this.out_of_patience()
    return over and (this.output_dir / run_folder.RESULTS).exists()


@contextmanager
def groups(this: Run) -> Iterator[Iterator[list[Batch]]]:
    """Accumulation groups from the current step to the last; on a GPU data is prepared ahead while the model
    trains.

    What is drawn at once ends with its epoch: so batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 train on the
    same groups of rows.
    """
    (micro_batches, updates), loader, first = this.rollout_sizes, this.loader, this.progress.step
    draw, within = divmod(first, updates)
    per_epoch = (
        None if loader.batches_per_epoch is None else math.ceil(loader.batches_per_epoch / micro_batches)
    )
    if per_epoch is None:
        batches = loader.batches(start=draw * micro_batches)
    else:
        epoch, place = divmod(draw, per_epoch)
        batches = loader.batches(start=epoch * loader.batches_per_epoch + place * micro_batches)

    def count(draw: int) -> int:
        if per_epoch is None:
            return micro_batches
        return min(micro_batches, loader.batches_per_epoch - draw % per_epoch * micro_batches)

    def all_groups(ready: Iterator[Batch]) -> Iterator[list[Batch]]:
        for number in itertools.count(draw):
            drawn = [next(ready) for _ in range(count(number))]
            try:
                yield from this.stage.groups(this.model, drawn, within if number == draw else 0)
            except RewardError as error:
                raise StopRun(f"{error}{save_after_failure(this)}") from error

    last = first if this.out_of_patience() else this.total_steps
    on_gpu = this.world.device.type == "cuda"
    prepared = (prepare(batch, this.world.device) for batch in batches)
    # not on a CPU: a batch of 2,048 tokens is made in 0.3 ms, and the threads of the step need every core
    with ahead(prepared, depth=max(2, micro_batches) if on_gpu else 0) as ready:
        yield itertools.islice(all_groups(ready), last - first)


def save_after_failure(this: Run) -> str:
    """A checkpoint of what was trained before the reward failed, if it can be had; where it is, for the
    message."""
    if this.world.size > 1 or this.options.save_strategy == "no" or not this.progress.step:
        return ""  # other ranks may have their rewards, and know nothing of it
    return f"; the same command continues from {save_checkpoint(this)}"


def prepare(batch: Batch | list[Prompt], device: torch.device) -> Batch | list[Prompt]:
    """What the host can do for a batch before its turn; a stage that draws prompts makes batches of them."""
    if not isinstance(batch, Batch):
        return batch
    batch = batch.rounded(ROW_MULTIPLE[device.type])
    return batch.pinned() if device.type == "cuda" else batch


def update(this: Run, group: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over an accumulation group.

    Gives this rank's share of the mean loss and the gradient norm, both () on the device.
    """
    device, stage = this.world.device, this.stage
    group = [batch.to(device) for batch in group]
    stage.prepare(this.model, group)
    # full, not tensor: the latter would copy a number of the host's and wait for it
    total = torch.full((), float(sum(stage.weight(batch) for batch in group)), device=device)
    total = this.world.sum(total).clamp_(min=1)
    loss = torch.zeros((), device=device)
    for number, batch in enumerate(group, start=1):
        with this.gradient_sum(number == len(group)):
            value, metrics = stage.loss(this.model, batch)
            value = value / total
            this.scaler.scale(value).backward()
        this.window.add_metrics(metrics)
        loss += value.detach()
    this.scaler.unscale_(this.optimizer)
    norm = clip_gradients(trained_parameters(this.optimizer), this.optim_options.max_grad_norm)
    set_learning_rate(this.optimizer, schedule(this.progress.step, this.optim_options, this.total_steps))
    this.scaler.step(this.optimizer)
    this.scaler.update()
    this.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def evaluate(this: Run) -> dict[str, float]:
    """What the stage measures on every evaluation set over all ranks, and the speed. The model's mode
    stays."""
    was_training, started, device = this.model.training, time.monotonic(), this.world.device
    this.model.eval()
    measured: dict[str, dict[str, float]] = {}
    for name, loader in this.eval_loaders.items():
        batches = itertools.islice(loader.batches(), loader.batches_per_epoch)
        ready = (prepare(batch, device) for batch in batches)
        measured[name] = this.stage.evaluate(this.model, ready, this.world)
        bad = next((kind for kind, value in measured[name].items() if not math.isfinite(value)), None)
        if bad is not None:
            raise StopRun(
                f"the evaluation's {bad} on {name} is {measured[name][bad]}; lower learning_rate, or use "
                "bf16 instead "
                "of fp16"
            )
    results: dict[str, float] = {}
    if len(measured) > 1:
        results |= {
            f"eval_{name}_{kind}": value for name, each in measured.items() for kind, value in each.items()
        }
    for kind in next(iter(measured.values())):
        results[f"eval_{kind}"] = sum(each[kind] for each in measured.values()) / len(measured)
    if len(measured) > 1 and "perplexity" in this.stage.evaluation_names:
        results["eval_perplexity"] = math.exp(min(results["eval_loss"], 700))  # of the mean loss
    if this.options.predict_with_generate:
        generated, rows = this.predictor.run(this.model, "eval")
        results |= (
            generated | results
        )  # the stage's own first: grpo has an exact_match too, of the final answers
        this.monitor.show_samples(this.progress.step, rows)
    seconds = time.monotonic() - started
    examples = sum(len(loader.store) for loader in this.eval_loaders.values())
    results |= {"eval_runtime": round(seconds, 4), "eval_samples_per_second": round(examples / seconds, 3)}
    this.model.train(was_training)
    return results


@dataclass(frozen=True)
class Due:
    save: bool
    evaluate: bool
    log: bool


def what_is_due(this: Run) -> Due:
    """After this step; the last one is logged, and saved with save_strategy=steps, as the Hugging Face
    trainer does."""
    options, step = this.options, this.progress.step
    last = step == this.total_steps
    ends_epoch = step % (steps_per_epoch(this.rollout_sizes, this.loader) or this.total_steps) == 0

    def due(strategy: str, every: int) -> bool:
        return (strategy == "steps" and step % every == 0) or (strategy == "epoch" and ends_epoch)

    return Due(
        save=due(options.save_strategy, options.save_steps) or (last and options.save_strategy == "steps"),
        evaluate=due(options.evaluation_strategy, options.eval_steps or options.logging_steps),
        log=step % options.logging_steps == 0 or (step == 1 and options.logging_first_step) or last,
    )


def wants_checkpoint(this: Run) -> bool:
    """Whether somebody touched output_dir/SAVE; the file is taken away."""
    request = this.output_dir / run_folder.SAVE_REQUEST
    if not (this.world.is_main and request.exists()):
        return False
    request.unlink()
    return True


def check_health(this: Run) -> None:
    """StopRun if an update since the last check went wrong. Comes before anything is logged or saved."""
    problem = this.health.problem()
    if problem is not None:
        raise StopRun(
            f"{problem}. Nothing was saved after it. Look at these rows, lower learning_rate, "
            "or use bf16 instead of fp16"
        )
    if this.options.fp16 and this.scaler.get_scale() < 1:
        raise StopRun(
            f"fp16: at step {this.progress.step} gradients overflow even with a loss scale of "
            f"{this.scaler.get_scale():g}; use bf16, or lower learning_rate"
        )


def log_training(this: Run, norm: torch.Tensor) -> None:
    """Average loss since the last line, learning rate, gradient norm, speed of all ranks, peak memory."""
    progress, since = this.progress, this.window.totals()
    rate = (
        schedule(progress.step - 1, this.optim_options, this.total_steps) * this.optim_options.learning_rate
    )
    values = {
        "loss": since.loss / since.steps,
        **this.stage.summary(since.metrics),
        "learning_rate": rate,
        "grad_norm": norm.item(),
        "tokens_per_second": round(since.tokens / since.seconds, 1),
        "peak_memory": round(peak_memory_gb(this.world.device), 3),
    }
    if this.options.fp16:
        values["loss_scale"] = this.scaler.get_scale()
    progress.logged_loss += since.loss
    progress.logged_tokens += since.tokens
    progress.logged_examples += since.examples
    this.window.reset()
    this.monitor.log(progress.step, this.epoch(progress.step), values)


def evaluate_and_track(this: Run) -> None:
    """Evaluate, log it, remember the best."""
    options, progress = this.options, this.progress
    results = evaluate(this)
    this.window.leave_out(results["eval_runtime"])
    this.monitor.log(progress.step, this.epoch(progress.step), results)
    value = results[options.metric]
    if options.better(value, progress.best_metric):
        progress.best_metric, progress.stale_evaluations = value, 0
        progress.best_checkpoint = f"checkpoint-{progress.step}"
    else:
        progress.stale_evaluations += 1


def finish(this: Run) -> None:
    """Load the best weights if asked, write the result, the numbers of the run and the plot."""
    options, progress, world = this.options, this.progress, this.world
    progress.seconds = this.monitor.seconds()
    this.monitor.close()
    if options.load_best_model_at_end and progress.best_checkpoint:
        best = this.output_dir / progress.best_checkpoint
        if best.is_dir():
            restore_trained(this.model, best)
            world.print(f"best: {best}, {options.metric} {progress.best_metric:.4f}")
        else:
            world.print(
                f"note: the best evaluation was at {best.name}, which was not saved; the last weights stay"
            )
    run_folder.write_result(
        this.output_dir, world, lambda folder: save_model_state(this, folder, progress.logged_tokens)
    )
    results = {
        "epoch": round(this.epoch(progress.step), 4),
        "train_loss": progress.logged_loss / max(progress.step, 1),  # mean over all updates of the run
        "train_runtime": round(progress.seconds, 2),
        "train_samples_per_second": round(progress.logged_examples / progress.seconds, 3),
        "train_steps_per_second": round(progress.step / progress.seconds, 3),
        "train_tokens_per_second": round(progress.logged_tokens / progress.seconds, 1),
        "train_steps": progress.step,
        "peak_memory": round(peak_memory_gb(world.device), 3),
    }
    if options.plot_loss:
        this.monitor.plot()
    this.monitor.save_results("train", results)  # last: from here on the run counts as finished
    world.barrier()
    world.print(f"saved to {this.output_dir}")


# Checkpoints


def save_model_state(this: Run, folder: Path, tokens: int) -> None:
    """What other programs read: weights, tokenizer, configuration, the Hugging Face trainer's
    trainer_state.json."""
    this.save_weights(folder)
    epoch = this.epoch(this.progress.step)
    state = run_folder.trainer_state(this.output_dir, this.progress, this.total_steps, epoch, tokens)
    write_json(folder / run_folder.TRAINER_STATE, state | {"log_history": this.monitor.history})


def save_checkpoint(this: Run) -> Path:
    """Write checkpoint-<step>, complete or not at all, and remove those beyond save_total_limit."""
    options, progress = this.options, this.progress
    progress.seconds = this.monitor.seconds()
    started = time.monotonic()
    tokens = progress.logged_tokens + this.window.totals().tokens

    def write(folder: Path) -> None:
        save_model_state(this, folder, tokens)
        state = {"progress": asdict(progress), "fingerprint": this.fingerprint}
        if not options.save_only_model:
            state |= {"optimizer": this.optimizer.state_dict(), "scaler": this.scaler.state_dict()}
        torch.save(state, folder / run_folder.STATE_FILE)

    rank_state = {"random": run_folder.random_state(this.world.device), "window": this.window.state()}
    rank_state["stage"] = this.stage.state()
    path = run_folder.write_checkpoint(this.output_dir, progress.step, this.world, write, rank_state)
    if this.world.is_main:
        run_folder.rotate(this.output_dir, options.save_total_limit, progress.best_checkpoint)
    this.window.leave_out(time.monotonic() - started)
    return path


def restore(this: Run, folder: Path, state: dict) -> None:
    """Everything back as it was when the checkpoint was written."""
    restore_trained(this.model, folder)
    load_optimizer(this.optimizer, state["optimizer"])
    this.scaler.load_state_dict(state["scaler"])
    this.progress = Progress(**state["progress"])
    this.window.restore(state["rank"]["window"])
    this.stage.restore(state["rank"]["stage"])
    run_folder.restore_random_state(state["rank"]["random"], this.world.device)
    this.world.print(f"resuming {folder} at step {this.progress.step} of {this.total_steps}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
