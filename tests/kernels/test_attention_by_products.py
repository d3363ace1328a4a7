"""Attention out of products (CPU): equal to the formula, values and every gradient, across its block
borders."""

import math

import pytest
import torch
from kernel_checks import assert_as_exact_as, random

import kernels
from kernels import attention_by_products as by_products


def formula(q, k, v, segments, scale):
    """Every score written out, segment by segment."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    results = []
    for query, key, value in zip(*(x.chunk(segments) for x in (q, k, v))):
        scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        results.append(
            torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)
        )
    return torch.cat(results)


def operands(segments, length, heads, size):
    tokens, (queries, keys) = segments * length, heads
    return [
        random(tokens, queries, size),
        random(tokens, keys, size, seed=1),
        random(tokens, keys, size, seed=2),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize(("segments", "length", "size"), [(1, 1, 2), (3, 17, 10), (2, 129, 16), (1, 333, 24)])
def test_equals_the_formula(segments, length, size, heads, dtype, monkeypatch):
    monkeypatch.setattr(by_products, "BLOCK", 64)  # several blocks, uneven ones among them
    inputs = [*operands(segments, length, heads, size), segments, 0.3]
    # a single key has the weight 1: its score gets no gradient at all
    trained = (0, 1, 2) if length > 1 else (2,)
    assert_as_exact_as(by_products.attention_by_products, formula, inputs, dtype, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_prompt_in_a_cache_equals_the_row_alone(dtype, monkeypatch):
    monkeypatch.setattr(by_products, "SHORTEST_FP32", 1)
    q, k, v = (x.to(dtype) for x in operands(1, 30, (6, 2), 8))
    keys, values = (torch.zeros(2, 2, 40, 8, dtype=dtype) for _ in range(2))
    borders = [0, 13, 30]
    for i, (start, stop) in enumerate(zip(borders, borders[1:])):
        keys[i, :, : stop - start], values[i, :, : stop - start] = (
            x[start:stop].transpose(0, 1) for x in (k, v)
        )
    found = kernels.cached_attention(q, keys, values, borders, [13, 17], None, 0.3)
    row = kernels.attention(q, k, v, torch.tensor(borders, dtype=torch.int32), 17, None, 0.3)
    torch.testing.assert_close(found, row)
    monkeypatch.setattr(kernels, "_whole", lambda dtype: (None, math.inf))
    other = kernels.cached_attention(q, keys, values, borders, [13, 17], None, 0.3)
    torch.testing.assert_close(
        found.float(), other.float(), atol=0.03 if dtype is torch.bfloat16 else 1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.bfloat16, 40), (torch.float32, by_products.SHORTEST_FP32)]
)
def test_is_taken_where_it_pays_and_never_for_a_window(dtype, length):
    if length < kernels._whole(dtype)[1]:
        pytest.skip("this processor has no instructions for it")
    q, k, v = (x.to(dtype).requires_grad_() for x in operands(1, length, (2, 1), 8))
    borders = torch.tensor([0, length], dtype=torch.int32)
    for window, taken in ((None, True), (length, True), (length - 1, False)):
        out = kernels.attention(q, k, v, borders, length, window, 0.3)
        assert (type(out.grad_fn).__name__ == "_AttentionBackward") == taken
