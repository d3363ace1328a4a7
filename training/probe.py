"""test_oom: the largest batch before the first update, so that a run which cannot fit ends early.

A forward and a backward pass over the longest rows, with as much memory taken beside them as the optimizer
will hold. Nothing of it stays: no weight changes, random numbers go on from where they were, and the order of
the rows is that of a run without it.
"""

import torch

from options.errors import fitting
from parallel.fsdp import accumulated
from training.instruments import peak_memory_gb
from training.measure import prepare
from training.optimizers import state_per_byte
from training.options import OptimOptions
from training.run import Run
from training.run_folder import random_state, restore_random_state


@fitting("test_oom: the largest batch", "lower per_device_train_batch_size or cutoff_len")
def try_largest(this: Run) -> None:
    """All ranks call it. Raises UserError where it does not fit."""
    model, stage, world = this.model, this.stage, this.inputs.world
    random, state = random_state(world.device), stage.state()
    trained = [parameter for each in this.optimizer.param_groups for parameter in each["params"]]
    per_byte = state_per_byte(this.inputs.config[OptimOptions].optim)
    held = [torch.zeros(int(per_byte * _here(p).nbytes), dtype=torch.uint8, device=p.device) for p in trained]
    batch = prepare(this.data.loader.largest(), world.device).to(world.device)
    model.train()
    stage.prepare(model, [batch])
    with accumulated(model, last=True):
        loss, _ = stage.loss(model, batch)
        (loss / max(1.0, float(stage.weight(batch)))).backward()
    model.zero_grad(set_to_none=True)
    held.clear()
    stage.restore(state)
    restore_random_state(random, world.device)
    peak = peak_memory_gb(world.device)
    world.print(f"test_oom: the largest batch, {len(batch.tokens):,} tokens, fits: peak memory {peak:.2f} GB")


def _here(parameter: torch.Tensor) -> torch.Tensor:
    return getattr(parameter, "to_local", lambda: parameter)()
