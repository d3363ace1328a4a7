"""Train a model: every stage, every tuning method, one loop.

    python train.py configs/demo.yaml
    torchrun --nproc_per_node 2 train.py configs/sft_lora.yaml learning_rate=1e-4
    python train.py configs/qlora.yaml plan=true        # what it would take, before any weight is read
    python train.py --help

Reading order: main -> run (what is built, in order) -> train (the loop) -> update (one optimizer step). The
loop sums the losses of an accumulation group, divides once by their weight (tokens, pairs, ...: Stage.weight)
over all micro-batches and ranks, and looks at results on the host only when it logs, evaluates or saves. Exit
status: 0 done, 1 the run cannot go on (loss not finite, disk full), 2 a mistake in options, files or data,
128 + n stopped by signal n with a checkpoint. `touch OUTPUT_DIR/SAVE` asks for a checkpoint.
"""

if __name__ == "__main__":
    from options.errors import begin

    begin("train.py")

import itertools
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import parallel.world
from checkpoints.huggingface import require_saved
from data import DataOptions, TokenizedDataSaved
from model import Decoder
from options import config as configuration
from options.errors import EXPECTED, StopRun, end_output, fitting, listen_to_ctrl_c, tell
from parallel.fsdp import accumulated
from parallel.options import ParallelOptions
from parallel.world import World
from pipeline.batch import Batch
from pipeline.prefetch import ahead
from stages.rewards import RewardError
from stages.stage import Metrics, Stage
from training import memory, run_folder, setup
from training.instruments import Health, MetricWindow, peak_memory_gb
from training.lost import name_of_rank, naming_absent
from training.measure import measure, prepare
from training.monitor import Monitor
from training.optimizers import clip_gradients, make_optimizer, set_learning_rate, step_in_backward
from training.options import OptimOptions, TrainOptions
from training.predict import PREDICTIONS, write_predictions
from training.probe import try_largest
from training.run import Run
from training.run_folder import Progress, wants_checkpoint
from training.saving import Saver
from training.schedules import schedule
from training.setup import SECTIONS
from training.signals import Interrupted, Signals


def main(argv: list[str]) -> int:
    """Join the other ranks, keep other runs out of the folder, run. Gives the exit status."""
    listen_to_ctrl_c()
    failed = True
    try:
        config = configuration.load(argv, SECTIONS, program="train.py", description=__doc__.splitlines()[0])
        options = config[TrainOptions]
        spread = None if options.plan and options.plan_ranks else config[ParallelOptions]
        with naming_absent():
            world = parallel.world.start(options.device, options.ddp_timeout, spread)
        if world.device.type == "cpu":
            memory.keep_freed()
        with nullcontext() if options.plan else run_folder.lock_folder(Path(options.output_dir), world):
            status, failed = run(config, world), False
        return status
    except TokenizedDataSaved as done:
        world.print(done)
        failed = False
        return 0
    except KeyboardInterrupt:  # in the loop a signal is noted, and ends it with a checkpoint
        print("train.py: interrupted before the first update; nothing was trained", file=sys.stderr)
        return 128 + signal.SIGINT
    except EXPECTED as error:
        return tell(name_of_rank("train.py"), error)
    finally:
        parallel.world.stop(failed)
        end_output()


def run(config: configuration.Config, world: World) -> int:
    """Build everything, cheap mistakes first, then train, evaluate, predict. Gives the exit status."""
    inputs = setup.read(config, world)
    config, options = inputs.config, inputs.options
    if options.plan:
        plan = setup.make_plan(inputs)
        if world.is_main:
            print(plan)
        return 0
    data, model, stage, state = setup.build(inputs)
    optimizer = make_optimizer(model, config[OptimOptions]) if options.trains else None
    scaler = torch.amp.GradScaler(world.device.type, enabled=options.fp16)
    services = options.services, options.run_name or options.output_dir
    monitor = Monitor(inputs.output_dir, *services, world.is_main, MetricWindow(world), config.shown)
    progress = Progress()
    saver = Saver(model, world, options.async_save, options.ddp_timeout)
    with run_folder.naming_lost(inputs.output_dir, world, progress), Signals(world) as signals, saver:
        this = Run(inputs, data, model, stage, optimizer, scaler, monitor, progress, signals, saver)
        status = 0
        if options.trains:
            require_saved(model)
            if state is not None:
                this.restore(state)
                del state  # the optimizer has its own copy
            begin = inputs.resume, options.overwrite_output_dir, config, progress.best_checkpoint
            run_folder.begin(inputs.output_dir, *begin, world)
            status = train(this)
            if config[DataOptions].streaming:
                data.loader.gather_tallies(world)
                world.print(data.prepared.report)  # only now is it known what was dropped and cut
        status = status or conclude(this)
    preempted = options.enable_jit_checkpoint and status == 128 + signal.SIGTERM
    return 0 if preempted else status


def conclude(this: Run) -> int:
    """Evaluate and predict, where that is asked for beside or behind a training. The exit status."""
    options, data, monitor = this.inputs.options, this.data, this.monitor
    output_dir, world = this.inputs.output_dir, this.inputs.world
    try:
        if options.do_eval and data.eval_loaders:
            monitor.show_results("eval", evaluate(this))
        if options.do_predict:
            with this.signals.end_this():
                place = output_dir, world, this.signals.look
                numbers = write_predictions(data.predictor, this.model, *place)
            monitor.show_results("predict", numbers)
            world.print(f"{output_dir / PREDICTIONS} holds the predictions")
    except Interrupted as stop:
        kept = f"; what was trained is in {output_dir}" if options.trains else ""
        world.print(f"{signal.Signals(stop.args[0]).name}: the evaluation was not finished{kept}")
        return 128 + stop.args[0]
    return 0


def train(this: Run) -> int:
    """Update until total_steps; log, evaluate, save when due. The exit status: 128 + n after signal n."""
    inputs, data, monitor, progress = this.inputs, this.data, this.monitor, this.progress
    options, optim_options = inputs.options, inputs.config[OptimOptions]
    output_dir, world = inputs.output_dir, inputs.world
    steps_left = max(0, data.total_steps - progress.step)
    early = progress.out_of_patience(options.early_stopping_steps)
    ended = (early or steps_left == 0) and not progress.evaluation_due
    if ended and run_folder.finished(output_dir):
        world.print(f"note: {output_dir} {progress.already_trained}")
        this.take_best()
        return 0
    monitor.begin(progress.step, data.total_steps, run_folder.read_history(inputs.resume), progress.seconds)
    health = Health(world, data.names)
    if options.test_oom:
        try_largest(this)
    if optim_options.optim_in_backward:
        step_in_backward(this.optimizer)
    max_norm = optim_options.max_grad_norm or 0.0
    this.model.train()
    if progress.evaluation_due and (stop := evaluate_and_track(this)):
        return this.leave(stop)
    early, norm = progress.out_of_patience(options.early_stopping_steps), None
    with groups(this) as ready:
        for group in itertools.islice(ready, 0 if early else steps_left):
            group = [batch.to(world.device) for batch in group]
            this.stage.prepare(this.model, group)
            set_learning_rate(this.optimizer, schedule(progress.step, optim_options, data.total_steps))
            parts = this.model, this.optimizer, this.stage, group, this.scaler
            loss, norm, metrics = update(*parts, world, max_norm)
            progress.step += 1
            monitor.window.add(loss, group, metrics)
            monitor.advance(progress.step)
            # under fp16 an infinite gradient only means that the scaler skipped it and halves its scale
            health.watch(progress.step, [loss] if options.fp16 else [loss, norm], group)
            received = max(this.signals.received, default=0)
            unsaved = this.saver.failure is not None
            asked = wants_checkpoint(output_dir, world)
            stop, asked, unsaved = world.max_over_ranks(received, asked, unsaved)
            if unsaved:  # a checkpoint beside the training: not an update is made that may be lost
                this.saver.wait()
            due = options.what_is_due(progress.step, data.total_steps, data.steps_per_epoch)
            log, progress.evaluation_due, save = due
            if log or progress.evaluation_due or save or asked or stop:
                health.check(this.scaler.get_scale())
            if log:
                log_training(this, norm)
            if progress.evaluation_due and not stop:
                stop = evaluate_and_track(this)
            early = progress.out_of_patience(options.early_stopping_steps)
            if stop:
                return this.leave(stop)
            if save or asked or (early and options.save_strategy != "no"):
                this.save_checkpoint()
            if early:
                world.print(f"early stop: no gain in {options.early_stopping_steps} evaluations")
                break
    if monitor.window.steps:  # an early stop between two log lines
        log_training(this, norm)
    finish(this)
    return 0


@contextmanager
def groups(this: Run) -> Iterator[Iterator[list[Batch]]]:
    """Accumulation groups from the current step on; on a GPU data is prepared ahead, in a thread."""
    loader, size, device = this.data.loader, this.data.batches_per_draw, this.inputs.world.device
    number, begin = divmod(this.progress.step, this.data.updates_per_draw)
    draws = ([prepare(batch, device) for batch in drawn] for drawn in loader.draws(size, number))

    def made_of(ready: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        for drawn, first in zip(ready, itertools.chain([begin], itertools.repeat(0))):
            try:
                yield from this.stage.groups(this.model, drawn, first)
            except RewardError as error:
                raise StopRun(f"{error}{save_after_failure(this)}") from error

    # not on a CPU: a batch of 2,048 tokens is made in 0.3 ms, and the threads of the step need every core
    with ahead(draws, depth=2 if device.type == "cuda" else 0) as ready:
        yield made_of(ready)


def save_after_failure(this: Run) -> str:
    """A checkpoint of what was trained before the reward failed, if there can be one; gives its place."""
    if this.inputs.options.save_strategy == "no" or not this.progress.step:
        return ""
    return f"; the same command continues from {this.save_checkpoint(wait=True)}"


@fitting("a training step", "lower per_device_train_batch_size or cutoff_len")
def update(
    model: Decoder, optimizer, stage: Stage, group: list[Batch], scaler, world: World, max_grad_norm: float
) -> tuple[torch.Tensor, torch.Tensor, list[Metrics]]:
    """One optimizer step over an accumulation group, which lies on the device.

    Gives this rank's share of the mean loss, the gradient norm, both (), and each micro-batch's metrics.
    """
    # full, not tensor: the latter would copy a number of the host's and wait for it
    total = torch.full((), float(sum(stage.weight(batch) for batch in group)), device=world.device)
    total = world.sum(total).clamp_(min=1)
    divisor = total * world.context  # the ranks that share a row each have its whole loss
    loss, metrics = torch.zeros((), device=world.device), []
    for number, batch in enumerate(group, start=1):
        with accumulated(model, number == len(group)):
            value, measured = stage.loss(model, batch)
            scaler.scale(value / divisor).backward()
        metrics.append(measured)
        loss += value.detach() / total
    scaler.unscale_(optimizer)
    trained = [parameter for each in optimizer.param_groups for parameter in each["params"]]
    norm = clip_gradients(trained, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, metrics


def evaluate(this: Run) -> dict[str, float]:
    """What the stage measures on every evaluation set, of generated texts too if asked for, and the speed."""
    predictor = this.data.predictor if this.inputs.options.predict_with_generate else None
    with this.signals.end_this():
        asked = this.data.eval_loaders, predictor, this.inputs.world, this.signals.look
        results, rows = measure(this.model, this.stage, *asked)
    results = this.inputs.world.gather(results)[0]  # what is best, and when to stop, all ranks see alike
    this.monitor.show_samples(this.progress.step, rows)
    return results


def evaluate_and_track(this: Run) -> int:
    """Evaluate, log it, remember the best; gives 0, or the signal that came before it was done."""
    options, progress, started = this.inputs.options, this.progress, time.monotonic()
    try:
        results = evaluate(this)
    except Interrupted as stop:
        return stop.args[0]
    finally:
        this.monitor.window.leave_out(time.monotonic() - started)
    this.monitor.log(progress.step, this.data.epoch(progress.step), results)
    value = results.get(options.metric)  # None: no answer was there of which it could be said
    progress.track(value, value is not None and options.better(value, progress.best_metric))
    return 0


def log_training(this: Run, norm: torch.Tensor | None) -> None:
    """Average loss since the last line, learning rate, gradient norm, speed of all ranks, peak memory."""
    progress, since, options = this.progress, this.monitor.window.totals(), this.inputs.config[OptimOptions]
    values = {
        "loss": since.loss / since.steps,
        **this.stage.summary(since.metrics),
        "learning_rate": schedule(progress.step - 1, options, this.data.total_steps) * options.learning_rate,
        **({} if norm is None else {"grad_norm": norm.item()}),  # None: of a process that is gone
        "tokens_per_second": round(since.tokens / since.seconds, 1),
        "peak_memory": round(peak_memory_gb(this.inputs.world.device), 3),
    }
    if this.scaler.is_enabled():
        values["loss_scale"] = this.scaler.get_scale()
    progress.count(since)
    this.monitor.window.reset()
    this.monitor.log(progress.step, this.data.epoch(progress.step), values)


def finish(this: Run) -> None:
    """Load the best weights if asked, write the result, the numbers of the run and the plot."""
    options, progress, world = this.inputs.options, this.progress, this.inputs.world
    this.saver.wait()
    progress.seconds = this.monitor.seconds()
    this.monitor.close()
    this.take_best()
    with run_folder.writing_result(this.inputs.output_dir, world) as folder:
        this.for_others(progress.logged_tokens)(folder)
    if options.plot_loss:
        this.monitor.plot()
    results = progress.results(this.data.epoch(progress.step), peak_memory_gb(world.device))
    this.monitor.save_results("train", results)  # last: from here on the run counts as finished
    world.barrier()
    world.print(f"saved to {this.inputs.output_dir}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
