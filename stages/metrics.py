"""What is logged beside a loss: sums, and the numbers of things that they are sums over."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parallel.world import World

KINDS = ("chosen", "rejected")
Metrics = dict[str, Tensor]  # name -> (2,): a sum, and the number of things it is a sum over

ANSWER_METRICS = tuple(f"{name}/{kind}" for name in ("rewards", "logps", "logits") for kind in KINDS)


def summed(values: dict[str, Tensor], number: float) -> Metrics:
    """The sum of each tensor, over so many things. Waits for nothing."""

    def pair(value: Tensor) -> Tensor:
        # full, not tensor: the latter would copy a number of the host's and wait for the device
        return torch.stack([value.sum(), torch.full((), float(number), device=value.device)])

    return {name: pair(value) for name, value in values.items()}


def by_kind(name: str, values: Tensor) -> dict[str, Tensor]:
    """values (2, ...), the chosen answers first."""
    return {f"{name}/{kind}": each for kind, each in zip(KINDS, values)}


def means_of(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """name -> mean; what is summed over nothing has none: an answer of that kind was not there."""
    return {name: total / number for name, (total, number) in sums.items() if number}


def means_over_ranks(sums: Metrics, world: World) -> dict[str, float]:
    """name -> mean, of the sums of all ranks, which have the same names. Waits for the device."""
    totals = world.sum(torch.stack(list(sums.values())).double()).tolist()
    return means_of(dict(zip(sums, totals)))
