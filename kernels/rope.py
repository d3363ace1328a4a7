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
