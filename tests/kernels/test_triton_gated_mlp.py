"""The gated activation kernel equals its reference: every activation, odd sizes, strided halves, both
gradients."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as, random

from kernels.gated_mlp import ACTIVATIONS, gated_mlp_reference, gated_mlp_triton, unsupported

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(derandomize=True, max_examples=5, deadline=None)
@given(tokens=st.integers(1, 40), size=st.integers(1, 300))
def test_gated_mlp_kernel(dtype, activation, tokens, size):
    def kernel(gate, up):
        return gated_mlp_triton(gate, up, activation)

    def reference(gate, up):
        return gated_mlp_reference(gate, up, activation)

    inputs = [random(tokens, size, scale=2.0), random(tokens, size, seed=1)]
    assert_as_exact_as(kernel, reference, inputs, dtype, (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "halves",
    [
        lambda x: x.chunk(2, dim=-1),  # of one product
        lambda x: (x[:, :20], x[:, 20:40].clone()),
        lambda x: (x[:20].T, x[20:].T),  # columns that do not lie together
        lambda x: (x[None, :, 3:5], x[None, :, :2]),
    ],
)
def test_gate_and_up_of_any_layout(monkeypatch, halves, dtype):
    monkeypatch.setattr(
        importlib.import_module("kernels.gated_mlp"), "BLOCK", 16
    )  # so that a row has several blocks

    def through(function):
        return lambda x: function(*halves(x), "silu").transpose(0, 1)  # the gradient is a view, too

    assert_as_exact_as(through(gated_mlp_triton), through(gated_mlp_reference), [random(40, 40)], dtype, (0,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_nothing_overflows(activation):
    gate = torch.tensor([-3e4, -100.0, -20.0, 0.0, 20.0, 100.0, 3e4], device=DEVICE).requires_grad_(True)
    expected = gate.detach().double().requires_grad_(True)
    gated_mlp_triton(gate, torch.ones_like(gate), activation).sum().backward()
    gated_mlp_reference(expected, torch.ones_like(expected), activation).sum().backward()
    torch.testing.assert_close(gate.grad.double(), expected.grad, rtol=1e-6, atol=1e-6)


def test_only_gate_and_up_are_kept_and_left_alone():
    gate, up = random(5, 24).requires_grad_(True), random(5, 24, seed=1).requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        result = gated_mlp_triton(gate, up, "gelu")
    result.sum().backward()
    assert kept == [gate.data_ptr(), up.data_ptr()]
    assert torch.equal(gate, random(5, 24)) and torch.equal(up, random(5, 24, seed=1))


def test_no_tokens_and_what_the_kernels_do_not_serve():
    gate = torch.zeros(0, 7, device=DEVICE, requires_grad=True)
    gated_mlp_triton(gate, gate, "silu").sum().backward()
    assert gate.grad.shape == (0, 7)
    assert "float64" in unsupported(gate.double(), gate.double())
    assert "two shapes" in unsupported(gate, gate[:, :1])
