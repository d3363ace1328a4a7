"""y = x W^T + b + s (x A^T) B^T as one autograd function, x saved once.  Hu et al., arXiv 2106.09685, eq. 3.

Linears with one input (q/k/v, gate/up) go through it together: x is saved once; the stacked A read x once
where separate adapters read it once each, forward and again for A's gradient; and dx is summed in one buffer.
W may be dense or quantised: anything with dequantize(), which is called again in the backward pass instead of
being saved.

Two orders of the same product. Separate: the low-rank branch beside the base product, 2 T R (in + out)
multiply-adds. Merged: first W + s B A, then one product; 2 in out R multiply-adds, and no pass over a (T,
out) tensor for the sum. With R << T the second costs less as soon as T > in out / (in + out). It is used on a
CPU in fp32 only: bf16 would round a small update away in W + s B A, and a GPU write and read a second weight.

No Triton kernel adds the branch, by count of bytes. An own kernel for y += s low B^T reads and writes y, 4 T
out bytes in bf16, and so does addmm_ after the base product. But the other way round, first y = s low B^T +
b, then the base product with beta = 1, the branch is a pure write of 2 T out bytes, and y is read in the
epilogue of the large product, under its arithmetic; y is also rounded in the better order. Likewise dx. On a
CPU the base comes first (oneDNN's fp32 product does not accumulate). A kernel could save the second of two
reads of dy in the backward pass (dy B and dy^T low), 2 T out bytes: left until it can be measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import LinearLayer, Part, matmul_transposed


def low_rank(x: Tensor, part: Part) -> Tensor:
    """scale (x A^T) B^T in x's dtype, plain, with autograd."""
    return F.linear(F.linear(x, part.lora_a.to(x.dtype)), part.lora_b.to(x.dtype)) * part.scale


def lora_linears_reference(x: Tensor, parts: list[Part]) -> list[Tensor]:
    """lora_linears in plain torch, one part after the other; weights may be trained too."""
    results = []
    for part in parts:
        # a new one each time, not the shared buffer: autograd may keep it
        weight = part.weight if isinstance(part.weight, Tensor) else part.weight.dequantize(x.dtype)
        bias = None if part.bias is None else part.bias.to(x.dtype)
        result = F.linear(x, weight.to(x.dtype), bias)
        results.append(result if part.lora_a is None else result + low_rank(x, part))
    return results


def lora_linears(x: Tensor, parts: list[Part]) -> list[Tensor]:
    """x (T, in) through several frozen linears with adapters -> [(T, out)] in x's dtype, one for each part.

    Gradients for x and every lora_a and lora_b that asks for one, each in its own dtype; adapters are cast to
    x's dtype where they are used. Weights and biases get none: the caller sees to it that they are frozen.
    """
    tensors, others = [], []
    for part in parts:
        dense = isinstance(part.weight, Tensor)
        tensors += [part.weight if dense else None, part.bias, part.lora_a, part.lora_b]
        others.append((None if dense else part.weight, part.scale))
    return list(_LoraLinears.apply(x, tuple(others), *tensors))


RANK_MULTIPLE = 8  # on a GPU: 16 bytes, without which cuBLAS takes kernels of half the speed


def _aligned(part: Part, device: torch.device) -> Part:
    """The part with zeros behind its rank where the product needs a multiple: the same product."""
    more = 0 if part.lora_a is None or not _branch_first(device) else -part.lora_a.shape[0] % RANK_MULTIPLE
    if not more:
        return part
    return part._replace(lora_a=F.pad(part.lora_a, (0, 0, 0, more)), lora_b=F.pad(part.lora_b, (0, more)))


_shared: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # the one buffer for dense weights, by its kind


def shared_buffers() -> list[Tensor]:
    """For whoever recorded products (a CUDA graph): what they write to; a larger weight would let it go."""
    return list(_shared.values())


def _dense(weight: Tensor | LinearLayer, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`. A quantised one stands in the shared buffer, until the next call."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    size, key = weight.out_features * weight.in_features, (weight.device, dtype)
    if key not in _shared or _shared[key].numel() < size:
        _shared.pop(key, None)  # the smaller one goes before the larger one comes
        with torch.inference_mode(False):
            _shared[key] = torch.empty(size, dtype=dtype, device=weight.device)
    return weight.dequantize(out=_shared[key][:size].view(weight.out_features, weight.in_features))


def _branch_first(device: torch.device) -> bool:
    """Whether products add to what is there for free, so that the low-rank branch is written first."""
    return device.type != "cpu"


class _LoraLinears(torch.autograd.Function):
    """tensors: weight (None if quantised), bias, lora_a, lora_b of each part; others: codes, scale.

    x is kept for the gradients of A alone; where every A is frozen (LoRA-FA, arXiv 2308.03303) only x A^T is.
    """

    @staticmethod
    def forward(ctx, x, others, *tensors):
        parts = [_aligned(part, x.device) for part in _unpack(others, tensors)]
        merged = [_merged(x, part) for part in parts]
        stacked, low = _stacked(parts, x.dtype), None
        trained, trains_a = any(ctx.needs_input_grad), any(ctx.needs_input_grad[4::4])
        needed = not all(one or part.lora_a is None for one, part in zip(merged, parts))
        if needed or (stacked is not None and trained and not trains_a):
            low = matmul_transposed(x, stacked)  # (T, sum of R); else it waits for the backward pass
        results = [_forward(x, *each) for each in zip(parts, merged, _columns(low, parts))]
        ctx.save_for_backward(x if trains_a else None, low, *tensors)
        ctx.others, ctx.merged, ctx.dtype = others, merged, x.dtype
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        x, low, *tensors = ctx.saved_tensors
        parts = [_aligned(part, grads[0].device) for part in _unpack(ctx.others, tensors)]
        ranks = [0 if lora_a is None else lora_a.shape[0] for lora_a in tensors[2::4]]  # without the zeros
        gradients, grad_low = [None] * len(tensors), None
        stacked = _stacked(parts, ctx.dtype)
        if stacked is not None:
            low = matmul_transposed(x, stacked) if low is None else low
            grad_low = torch.empty_like(low)  # (T, sum of R)
            columns = _columns(low, parts), _columns(grad_low, parts)
            for place, (part, grad, one, grad_one) in enumerate(zip(parts, grads, *columns)):
                if part.lora_a is not None:
                    _scaled_product(grad, part.lora_b.to(ctx.dtype), part.scale, grad_one)
                    gradients[4 * place + 3] = _grad_b(grad, one, part)[:, : ranks[place]]
            if x is not None:
                grad_a = matmul_transposed(grad_low.T, x.T).T  # (in, sum of R): all from one pass over x
                for place, (part, grad) in enumerate(zip(parts, _columns(grad_a, parts))):
                    if part.lora_a is not None and ctx.needs_input_grad[4 * place + 4]:
                        gradients[4 * place + 2] = grad.T[: ranks[place]].to(part.lora_a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_x(grads, parts, ctx.merged, stacked, grad_low, ctx.dtype)
        return grad_x, None, *gradients


def _unpack(others, tensors) -> list[Part]:
    parts = []
    for place, (quantised, scale) in enumerate(others):
        weight, *rest = tensors[4 * place : 4 * place + 4]
        parts.append(Part(quantised if weight is None else weight, *rest, scale))
    return parts


def _stacked(parts: list[Part], dtype: torch.dtype) -> Tensor | None:
    """Every A, one under the other (sum of R, in); None without adapters."""
    rows = [part.lora_a for part in parts if part.lora_a is not None]
    if len(rows) <= 1:
        return rows[0].to(dtype) if rows else None
    return torch.cat(rows).to(dtype)


def _columns(low: Tensor | None, parts: list[Part]) -> list[Tensor | None]:
    """The columns (..., R) of each part; None for one without an adapter."""
    sizes = [0 if part.lora_a is None else part.lora_a.shape[0] for part in parts]
    if low is None:
        return [None] * len(parts)
    return [columns if size else None for columns, size in zip(low.split(sizes, dim=1), sizes)]


def _merged(x: Tensor, part: Part) -> bool:
    """Whether this part goes by W + s B A."""
    if part.lora_a is None or not isinstance(part.weight, Tensor) or _branch_first(x.device):
        return False
    outputs, inputs = part.weight.shape
    fp32 = x.dtype is part.weight.dtype is torch.float32
    return fp32 and x.shape[0] * (inputs + outputs) > inputs * outputs


def _updated(part: Part) -> Tensor:
    """W + s B A, fp32."""
    weight = part.weight
    return torch.addmm(weight, part.lora_b.to(weight.dtype), part.lora_a.to(weight.dtype), alpha=part.scale)


def _forward(x: Tensor, part: Part, merged: bool, low: Tensor | None) -> Tensor:
    bias = None if part.bias is None else part.bias.to(x.dtype)
    lora_b = None if low is None or merged else part.lora_b.to(x.dtype)
    result = None if isinstance(part.weight, Tensor) else part.weight.product(x)
    if result is None and lora_b is not None and _branch_first(x.device):
        if bias is None:
            result = _scaled_product(low, lora_b.T, part.scale, x.new_empty(x.shape[0], lora_b.shape[0]))
        else:
            result = torch.addmm(bias, low, lora_b.T, alpha=part.scale)
        return result.addmm_(x, _dense(part.weight, x.dtype).T)
    if result is None:
        result = matmul_transposed(x, _updated(part) if merged else _dense(part.weight, x.dtype))
    if lora_b is not None:
        result.addmm_(low, lora_b.T, alpha=part.scale)
    return result if bias is None else result.add_(bias)


def _scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """out = scale * a b, in one launch on a GPU."""
    if _branch_first(a.device):
        return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
    return out.copy_(matmul_transposed(a, b.T)).mul_(scale)


def _grad_b(grad: Tensor, low: Tensor, part: Part) -> Tensor:
    """s dy^T low (out, R)."""
    if _branch_first(grad.device):
        grad_b = _scaled_product(grad.T, low, part.scale, low.new_empty(grad.shape[1], low.shape[1]))
    else:
        # the small factor goes first: the first one is copied when it is transposed
        grad_b = matmul_transposed(low.T, grad.T).mul_(part.scale).T
    return grad_b.to(part.lora_b.dtype)


def _grad_x(grads, parts: list[Part], merged: list[bool], stacked, grad_low, dtype: torch.dtype) -> Tensor:
    """sum over parts of dy W + grad_low A (T, in), in one buffer."""
    on_cpu, total = grads[0].device.type == "cpu", None
    branch_first = grad_low is not None and _branch_first(grads[0].device)
    if branch_first:
        total = grad_low @ stacked
    for part, grad, one in zip(parts, grads, merged):
        weight = _updated(part) if one else _dense(part.weight, dtype)  # (out, in)
        if total is None:
            total = matmul_transposed(grad, weight.T)
        elif on_cpu and dtype is torch.float32:
            total += matmul_transposed(grad, weight.T)  # oneDNN's fp32 product does not accumulate
        else:
            total.addmm_(grad, weight)
    if grad_low is None or branch_first:
        return total
    if not any(merged):
        return total.addmm_(grad_low, stacked)
    for part, one, columns in zip(parts, merged, _columns(grad_low, parts)):
        if columns is not None and not one:
            total.addmm_(columns, part.lora_a.to(dtype))
    return total
