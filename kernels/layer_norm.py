"""LayerNorm: y = weight * (x - mean) / sqrt(variance + eps) + bias.  Ba et al., arXiv 1607.06450, section 3.

weight and bias may be None (OLMo has neither). kernels/norms.py has the kernels and the gradients.
"""

import torch
import torch.nn.functional as F

from kernels import norms


def layer_norm_reference(x: torch.Tensor, weight, bias, eps: float) -> torch.Tensor:
    """x (..., E) any float dtype, weight and bias (E,) or None -> like x; torch computes in fp32."""
    weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_triton(x: torch.Tensor, weight, bias, eps: float) -> torch.Tensor:
    """layer_norm_reference as one kernel. Backward: one, and a small one for weight and bias."""
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, _, mean, rstd = norms.forward(x, None, weight, bias, eps, 0.0, centered=True)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        want_weight, want_bias = ctx.needs_input_grad[1:3]
        dx, dweight, dbias = norms.backward(grad, None, x, weight, mean, rstd, 0.0, want_weight, want_bias)
        dweight = dweight.to(weight.dtype) if want_weight else None
        return dx, dweight, dbias.to(ctx.bias_dtype) if want_bias else None, None
