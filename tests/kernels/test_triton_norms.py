"""The norm kernels equal their references: odd sizes, narrow and wide rows, strided rows, every gradient."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as, random, relative_error

from kernels import norms
from kernels.layer_norm import layer_norm_reference, layer_norm_triton
from kernels.rms_norm import add_rms_norm_reference, add_rms_norm_triton, rms_norm_reference, rms_norm_triton

pytest.importorskip("triton")
FEW = settings(derandomize=True, max_examples=6, deadline=None)
ROWS, SIZE = st.integers(1, 70), st.integers(2, 700)


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of more than 64 values are wide, so that the interpreter has few of them to do."""
    monkeypatch.setattr(norms, "MAX_BLOCK", 64)
    monkeypatch.setattr(norms, "MAX_BLOCK_BACKWARD", 32)
    monkeypatch.setattr(norms, "WIDE_BLOCK", 32)


def check_rms_norm(rows, size, offset, dtype, trained):
    def kernel(x, weight):
        return rms_norm_triton(x, weight, 1e-5, offset)

    def reference(x, weight):
        return rms_norm_reference(x, weight, 1e-5, offset)

    assert_as_exact_as(
        kernel, reference, [random(rows, size, scale=3.0), random(size, seed=1)], dtype, trained
    )


def check_add_rms_norm(rows, size, offset, dtype, trained):
    def kernel(x, delta, weight):
        return add_rms_norm_triton(x, delta, weight, 1e-5, offset)

    def reference(x, delta, weight):
        return add_rms_norm_reference(x, delta, weight, 1e-5, offset)

    inputs = [random(rows, size, scale=3.0), random(rows, size, seed=2), random(size, seed=1)]
    assert_as_exact_as(kernel, reference, inputs, dtype, trained)


def check_layer_norm(rows, size, dtype, weight, bias, trained):
    def kernel(x, weight, bias):
        return layer_norm_triton(x + 4.0, weight, bias, 1e-5)  # a mean that matters

    def reference(x, weight, bias):
        return layer_norm_reference(x + 4.0, weight, bias, 1e-5)

    inputs = [
        random(rows, size),
        random(size, seed=1) if weight else None,
        random(size, seed=2) if bias else None,
    ]
    assert_as_exact_as(kernel, reference, inputs, dtype, trained)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@FEW
@given(rows=ROWS, size=SIZE)
@example(rows=3, size=1)
@example(rows=1000, size=40)  # many rows per program, several programs
def test_rms_norm_kernel(dtype, offset, rows, size):
    check_rms_norm(rows, size, offset, dtype, (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@FEW
@given(rows=ROWS, size=SIZE)
def test_add_rms_norm_kernel(dtype, offset, rows, size):
    check_add_rms_norm(rows, size, offset, dtype, (0, 1, 2))


@pytest.mark.parametrize("size", [24, 577, 65])
@pytest.mark.parametrize("few", [False, True], ids=["", "wide rows"])
def test_a_stream_in_fp32_with_summands_and_results_in_fp16(request, size, few):
    """And a weight in fp32, which is not rounded."""
    if few:
        request.getfixturevalue("small_blocks")

    def mixed(function):
        def call(x, delta, weight):
            narrow = torch.float16 if x.dtype is torch.float32 else x.dtype
            y, total = function(x * 1e5, delta.to(narrow), weight, 1e-5, dtype=narrow)
            assert (y.dtype, total.dtype) == (narrow, x.dtype) and total.abs().max() > 65504
            return y, total

        return call

    inputs = [random(7, size, scale=3.0), random(7, size, seed=2), random(size, seed=1)]
    assert_as_exact_as(
        mixed(add_rms_norm_triton), mixed(add_rms_norm_reference), inputs, torch.float32, (0, 1, 2)
    )


def test_a_weight_in_fp32_is_not_rounded_to_the_dtype_of_x():
    x, weight = random(5, 64).half(), 1 + random(64, seed=1) / 4096
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5)
    errors = [relative_error(rms_norm_reference(x, one, 1e-5), exact) for one in (weight, weight.half())]
    assert errors[0] < 0.8 * errors[1]
    torch.testing.assert_close(
        rms_norm_triton(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
@FEW
@given(rows=ROWS, size=SIZE)
def test_layer_norm_kernel(dtype, weight, bias, rows, size):
    check_layer_norm(rows, size, dtype, weight, bias, [0, *[1] * weight, *[2] * bias])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 33), (6, 96), (5, 130)])
def test_wide_rows(small_blocks, dtype, rows, size):
    check_rms_norm(rows, size, 1.0, dtype, (0, 1))
    check_add_rms_norm(rows, size, 0.0, dtype, (0, 1, 2))
    check_add_rms_norm(rows, size, 0.0, dtype, (0, 1))
    check_layer_norm(rows, size, dtype, True, True, (0, 1, 2))


@pytest.mark.parametrize("size", [8200, 65536])
def test_the_widest_rows_as_they_come(size):
    check_add_rms_norm(1, size, 0.0, torch.float32, (0, 1, 2))


def test_a_frozen_weight_costs_no_sums(monkeypatch):
    def started(function, *inputs):
        """Names of the kernels that this and its backward pass start."""
        names = []
        with monkeypatch.context() as patch:
            patch.setattr(norms, "run", lambda kernel, *_, **__: names.append(kernel.fn.__name__))
            function(*inputs, 1e-5).sum().backward()
        return names

    x, weight = random(5, 24).requires_grad_(True), random(24)
    assert started(rms_norm_triton, x, weight) == ["_forward_kernel", "_backward_kernel"]
    assert started(layer_norm_triton, x, weight, weight) == ["_forward_kernel", "_backward_kernel"]
    trained = started(rms_norm_triton, x, weight.requires_grad_(True))
    assert trained == ["_forward_kernel", "_backward_kernel", "_sum_programs_kernel"]


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 2), (2,)])
def test_only_the_gradients_that_are_asked_for(trained):
    check_add_rms_norm(9, 24, 0.0, torch.float32, trained)
    check_layer_norm(9, 24, torch.float32, True, True, trained)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_add(dtype):
    """The stream goes on unchanged, and its gradient is added by the kernel all the same."""

    def kernel(x, weight):
        return add_rms_norm_triton(x, None, weight, 1e-5)

    def reference(x, weight):
        return add_rms_norm_reference(x, None, weight, 1e-5)

    inputs = [random(9, 24), random(24, seed=2)]
    assert_as_exact_as(kernel, reference, inputs, dtype, (0, 1))
    x = inputs[0].requires_grad_(True)
    normed, total = kernel(x, inputs[1])
    assert total.data_ptr() == x.data_ptr() and normed.grad_fn is total.grad_fn


@pytest.mark.parametrize("result", [0, 1])
def test_a_result_that_nobody_uses(result):
    inputs = [random(9, 24), random(9, 24, seed=1), random(24, seed=2)]
    places = (0, 1, 2) if result == 0 else (0, 1)
    kernel = lambda *x: add_rms_norm_triton(*x, 1e-5)[result]  # noqa: E731
    reference = lambda *x: add_rms_norm_reference(*x, 1e-5)[result]  # noqa: E731
    assert_as_exact_as(kernel, reference, inputs, torch.float32, places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:20],  # rows of a wider tensor
        lambda x: x.view(18, 8, 24)[:, 2:5],  # heads of one product
        lambda x: x.view(6, 3, 8, 24)[:, :, 2:5],
        lambda x: x.view(18, 24, 8).transpose(1, 2),  # values that do not lie together
        lambda x: x[:1].expand(7, -1),
        lambda x: x[4],
    ],
)
def test_rows_of_any_layout(view, dtype):
    wide, weight = random(18, 8 * 24, scale=3.0), random(8 * 24, seed=1)

    def through(function):
        return lambda x, weight: function(view(x), weight[: view(x).shape[-1]], 1e-5).transpose(0, -1)

    assert_as_exact_as(through(rms_norm_triton), through(rms_norm_reference), [wide, weight], dtype, (0, 1))


def test_a_master_weight_gets_a_gradient_in_its_own_dtype():
    x, weight = random(9, 24).half(), random(24, seed=1).requires_grad_(True)
    y = rms_norm_triton(x, weight, 1e-5)
    torch.testing.assert_close(y, rms_norm_reference(x, weight, 1e-5))
    y.sum().backward()
    assert y.dtype == torch.float16 and weight.grad.dtype == torch.float32


def test_the_weights_gradient_has_the_same_bits_every_time():
    gradients = set()
    for _ in range(3):
        weight = random(24, seed=1).requires_grad_(True)
        rms_norm_triton(random(999, 24), weight, 1e-5).square().sum().backward()
        gradients.add(weight.grad.cpu().numpy().tobytes())
    assert len(gradients) == 1


def test_the_mean_is_taken_in_fp32():
    x = torch.full((1, 64), 300.0, device=DEVICE).half()  # its square is beyond fp16
    torch.testing.assert_close(rms_norm_triton(x, torch.ones(64, device=DEVICE), 1e-6), torch.ones_like(x))


def test_no_rows():
    x, weight = torch.zeros(0, 24, device=DEVICE, requires_grad=True), random(24).requires_grad_(True)
    y, total = add_rms_norm_triton(x, x, weight, 1e-5)
    (y.sum() + total.sum()).backward()
    assert y.shape == (0, 24) and weight.grad.eq(0).all()


def test_what_the_kernels_do_not_serve():
    assert norms.unsupported(torch.empty(2, norms.MAX_SIZE)) is None
    assert "at most 65536" in norms.unsupported(torch.empty(2, norms.MAX_SIZE + 1))
    assert "float64" in norms.unsupported(torch.empty(2, 4).double())
    assert "two shapes" in norms.unsupported(torch.empty(2, 4), torch.empty(1, 4))
