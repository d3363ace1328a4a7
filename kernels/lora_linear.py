"""y = x W^T + b + s (x A^T) B^T as one autograd function that saves x once.  Hu et al., arXiv 2106.09685, eq. 3.

Two orders of the same product. Separate: the low-rank branch beside the base product, 2 T R (in + out) multiply-adds.
Merged: first W + s B A, then one product; 2 in out R multiply-adds, and no pass over a (T, out) tensor for the sum.
With R << T the second costs less as soon as T > in out / (in + out). It is used in fp32 only: in bf16 the sum
W + s B A would round a small update away.
"""

import torch

from kernels.linear import matmul_transposed


def lora_linear_reference(x, weight, bias, lora_a, lora_b, scale: float) -> torch.Tensor:
    """x (T, in), weight (out, in), bias (out,) or None, lora_a (R, in), lora_b (out, R) -> (T, out) in x's dtype."""
    result = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return result + (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T * scale


def lora_linear(x, weight, bias, lora_a, lora_b, scale: float) -> torch.Tensor:
    """The same as lora_linear_reference for a frozen weight and bias; gradients for x, lora_a and lora_b."""
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale)


def _merge_is_cheaper(rows: int, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    outputs, inputs = weight.shape
    return dtype is torch.float32 and weight.dtype is dtype and rows * (inputs + outputs) > inputs * outputs


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale):
        ctx.scale = scale
        ctx.merged = _merge_is_cheaper(x.shape[0], weight, x.dtype)
        if ctx.merged:
            low = None
            result = matmul_transposed(x, torch.addmm(weight, lora_b, lora_a, alpha=scale))
        else:
            result = matmul_transposed(x, weight.to(x.dtype))
            low = matmul_transposed(x, lora_a.to(x.dtype))  # (T, R)
            result.addmm_(low, lora_b.to(x.dtype).T, alpha=scale)
        if bias is not None:
            result += bias.to(x.dtype)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        return result

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        narrow_a, narrow_b = lora_a.to(grad.dtype), lora_b.to(grad.dtype)
        if low is None:
            low = matmul_transposed(x, narrow_a)
        grad_low = matmul_transposed(grad, narrow_b.T).mul_(ctx.scale)  # (T, R)
        grad_a = matmul_transposed(grad_low.T, x.T).to(lora_a.dtype)
        # the small factor goes first: the first one is copied when it is transposed
        grad_b = matmul_transposed(low.T, grad.T).mul_(ctx.scale).T.to(lora_b.dtype)  # (out, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.merged:
                grad_x = matmul_transposed(grad, torch.addmm(weight, lora_b, lora_a, alpha=ctx.scale).T)
            else:
                grad_x = matmul_transposed(grad, weight.to(grad.dtype).T).addmm_(grad_low, narrow_a)
        return grad_x, None, None, grad_a, grad_b, None
