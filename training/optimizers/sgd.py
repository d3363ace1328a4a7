"""Stochastic gradient descent, without momentum: no state at all."""

import torch

from training.options import OptimOptions
from training.rounding import store, turns

SERVES = {"sgd": 0.0}


def make(model, groups: list[dict], options: OptimOptions) -> torch.optim.Optimizer:
    in_bf16 = any(parameter.dtype is torch.bfloat16 for group in groups for _, parameter in group["params"])
    return (RoundingSGD if in_bf16 else torch.optim.SGD)(groups, lr=options.learning_rate)


class RoundingSGD(torch.optim.SGD):
    """In fp32 arithmetic; weights in bf16 are rounded by chance."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter, group, _, noise in turns(self):
            value = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
            store(parameter, value.sub_(parameter.grad.float(), alpha=group["lr"]), noise)
