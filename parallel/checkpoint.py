"""Tensors of many ranks in one folder: torch.distributed.checkpoint, in safetensors files.

    save(writer, {"a::exp_avg": tensor, ...}, world)        # each rank writes the shares that it holds
    tensors = load(folder, {"a": parameter, ...}, world)    # each reads what it needs, on any number of ranks

The files are those of torch's HuggingFaceStorageWriter (training/saving.py): each rank's tensors, with their
offsets in the header. Its other format keeps a pickle beside them, which nobody should have to open.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from parallel.fsdp import local
from parallel.world import World

SEPARATOR = "::"  # between a parameter's name and that of one of its states


def save(writer: dcp.StorageWriter, tensors: dict[str, Tensor], world: World) -> None:
    """All ranks call it. A plain tensor is the same on all that have one of its name, and one writes it."""
    with _as_of_one():
        dcp.save(tensors, storage_writer=writer, process_group=world.host, no_dist=world.size == 1)


def load(folder: Path, parameters: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """What `save` wrote as PARAMETER::STATE, in the layout of the parameters of now: what has a parameter's
    first dimension is sharded like it, the rest is whole on every rank. What belongs to none is left."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    targets: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        shape, dtype = stored.size, stored.properties.dtype
        like = parameters.get(name.rpartition(SEPARATOR)[0])
        if like is None:  # of another rank of a tensor group
            continue
        sharded = isinstance(like, DTensor) and len(shape) > 0 and shape[0] == like.shape[0]
        targets[name] = torch.empty(shape, dtype=dtype, device="meta" if sharded else "cpu")
        if sharded:  # where the parameter's share lies, which may be the host
            mine, strides = local(like), targets[name].stride()
            mine = torch.empty((mine.shape[0], *shape[1:]), dtype=dtype, device=mine.device)
            layout = {"shape": shape, "stride": strides, "run_check": False}
            targets[name] = DTensor.from_local(mine, like.device_mesh, like.placements, **layout)
    with _as_of_one():
        dcp.load(targets, storage_reader=reader, process_group=world.host, no_dist=world.size == 1)
    for name, tensor in targets.items():
        like = parameters[name.rpartition(SEPARATOR)[0]]
        if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.dim() > 0:
            everywhere = [Replicate()] * like.device_mesh.ndim
            targets[name] = distribute_tensor(tensor, like.device_mesh, everywhere, src_data_rank=None)
    return targets


@contextmanager
def _as_of_one() -> Iterator[None]:
    """What failed on any rank is raised as it was there."""
    try:
        yield
    except dcp.CheckpointException as error:  # on all ranks, of those where something failed
        (_, (failure, _)), *_ = error.failures.items()
        raise failure from error
