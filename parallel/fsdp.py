"""Data parallel, sharded, and both: torch's `fully_shard` (FSDP2), applied from outside to a model.

    distribute(model, world, options)       # parameters become DTensors; blocks gather theirs when they run
    with accumulated(model, last=True): loss.backward()

One engine on a mesh replicate x shard: `ddp` is (ranks, 1), `fsdp` (1, ranks), `hsdp` (ranks / s, s).
Gradients are SUMMED over ranks, for the loop has divided by the weight of all of them: the engine's own
division is off. They are reduced over `shard` after each backward pass, so that no rank ever holds them
whole, and over `replicate` after the last one of an accumulation group. What is frozen is sharded, but never
copied: under ddp it stays out of the engine. Codes of quantised layers are buffers in one process and become
parameters without gradient here, because the engine shards nothing else; they are gathered as the bytes that
they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from parallel.context import divide_rows
from parallel.options import ParallelOptions
from parallel.tensor import cut, share_of, sum_parts
from parallel.world import World, make_mesh


def distribute(model: nn.Module, world: World, options: ParallelOptions) -> None:
    """Hand the model's parameters to the engine, block by block; one process needs none but to offload.

    model: has `layers`; everything outside of them stays gathered from its forward pass to the end of the
    backward pass, because the heads are applied outside of forward.
    """
    if (world.size == 1 and not options.fsdp_offload) or isinstance(model, FSDPModule):
        return
    replicate, shard = options.engine(world.size)
    model.world = world
    model.keeps_company = shard > 1 and not options.gather_for_generation  # generation/company.py
    cut(model, world)
    if replicate * shard == 1 and not options.fsdp_offload:  # every rank has a slice of its own
        return
    sizes, names = (replicate, shard, options.tp_size), ("replicate", "shard", "tensor")
    mesh = make_mesh(world.device.type, sizes, names)
    mesh = mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    how = {"mesh": mesh, "offload_policy": offload if options.fsdp_offload else OffloadPolicy()}
    if world.context > 1:
        divide_rows(model, world, options.cp_mode)
    head = getattr(model, "v_head", None)
    heads = [] if head is None else [head]  # in fp32 where all else may train in bf16
    for part in (*model.layers, *heads, model):  # each takes what no part of it has
        reshards = part not in (*heads, model) and options.fsdp_reshard_after_forward
        parameters_from_buffers(part)
        here = shard == 1 and not options.fsdp_offload
        kept = {p for p in part.parameters() if not p.requires_grad} if here else set()
        dtype = next((p.dtype for p in part.parameters() if p.requires_grad), torch.float32)
        sums = torch.promote_types(dtype, torch.float32)  # of bf16 gradients too
        how["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=sums)
        with _slices_remembered(part):
            fully_shard(part, reshard_after_forward=reshards, ignored_params=kept, **how)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.reshards = reshards
    model.set_modules_to_forward_prefetch(heads)  # with the model, for a rank may not ask its head
    model.outside, model.gathered = [*heads, model], False
    model.keeps_gathered = shard > 1 and not options.fsdp_reshard_after_forward


@contextmanager
def _slices_remembered(module: nn.Module) -> Iterator[None]:
    """Within it parameters become other ones of the same names."""
    shares = {name: share_of(p) for name, p in module.named_parameters() if share_of(p) is not None}
    yield
    for name, share in shares.items():
        module.get_parameter(name).tensor_share = share


def allot(model: nn.Module, world: World, options: ParallelOptions) -> None:
    """Distribute a model that lies on the meta device: its parameters are shares, whose numbers are any."""
    distribute(model, world, options)
    with _slices_remembered(model):
        model.to_empty(device="cpu" if options.fsdp_offload else world.device)


def parameters_from_buffers(model: nn.Module) -> None:
    """Turn the buffers of all modules into parameters without gradient, with at least one dimension."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            del module._buffers[name]
            value = buffer.reshape(1) if buffer.dim() == 0 else buffer
            module.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))


@contextmanager
def accumulated(model: nn.Module, last: bool) -> Iterator[None]:
    """Around a backward pass; last: of its accumulation group."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last or not model.keeps_gathered)
    yield
    if last:
        sum_parts(model.parameters())


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All of a parameter of which this rank may hold a share, detached; every rank has to ask for it."""
    value, share = parameter.detach(), share_of(parameter)
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value if share is None else share.whole(value)


def whole_shape(parameter: Tensor) -> torch.Size:
    """That of `whole`; nobody else is asked."""
    share, shape = share_of(parameter), list(parameter.shape)
    if share is not None and share.dim is not None:
        shape[share.dim] *= share.size
    return torch.Size(shape)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain one of the same memory; nobody else is asked."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settle(model: nn.Module) -> None:
    """Back to shares: what lies outside of the blocks stays gathered after a forward pass alone, and whoever
    reads or writes parameters then would have a copy. All ranks call it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write the whole `value` into a parameter of which this rank may hold a share; nobody else is asked."""
    local(target).copy_(own_part(target, value))


def own_part(target: Tensor, value: Tensor) -> Tensor:
    """Of the whole `value` what this rank holds of `target`, a view; nobody else is asked."""
    if share_of(target) is not None:
        value = share_of(target).of(value)
    return value[own_rows(target, len(value))] if isinstance(target, DTensor) else value


def own_rows(target: DTensor, count: int) -> slice:
    """Which of so many rows lie with this rank, in a tensor beside this one."""
    mesh, shares = target.device_mesh, target.device_mesh.ndim - 1  # the last dimension
    size = -(-count // mesh.size(shares))
    start = min(mesh.get_local_rank(shares) * size, count)
    return slice(start, min(start + size, count))
