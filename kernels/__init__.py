"""The only place that chooses between implementations of an operation (by device, dtype and shape).

One file per operation; each holds its formula, a plain reference, and what is faster where. `KERNELS=reference` in the
environment forces the references everywhere; the default `auto` takes the fastest. `choices()` says what was taken.
"""

import os

import torch

from kernels.attention import attention_reference as attention
from kernels.attention import cached_attention_reference as cached_attention
from kernels.cross_entropy import linear_cross_entropy as _chunked_cross_entropy
from kernels.cross_entropy import linear_cross_entropy_reference
from kernels.gated_mlp import gated_mlp_reference as gated_mlp
from kernels.linear import linear_onednn, linear_reference, onednn_fp32_available
from kernels.lora_linear import lora_linear as _one_function_lora
from kernels.lora_linear import lora_linear_reference
from kernels.rms_norm import rms_norm_reference as rms_norm
from kernels.rope import rope_reference as rope

__all__ = [
    "attention",
    "cached_attention",
    "choices",
    "gated_mlp",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rope",
]


def _mode() -> str:
    mode = os.environ.get("KERNELS", "auto")
    if mode not in ("auto", "reference"):
        raise ValueError(
            f"KERNELS={mode}: known are auto and reference (Triton kernels are not in this version); unset it or pick one"
        )
    return mode


_FORCE_REFERENCE = _mode() == "reference"  # read once: the choice must not change in the middle of a run


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, in) W^T (out, in) + bias -> (T, out) in x's dtype. See kernels/linear.py."""
    if x.device.type == "cpu" and onednn_fp32_available() and not _FORCE_REFERENCE:
        return linear_onednn(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_cross_entropy(hidden, weight, labels, bias=None) -> torch.Tensor:
    """Sum of the cross entropies of hidden (L, E) against the head (V, E). See kernels/cross_entropy.py."""
    chosen = linear_cross_entropy_reference if _FORCE_REFERENCE else _chunked_cross_entropy
    return chosen(hidden, weight, labels, bias)


def lora_linear(x, weight, bias, lora_a, lora_b, scale: float) -> torch.Tensor:
    """Base product and low-rank branch in one. See kernels/lora_linear.py."""
    chosen = lora_linear_reference if _FORCE_REFERENCE or weight.requires_grad else _one_function_lora
    return chosen(x, weight, bias, lora_a, lora_b, scale)


def choices(device: torch.device | str) -> str:
    """One line for the start of a run: which implementation serves each operation on this device."""
    if _FORCE_REFERENCE:
        return "kernels: reference everywhere (KERNELS=reference)"
    on_cpu = torch.device(device).type == "cpu"
    product = "oneDNN fp32" if on_cpu and onednn_fp32_available() else "torch"
    attention_name = "torch flash per segment" if on_cpu else "torch with a block mask"
    return f"kernels: linear {product}, attention {attention_name}, cross entropy chunked, lora fused, the rest torch"
