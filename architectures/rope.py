"""The rotary embedding: its switches, how config.json spells them, and the angles of every kind.

angle = position * inverse frequency of the pair; `kind` changes the frequencies so that longer texts fit:
linear    divided by the factor (arXiv 2306.15595)
dynamic   a larger base by the text's length, NTK-aware: theta (f s / L0 - (f - 1))^(D / (D - 2)) for s > L0
yarn      arXiv 2309.00071, eq. 17-19 with the ramp over dimensions
llama3    kept above, divided below, blended between two wavelengths (Llama 3.1 model card code)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from options.errors import UserError, refuse

ROPE_KINDS = ("none", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    theta: float = 10000.0
    kind: str = "none"  # one of ROPE_KINDS
    factor: float = 1.0
    original_positions: int = 0  # tokens the model was trained on; the reference length of every scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn, rotations
    beta_slow: float = 1.0  # yarn, rotations
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions


def rope_from_hf(hf: Mapping[str, Any]) -> Rope:
    """Read `rope_parameters` (newer files) or `rope_theta` with `rope_scaling` (older ones)."""
    entry = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = hf.get(key) or {}
        refuse(not isinstance(given, dict), f"config.json: {key} is {given!r}, expected an object")
        entry |= given
    for key in ("factor", "rope_theta", "attention_factor", "original_max_position_embeddings"):
        wrong = not isinstance(entry.get(key, 0), int | float | None)
        refuse(wrong, f"config.json: {key} of RoPE is {entry.get(key)!r}, expected a number")
    theta = float(entry.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = entry.get("rope_type") or entry.get("type") or "default"
    kind = "none" if kind == "default" else kind
    if kind not in ROPE_KINDS:
        raise UserError(f"config.json: rope type {kind!r} is not one of {', '.join(ROPE_KINDS)}")
    if entry.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not in this version")
    maximum = hf["max_position_embeddings"]
    original = entry.get("original_max_position_embeddings") or maximum
    if kind == "dynamic":
        original = maximum  # as transformers: the dynamic kind grows from the model's own maximum
    factor = float(entry.get("factor") or (maximum / original))
    attention = entry.get("attention_factor")
    if kind == "yarn" and attention is None:
        attention = _yarn_attention(factor, entry.get("mscale"), entry.get("mscale_all_dim"))
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        original_positions=original,
        low_freq_factor=float(entry.get("low_freq_factor", 1.0)),
        high_freq_factor=float(entry.get("high_freq_factor", 4.0)),
        beta_fast=float(entry.get("beta_fast") or 32),
        beta_slow=float(entry.get("beta_slow") or 1),
        attention_factor=float(attention or 1.0),
        truncate=bool(entry.get("truncate", True)),
    )


def _yarn_attention(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """arXiv 2309.00071, eq. 22: 0.1 ln(factor) + 1; a ratio of two where a file gives both weights."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def rotation(
    rope: Rope, size: int, positions: Tensor, cu_seqlens: Tensor, lengths, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D/2) of every token's angles; angles in fp32, since bf16 cannot count past 256.

    lengths: (N,) of the segments' whole texts, more than cu_seqlens (N+1,) says where a cache holds their
    beginnings; None: no cache. The dynamic kind goes by each, so that a packed row equals its segments alone.
    """
    if rope.kind == "dynamic":
        new = cu_seqlens[1:] - cu_seqlens[:-1]
        lengths = new if lengths is None else torch.as_tensor(lengths, device=positions.device)
        frequency = dynamic_inverse_frequencies(rope, size, lengths)  # (N, D/2)
        frequency = frequency.repeat_interleave(new.long(), dim=0, output_size=positions.shape[0])  # (T, D/2)
    else:
        frequency = inverse_frequencies(rope, size, positions.device)
    angle = positions[:, None].float() * frequency
    return (angle.cos() * rope.attention_factor).to(dtype), (angle.sin() * rope.attention_factor).to(dtype)


def inverse_frequencies(rope: Rope, size: int, device=None) -> Tensor:
    """(D/2,) fp32 radians per position, for every kind but dynamic."""
    frequency = 1.0 / (rope.theta ** _exponents(size, device))
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        width = rope.high_freq_factor - rope.low_freq_factor
        smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / width
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * frequency / rope.factor + smooth * frequency
    if rope.kind == "yarn":
        low, high = _yarn_dimension(rope, size, rope.beta_fast), _yarn_dimension(rope, size, rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        ramp = (torch.arange(size // 2, dtype=torch.float32, device=device) - low) / (high - low)
        ramp = ramp.clamp(0, 1)
        return frequency / rope.factor * ramp + frequency * (1 - ramp)
    return frequency


def _yarn_dimension(rope: Rope, size: int, rotations: float) -> float:
    """The pair of dimensions that turns this often over the trained length."""
    turns = rope.original_positions / (rotations * 2 * math.pi)
    return size * math.log(turns) / (2 * math.log(rope.theta))


def dynamic_inverse_frequencies(rope: Rope, size: int, lengths: Tensor) -> Tensor:
    """(N,) tokens of each text -> (N, D/2)."""
    length = lengths.float().clamp(min=rope.original_positions)
    growth = rope.factor * length / rope.original_positions - (rope.factor - 1)
    theta = rope.theta * growth ** (size / (size - 2))  # (N,)
    return 1.0 / (theta[:, None] ** _exponents(size, lengths.device))


def _exponents(size: int, device) -> Tensor:
    return torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
