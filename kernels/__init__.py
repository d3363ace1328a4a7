"""Kernels: one file per operation, and this page, which alone chooses between its implementations.

Each file holds the formula, `<operation>_reference` (plain torch: the oracle, and a CPU's fast path), the
Triton kernels, their autograd function, and `unsupported(...)`: why a shape is not theirs. A choice goes by
device, dtype and shape, and is said once; `choices()` tells what was taken. KERNELS=auto (Triton on a GPU,
torch on a CPU) | triton (insist; on a CPU with TRITON_INTERPRET=1) | reference.
    rms_norm, layer_norm  norms of rows, with the residual add; norms.py has their Triton kernels
    rope                  rotary embedding of q and k
    attention             the formula and torch's; flash_attention (Triton), attention_by_products (CPU),
                          attention_backends (kernels of others, and the choice by measurement)
    decode_attention      attention against a cache whose lengths the device knows
    gated_mlp             act(gate) * up
    cross_entropy         losses and log-probabilities of a head without logits
    linear, lora_linear   products of one or several linears with one input, with adapters beside them
    nf4, byte_linear      products straight from codes
    recompute             what blocks keep for the backward pass; launch: how Triton kernels are started
To add one: copy gated_mlp.py, add a choice here and a line above; docs/kernels.md says what tests it needs.
"""

import math
import os

import torch

from kernels import attention_backends as _backends
from kernels import attention_by_products as _by_products
from kernels import cross_entropy as _cross_entropy
from kernels import decode_attention as _decode_attention
from kernels import flash_attention as _flash
from kernels import gated_mlp as _gated_mlp
from kernels import launch
from kernels import layer_norm as _layer_norm
from kernels import linear as _linear
from kernels import lora_linear as _lora_linear
from kernels import nf4 as _nf4
from kernels import norms as _norms
from kernels import rms_norm as _rms_norm
from kernels import rope as _rope
from kernels.attention import attention_reference, attention_sdpa, cached_attention_reference
from kernels.linear import SMALL_BATCH, LinearLayer, Part
from kernels.nf4 import Codes
from kernels.recompute import BOOK, remember
from options.errors import UserError

_MODES = ("auto", "triton", "reference")


def _mode() -> str:
    return os.environ.get("KERNELS") or "auto"


_MODE = _mode()  # read once: the choice must not change in the middle of a run
_REFERENCE = _MODE == "reference"


def _triton_serves(operation: str, device: torch.device, unsupported=None, *tensors) -> bool:
    """Whether the operation's Triton kernel is taken. unsupported(*tensors): why it cannot, or None."""
    if _REFERENCE or (_MODE == "auto" and (device.type != "cuda" or torch.compiler.is_compiling())):
        return False  # a compiled block is torch's: its compiler fuses, and cannot see into our launches
    problem = _missing(device) or (unsupported and unsupported(*tensors))
    if problem is not None:
        launch.say_once(f"kernels: {operation} takes the torch reference: {problem}")
    return problem is None


def _remembers() -> bool:
    """Whether a block that drops what is cheap to make again is running. A compiled one has no recipes."""
    return not torch.compiler.is_compiling() and BOOK.get() is not None


def _cheap(function, *inputs) -> torch.Tensor:
    """function(*inputs), which kernels/recompute.py may make again instead of keeping it for the backward."""
    value = function(*inputs)
    return remember(value, function, *inputs) if _remembers() else value


def _is_one_row(x: torch.Tensor) -> bool:
    """Whether x (T, E) is one token on a CPU, without a gradient: there each small operation counts."""
    alone = x.shape[0] == 1 and x.dim() == 2 and x.device.type == "cpu"
    return alone and not torch.is_grad_enabled() and not _REFERENCE


def _missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run there; an error if they were insisted on."""
    if _MODE not in _MODES:
        raise UserError(f"KERNELS={_MODE}: known are auto, triton and reference; unset it for auto")
    missing = launch.unavailable(device)
    if missing is not None and _MODE == "triton":
        raise UserError(f"KERNELS=triton: {missing}; unset KERNELS to take what runs here")
    return missing


def rms_norm(x, weight, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """weight * x / rms(x) in dtype or x's; with offset 1, (1 + weight). See kernels/rms_norm.py."""
    serves = _triton_serves("rms_norm", x.device, _norms.unsupported, x)
    chosen = _rms_norm.rms_norm_triton if serves else _rms_norm.rms_norm_reference
    return _cheap(chosen, x, weight, eps, offset, dtype)


def add_rms_norm(
    x, delta: torch.Tensor | None, weight, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm of x + delta, and that sum; delta None is 0. See kernels/rms_norm.py."""
    serves = _triton_serves("rms_norm", x.device, _norms.unsupported, x, delta)
    by_torch = _rms_norm.add_rms_norm_row if _is_one_row(x) else _rms_norm.add_rms_norm_reference
    chosen = _rms_norm.add_rms_norm_triton if serves else by_torch
    normed, total = chosen(x, delta, weight, eps, offset, dtype)
    if _remembers():  # the norm of the sum, which is kept anyway
        alone = _rms_norm.rms_norm_triton if serves else _rms_norm.rms_norm_reference
        remember(normed, alone, total, weight, eps, offset, dtype)
    return normed, total


ATTENTION = ("auto", "triton", "sdpa", "disabled", "fa2", "fa3")  # values of `flash_attn`
_chooser, _steady = _backends.Chooser(_backends.time_on_gpu), _backends.Steady()


def require_attention(flash_attn: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """`flash_attn`, or auto where a package of others cannot serve there, which is said once: LLaMA-Factory's
    files ask for fa2, and it goes on too. UserError, before there is work to lose, if KERNELS or triton
    cannot be had there."""
    if _REFERENCE:
        return flash_attn
    device = torch.device(device)
    missing = _missing(device)
    if flash_attn == "triton" and missing is not None:
        raise UserError(f"flash_attn=triton: {missing}; or set flash_attn=auto")
    if flash_attn in _backends.PACKAGES:
        problem = _backends.missing_package(flash_attn)
        if device.type != "cuda":
            problem = f"flash_attn={flash_attn} runs on a GPU, not on {device.type}"
        elif dtype is torch.float32:
            problem = f"flash_attn={flash_attn} knows no fp32"
        if problem is not None:
            launch.say_once(f"kernels: {problem}, so attention is chosen as by flash_attn=auto")
            return "auto"
    return flash_attn


def attention(
    q, k, v, cu_seqlens, max_seqlen, window, scale, causal=True, softcap=None, slopes=None, flash_attn="auto"
) -> torch.Tensor:
    """q (T, H, D) over k, v (T, K, D) within segments -> (T, H, D); slopes (H,): ALiBi's. See
    kernels/attention.py.

    flash_attn: auto = on a CPU torch's kernels, on a GPU what measures fastest for the shape; triton, sdpa,
    fa2, fa3 = that one, UserError if it cannot be had; disabled = the plain formula.
    """
    arguments = (q, k, v, cu_seqlens, max_seqlen, window, scale, causal, softcap, slopes)
    if flash_attn == "disabled" or _REFERENCE:
        return attention_reference(*arguments)
    if flash_attn in _backends.PACKAGES:
        return _backends.attention_package(flash_attn, *arguments)
    if flash_attn == "triton":
        problem = launch.unavailable(q.device) or _flash.unsupported(q, k, v)
        if problem is not None:
            raise UserError(f"flash_attn=triton: {problem}; or set flash_attn=auto")
        return _flash.flash_attention_triton(*arguments)
    if flash_attn == "sdpa" or not _triton_serves("attention", q.device, _flash.unsupported, q, k, v):
        if q.device.type == "cpu" and softcap is None:
            return attention_sdpa(*arguments, whole=_whole(q.dtype))
        return _backends.attention_torch(*arguments)
    if _MODE == "triton" or launch.recorded_or_traced():
        return _flash.flash_attention_triton(*arguments)
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    steady = trained and _steady(cu_seqlens, q.shape[0], max_seqlen)
    candidates = {"triton": _flash.flash_attention_triton, **_backends.backends(*arguments, steady=steady)}
    key = _backends.shape_class(q, k, cu_seqlens, max_seqlen, window, causal, trained)
    measure = q.shape[0] > 0 and not launch.capturing(q.device)
    return _chooser.choose(key, candidates, arguments, measure)(*arguments)


def _whole(dtype: torch.dtype) -> tuple:
    """(function, shortest length in tokens): causal segments on a CPU, faster than torch's kernel."""
    shortest = math.inf
    if dtype is torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        shortest = 1
    elif dtype is torch.float32 and _linear.onednn_fp32_available():
        shortest = _by_products.SHORTEST_FP32
    return _by_products.attention_by_products, shortest


def cached_attention(q, keys, values, borders, lengths, window: int | None, scale: float) -> torch.Tensor:
    """New tokens against a cache whose lengths the host knows -> (T, H, D). See kernels/attention.py."""
    if _triton_serves("cached_attention", q.device, _decode_attention.unsupported, q, keys, 1):
        return _decode_attention.cached_attention_triton(q, keys, values, borders, lengths, window, scale)
    whole = _whole(q.dtype) if q.device.type == "cpu" else (None, math.inf)
    return cached_attention_reference(q, keys, values, borders, lengths, window, scale, whole)


def decode_attention(q, keys, values, cu_seqlens, lengths, max_new, window, scale, softcap=None, slopes=None):
    """New tokens against a cache whose lengths the device knows. See kernels/decode_attention.py."""
    serves = _triton_serves("decode_attention", q.device, _decode_attention.unsupported, q, keys, max_new)
    of = _decode_attention.decode_attention_triton if serves else _decode_attention.decode_attention_reference
    return of(q, keys, values, cu_seqlens, lengths, max_new, window, scale, softcap, slopes)


def store_in_cache(k, v, keys, values, cu_seqlens, lengths, max_new) -> None:
    """k, v (T, K, D) into the last filled slots of keys and values (N, K, capacity, D). The same file."""
    serves = _triton_serves("store_in_cache", k.device)
    store = _decode_attention.store_triton if serves else _decode_attention.store_reference
    store(k, v, keys, values, cu_seqlens, lengths, max_new)


def layer_norm(x, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """weight * (x - mean) / deviation + bias over the last dimension. See kernels/layer_norm.py."""
    if _triton_serves("layer_norm", x.device, _norms.unsupported, x):
        return _layer_norm.layer_norm_triton(x, weight, bias, eps)
    return _layer_norm.layer_norm_reference(x, weight, bias, eps)


def rope(q, k, cos, sin, interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """q (T, H, D), k (T, K, D) rotated by angles, given as cos and sin (T, R/2). See kernels/rope.py."""
    if _triton_serves("rope", q.device, _rope.unsupported, q, k):
        return _rope.rope_triton(q, k, cos, sin, interleaved)
    return (_rope.rope_reference if _REFERENCE else _rope.rope)(q, k, cos, sin, interleaved)


def gated_mlp(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, each (T, F); activation: silu, gelu, gelu_tanh or relu. See kernels/gated_mlp.py."""
    chosen = _gated_mlp.gated_mlp_reference if _REFERENCE else _gated_mlp.gated_mlp
    if _triton_serves("gated_mlp", gate.device, _gated_mlp.unsupported, gate, up):
        chosen = _gated_mlp.gated_mlp_triton
    return _cheap(chosen, gate, up, activation)


def linear_cross_entropy(hidden, weight, labels, bias: torch.Tensor | None = None, **terms) -> torch.Tensor:
    """Summed loss of hidden rows under the head, without (L, V) logits. See kernels/cross_entropy.py."""
    return _of_cross_entropy("linear_cross_entropy", hidden)(hidden, weight, labels, bias, **terms)


def linear_logprobs(hidden, weight, labels, bias: torch.Tensor | None = None, **terms) -> torch.Tensor:
    """(L,) log-probabilities of labels, without (L, V) logits. See kernels/cross_entropy.py."""
    return _of_cross_entropy("linear_logprobs", hidden)(hidden, weight, labels, bias, **terms)


def cross_entropy(logits, labels, **terms) -> torch.Tensor:
    """Summed loss of logits (L, V), over which the gradient is written. See kernels/cross_entropy.py."""
    return _of_cross_entropy("cross_entropy", logits)(logits, labels, **terms)


def _of_cross_entropy(operation: str, x: torch.Tensor):
    """That operation of kernels/cross_entropy.py, in torch, Triton or as reference."""
    suffix = "_reference" if _REFERENCE else ""
    if _triton_serves("cross_entropy", x.device, _cross_entropy.unsupported, x):
        suffix = "_triton"
    return getattr(_cross_entropy, operation + suffix)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, in) W^T (out, in) + bias -> (T, out) in x's dtype. See kernels/linear.py."""
    if weight.stride(0) == 1 and weight.dtype is x.dtype and _is_one_row(x):
        return _linear.matvec_by_rows(x, weight.detach().T, bias)
    if x.device.type == "cpu" and _linear.onednn_fp32_available() and not _REFERENCE:
        return _linear.linear_onednn(x, weight, bias)
    return _linear.linear_reference(x, weight, bias)


def linears(x: torch.Tensor, parts: list[Part]) -> list[torch.Tensor]:
    """Linear layers with one input: x (..., in) -> [(..., out)] in x's dtype, one for each part.

    Several go together where they gain from it: weights that lie in one table are one product; a few rows go
    straight through codes; adapters on frozen weights save and read x once. The others go one by one.
    """
    if x.dim() != 2:
        results = linears(x.reshape(-1, x.shape[-1]), parts)
        return [result.reshape(*x.shape[:-1], result.shape[-1]) for result in results]
    results = _from_table(x, parts)
    if results is not None:
        return results
    if len(parts) == 1 and parts[0].weight is not None:
        return [_one_linear(x, parts[0])]
    results = _from_codes(x, parts)
    if results is not None:
        return results
    known = [place for place, part in enumerate(parts) if _lora_linear_knows(part)]
    results = [None] * len(parts)
    if len(known) > 1 and any(parts[place].lora_a is not None for place in known):
        for place, result in zip(known, _lora_linears(x, [parts[place] for place in known])):
            results[place] = result
    for place, part in enumerate(parts):
        if results[place] is None:
            results[place] = _one_linear(x, part) if part.layer is None else part.layer(x)
    return results


def _from_table(x: torch.Tensor, parts: list[Part]) -> list[torch.Tensor] | None:
    """All layers of one table, as one product with adapters beside it; no gradient, for a table gets none."""
    table = parts[0].table
    if table is None or len(parts) != len(table.sizes) or torch.is_grad_enabled():
        return None
    for part in parts:
        if part.table is not table:
            return None
    same = table.weight is None or table.weight.dtype is x.dtype
    if x.shape[0] == 1 and table.row is not None and same and not _REFERENCE:
        result = table.row(x)
        result = result.to(x.dtype) if table.bias is None else result.add_(table.bias).to(x.dtype)
    elif table.weight is not None:
        result = linear(x, table.weight, table.bias)
    else:
        return None
    results = [result] if len(parts) == 1 else result.split(table.sizes, 1)
    pairs = zip(results, parts)
    return [y if part.lora_a is None else y + _lora_linear.low_rank(x, part) for y, part in pairs]


def _one_linear(x: torch.Tensor, part: Part) -> torch.Tensor:
    """x (T, in) through one part whose weight is given."""
    results = _from_codes(x, [part])
    if results is not None:
        return results[0]
    if part.lora_a is None and isinstance(part.weight, torch.Tensor):
        return linear(x, part.weight, part.bias)
    if _lora_linear_knows(part):
        return _lora_linears(x, [part])[0]
    result = _one_linear(x, part._replace(lora_a=None, lora_b=None))
    return result + _lora_linear.low_rank(x, part).to(result.dtype)


def _from_codes(x: torch.Tensor, parts: list[Part]) -> list[torch.Tensor] | None:
    """Products straight from the codes, of a few rows without a gradient; None where no format does that."""
    first = parts[0].weight
    small = 0 < x.shape[0] <= SMALL_BATCH and not torch.is_grad_enabled()
    if small and isinstance(first, LinearLayer) and all(type(part.weight) is type(first) for part in parts):
        return first.from_codes(x, parts)
    return None


def _lora_linear_knows(part: Part) -> bool:
    """Frozen dense weights; and codes, made dense once forward and once backward, but without a backward pass
    their own product beside the adapter may be cheaper."""
    if isinstance(part.weight, LinearLayer):
        return part.lora_a is None or torch.is_grad_enabled()
    frozen = part.weight is not None and not part.weight.requires_grad
    return frozen and not (part.bias is not None and part.bias.requires_grad)


def _lora_linears(x: torch.Tensor, parts: list[Part]) -> list[torch.Tensor]:
    """Frozen weights with or without adapters and one input. See kernels/lora_linear.py."""
    return (_lora_linear.lora_linears_reference if _REFERENCE else _lora_linear.lora_linears)(x, parts)


def dequantise_4bit(weight: Codes, out: torch.Tensor) -> bool:
    """Write a weight in 4 bits into out (out, in), where a kernel does that; False leaves it to the caller.
    See kernels/nf4.py."""
    if not _triton_serves("weights in 4 bits", out.device, _nf4.unsupported_fill, out):
        return False
    _nf4.dequantise_triton(weight, out)
    return True


def small_batch_4bit(x: torch.Tensor, parts: list[Part]) -> list[torch.Tensor] | None:
    """x (1 to 16 rows, in) through linears in 4 bits with their adapters, straight from the codes, no
    gradient; None where no kernel does that, and then the dense weight is the way. See kernels/nf4.py."""
    if not _triton_serves("products with weights in 4 bits", x.device, _nf4.unsupported, x):
        return None
    return _nf4.small_batch_triton(x, parts)


def choices(device: torch.device | str, flash_attn: str = "auto") -> str:
    """One line for the start of a run: which implementation serves each operation on this device."""
    if _REFERENCE:
        return "kernels: reference everywhere (KERNELS=reference)"
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    missing = _missing(device) or ("torch is faster on a CPU" if on_cpu and _MODE == "auto" else None)
    pointwise = "Triton" if missing is None else "torch"
    product = "oneDNN fp32" if on_cpu and _linear.onednn_fp32_available() else "torch"
    measured = "torch flash per segment" if on_cpu else "measured per shape"
    attention_name = "Triton" if _MODE == "triton" else measured if missing is None or on_cpu else "torch"
    if flash_attn != "auto":
        attention_name = {"disabled": "by the plain formula", "triton": "Triton"}.get(flash_attn, flash_attn)
    most = f"linear {product}, attention {attention_name}, cross entropy chunked in {pointwise}, lora fused"
    return f"kernels: {most}, norms, rope and gated mlp {pointwise}"
