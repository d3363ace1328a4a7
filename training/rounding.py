"""What fp32 arithmetic gives, written into bf16 by chance (stochastic rounding, arXiv 1502.02551).

bf16 keeps 8 bits: a step smaller than 1/512 of a weight, and a second moment that changes by 1/1000, would be
rounded away, always. Rounded up as often as the rest asks for, on average nothing is lost.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.fsdp import local

CHUNK = 2**24  # values rounded at a time: the noise takes 64 MiB


def noise_of(step: int, group: int, place: int, device: torch.device, share: int = 0) -> torch.Generator:
    """Of the parameter at that place of that group, or of a share of it: the same in every process that has
    it and in a resumed run."""
    return torch.Generator(device).manual_seed(step << 28 | group << 24 | place ^ share << 52)


def turns(optimizer: torch.optim.Optimizer) -> Iterator[tuple]:
    """(parameter, its group, its state, which counts steps, the noise of this one) of all with a gradient."""
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                state = optimizer.state[parameter]
                state["step"] = state.get("step", 0) + 1
                share = number_of_share(parameter)
                yield (
                    parameter,
                    group,
                    state,
                    noise_of(int(state["step"]), index, place, parameter.device, share),
                )


def store(target: Tensor, value: Tensor, noise: torch.Generator) -> None:
    """value, fp32, into target, which has its shape; both contiguous. Of shares each rank stores its own."""
    target, value = local(target), local(value)
    for narrow, wide in zip(target.view(-1).split(CHUNK), value.view(-1).split(CHUNK)):
        narrow.copy_(rounded_by_chance(wide, noise) if target.dtype is torch.bfloat16 else wide)


def rounded_by_chance(value: Tensor, noise: torch.Generator) -> Tensor:
    """value (n,) fp32 -> numbers of bf16: one of the two neighbours, the nearer the likelier. Its mean is
    value."""
    rest = torch.randint(2**16, value.shape, dtype=torch.int32, device=value.device, generator=noise)
    return (value.view(torch.int32) + rest).bitwise_and_(-(2**16)).view(torch.float32)


def number_of_share(tensor: Tensor) -> int:
    """Which share of a tensor this rank holds; 0 where it has all."""
    if not isinstance(tensor, DTensor):
        return 0
    places = zip(tensor.device_mesh.get_coordinate(), tensor.device_mesh.shape, tensor.placements)
    number = 0
    for place, size, placement in places:
        number = number * size + place if placement.is_shard() else number
    return number
