"""Causal attention on a CPU out of oneDNN's products, for the dtypes and lengths at which torch's kernel is
slower.

softmax(q k^T * scale) v for segments of one length, by blocks of queries: a block meets the keys up to its
own end only, so what lies above the diagonal is not multiplied, and no more than a block's scores exist at a
time. The backward pass computes them again. With P = softmax(S), O = P V (arXiv 2205.14135, appendix B):
    dV = P^T dO      dS = P * (dO V^T - sum over keys of P * dO V^T)      dQ = dS K      dK = dS^T Q
The query heads of one key/value head are rows of one product, so K and V are never repeated.

T tokens, N segments of S tokens, H query heads, K key/value heads, G = H / K, D head size; one product serves
N K pairs of segment and head in bf16, and one pair in fp32 (oneDNN's fp32 product has no batches here).
Measured with 33 to 1024 tokens, 9 heads of 64, forward and backward: bf16 1.5 to 3.7 times as fast as torch's
kernel, fp32 1.5 times from 512 tokens on and slower below 300; kernels/__init__.py chooses by that.
"""

import functools
import math

import torch
from torch import Tensor

from kernels.linear import matmul_transposed

# queries; measured best of 64 to 1024: what is skipped above the diagonal against the number of calls
BLOCK = 128
SHORTEST_FP32 = 512  # tokens; below, the many small products of one pair each cost what they save


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, segments: int, scale: float) -> Tensor:
    """q (T, H, D), k and v (T, K, D): `segments` of equal length, one dtype -> (T, H, D), with gradients."""
    return _Attention.apply(q, k, v, segments, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.scale = segments, scale
        queries, keys, values = (_by_head(x, k, segments) for x in (q, k, v))
        out = torch.empty_like(queries)
        for pairs in _pairs_at_once(queries):
            for rows, seen, block in _blocks(queries, keys):
                weights = _weights(queries[pairs, rows], keys[pairs, :seen], block, scale)
                out[pairs, rows] = _product(weights, values[pairs, :seen].mT)
        return _by_token(out, q, segments)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        queries, keys, values, grad_out = (_by_head(x, k, ctx.segments) for x in (q, k, v, grad))
        grad_queries = torch.empty_like(queries)
        grad_keys, grad_values = (x.new_zeros(x.mT.shape) for x in (keys, values))
        for pairs in _pairs_at_once(queries):
            for rows, seen, block in _blocks(queries, keys):
                query, key, grad_row = queries[pairs, rows], keys[pairs, :seen], grad_out[pairs, rows]
                weights = _weights(query, key, block, ctx.scale)  # (pairs, rows, seen)
                grad_values[pairs, :, :seen] += _product(
                    grad_row.mT.contiguous(), weights.mT
                )  # (pairs, D, seen)
                grad_weights = _product(grad_row, values[pairs, :seen])
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_queries[pairs, rows] = _product(grad_scores, key.mT, ctx.scale)
                grad_keys[pairs, :, :seen] += _product(query.mT.contiguous(), grad_scores.mT, ctx.scale)
        grads = (grad_queries, q), (grad_keys.mT, k), (grad_values.mT, v)
        return *(_by_token(grad, x, ctx.segments) for grad, x in grads), None, None


def _weights(queries: Tensor, keys: Tensor, block: int, scale: float) -> Tensor:
    """softmax of the scores (pairs, rows, seen); the last `block` keys are at the rows' own positions."""
    scores = _product(queries, keys, scale)
    scores[..., -block:] += _causal(block, scores.shape[1] // block, scores.dtype)
    return torch.softmax(scores, -1, out=scores)


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a (pairs, M, X) times b (pairs, N, X) transposed -> (pairs, M, N)."""
    if a.dtype is torch.float32:
        result = matmul_transposed(a[0], b[0])[None]  # one pair
        return result if scale == 1.0 else result.mul_(scale)
    # as alpha the scale meets the sum before it is rounded to 16 bits
    return torch.baddbmm(a.new_empty(()).expand(1, 1, 1), a, b.mT, beta=0, alpha=scale)


def _pairs_at_once(queries: Tensor) -> list[slice]:
    pairs = queries.shape[0]
    step = 1 if queries.dtype is torch.float32 else pairs
    return [slice(start, start + step) for start in range(0, pairs, step)]


def _blocks(queries: Tensor, keys: Tensor) -> list[tuple[slice, int, int]]:
    """Rows of a block of queries, how many keys it may see, how many positions it has."""
    length = keys.shape[1]
    group = queries.shape[1] // length
    count = max(1, round(length / BLOCK))
    borders = [length * i // count for i in range(count + 1)]
    blocks = zip(borders, borders[1:])
    return [(slice(start * group, stop * group), stop, stop - start) for start, stop in blocks]


@functools.lru_cache(maxsize=64)
def _causal(block: int, group: int, dtype: torch.dtype) -> Tensor:
    """(block * G, block): 0 where a row's position sees the key, -inf above the diagonal."""
    with torch.inference_mode(False):
        position = torch.arange(block)
        hidden = position[None, :] > position.repeat_interleave(group)[:, None]
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)


def _by_head(x: Tensor, keys: Tensor, segments: int) -> Tensor:
    """(T, heads, D) -> (N K, S heads/K, D), contiguous: rows of one pair, a position's heads side by side."""
    tokens, groups, size = keys.shape
    heads = x.reshape(segments, tokens // segments, groups, -1).transpose(1, 2)
    return heads.reshape(segments * groups, -1, size)


def _by_token(x: Tensor, like: Tensor, segments: int) -> Tensor:
    """The way back: (N K, S heads/K, D) -> the shape of `like`, (T, heads, D)."""
    groups = x.shape[0] // segments
    heads = x.reshape(segments, groups, like.shape[0] // segments, -1).transpose(1, 2)
    return heads.reshape(like.shape)
