"""How Triton kernels are declared, started and recorded: the one file that knows Triton's machinery.

    from kernels.launch import jit, run, tl

    @jit
    def _scale_kernel(x, y, count, factor, BLOCK: tl.constexpr): ...

    run(_scale_kernel, (blocks,), x, y, count, 2.0, BLOCK=1024, num_warps=4)

`run` is kernel[grid](...), with one addition: inside `recording(90)` nothing is started. The launches are
collected instead, with the block sizes that the launcher chooses for that GPU generation, and can be compiled
on a machine without a GPU (tests/kernels/test_kernels_compile.py does that in CI). TRITON_INTERPRET=1 in the
environment, set before this file is imported, runs the kernels on CPU tensors.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # there are no wheels outside Linux; the references serve there
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(function=None, **options):
        return function or jit


# What is assumed about a GPU that is not there. Capability -> multiprocessors: A100, RTX 3090, RTX 4090, H100
RECORDED_PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132}
TRITON_TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TRITON_TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8"}
TRITON_TYPES |= {torch.uint8: "u8", torch.bool: "i1"}


@dataclass
class Launch:
    """One recorded start of a kernel: what triton.compile needs to know."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[int]  # arguments (by place) that Triton may take as multiples of 16
    options: dict[str, int]  # num_warps, num_stages


@dataclass
class _Recording:
    capability: int
    launches: list[Launch] = field(default_factory=list)


_recording: _Recording | None = None


@contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Collect launches for a GPU of this capability (80 = A100, 90 = H100) instead of starting them."""
    global _recording
    before, _recording = _recording, _Recording(capability)
    try:
        yield _recording.launches
    finally:
        _recording = before


def run(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Start a kernel. arguments in its order, a tensor first; options: constants, num_warps, num_stages."""
    if _recording is not None:
        _recording.launches.append(_describe(kernel, arguments, options))
    elif all(grid):  # without rows there is nothing to start, and CUDA refuses an empty grid
        device = arguments[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # Triton starts kernels on the current GPU, wherever the tensors are
            with torch.cuda.device(device):
                kernel[grid](*arguments, **options)
        else:
            kernel[grid](*arguments, **options)


def _describe(kernel, arguments, options) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, arguments)) | {name: value for name, value in options.items() if name in names}
    launch = Launch(kernel, {}, {}, [], {name: value for name, value in options.items() if name not in names})
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        # as Triton's own launcher does it: None and 1 become constants, multiples of 16 are marked
        # @jit(do_not_specialize=[...]): any value, one compiled kernel
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            launch.signature[parameter.name] = "constexpr"
            launch.constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            launch.signature[parameter.name] = "*" + TRITON_TYPES[value.dtype]
            launch.divisible.append(place)
        elif isinstance(value, float):
            launch.signature[parameter.name] = "fp32"
        else:
            launch.signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and free:
                launch.divisible.append(place)
    return launch


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def capability(device: torch.device) -> int:
    """10 * major + minor of the GPU; 0 in the interpreter."""
    if _recording is not None:
        return _recording.capability
    return 0 if device.type != "cuda" else _gpu(device.index or 0)[0]


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 4 in the interpreter: persistent grids short but not trivial."""
    if _recording is not None:
        return RECORDED_PROCESSORS[_recording.capability]
    return 4 if device.type != "cuda" else _gpu(device.index or 0)[1]


@functools.cache
def _gpu(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device; None if they can."""
    if _recording is not None:
        return None
    if triton is None:
        return "Triton is not installed (pip install triton; Linux only)"
    if interpreted() or (device.type == "cuda" and capability(device) >= 80):
        return None
    if device.type == "cuda":
        major, minor = divmod(capability(device), 10)
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0 (Ampere) or newer"
    return f"Triton has no {device.type} backend; TRITON_INTERPRET=1 runs kernels in its (slow) interpreter"


def recorded_or_traced() -> bool:
    """Whether launches are recorded or torch.compile traces: there are no numbers to choose by."""
    return _recording is not None or torch.compiler.is_compiling()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may be timed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def say_once(message: str) -> None:
    """To stderr, the first time only: what was chosen instead of what could have been expected."""
    with suppress(OSError):  # whoever read it is gone
        print(message, file=sys.stderr, flush=True)


def next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)


@jit
def tanh(x, EXACT: tl.constexpr):
    """For kernels with a soft cap; Triton has none that runs everywhere.

    EXACT: also small x to fp32's precision, where 1 - 2 / (1 + e^2x) cancels; its series reaches to x^9.
    """
    result = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # 2 log2 e
    if EXACT:
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        result = tl.where(tl.abs(x) < 0.25, series, result)
    return result
