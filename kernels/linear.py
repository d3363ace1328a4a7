"""y = x W^T + b, with the weight cast to the compute dtype at the place of use.

Why a file for one matrix product: on x86 machines that are not Intel's, torch sends fp32 products to MKL, which there
stays on its 256-bit path; oneDNN (already inside torch) runs the same product with 512-bit registers, measured 2.2 times
as fast (bench/train_cpu.py prints both rates). The product is still true fp32. bf16 and fp16 go to oneDNN in any case.

Casting here instead of under autocast keeps precision visible: parameters may be fp32 masters while x is bf16, and the
backward pass casts again instead of holding a second copy of every weight.
"""

import torch
import torch.nn.functional as F


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, in) in the compute dtype, weight (out, in), bias (out,) or None -> (T, out) in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def matmul_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K) times b (N, K) transposed -> (M, N), no autograd. Strides are free; fp32 on a CPU goes to oneDNN."""
    if a.dtype is torch.float32 and a.device.type == "cpu" and onednn_fp32_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], None)
    return a @ b.T


def onednn_fp32_available() -> bool:
    """Whether this torch build carries oneDNN's linear operator and the processor has 512-bit registers."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        result = matmul_transposed(x, weight.to(x.dtype))  # (T, out)
        return result if bias is None else result.add_(bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_transposed(grad, weight.to(grad.dtype).T)  # (T, in)
        if ctx.needs_input_grad[1]:
            grad_weight = matmul_transposed(grad.T, x.T).to(weight.dtype)  # (out, in)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def linear_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """linear_reference with fp32 products on oneDNN, forward and backward. x must be (T, in)."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    if x.dtype is torch.float32 and weight.dtype is torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return F.linear(x, weight.to(x.dtype), bias)
