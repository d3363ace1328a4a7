"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps).  Zhang and Sennrich, arXiv 1910.07467, eq. 4.

As in Llama, the normalised value is rounded to x's dtype before it meets the weight.
"""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., E) any float dtype, weight (E,) -> (..., E) in x's dtype; the mean is taken in fp32 (fp64 stays)."""
    wide = x if x.dtype is torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight.to(x.dtype)
