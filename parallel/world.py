"""Several processes as one: process group, sums, rank-0 output. One process needs no launcher.

`torchrun --nproc_per_node N train.py ...` sets RANK, WORLD_SIZE, LOCAL_RANK; without them the size is 1.
"""

import datetime
import json
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from options.errors import refuse, say
from parallel.options import ParallelOptions


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device
    tensor: int = 1  # ranks that hold each layer between them: the fastest coordinate of a rank
    context: int = 1  # ranks that hold each row of tokens between them: the next one
    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)  # "data", "context", "tensor"
    host: dist.ProcessGroup | None = None  # gloo, of all ranks: never waits for a GPU; None: one process

    @property
    def data_size(self) -> int:
        """Ranks, or groups of them, that have rows of their own."""
        return self.size // (self.tensor * self.context)

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor * self.context)

    @property
    def context_rank(self) -> int:
        return self.rank // self.tensor % self.context

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *values) -> None:
        """Print on rank 0."""
        if self.is_main:
            say(*values)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place, without a host synchronisation: over those with rows of their own, for
        those that share a row or a layer have computed the same numbers."""
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.groups.get("data"))
        return tensor

    def from_main(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def as_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the first of the ranks with the same rows has, where the tensor lies."""
        for size, name in ((self.tensor, "tensor"), (self.context, "context")):
            if size > 1:
                shared = tensor.to(self.device)
                dist.broadcast(shared, group=self.groups[name], group_src=0)
                tensor = shared.to(tensor.device)
        return tensor

    def max_over_ranks(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks, over the host's own group: it never waits for a GPU."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.max_over_ranks(int(flag))[0])

    def gather(self, value: object) -> list:
        """What each rank gave, which has to be JSON, in the order of the ranks; over the host's own group."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
        sizes = self.max_over_ranks(*(len(mine) * (rank == self.rank) for rank in range(self.size)))
        parts = [torch.zeros(max(sizes), dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, nn.functional.pad(mine, (0, max(sizes) - len(mine))), group=self.host)
        return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes)]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.host)


SPEAKS_FIRST = datetime.timedelta(seconds=60)
PEERS: list = []  # the store of the process group, and [host, process] of each rank


def start(device: str = "auto", timeout_seconds: int = 1800, options: ParallelOptions | None = None) -> World:
    """Join the process group that torchrun describes. device: auto | cpu | cuda. Raises UserError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    options = options or ParallelOptions()
    options.engine(size)  # or else it is refused before anybody waits for the others
    # from dcp: one process is what was asked for; here, for a thread that saves may not filter it
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        absent = "device: cuda asked for, but torch sees no GPU; use device=cpu or install a CUDA build"
        refuse(not torch.cuda.is_available(), absent)
        gpus, remedy = torch.cuda.device_count(), "start torchrun with --nproc_per_node of at most that"
        missing = f"device: process {local_rank} of this machine has no GPU (there are {gpus}); {remedy}"
        refuse(local_rank >= gpus, missing)
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
    host, store, timeout = None, None, datetime.timedelta(seconds=timeout_seconds)
    if (size > 1 or options.fsdp_offload) and not dist.is_initialized():
        others = dist.rendezvous("env://", rank, size, timeout=timeout)
        store = next(others)[0] if size > 1 else dist.HashStore()
        # torchrun may keep the store for ranks that it starts again, with addresses of those that are gone
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        PEERS[:] = [store]
        store.set(f"has come {rank}", "")
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"  # shares may wait on the host
        # NCCL's watchdog ends the process without a word: the host's group has to lose patience before it
        later = timeout + SPEAKS_FIRST * (place.type == "cuda")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=later)
        host = dist.new_group(backend="gloo", timeout=timeout)
    groups = {}
    if options.tp_size * options.cp_size > 1:
        sizes, names = (options.data(size), options.cp_size, options.tp_size), ("data", "context", "tensor")
        mesh = make_mesh(place.type, sizes, names)
        groups = {name: mesh.get_group(name) for name in names}
    world = World(rank, size, local_rank, place, options.tp_size, options.cp_size, groups, host)
    if store is not None:
        PEERS[:] = [store, world.gather([socket.gethostname(), os.getpid()])]
    return world


def make_mesh(device: str, sizes: tuple[int, ...], names: tuple[str, ...], **how) -> DeviceMesh:
    """A mesh whose groups have the timeout of the process group; torch gives them one of its own."""
    mesh, world = init_device_mesh(device, sizes, mesh_dim_names=names, **how), dist.group.WORLD
    for group in (group for group in mesh.get_all_groups() if group is not world):
        for kind in group._device_types:
            patience = world._get_backend(kind).options._timeout
            group._get_backend(kind)._set_default_timeout(patience)
    return mesh


def stop(failed: bool = False) -> None:
    """Leave the process group. failed: others may never come to what this rank has waiting, on a GPU too."""
    if dist.is_initialized():
        (distributed_c10d._abort_process_group if failed else dist.destroy_process_group)()
        PEERS.clear()
