"""Attention on a GPU by kernels of others, and the choice between them and ours by measurement.

torch carries FlashAttention 2 for rows with borders and cuDNN's kernels for equal lengths; which one wins
depends on the GPU, the head size and the lengths. So `Chooser` times what can serve a class of shapes, once,
with the first row of that class, forward and backward where gradients are asked for, and says what it found.
The calls into torch and into the package flash_attn have not been run on a GPU yet: unmeasured.
"""

import importlib
import importlib.util
import statistics
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention_reference, attention_sdpa
from kernels.launch import next_power_of_2, say_once
from options.errors import UserError

WARM_UP, TIMED = 3, 5  # calls of each candidate; the median of the latter counts
PACKAGES = {  # flash_attn's value -> module, how to install it
    "fa2": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "fa3": (
        "flash_attn_interface",
        'pip install "git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper" '
        "--no-build-isolation",
    ),
}


def equal_lengths(q, cu_seqlens, max_seqlen: int) -> bool:
    """Whether all segments have one length, known without asking the device."""
    return q.shape[0] == (cu_seqlens.shape[0] - 1) * max_seqlen > 0


def batched(
    q, k, v, cu_seqlens, max_seqlen, window, scale, causal=True, softcap=None, alibi_slopes=None, cudnn=False
):
    """Segments of one length as a batch of torch's scaled_dot_product_attention; no window, cap or slopes."""

    def rows(x):  # (N, heads, length, D)
        return x.view(-1, max_seqlen, *x.shape[1:]).transpose(1, 2)

    options = {"is_causal": causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if cudnn:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), **options)
    else:
        out = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), **options)
    return out.transpose(1, 2).reshape(q.shape)


def cudnn(*arguments):
    """`batched`, and nothing but cuDNN's kernel."""
    return batched(*arguments, cudnn=True)


def torch_flash(q, k, v, cu_seqlens, max_seqlen, window, scale, causal=True, softcap=None, alibi_slopes=None):
    """torch's FlashAttention 2 on rows with borders; fp16 and bf16, no cap and no slopes."""
    left, right = (None, None) if window is None else (window - 1, 0)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    windows = {"window_size_left": left, "window_size_right": right}
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, causal, False, scale=scale, **windows
    )[0]


def backends(
    q, k, v, cu_seqlens, max_seqlen, window, scale, causal, softcap, alibi_slopes
) -> dict[str, Callable]:
    """What of torch can serve this row on a GPU, by name."""
    if softcap is not None or alibi_slopes is not None:
        return {}
    half, found = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0, {}
    if half and q.shape[-1] <= 256:
        found["torch flash"] = torch_flash
    if equal_lengths(q, cu_seqlens, max_seqlen) and (window is None or window >= max_seqlen):
        found["batched sdpa"] = batched
        if half:
            found["cudnn"] = cudnn
    return found


def attention_torch(
    q, k, v, cu_seqlens, max_seqlen, window, scale, causal=True, softcap=None, alibi_slopes=None
):
    """The best of torch without measuring (flash_attn: sdpa). Only the plain formula knows a soft cap."""
    arguments = (q, k, v, cu_seqlens, max_seqlen, window, scale, causal, softcap, alibi_slopes)
    if softcap is not None:
        say_once("kernels: attention takes the torch reference: scaled_dot_product_attention has no soft cap")
        return attention_reference(*arguments)
    served = backends(*arguments)
    for name in ("batched sdpa", "torch flash"):
        if name in served:
            return served[name](*arguments)
    return attention_sdpa(*arguments)


def require_package(flash_attn: str) -> None:
    """Raise ValueError if this value of flash_attn needs a package that is not installed."""
    module, command = PACKAGES.get(flash_attn, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise UserError(
            f"flash_attn={flash_attn} needs the package {module}, which is not "
            f"installed: {command}; or set flash_attn=auto"
        )


def attention_package(
    name: str, q, k, v, cu_seqlens, max_seqlen, window, scale, causal, softcap, alibi_slopes
):
    """flash_attn: fa2 or fa3. ValueError for a missing package or a switch that it has not."""
    require_package(name)
    module, _ = PACKAGES[name]
    options = {"window_size": (-1, -1) if window is None else (window - 1, 0)}
    if softcap is not None:
        options["softcap"] = softcap
    if alibi_slopes is not None:
        if name == "fa3":
            raise UserError("flash_attn: fa3 knows no ALiBi slopes; take fa2 or triton")
        options["alibi_slopes"] = alibi_slopes.float()
    out = importlib.import_module(module).flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal, **options
    )
    return out[0] if isinstance(out, tuple) else out


def shape_class(q, k, cu_seqlens, max_seqlen, window, causal, trained: bool) -> tuple:
    """What decides which kernel is fastest; lengths by powers of two, so that a run has few classes."""
    tokens, longest = next_power_of_2(q.shape[0]), next_power_of_2(max_seqlen)
    even = equal_lengths(q, cu_seqlens, max_seqlen)
    return (q.device, q.dtype, *q.shape[1:], k.shape[1], tokens, longest, even, window, causal, trained)


class Chooser:
    """Remembers, per class of shapes, the name of the candidate that `timer` found fastest."""

    def __init__(self, timer: Callable[[Callable, tuple], float]):
        self.timer = timer  # (function, its arguments) -> milliseconds; RuntimeError: it cannot serve them
        self.names: dict[tuple, str] = {}

    def choose(self, shapes: tuple, candidates: dict[str, Callable], arguments: tuple) -> Callable:
        """candidates: at least one; the first one is ours and must work."""
        name = self.names.get(shapes)
        if name not in candidates:
            name = self.names[shapes] = self._measure(candidates, arguments)
        return candidates[name]

    def _measure(self, candidates: dict[str, Callable], arguments: tuple) -> str:
        if len(candidates) == 1:
            return next(iter(candidates))
        times, said = {}, []
        for number, (name, function) in enumerate(candidates.items()):
            try:
                times[name] = self.timer(function, arguments)
            except RuntimeError as error:  # torch's way to say that none of its kernels takes these shapes
                if number == 0:
                    raise
                said.append(f"{name} not possible ({str(error).splitlines()[0][:80]})")
        best = min(times, key=times.__getitem__)
        said = [f"{name} {time:.3f} ms" for name, time in times.items()] + said
        q, k, longest = arguments[0], arguments[1], arguments[4]
        shape = (
            f"{q.shape[0]} tokens, segments up to {longest}, {q.shape[1]}/{k.shape[1]} heads of {q.shape[2]}"
        )
        say_once(f"kernels: attention on {shape}: {', '.join(said)} -> {best}")
        return best


def time_on_gpu(function: Callable, arguments: tuple) -> float:
    """Median milliseconds of forward, and backward if an argument is trained. Synchronises: once per class of
    shapes.

    In a thread of its own, where none of the caller's autograd hooks and dispatch modes (checkpointing) are
    in force.
    """
    found: list = []
    torch.cuda.synchronize()  # the other thread works on another stream
    thread = threading.Thread(target=_time, args=(function, arguments, torch.is_grad_enabled(), found))
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _time(function: Callable, arguments: tuple, grad: bool, found: list) -> None:
    try:
        inputs = [x.detach() if torch.is_tensor(x) else x for x in arguments]
        trained = grad and any(torch.is_tensor(x) and x.requires_grad for x in arguments)
        if trained:
            inputs[:3] = [x.requires_grad_(True) for x in inputs[:3]]
        times = []
        with torch.cuda.device(inputs[0].device):
            for _ in range(WARM_UP + TIMED):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                out = function(*inputs)
                if trained:
                    torch.autograd.grad(out, inputs[:3], torch.ones_like(out))
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop))
        found.append(statistics.median(times[WARM_UP:]))
    except BaseException as error:  # noqa: BLE001  handed to the caller, who raises it
        found.append(error)
