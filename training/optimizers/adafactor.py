"""Adafactor (arXiv 1804.04235), torch's version: of second moments it keeps the means of rows and columns."""

import torch

from training.options import OptimOptions

SERVES = {"adafactor": 0.1}  # two vectors for each matrix


def make(model, groups: list[dict], options: OptimOptions) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=options.learning_rate)
