"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps).  Zhang and Sennrich, arXiv 1910.07467, eq. 4.

As in Llama, the normalised value is rounded to x's dtype before it meets the weight. With offset 1 the factor is
1 + weight and nothing is rounded on the way (Gemma). add_rms_norm adds the residual in the same kernel, and its
backward pass the gradient that the sum has from elsewhere. kernels/norms.py has the kernels and the gradients.
"""

import torch

from kernels import norms


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x (..., E) any float dtype, weight (E,) -> (..., E) in x's dtype; the mean is taken in fp32 (fp64 stays)."""
    wide = x if x.dtype is torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normal * (offset + weight.to(wide.dtype))).to(x.dtype)
    return normal.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm_reference(x, delta, weight, eps: float, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta (..., E) -> rms_norm_reference(x + delta), x + delta. delta None: nothing to add."""
    total = x if delta is None else x + delta
    return rms_norm_reference(total, weight, eps, offset), total


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """rms_norm_reference as one kernel. Backward: one, and a small one if the weight trains; keeps x and 1 / rms."""
    return _RMSNorm.apply(x, None, weight, eps, offset)[0]


def add_rms_norm_triton(x, delta, weight, eps: float, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """add_rms_norm_reference in the same number of kernels as rms_norm_triton; keeps the sum and 1 / rms."""
    return _RMSNorm.apply(x, delta, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, offset):
        y, total, _, rstd = norms.forward(x, delta, weight, None, eps, offset, centered=False)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset, ctx.added = offset, delta is not None
        ctx.set_materialize_grads(False)
        return y, total  # x itself without delta: whoever goes on with it has its gradient added in the kernel, too

    @staticmethod
    def backward(ctx, grad, total_grad):
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = total_grad, None
        if grad is not None:
            want_weight = ctx.needs_input_grad[2]
            dx, dweight, _ = norms.backward(
                grad, total_grad, total, weight, None, rstd, ctx.offset, want_weight, want_bias=False
            )
            dweight = dweight.to(weight.dtype) if want_weight else None
        return dx, dx if ctx.added else None, dweight, None, None
