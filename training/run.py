"""A run: what the functions of train.py share, and how it is kept on the disk and comes back."""

import io
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import parallel.checkpoint
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import restore_trained, save_tokenizer, trained
from checkpoints.source import RUN_CONFIG
from model import Decoder
from parallel.world import World
from stages.stage import Stage
from templates import TemplateOptions
from training import run_folder, setup
from training.monitor import Monitor, write_json
from training.optimizers import OPTIMIZER, load_optimizer, states
from training.run_folder import Progress
from training.saving import Saver, Writer
from training.signals import Signals


@dataclass
class Run:
    """update of train.py takes of it what it needs."""

    inputs: setup.Inputs  # options and ranks, the model's folder, tokenizer, template
    data: setup.Data  # loaders, and how many updates are made of them
    model: Decoder
    stage: Stage
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler
    monitor: Monitor  # log lines and files; monitor.window: the updates since the last line
    progress: Progress  # counters
    signals: Signals
    saver: Saver

    def for_others(self, tokens: int, take: Callable = lambda tensor: tensor) -> Callable[[Path], None]:
        """Writes what other programs read, as it is now, into a folder, on all ranks. take: see Saver."""
        inputs, config, weights = self.inputs, self.inputs.config, None
        if self.saver.replica == 0:
            weights = trained(self.model, config[ModelOptions].model_name_or_path, take)
        template, chosen = inputs.template, config[TemplateOptions]  # not for a thread: see options/limits.py
        words = () if template is None else template.stop_words(inputs.tokenizer.eos_token)
        other = template is not None and (chosen.template is not None or chosen.default_system)
        total, epoch = self.data.total_steps, self.data.epoch(self.progress.step)
        state = self.progress.trainer_state(inputs.output_dir, total, epoch, tokens)
        state |= {"log_history": list(self.monitor.history)}

        def write(folder: Path) -> None:
            if weights is not None:
                weights(folder if inputs.world.is_main else None, inputs.source)
            if inputs.world.is_main:
                save_tokenizer(inputs.tokenizer, folder, words, template.to_jinja() if other else None)
                config.save(folder / RUN_CONFIG)
                write_json(folder / run_folder.TRAINER_STATE, state)

        return write

    def save_checkpoint(self, wait: bool = False) -> Path:
        """Write checkpoint-<step>, complete or not at all, and rotate. wait: until it is there."""
        options, world = self.inputs.options, self.inputs.world
        progress, window = self.progress, self.monitor.window
        started = time.monotonic()
        self.saver.wait()
        progress.seconds = self.monitor.seconds()
        tokens = progress.logged_tokens + window.totals().tokens
        own = {"random": run_folder.random_state(world.device), "window": window.state()}
        consumed = self.data.batches_drawn(progress.step)
        own |= {"stage": self.stage.state(), "data": self.data.loader.state(consumed)}
        path, best = self.inputs.output_dir / f"checkpoint-{progress.step}", progress.best_checkpoint
        state, tensors = {"progress": asdict(progress), "fingerprint": self.data.fingerprint}, {}
        if not options.save_only_model:
            optimizer, tensors = states(self.optimizer)
            tensors = self.saver.take_turns(tensors)
            state |= {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
        own, state = in_bytes(own), in_bytes(state) if world.is_main else b""
        write_model = self.for_others(tokens, self.saver.take)

        def write(world: World) -> None:
            with run_folder.writing_checkpoint(path, world) as folder:
                with run_folder.together(world):  # what follows waits for all ranks
                    (folder / f"rank_state_{world.rank}.pt").write_bytes(own)
                    if world.is_main:
                        (folder / run_folder.STATE_FILE).write_bytes(state)
                with run_folder.together(world):
                    write_model(folder)
                if not options.save_only_model:
                    parallel.checkpoint.save(Writer(folder / OPTIMIZER), tensors, world)
            if world.is_main:
                run_folder.rotate(path.parent, options.save_total_limit, best)

        self.saver.begin(write)
        if wait:
            self.saver.wait()
        window.leave_out(time.monotonic() - started)
        return path

    def restore(self, state: dict) -> None:
        """Everything back as it was when the checkpoint was written."""
        world, folder = self.inputs.world, self.inputs.resume
        restore_trained(self.model, folder)
        load_optimizer(self.optimizer, state["optimizer"], folder / OPTIMIZER, world)
        self.scaler.load_state_dict(state["scaler"])
        vars(self.progress).update(state["progress"])
        self.monitor.window.restore(state["rank"]["window"])
        self.stage.restore(state["rank"]["stage"])
        self.data.loader.restore(*state["rank"]["data"])
        if state["rank"]["random"] is None:  # rows lay on other ranks
            torch.manual_seed(hash((self.inputs.options.seed, self.progress.step, world.data_rank)))
        else:
            run_folder.restore_random_state(state["rank"]["random"], world.device)
        anew = ", with new random numbers for dropout" if state["rank"]["random"] is None else ""
        world.print(f"resuming {folder} at step {self.progress.step} of {self.data.total_steps}{anew}")

    def take_best(self) -> None:
        """Give the model the weights that evaluated best, if that is asked for."""
        options, progress, world = self.inputs.options, self.progress, self.inputs.world
        if options.load_best_model_at_end and progress.best_checkpoint:
            best = self.model, self.inputs.output_dir, progress, options.metric
            world.print(run_folder.load_best(*best, world))

    def leave(self, stop: int) -> int:
        """After this signal: a checkpoint, and the exit status."""
        path = self.save_checkpoint(wait=True)
        self.monitor.close()
        stopped = f"{signal.Signals(stop).name}: stopped after step {self.progress.step}"
        self.inputs.world.print(f"{stopped}; the same command continues from {path}")
        return 128 + stop


def in_bytes(value: dict) -> memoryview:
    """As torch.save writes it, and as it is now."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()
