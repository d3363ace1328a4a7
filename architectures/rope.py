"""The rotary embedding: its switches, how config.json spells them, and the angles of every kind.

angle = position * inverse frequency of the pair; `kind` changes the frequencies so that longer texts fit:
linear    divided by the factor (arXiv 2306.15595)
dynamic   a larger base by the text's length, NTK-aware: theta (f s / L0 - (f - 1))^(D / (D - 2)) for s > L0
yarn      arXiv 2309.00071, eq. 17-19 with the ramp over dimensions
llama3    kept above, divided below, blended between two wavelengths (Llama 3.1 model card code)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from options.errors import UserError, refuse
from options.json_fields import NUMBER, Field, check

ROPE_KINDS = ("none", "linear", "dynamic", "yarn", "llama3")
TOKENS = Field(int, 1, 2**31 - 1)  # a length
THETA = Field(NUMBER, 1.001, 1e15, null=True)  # at 1 all angles are alike
SCALE = Field(NUMBER, 1e-6, 1e6, null=True)
FIELDS = {  # of rope_parameters and rope_scaling
    "rope_type": Field(str, null=True),
    "type": Field(str, null=True),
    "rope_theta": THETA,
    "original_max_position_embeddings": replace(TOKENS, null=True),
    "truncate": Field(bool, null=True),
}
FIELDS |= dict.fromkeys(("factor", "attention_factor", "partial_rotary_factor"), SCALE)
FIELDS |= dict.fromkeys(("low_freq_factor", "high_freq_factor"), SCALE)
FIELDS |= dict.fromkeys(
    ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), Field(NUMBER, 0, 1e6, null=True)
)


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


def rope_of(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the rope, in the newer spelling (rope_parameters), rope_type and rope_theta
    included: as transformers, rope_scaling (older files) counts before rope_parameters. Raises UserError."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    nested = [key for key, value in given.items() if isinstance(value, dict)]
    refuse(nested, f"config.json: a rope of its own for {', '.join(nested)} layers is not in this version")
    check(given, FIELDS, "config.json: RoPE's ")
    entry = {key: value for key, value in given.items() if value is not None and key != "type"}
    kind = given.get("rope_type") or given.get("type") or "none"
    kind = "none" if kind == "default" else kind
    refuse(kind not in ROPE_KINDS, f"config.json: rope type {kind!r} is not one of {', '.join(ROPE_KINDS)}")
    entry["rope_type"] = "default" if kind == "none" else kind
    entry["rope_theta"] = entry.get("rope_theta") or hf.get("rope_theta") or 10000.0
    maximum, original = hf["max_position_embeddings"], "original_max_position_embeddings"
    if kind in ("yarn", "llama3"):  # a length beside the rope counts first, as in the models of transformers
        entry[original] = hf.get(original) or entry.get(original, maximum)
    if kind == "yarn":  # DeepSeek's files give the two lengths alone
        entry.setdefault("factor", maximum / entry[original])
    refuse(kind != "none" and "factor" not in entry, f"config.json: RoPE's factor is missing for type {kind}")
    if entry.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not in this version")
    return entry


def rope_from_hf(hf: Mapping[str, Any]) -> Rope:
    """The switches of this config.json."""
    entry, maximum = rope_of(hf), hf["max_position_embeddings"]
    kind = "none" if entry["rope_type"] == "default" else entry["rope_type"]
    low, high = float(entry.get("low_freq_factor", 1.0)), float(entry.get("high_freq_factor", 4.0))
    between = f"high_freq_factor {high:g} is not above low_freq_factor {low:g}"
    refuse(kind == "llama3" and high <= low, f"config.json: RoPE's {between}")
    factor = 1.0 if kind == "none" else float(entry["factor"])
    attention = 1.0
    if kind == "yarn":
        own = _yarn_attention(factor, entry.get("mscale"), entry.get("mscale_all_dim"))
        attention = float(entry.get("attention_factor", own))
    return Rope(
        theta=float(entry["rope_theta"]),
        kind=kind,
        factor=factor,
        # as transformers: the dynamic kind grows from the model's own maximum
        original_positions=entry["original_max_position_embeddings"]
        if kind in ("yarn", "llama3")
        else maximum,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=float(entry.get("beta_fast") or 32),  # 0 is the default, as transformers has it
        beta_slow=float(entry.get("beta_slow") or 1),
        attention_factor=attention,
        truncate=entry.get("truncate", True),
    )


def longest_text(rope: Rope, maximum: int) -> int:
    """Tokens that a model with this max_position_embeddings takes: linear and dynamic stretch that number,
    yarn the original one; of llama3 it is what the stretched model takes already."""
    if rope.kind in ("linear", "dynamic"):
        return max(1, int(maximum * rope.factor))
    return max(maximum, int(rope.original_positions * rope.factor)) if rope.kind == "yarn" else maximum


def in_both_spellings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for every reader: rope_parameters is transformers 5's, rope_theta with rope_scaling
    what 4 reads; with yarn the maximum is the stretched one, as both want it."""
    entry, rope = rope_of(hf), rope_from_hf(hf)
    entry |= {} if rope.kind == "none" else {"factor": rope.factor}
    older = {key: value for key, value in entry.items() if key != "rope_theta"}
    spelled = {"rope_parameters": entry, "rope_theta": entry["rope_theta"]}
    spelled["rope_scaling"] = None if rope.kind == "none" else older
    if rope.kind == "yarn":
        spelled["max_position_embeddings"] = longest_text(rope, hf["max_position_embeddings"])
    return {**hf, **spelled}


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
