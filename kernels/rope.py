"""Rotary position embedding, half-split convention.  Su et al., arXiv 2104.09864, section 3.4.

For the pair (x[i], x[i + D/2]) at angle a = position * inverse_frequency[i]:
    (x1 cos a - x2 sin a,  x2 cos a + x1 sin a).
"""

import torch


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (T, heads, D); cos, sin (T, D/2) in x's dtype, one angle per pair -> (T, heads, D)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, D/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """rope_reference in two passes over x, keeping nothing of x for the backward pass: that one rotates back."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _rotate(x, cos, sin)
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return rotate(x, *rotation_tables(cos, sin))


def rotation_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (T, D/2) -> (cos, cos) and (-sin, sin), each (T, 1, D): made once for all layers when decoding."""
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (T, heads, D) * (cos, cos) + (x2, x1) * (-sin, sin): the halves of x swapped; cos, sin by rotation_tables."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)
