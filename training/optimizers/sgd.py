"""Stochastic gradient descent, without momentum: no state at all."""

import torch

from training.options import OptimOptions

SERVES = {"sgd": 0.0}


def make(model, groups: list[dict], options: OptimOptions) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=options.learning_rate)
