"""y = x W^T + b, with the weight cast to the compute dtype at the place of use; and what a linear layer is.

Why a file for one matrix product: on x86 machines that are not Intel's, torch sends fp32 products to MKL,
which there stays on its 256-bit path; oneDNN (already inside torch) runs the same product with 512-bit
registers, measured 2.2 times as fast (bench/train.py prints both), and still in true fp32. bf16 and fp16 go
to oneDNN in any case.

Casting here instead of under autocast keeps precision visible: parameters may be fp32 masters while x is
bf16, and the backward pass casts again instead of holding a second copy of every weight.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_BATCH = 16  # rows: up to here a product reads the codes themselves, where a kernel for that exists


class Table(NamedTuple):
    """Linear layers with one input as one product for decoding (generation/layout.py), without adapters."""

    weight: Tensor | None  # (sum of out, in)
    bias: Tensor | None  # (sum of out,)
    sizes: list[int]  # out of each layer
    row: Callable | None = None  # on a CPU: x (1, in) times the weight -> (1, sum of out), maybe in fp32


class Part(NamedTuple):
    """What one linear layer computes, x W^T + bias + scale (x A^T) B^T, as kernels.linears takes it."""

    weight: Union[Tensor, "LinearLayer", None]  # (out, in), or the quantised layer itself; None: ask `layer`
    bias: Tensor | None = None  # (out,)
    lora_a: Tensor | None = None  # (R, in); None: no adapter
    lora_b: Tensor | None = None  # (out, R)
    scale: float = 0.0
    table: Table | None = None  # that has the weight
    layer: nn.Module | None = None  # that computes this part alone


class LinearLayer(nn.Module):
    """A linear layer as model, adapters and kernels know it; in_features, out_features, bias (out,) or None.

    Three kinds: architectures/layers.Linear, quant/linear.QuantLinear, lora.LoraLinear around one of them. A
    layer says by part() what it computes and kernels.linears chooses how: forward is `kernels.linears(x,
    [self.part()])[0]`, and layers with one input go there together. The rest is what a layer of codes may do
    better than by its dense weight; None says that it does not.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    table: Table | None = None

    def part(self) -> Part:
        """What forward computes, as the layer is now."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The weight (out, in) in `dtype` (None: its own), written into `out` if that is given."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor | None:
        """x (T, in) -> x W^T (T, out) in x's dtype, also in training; backward takes the dense weight."""
        return None

    def from_codes(self, x: Tensor, parts: list[Part]) -> list[Tensor] | None:
        """x of 1 to SMALL_BATCH rows through parts whose weights are layers of this class; no gradient."""
        return None

    def bytes_for_decoding(self, dtype: torch.dtype) -> tuple | None:
        """The weight as byte_linear.Bytes, for one row on a CPU, where that is as good as `dtype`."""
        return None

    def waits(self, rows: int) -> bool:
        """Whether a product of so many rows waits for a GPU, so that no CUDA graph can hold it."""
        return False


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (T, in) in the compute dtype, weight (out, in), bias (out,) or None -> (T, out) in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (N, K) transposed -> (M, N), no autograd; fp32 on a CPU goes to oneDNN.

    a is copied unless it is contiguous; b may be contiguous either way round (a weight or its transpose).
    """
    # without rows oneDNN refuses
    if a.dtype is torch.float32 and a.device.type == "cpu" and a.numel() > 0 and onednn_fp32_available():
        if not (b.is_contiguous() or b.T.is_contiguous()):
            b = b.contiguous()  # oneDNN takes a strided b too, but 4000 times slower
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], None)
    return a @ b.T


@functools.cache  # asked at every product
def onednn_fp32_available() -> bool:
    """Whether this torch build carries oneDNN's linear operator and the processor has 512-bit registers."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        result = matmul_transposed(x, weight.to(x.dtype))  # (T, out)
        return result if bias is None else result.add_(bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_transposed(grad, weight.to(grad.dtype).T)  # (T, in)
        if ctx.needs_input_grad[1]:
            grad_weight = matmul_transposed(grad.T, x.T).to(weight.dtype)  # (out, in)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear_reference with fp32 products on oneDNN, forward and backward. x must be (T, in)."""
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    plain = weight.is_contiguous() or weight.T.is_contiguous()  # oneDNN is very slow on other strides
    if x.dtype is torch.float32 and weight.dtype is torch.float32 and plain and x.numel() > 0:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return F.linear(x, weight.to(x.dtype), bias)


def matvec_by_rows(x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (1, in) times table (in, out), rows contiguous -> (1, out): decoding's, bound by memory speed. No
    gradient; the table is detached, or the operation would also build what a backward pass needs.

    An embedding bag, y = sum_i x[i] * table[i], because torch's kernel for that (fbgemm, rows weighted by x)
    streams the table at the speed of memory: measured 80 to 95% of a plain read, against 60% for oneDNN's
    product and 35% for MKL's on the shapes of a 135M model. One bag per thread, each over its share of rows.
    """
    rows, starts = shares_of_rows(table.shape[0], min(torch.get_num_threads(), table.shape[0]))
    bags, *_ = torch.embedding_bag(table, rows, starts, mode=0, per_sample_weights=x[0])
    result = bags.sum(0, keepdim=True)
    return result if bias is None else result.add_(bias)


@functools.lru_cache(maxsize=64)  # an entry per input size of a model
def shares_of_rows(inputs: int, bags: int) -> tuple[Tensor, Tensor]:
    """Row numbers 0..inputs-1, and where each bag's share of them starts."""
    with torch.inference_mode(False):
        return torch.arange(inputs), torch.arange(bags) * inputs // bags
