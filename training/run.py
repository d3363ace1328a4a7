"""A run: what the functions of train.py share, and how it is kept on the disk and comes back."""

import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import parallel.checkpoint
from checkpoints.huggingface import restore_trained
from model import Decoder
from stages.stage import Stage
from training import run_folder, setup
from training.monitor import Monitor, write_json
from training.optimizers import OPTIMIZER, load_optimizer, states
from training.run_folder import Progress
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

    def save_model(self, folder: Path, tokens: int) -> None:
        """What other programs read: weights, tokenizer, configuration, trainer_state.json of transformers."""
        setup.save_weights(self.inputs, self.model, folder)
        total, epoch = self.data.total_steps, self.data.epoch(self.progress.step)
        state = self.progress.trainer_state(self.inputs.output_dir, total, epoch, tokens)
        if self.inputs.world.is_main:
            write_json(folder / run_folder.TRAINER_STATE, state | {"log_history": self.monitor.history})

    def save_checkpoint(self) -> Path:
        """Write checkpoint-<step>, complete or not at all, and remove those beyond save_total_limit."""
        options, world = self.inputs.options, self.inputs.world
        progress, window = self.progress, self.monitor.window
        started = time.monotonic()
        progress.seconds = self.monitor.seconds()
        tokens = progress.logged_tokens + window.totals().tokens
        own = {"random": run_folder.random_state(world.device), "window": window.state()}
        consumed = self.data.batches_drawn(progress.step)
        own |= {"stage": self.stage.state(), "data": self.data.loader.state(consumed)}
        path = self.inputs.output_dir / f"checkpoint-{progress.step}"
        with run_folder.writing_checkpoint(path, world) as folder:
            with run_folder.together(world):  # what follows waits for all ranks
                torch.save(own, folder / f"rank_state_{world.rank}.pt")
            with run_folder.together(world):
                self.save_model(folder, tokens)
            optimizer, tensors = states(self.optimizer)
            if not options.save_only_model:
                parallel.checkpoint.save(folder / OPTIMIZER, tensors, world)
            if world.is_main:
                state = {"progress": asdict(progress), "fingerprint": self.data.fingerprint}
                if not options.save_only_model:
                    state |= {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
                torch.save(state, folder / run_folder.STATE_FILE)
        if world.is_main:
            run_folder.rotate(path.parent, options.save_total_limit, progress.best_checkpoint)
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
        path = self.save_checkpoint()
        self.monitor.close()
        stopped = f"{signal.Signals(stop).name}: stopped after step {self.progress.step}"
        self.inputs.world.print(f"{stopped}; the same command continues from {path}")
        return 128 + stop
