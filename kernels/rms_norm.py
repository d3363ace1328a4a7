"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps).  Zhang and Sennrich, arXiv 1910.07467, eq. 4.

As in Llama, the normalised value is rounded to x's dtype before it meets the weight. With offset 1 the factor is
1 + weight and nothing is rounded on the way (Gemma). Backward, with n = x / rms and g = grad * (offset + weight):
    dx = (g - n mean(g n)) / rms        dweight = sum over rows of grad * n
"""

import torch

from kernels.launch import jit, next_power_of_2, run, tl

MAX_SIZE = 65536  # values per row that one program holds in registers


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x (..., E) any float dtype, weight (E,) -> (..., E) in x's dtype; the mean is taken in fp32 (fp64 stays)."""
    wide = x if x.dtype is torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normal * (offset + weight.to(wide.dtype))).to(x.dtype)
    return normal.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm_reference(x, delta, weight, eps: float, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta (..., E) -> rms_norm_reference(x + delta), x + delta."""
    total = x + delta
    return rms_norm_reference(total, weight, eps, offset), total


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel does not serve these tensors; None if it does."""
    if x.shape[-1] > MAX_SIZE:
        return f"rows of {x.shape[-1]} values; at most {MAX_SIZE}"
    return None


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """rms_norm_reference as one kernel forward and two backward."""
    return _RMSNorm.apply(x, weight, eps, offset)


@jit
def _forward_kernel(x, weight, y, rstd, stride, size, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    tl.store(rstd + row, scale)
    normal = value * scale
    if offset == 0.0:
        normal = normal.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * size + columns, (normal * (offset + factor)).to(y.dtype.element_ty), mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        rows = x.reshape(-1, x.shape[-1])
        count, size = rows.shape
        y = torch.empty_like(rows)
        rstd = torch.empty(count, dtype=torch.float32, device=x.device)
        block = next_power_of_2(size)
        run(
            _forward_kernel, (count,), rows, weight, y, rstd, rows.stride(0), size, eps, offset,
            BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
        return y.view(x.shape)
