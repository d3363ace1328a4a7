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


def gated_mlp(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gated_mlp_reference that keeps gate and up only: the backward pass computes act(gate) again instead of saving it.

    For silu; the other activations keep what autograd keeps.
    """
    if activation != "silu" or not torch.is_grad_enabled():
        return gated_mlp_reference(gate, up, activation)
    return _SiluTimes.apply(gate, up)


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
