"""Angles of the rotary embedding: radians per position of every pair of numbers, for every kind of Rope."""

import math

import torch
from torch import Tensor

from architectures.config import Rope


def inverse_frequencies(rope: Rope, size: int, device=None) -> Tensor:
    """(D/2,) fp32 radians per position, for every kind but dynamic.

    linear: divided by the factor (arXiv 2306.15595). yarn: arXiv 2309.00071, eq. 17-19 with the ramp over
    dimensions. llama3: kept above, divided below, blended between two wavelengths (Llama 3.1 model card
    code).
    """
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
    frequency = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * frequency / rope.factor + smooth * frequency
    if rope.kind == "yarn":

        def dimension(rotations: float) -> float:  # the pair that turns this often over the trained length
            return (
                size
                * math.log(rope.original_positions / (rotations * 2 * math.pi))
                / (2 * math.log(rope.theta))
            )

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        ramp = ((torch.arange(size // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(
            0, 1
        )
        return frequency / rope.factor * ramp + frequency * (1 - ramp)
    return frequency


def dynamic_inverse_frequencies(rope: Rope, size: int, lengths: Tensor) -> Tensor:
    """NTK-aware base by text length: theta * (f s / L0 - (f - 1))^(D / (D - 2)) for s > L0; (N,) -> (N,
    D/2)."""
    length = lengths.float().clamp(min=rope.original_positions)
    growth = rope.factor * length / rope.original_positions - (rope.factor - 1)
    theta = rope.theta * growth ** (size / (size - 2))  # (N,)
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=lengths.device).float() / size
    return 1.0 / (theta[:, None] ** exponent)
