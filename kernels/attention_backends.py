"""Attention on a GPU by kernels of others, and the choice between them and ours by measurement.

torch carries FlashAttention 2 for rows with borders and cuDNN's kernels for equal lengths; which one wins
depends on the GPU, the head size and the lengths. So `Chooser` times what can serve a class of shapes, once,
with the first row of that class, forward and backward where gradients are asked for, compares its numbers
with ours, and says what it found: one that is off, or for which there is no memory, is never taken.
The calls into torch and into the package flash_attn have not been run on a GPU yet: unmeasured.
"""

import importlib
import importlib.util
import statistics
import threading
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import attention_reference, attention_sdpa
from kernels.launch import next_power_of_2, say_once
from options.errors import UserError, refuse

TIMED = 5  # calls of each candidate after a first one, which compiles and plans; their median counts
LONG = 50.0  # milliseconds: of a call that takes longer, one tells enough
# From ours, relative: all of a result, and its worst row. bf16 is off by 0.01 at most, a wrong kernel by more
MAY_DIFFER, ROW_MAY_DIFFER = 0.03, 0.1
COMPARED_ROWS = 4096  # of a result, evenly taken: at long contexts a second copy of all would be gigabytes
CUDNN_AFTER = 3  # rows of one length in sequence: cuDNN makes a plan, half a second, for every new length
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


# torch's own order may begin with cuDNN's, whose plans are made anew for every length of a prompt
TORCH_OWN = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def batched(
    q,
    k,
    v,
    cu_seqlens,
    max_seqlen,
    window,
    scale,
    causal=True,
    softcap=None,
    alibi_slopes=None,
    kernels=TORCH_OWN,
):
    """Segments of one length as a batch of torch's scaled_dot_product_attention; no window, cap or slopes."""

    def rows(x):  # (N, heads, length, D)
        return x.view(-1, max_seqlen, *x.shape[1:]).transpose(1, 2)

    options = {"is_causal": causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    with sdpa_kernel(list(kernels)):
        out = F.scaled_dot_product_attention(rows(q), rows(k), rows(v), **options)
    return out.transpose(1, 2).reshape(q.shape)


def cudnn(*arguments):
    """`batched`, and nothing but cuDNN's kernel."""
    return batched(*arguments, kernels=(SDPBackend.CUDNN_ATTENTION,))


def torch_flash(q, k, v, cu_seqlens, max_seqlen, window, scale, causal=True, softcap=None, alibi_slopes=None):
    """torch's FlashAttention 2 on rows with borders; fp16 and bf16, no cap and no slopes."""
    left, right = (None, None) if window is None else (window - 1, 0)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    windows = {"window_size_left": left, "window_size_right": right}
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, causal, False, scale=scale, **windows
    )[0]


def backends(
    q, k, v, cu_seqlens, max_seqlen, window, scale, causal, softcap, alibi_slopes, steady=False
) -> dict[str, Callable]:
    """What of torch can serve this row on a GPU, by name. steady: rows of its length keep coming."""
    if softcap is not None or alibi_slopes is not None:
        return {}
    half, found = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0, {}
    if half and q.shape[-1] <= 256:
        found["torch flash"] = torch_flash
    if equal_lengths(q, cu_seqlens, max_seqlen) and (window is None or window >= max_seqlen):
        found["batched sdpa"] = batched
        if half and steady:
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


def missing_package(flash_attn: str) -> str | None:
    """That the package of this value is not installed, and how to install it."""
    module, command = PACKAGES[flash_attn]
    if importlib.util.find_spec(module) is not None:
        return None
    return f"flash_attn={flash_attn} needs the package {module}, which is not installed ({command})"


def attention_package(name, q, k, v, cu_seqlens, max_seqlen, window, scale, causal, softcap, alibi_slopes):
    """flash_attn: fa2 or fa3. ValueError for a missing package or a switch that it has not."""
    missing = missing_package(name)
    refuse(missing is not None, missing)
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


class Steady:
    """Tells whether rows keep one length, as packed ones do and prompts do not."""

    def __init__(self):
        self.length, self.rows = None, 0
        self.last: Callable = lambda: None  # the borders of the last row, which all layers share

    def __call__(self, cu_seqlens, *length) -> bool:
        if self.last() is not cu_seqlens:
            self.last = weakref.ref(cu_seqlens)
            self.rows = self.rows + 1 if length == self.length else 1
            self.length = length
        return self.rows > CUDNN_AFTER


class Chooser:
    """Remembers, per class of shapes, the name of the candidate that `timer` found fastest."""

    def __init__(self, timer: Callable[[Callable, tuple], tuple[float, list]]):
        # (function, its arguments) -> milliseconds, results and gradients to compare (rows first);
        # RuntimeError: it cannot serve them
        self.timer = timer
        self.names: dict[tuple, str] = {}

    def choose(self, shapes: tuple, candidates: dict[str, Callable], arguments: tuple, measure=True):
        """candidates: at least one; the first one is ours and must work. Without `measure` (a graph is being
        captured) ours is taken until the class has been measured."""
        shapes = (*shapes, *candidates)
        if shapes not in self.names and not measure:
            return next(iter(candidates.values()))
        if shapes not in self.names:
            self.names[shapes] = self._measure(candidates, arguments)
        return candidates[self.names[shapes]]

    def _measure(self, candidates: dict[str, Callable], arguments: tuple) -> str:
        if len(candidates) == 1:
            return next(iter(candidates))
        times, said, truth = {}, [], None
        for name, function in candidates.items():
            try:
                time, results = self.timer(function, arguments)
            except torch.OutOfMemoryError:
                said.append(f"{name} not measured, out of memory")
                if truth is None:  # ours, which keeps least: and with what would others be compared?
                    break
                continue
            except RuntimeError as error:  # torch's way to say that none of its kernels takes these shapes
                if truth is None:
                    raise
                said.append(f"{name} not possible ({str(error).splitlines()[0][:80]})")
                continue
            whole = row = 0.0
            if truth is None:
                truth = results
            else:
                whole, row = (max(each) for each in zip(*map(difference, results, truth)))
            if whole <= MAY_DIFFER and row <= ROW_MAY_DIFFER:
                times[name] = time
            else:
                said.append(f"{name} dropped, its numbers are off by {whole:.2g}, in a row by {row:.2g}")
        best = min(times, key=times.__getitem__, default=next(iter(candidates)))
        said = [f"{name} {time:.3f} ms" for name, time in times.items()] + said
        q, k, longest = arguments[0], arguments[1], arguments[4]
        shape = f"{q.shape[0]} tokens, texts up to {longest}, {q.shape[1]}/{k.shape[1]} heads of {q.shape[2]}"
        say_once(f"kernels: attention on {shape}: {', '.join(said)} -> {best}")
        return best


def difference(found, truth) -> tuple[float, float]:
    """(T, heads, D) both -> how far found is from truth, relative: all of it, and its worst row.

    A row is judged by its own size or by the mean row's, if that is larger. What is no number is infinitely
    far.
    """
    away = (found.double() - truth.double()).flatten(1).norm(dim=1)
    size = truth.double().flatten(1).norm(dim=1)
    mean = size.square().mean().sqrt().clamp_min(1e-30)
    whole = away.square().mean().sqrt() / mean
    numbers = torch.stack((whole, (away / size.maximum(mean)).max())).nan_to_num(nan=torch.inf)
    return tuple(numbers.tolist())


def time_on_gpu(function: Callable, arguments: tuple) -> tuple[float, list]:
    """Median milliseconds of forward, and backward if an argument is trained; some rows of what came out.

    Synchronises: once per class of shapes. In a thread of its own, where none of the caller's autograd hooks
    and dispatch modes (checkpointing) are in force.
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
        with torch.cuda.device(arguments[0].device):
            found.append(_timed(function, arguments, grad, _gpu_milliseconds))
    except BaseException as error:  # noqa: BLE001  handed to the caller, who raises it
        # without the frames, whose tensors would wait for the collector while memory is short
        found.append(error.with_traceback(None))


def _timed(function: Callable, arguments: tuple, grad: bool, milliseconds: Callable) -> tuple[float, list]:
    """milliseconds(call) -> (what one call took, what it gave)."""
    inputs = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    trained = grad and any(torch.is_tensor(x) and x.requires_grad for x in arguments)
    if trained:
        inputs[:3] = [x.requires_grad_(True) for x in inputs[:3]]

    def call() -> tuple:
        out = function(*inputs)
        return (out, *(torch.autograd.grad(out, inputs[:3], _weights(out)) if trained else ()))

    _, results = milliseconds(call)
    tokens, every = len(inputs[0]), max(1, len(inputs[0]) // COMPARED_ROWS)
    results = [x.detach()[(tokens - 1) % every :: every].clone() for x in results]  # the last row among them
    times: list[float] = []
    while len(times) < TIMED and not (times and times[0] > LONG):
        times.append(milliseconds(call)[0])
    return statistics.median(times), results


def _weights(out: torch.Tensor) -> torch.Tensor:
    """Gradients of out: they differ from place to place, so that a mix-up is seen."""
    period = torch.linspace(-1, 1, 251, dtype=out.dtype, device=out.device)
    return period.repeat(-(-out.numel() // 251))[: out.numel()].view(out.shape)


def _gpu_milliseconds(call: Callable) -> tuple[float, tuple]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    results = call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), results
