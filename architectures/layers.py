"""What every layer is made of: Linear, RMSNorm, MLP; and what a layer knows of the row (ForwardContext)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from architectures.config import ModelConfig
from kernels.linear import LinearLayer, Part


class Linear(LinearLayer, nn.Linear):
    """nn.Linear that casts its weight to the input's dtype where it is used: fp32 masters under bf16
    compute."""

    def part(self) -> Part:
        return Part(self.weight, self.bias, table=self.table, layer=self)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        weight = self.weight.detach()
        return weight.to(dtype or weight.dtype) if out is None else out.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linears(x, [self.part()])[0]


class RMSNorm(nn.Module):
    """(offset + weight) x / sqrt(mean(x^2) + eps)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0, dtype=None, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset, dtype=dtype, device=device))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps, self.offset)

    def of_sum(self, x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x, delta (T, E) or None -> the norm of x + delta in `dtype`, and x + delta: one kernel on a GPU."""
        return kernels.add_rms_norm(x, delta, self.weight, self.eps, self.offset, dtype)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): F numbers between.  Shazeer, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig, layer: int, **factory):
        super().__init__()
        hidden, size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, size, bias=bias, **factory)
        self.up_proj = Linear(hidden, size, bias=bias, **factory)
        self.down_proj = Linear(size, hidden, bias=bias, **factory)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = kernels.linears(x, [self.gate_proj.part(), self.up_proj.part()])
        if x.dtype is torch.float16:
            scale = _row_scale(gate, up)
            gated = kernels.gated_mlp(gate, up * scale.to(up.dtype), self.activation)
            out, bias = self.down_proj(gated).float(), self.down_proj.bias
            return out / scale if bias is None else (out - bias) / scale + bias
        return self.down_proj(kernels.gated_mlp(gate, up, self.activation))


# fp16 ends at 65,504, and trained models go there at a few tokens: first in act(gate) * up and what down_proj
# makes of it, then in the residual stream that adds this up. So under fp16 the stream is fp32
# (Decoder.forward; the norms give fp16 to the products), and the row of such a token goes through down_proj
# smaller by a power of two, which costs no digit. Rows below the limit are as they were.
FP16_ROW_LIMIT = 64.0  # of |act(gate) * up|: sums of 11,008 such values times weights of 0.05 still fit


@torch.no_grad()
def _row_scale(gate: Tensor, up: Tensor) -> Tensor:
    """(T, 1) fp32, powers of two up to 1: by which rows of act(gate) * up (T, F) stay within the limit."""
    largest_gate, largest_up = (x.abs().amax(-1, keepdim=True).float() for x in (gate, up))
    bound = largest_gate * largest_up  # |act(x)| <= |x|
    exponent = torch.floor(torch.log2(FP16_ROW_LIMIT / bound.clamp_min(FP16_ROW_LIMIT)))
    return torch.exp2(exponent.clamp_min(-24))  # the smallest that fp16 has


@dataclass
class ForwardContext:
    """What every layer needs to know of the row of tokens that is on its way.

    What a cache plans for it (generation/cache.py) stands in the second half.
    """

    cu_seqlens: Tensor  # (N+1,) int32, borders of the segments
    max_seqlen: int  # tokens
    cache: Any  # keys and values of what came before (generation/), or None
    flash_attn: str  # which attention, one of kernels.ATTENTION
    dtype: torch.dtype  # of the products
    borders: list[int] | None = None  # cu_seqlens on the host
    lengths: Any = None  # per sequence, tokens once the row is stored: on the host, or (N,) on the device
    is_whole: bool = False  # whether the cache was empty, so that the row holds all there is
    filled: Tensor | None = None  # lengths on a GPU, (N,) int32
