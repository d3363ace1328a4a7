"""The only place that chooses between implementations of an operation (by device, dtype and shape).

One file per operation; each holds its formula, a plain reference, and what is faster where. `KERNELS=reference` in the
environment forces the references everywhere; the default `auto` takes the fastest. `choices()` says what was taken.
"""

import os

import torch

from kernels import cross_entropy as _cross_entropy
from kernels import gated_mlp as _gated_mlp
from kernels import linear as _linear
from kernels import lora_linear as _lora_linear
from kernels import rope as _rope
from kernels.attention import attention_reference as attention
from kernels.attention import cached_attention_reference as cached_attention
from kernels.rms_norm import rms_norm_reference as rms_norm

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
    "rotate",
    "rotation_tables",
]


def _mode() -> str:
    mode = os.environ.get("KERNELS", "auto")
    if mode not in ("auto", "reference"):
        raise ValueError(
            f"KERNELS={mode}: known are auto and reference (Triton kernels are not in this version); unset it"
        )
    return mode


_REFERENCE = _mode() == "reference"  # read once: the choice must not change in the middle of a run

rope = _rope.rope_reference if _REFERENCE else _rope.rope
rotate, rotation_tables = _rope.rotate, _rope.rotation_tables  # the same in two steps, for decoding
gated_mlp = _gated_mlp.gated_mlp_reference if _REFERENCE else _gated_mlp.gated_mlp
linear_cross_entropy = (
    _cross_entropy.linear_cross_entropy_reference if _REFERENCE else _cross_entropy.linear_cross_entropy
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, in) W^T (out, in) + bias -> (T, out) in x's dtype. See kernels/linear.py."""
    if x.device.type == "cpu" and _linear.onednn_fp32_available() and not _REFERENCE:
        return _linear.linear_onednn(x, weight, bias)
    return _linear.linear_reference(x, weight, bias)


def lora_linear(x, weight, bias, lora_a, lora_b, scale: float) -> torch.Tensor:
    """Base product and low-rank branch in one. See kernels/lora_linear.py."""
    separate = _REFERENCE or weight.requires_grad
    chosen = _lora_linear.lora_linear_reference if separate else _lora_linear.lora_linear
    return chosen(x, weight, bias, lora_a, lora_b, scale)


def choices(device: torch.device | str) -> str:
    """One line for the start of a run: which implementation serves each operation on this device."""
    if _REFERENCE:
        return "kernels: reference everywhere (KERNELS=reference)"
    on_cpu = torch.device(device).type == "cpu"
    product = "oneDNN fp32" if on_cpu and _linear.onednn_fp32_available() else "torch"
    attention_name = "torch flash per segment" if on_cpu else "torch with a block mask"
    return f"kernels: linear {product}, attention {attention_name}, cross entropy chunked, lora fused, the rest torch"
