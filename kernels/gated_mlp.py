"""Gated activation of the MLP: act(gate) * up.  Shazeer, arXiv 2002.05202, section 2 (SwiGLU, GEGLU, ReGLU)."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def gated_mlp_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate, up (T, F) -> act(gate) * up (T, F), same dtype. activation: a key of ACTIVATIONS."""
    return ACTIVATIONS[activation](gate) * up
