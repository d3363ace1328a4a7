"""Checkpoints beside the training (`async_save`): a thread writes what was copied to host memory.

Threads talk through groups of their own, and wait for no message of the training. Copies of shares lie on a
mesh of these: `whole` and parallel.checkpoint.save take them like shares. Both ways leave the same bytes.
"""

import datetime
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from checkpoints.safetensors_files import write_tensors
from options.atomic import flush
from parallel.fsdp import local
from parallel.tensor import share_of
from parallel.world import World, make_mesh


class Saver:
    def __init__(self, model: nn.Module, world: World, beside: bool, seconds: int):
        """beside: the training; seconds: that ranks wait for one another. All ranks make it at once."""
        self.world, self.beside, self.thread, self.failure = world, beside, None, None
        spread = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
        shard = 1 if spread is None else spread.size(spread.ndim - 1)
        together = shard * world.tensor  # ranks that hold all weights between them
        self.replicas, self.replica = world.size // together, world.rank // together
        if beside and dist.is_initialized():
            host = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))
            self.world = replace(world, host=host)
            names = "replicate copies", "shard copies", "tensor copies"
            own = dict.fromkeys(names, "gloo")  # or else it may take groups that there are
            mesh = make_mesh("cpu", (self.replicas, shard, world.tensor), names, backend_override=own)
            self.mesh = mesh[names[:2]] if self.replicas > 1 else mesh[names[1]]  # as that of fsdp.Engine
            self.slices = mesh.get_group(names[2])

    @torch.no_grad()
    def take(self, tensor: Tensor) -> Tensor:
        """A copy of what this rank holds, complete in `begin`; where nothing runs beside it the tensor."""
        if not self.beside:
            return tensor
        mine, share = local(tensor.detach()), share_of(tensor)
        copy = torch.empty_like(mine, device="cpu", pin_memory=mine.is_cuda).copy_(mine, non_blocking=True)
        if isinstance(tensor, DTensor):
            like = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
            copy = DTensor.from_local(copy, self.mesh, tensor.placements, **like)
        if share is not None:
            copy.tensor_share = replace(share, group=self.slices)
        return copy

    def take_turns(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those that this rank writes: what replicas have alike, as under ddp, they write in turn."""
        alike = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
        others = {name for turn, name in enumerate(alike) if turn % self.replicas != self.replica}
        return {name: self.take(tensor) for name, tensor in tensors.items() if name not in others}

    def begin(self, write: Callable[[World], None]) -> None:
        """At once or in a thread, one at a time; `wait` raises what went wrong, on all ranks."""
        if not self.beside:
            write(self.world)
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # the copies are complete

        def run() -> None:
            try:
                write(self.world)
            except BaseException as failure:
                self.failure = failure

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
        failure, self.failure, self.thread = self.failure, None, None
        if failure is not None:
            raise failure

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """What ends a run waits, but where ranks have lost each other, and the thread may have, too."""
        if self.thread is not None and not (self.world.size > 1 and isinstance(error, RuntimeError)):
            self.thread.join()
            if self.failure is not None:
                self.world.print(f"note: {self.failure}")


class Writer(dcp.HuggingFaceStorageWriter):
    """torch's, but without two copies of the file's bytes, while which are made no other thread runs."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        tensors = {each.index.fqn: planner.resolve_data(each).detach().cpu() for each in plan.items}
        offsets = {each.index.fqn: {"saved_offsets": each.tensor_data.chunk.offsets} for each in plan.items}
        notes = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
        if tensors:
            number = plan.storage_data["shard_index"]
            file = Path(self.path, f"shard-{number:05}-model-00001-of-00001.safetensors")
            write_tensors(file, {name: tensor.contiguous() for name, tensor in tensors.items()}, notes)
            flush(file)
        done = torch.futures.Future()
        done.set_result([])
        return done
