"""Gated activation of the MLP: act(gate) * up.  Shazeer, arXiv 2002.05202, section 2 (SwiGLU, GEGLU, ReGLU).

Backward: dgate = grad * up * act'(gate), dup = grad * act(gate). It computes act(gate) again instead of
keeping it.
"""

import torch
import torch.nn.functional as F

from kernels.launch import ceil_divide, jit, run, tl

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
ACTIVATIONS["gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")
BLOCK = 2048  # values per program: 16 per thread with 4 warps, two 16-byte loads per tensor in bf16


def gated_mlp_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate, up (T, F) -> act(gate) * up (T, F), same dtype. activation: a key of ACTIVATIONS."""
    return ACTIVATIONS[activation](gate) * up


def gated_mlp(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gated_mlp_reference that keeps gate and up only: the backward pass computes act(gate) again instead of
    saving it.

    For silu; the other activations keep what autograd keeps.
    """
    if activation != "silu" or not torch.is_grad_enabled():
        return gated_mlp_reference(gate, up, activation)
    return _SiluTimes.apply(gate, up)


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def unsupported(gate: torch.Tensor, up: torch.Tensor) -> str | None:
    """Why the kernels do not serve these tensors; None if they do."""
    if gate.dtype is torch.float64:
        return "float64; it computes in float32"
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return "gate and up of two shapes or dtypes"
    return None


def gated_mlp_triton(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gated_mlp_reference as one kernel, and one backward; gate and up may be halves of one tensor."""
    return _GatedMLP.apply(gate, up, activation)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        result = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _start(_forward_kernel, (gate, up), (result,), activation)
        return result

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        _start(_backward_kernel, (gate, up, grad), (dgate, dup), ctx.activation)
        return dgate, dup, None


def _start(kernel, inputs: tuple, results: tuple, activation: str) -> None:
    """Inputs of one shape, with any distance between their rows; results are contiguous."""
    if all(x.is_contiguous() for x in inputs):
        rows, size, strides = 1, inputs[0].numel(), [0] * len(inputs)  # one long row
    else:
        size = inputs[0].shape[-1]
        inputs = [x.reshape(-1, size) for x in inputs]
        inputs = [x if x.stride(1) == 1 else x.contiguous() for x in inputs]
        rows, strides = inputs[0].shape[0], [x.stride(0) for x in inputs]
    blocks = ceil_divide(size, BLOCK)  # in a row
    grid, sizes = (rows * blocks,), (blocks, size)
    run(kernel, grid, *inputs, *results, *strides, *sizes, ACT=activation, BLOCK=BLOCK, num_warps=4)


@jit
def _activation(x, ACT: tl.constexpr):
    """act(x) and its derivative, in fp32."""
    if ACT == "silu":
        gate = tl.sigmoid(x)
        result, slope = x * gate, gate * (1.0 + x * (1.0 - gate))
    elif ACT == "gelu":
        gate = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # 1 / sqrt(2)
        result, slope = x * gate, gate + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        result = x * gate
        slope = gate + result * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(ACT == "relu")
        result, slope = tl.where(x > 0, x, 0.0), tl.where(x > 0, 1.0, 0.0)
    return result, slope


@jit(do_not_specialize=["blocks"])
def _forward_kernel(
    gate, up, result, gate_stride, up_stride, blocks, size, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    other = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    activated, _ = _activation(value, ACT)
    tl.store(result + row * size + column, (activated * other).to(result.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["blocks"])
def _backward_kernel(
    gate,
    up,
    grad,
    dgate,
    dup,
    gate_stride,
    up_stride,
    grad_stride,
    blocks,
    size,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    other = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    change = tl.load(grad + row * grad_stride + column, mask=inside).to(tl.float32)
    activated, slope = _activation(value, ACT)
    place = row * size + column
    tl.store(dgate + place, (change * other * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (change * activated).to(dup.dtype.element_ty), mask=inside)
