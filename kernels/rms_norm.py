"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps).  Zhang and Sennrich, arXiv 1910.07467, eq. 4.

As in Llama, the normalised value is rounded to y's dtype before it meets the weight, unless the weight is
wider (norms kept in fp32). With offset 1 the factor is 1 + weight and nothing is rounded on the way (Gemma).
y has x's dtype, or the one that is asked for: a residual stream in fp32 goes on into fp16 products.
add_rms_norm adds the residual in the same kernel, and its backward pass the gradient that the sum has from
elsewhere. kernels/norms.py has the kernels and the gradients.
"""

import math

import torch

from kernels import norms


def rms_norm_reference(x, weight, eps: float, offset: float = 0.0, dtype=None) -> torch.Tensor:
    """x (..., E), weight (E,) -> (..., E) in dtype or x's; the mean is taken in fp32 (fp64 stays)."""
    wide = x if x.dtype is torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _scaled(normal, weight, offset, dtype or x.dtype)


def _scaled(normal, weight, offset: float, dtype: torch.dtype) -> torch.Tensor:
    """x / rms(x) times the factor, in dtype."""
    if offset:
        return (normal * (offset + weight.to(normal.dtype))).to(dtype)
    if weight.dtype.itemsize > dtype.itemsize:
        return (normal * weight.to(normal.dtype)).to(dtype)
    return normal.to(dtype) * weight.to(dtype)


def add_rms_norm_reference(
    x, delta, weight, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta (..., E) or None -> rms_norm_reference(x + delta), x + delta in x's dtype."""
    total = x if delta is None else x + delta
    return rms_norm_reference(total, weight, eps, offset, dtype), total


def add_rms_norm_row(
    x, delta, weight, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_rms_norm_reference of one row (1, E) on a CPU, no gradient: 1 / rms as a number of the host costs
    half of what it does as a tensor."""
    total = x if delta is None else x + delta
    wide = total if total.dtype is torch.float64 else total.float()
    factor = 1.0 / math.sqrt(torch.dot(wide[0], wide[0]).item() / x.shape[1] + eps)
    return _scaled(wide * factor, weight, offset, dtype or total.dtype), total


def rms_norm_triton(x, weight, eps: float, offset: float = 0.0, dtype=None) -> torch.Tensor:
    """rms_norm_reference as one kernel. Backward: one, and a small one if the weight trains."""
    return _RMSNorm.apply(x, None, weight, eps, offset, dtype)[0]


def add_rms_norm_triton(
    x, delta, weight, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_rms_norm_reference in the same number of kernels as rms_norm_triton; keeps the sum and 1 / rms."""
    return _RMSNorm.apply(x, delta, weight, eps, offset, dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, offset, dtype):
        y, total, _, rstd = norms.forward(x, delta, weight, None, eps, offset, centered=False, dtype=dtype)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset, ctx.added = offset, None if delta is None else delta.dtype
        ctx.set_materialize_grads(False)
        # total is x itself without delta: whoever goes on with it has its gradient added in the kernel, too
        return y, total

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
        return dx, dx.to(ctx.added) if ctx.added else None, dweight, None, None, None
