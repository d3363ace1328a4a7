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
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.context import divide_rows
from parallel.options import ParallelOptions
from parallel.tensor import cut, cut_block, share_of, sum_parts
from parallel.world import World, make_mesh


class Engine:
    """fully_shard on the mesh that the options ask for: takes a model's parts, one by one."""

    def __init__(self, world: World, options: ParallelOptions):
        self.world, self.options, self.how = world, options, None
        replicate, self.shard = options.engine(world.size)
        if replicate * self.shard > 1 or options.fsdp_offload:  # else every rank has a slice of its own
            sizes, names = (replicate, self.shard, options.tp_size), ("replicate", "shard", "tensor")
            mesh = make_mesh(world.device.type, sizes, names)
            pinned = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            offload = pinned if options.fsdp_offload else OffloadPolicy()
            mesh = mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]
            self.how = {"mesh": mesh, "offload_policy": offload}

    def take_block(self, block: nn.Module) -> None:
        """Nothing changes it from outside any more: this rank keeps its share of it."""
        if not isinstance(block, FSDPModule):
            cut_block(block, self.world)
            self.take(block, self.options.fsdp_reshard_after_forward)

    def take(self, module: nn.Module, reshard: bool) -> None:
        """All of its parameters that no part of it has given yet. reshard: after each forward pass."""
        if self.how is None:
            return
        parameters_from_buffers(module)
        here = self.shard == 1 and not self.options.fsdp_offload
        kept = {p for p in module.parameters() if not p.requires_grad} if here else set()
        named = module.named_parameters()
        shares = {name: share for name, parameter in named if (share := share_of(parameter)) is not None}
        dtype = next((p.dtype for p in module.parameters() if p.requires_grad), torch.float32)
        sums = torch.promote_types(dtype, torch.float32)  # of bf16 gradients too
        how = self.how | {"mp_policy": MixedPrecisionPolicy(reduce_dtype=sums)}
        fully_shard(module, reshard_after_forward=reshard, ignored_params=kept, **how)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.reshards = reshard
        for name, share in shares.items():
            module.get_parameter(name).tensor_share = share  # the engine's parameters are new ones


def distribute(
    model: nn.Module, world: World, options: ParallelOptions, engine: Engine | None = None
) -> None:
    """Hand the model's parameters to the engine, block by block; one process needs none but to offload.

    model: has `layers`; everything outside of them stays gathered from its forward pass to the end of the
    backward pass, because the heads are applied outside of forward. engine: has taken blocks already.
    """
    if (world.size == 1 and not options.fsdp_offload) or isinstance(model, FSDPModule):
        return
    engine = engine or Engine(world, options)
    model.world = world
    model.keeps_company = engine.shard > 1 and not options.gather_for_generation  # generation/company.py
    for block in model.layers:
        engine.take_block(block)
    cut(model, world)
    if engine.how is None:
        return
    if world.context > 1:
        divide_rows(model, world, options.cp_mode)
    head = getattr(model, "v_head", None)
    heads = [] if head is None else [head]  # in fp32 where all else may train in bf16
    for part in (*heads, model):
        engine.take(part, reshard=False)
    model.set_modules_to_forward_prefetch(heads)  # with the model, for a rank may not ask its head
    model.outside, model.gathered = [*heads, model], False
    model.keeps_gathered = engine.shard > 1 and not options.fsdp_reshard_after_forward


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
    if share_of(target) is not None:
        value = share_of(target).of(value).contiguous()
    if isinstance(target, DTensor):
        share = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target, value = target.to_local(), share.to_local()
    target.copy_(value)
