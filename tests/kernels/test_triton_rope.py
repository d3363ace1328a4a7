"""The rotary kernel equals its reference: odd sizes, both conventions, partial rotary, strided q, k and
gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, assert_as_exact_as, random

from kernels.rope import rope_reference, rope_triton

pytest.importorskip("triton")


def operands(tokens, heads, kv_heads, size, rotary):
    angle = random(tokens, rotary // 2, seed=1, scale=5.0)
    return [random(tokens, heads, size), random(tokens, kv_heads, size, seed=2), angle.cos(), angle.sin()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@settings(derandomize=True, max_examples=6, deadline=None)
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    half=st.integers(1, 40),
    rest=st.integers(0, 33),
)
def test_rope_kernel(dtype, interleaved, tokens, heads, kv_heads, half, rest):
    def kernel(q, k, cos, sin):
        return rope_triton(q, k, cos, sin, interleaved)

    def reference(q, k, cos, sin):
        return rope_reference(q, k, cos, sin, interleaved)

    inputs = operands(tokens, heads, kv_heads, 2 * half + rest, 2 * half)
    assert_as_exact_as(kernel, reference, inputs, dtype, (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_and_k_may_be_columns_of_one_product(dtype):
    """And the gradients may be views as well: here the kernel's results are transposed on their way to the
    loss."""

    def through(function):
        def run(fused, cos, sin):
            q, k, _ = fused.view(19, 8, 24).split([5, 2, 1], dim=1)
            return [x.transpose(0, 1) for x in function(q, k, cos, sin)]

        return run

    angle = random(19, 12, seed=1)
    inputs = [random(19, 8 * 24), angle.cos(), angle.sin()]
    assert_as_exact_as(through(rope_triton), through(rope_reference), inputs, dtype, (0,))


def test_values_in_any_order_and_gradients_without_memory_of_their_own():
    def through(function):
        def run(q, k, cos, sin):
            turned_q, turned_k = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return turned_q.sum(), turned_k.sum(0)  # gradients with strides of 0

        return run

    angle = random(7, 4, seed=1)
    inputs = [random(7, 8, 3), random(7, 8, 2, seed=2), angle.cos(), angle.sin()]
    assert_as_exact_as(through(rope_triton), through(rope_reference), inputs, torch.float32, (0, 1))


def test_one_gradient_alone_is_enough():
    q, k, cos, sin = operands(5, 3, 1, 8, 8)
    q.requires_grad_(True)
    rope_triton(q, k, cos, sin)[0].sum().backward()
    expected = rope_reference(torch.ones_like(k).expand(5, 3, 8), k, cos, -sin)[0]
    torch.testing.assert_close(q.grad, expected)


def test_nothing_is_changed_in_place():
    inputs = operands(9, 2, 2, 12, 8)
    before = [x.clone() for x in inputs]
    rope_triton(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(inputs, before))
