"""Losses of hidden rows: chunks in torch and in Triton against the plain reference; memory, bad labels, the
formula."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, evaluate, random, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.cross_entropy import linear_cross_entropy_reference, linear_logprobs_reference

file = importlib.import_module("kernels.cross_entropy")
TERMS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": -0.25},
    {"label_smoothing": 0.1},
    {"z_loss": 0.02},
    {"softcap": 2.0, "logit_scale": 1.5, "label_smoothing": 0.2, "z_loss": 0.1},
]
SLACK = {
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}  # a sum of few logits can be right by luck
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Borders of blocks and chunks fall inside the small shapes of these tests."""
    monkeypatch.setattr(file, "LOOP_BLOCK", 64)
    monkeypatch.setattr(file, "ROW_MULTIPLE", 4)
    monkeypatch.setattr(file, "WORKSPACE_BYTES", 4 * 200 * 4)
    monkeypatch.setattr(file, "CHUNK_BYTES", 4 * 131 * 5)


def operands(rows, size, classes, biased=False):
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(classes)).to(DEVICE)
    bias = random(classes, seed=2) if biased else None
    return [random(rows, size), random(classes, size, seed=1, scale=0.5), labels, bias]


def assert_agrees(kernel, reference, inputs, dtype, trained, **terms):
    inputs = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    exact = evaluate(lambda *x: reference(*x, **terms), inputs, torch.float64, trained)
    plain = evaluate(lambda *x: reference(*x, **terms), inputs, dtype, trained)
    found = evaluate(lambda *x: kernel(*x, **terms), inputs, dtype, trained)
    for place, (one, other, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert one.shape == truth.shape and one.dtype is other.dtype
        error, allowed = relative_error(one, truth), 2 * relative_error(other, truth) + SLACK[dtype]
        assert error <= allowed, f"result {place}: error {error:.2e}, allowed {allowed:.2e}"


LINEAR = ["linear_cross_entropy", "linear_cross_entropy_triton"]
LOGPROBS = ["linear_logprobs", "linear_logprobs_triton"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize(
    "classes", [131, 48]
)  # 48: in 16 bits and without terms, the kernel that holds whole rows
@pytest.mark.parametrize("name", LINEAR)
def test_linear_cross_entropy(name, classes, terms, dtype):
    inputs = operands(9, 33, classes)
    assert_agrees(getattr(file, name), linear_cross_entropy_reference, inputs, dtype, (0, 1), **terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [{}, {"softcap": 3.0, "logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("classes", [131, 48])
@pytest.mark.parametrize("name", LOGPROBS)
def test_linear_logprobs(name, classes, terms, dtype):
    inputs = operands(9, 33, classes)
    assert_agrees(getattr(file, name), linear_logprobs_reference, inputs, dtype, (0, 1), **terms)


@pytest.mark.parametrize("name", LINEAR)
def test_a_loss_scale_beyond_float16_reaches_the_gradients_unrounded(name):
    """GradScaler begins with 2^16; fp16 ends below it, and would round 2049 to 2048."""
    hidden, weight, labels, _ = operands(9, 33, 48)
    inputs = [(x * 1e-2).half().requires_grad_(True) for x in (hidden, weight)]
    loss = getattr(file, name)(*inputs, labels)
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    for scale in (2.0**16, 2.0**11 + 1):
        scaled = torch.autograd.grad(loss, inputs, torch.tensor(scale, device=DEVICE), retain_graph=True)
        assert torch.equal(scaled[0], (plain[0].float() * scale).half())
        assert scaled[1].isfinite().all()


@pytest.mark.parametrize("trained", [(0,), (1,), (3,), (0, 3), ()])
@pytest.mark.parametrize("name", LINEAR + LOGPROBS)
def test_with_a_bias_each_gradient_comes_alone(name, trained):
    inputs = operands(9, 33, 131, biased=True)
    reference = linear_cross_entropy_reference if name in LINEAR else linear_logprobs_reference
    assert_agrees(getattr(file, name), reference, inputs, torch.float32, trained, softcap=2.0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 11),
    size=st.integers(1, 40),
    classes=st.integers(1, 200),
    biased=st.booleans(),
    terms=st.sampled_from(TERMS),
    half=st.booleans(),
)
def test_odd_shapes(rows, size, classes, biased, terms, half):
    file.LOOP_BLOCK = 64  # the fixture's value; hypothesis runs outside of it
    inputs, dtype = operands(rows, size, classes, biased), torch.float16 if half else torch.float32
    trained = (0, 1, 3) if biased else (0, 1)
    if classes == 1 and not terms.get("z_loss"):
        trained = ()  # one class is certain: the exact gradient is zero, and no error is relative to that
    kernel = file.linear_cross_entropy_triton
    assert_agrees(kernel, linear_cross_entropy_reference, inputs, dtype, trained, **terms)


def test_the_reference_is_the_formula():
    """The file's head, with every term; gradients of the chunks in torch against it in fp64."""
    hidden, weight, labels, bias = (
        x.double() if x.is_floating_point() else x for x in operands(7, 5, 11, True)
    )
    a, c, e, w = 1.5, 2.0, 0.2, 0.1
    terms = {"logit_scale": a, "softcap": c, "label_smoothing": e, "z_loss": w}
    z = c * torch.tanh(a * (hidden @ weight.T + bias) / c)
    lse = z.exp().sum(1).log()
    expected = lse - (1 - e) * z[torch.arange(7), labels] - e * z.mean(1) + w * lse**2
    found = linear_cross_entropy_reference(hidden, weight, labels, bias, **terms)
    torch.testing.assert_close(found, expected.sum(), rtol=1e-12, atol=0)

    def chunked(hidden, weight, bias):
        return file.linear_cross_entropy(hidden, weight, labels, bias, **terms)

    assert torch.autograd.gradcheck(chunked, [x.requires_grad_(True) for x in (hidden, weight, bias)])

    def logprobs(hidden, weight, bias):
        return file.linear_logprobs(hidden, weight, labels, bias, softcap=c, logit_scale=a)

    assert torch.autograd.gradcheck(logprobs, [hidden, weight, bias])


@pytest.mark.parametrize("terms", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [131, 48])
@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_triton"])
def test_plain_cross_entropy_writes_its_gradient_over_the_logits(name, classes, dtype, terms):
    given, labels = random(9, classes, scale=3.0).to(dtype), operands(9, 3, classes)[2]
    exact_logits = given.double().requires_grad_(True)
    exact = file.cross_entropy_reference(exact_logits, labels, **terms)
    exact.backward(torch.tensor(0.5, dtype=torch.float64, device=DEVICE))
    logits = given.clone().requires_grad_(True)
    loss = getattr(file, name)(logits, labels, **terms)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward(torch.tensor(0.5, device=DEVICE))
    assert logits.grad.data_ptr() == logits.data_ptr()  # nothing of their size was made
    assert relative_error(logits.grad, exact_logits.grad) < {torch.float32: 1e-6}.get(dtype, 4e-3)
    plain = given.clone()
    with torch.no_grad():
        assert getattr(file, name)(plain, labels, **terms).item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.equal(plain, given)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_triton"])
def test_who_still_needs_the_logits_is_refused(name):
    labels = operands(9, 3, 48)[2]
    logits = random(9, 48).requires_grad_(True)
    loss = getattr(file, name)(logits, labels)
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 2).backward()
    logits = random(9, 48).requires_grad_(True) * 1.0
    other = logits.square().sum()
    total = other + getattr(file, name)(logits, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_logits_whose_rows_lie_apart():
    """A slice of a wider tensor: what stands beside it is not touched."""
    wide = random(9, 80)
    before, labels = wide.clone(), operands(9, 3, 48)[2]
    part = wide[:, 16:64].requires_grad_(True)
    expected = file.cross_entropy_reference(part.detach().double(), labels)
    loss = file.cross_entropy_triton(part, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert torch.equal(wide[:, :16], before[:, :16]) and torch.equal(wide[:, 64:], before[:, 64:])


@pytest.mark.parametrize("classes", [131, 48])
@pytest.mark.parametrize("bad", [-100, -1, 131, 2**40])
def test_labels_that_there_are_not(bad, classes):
    hidden, weight, labels, _ = operands(5, 33, classes)
    labels[3] = bad
    if DEVICE == "cpu":
        for name in ("linear_cross_entropy", "linear_logprobs"):
            with pytest.raises(
                ValueError, match=rf"labels: not all are in 0\.\.{classes - 1} \(index {bad} is out"
            ):
                getattr(file, name)(hidden, weight, labels)
    for dtype in DTYPES:
        leaf = hidden.to(dtype, copy=True).requires_grad_(True)
        result = file.linear_logprobs_triton(leaf, weight.to(dtype), labels)
        assert result.isnan().tolist() == [False, False, False, True, False]
        assert file.linear_cross_entropy_triton(leaf, weight.to(dtype), labels).isnan()
        result.sum().backward()
        assert leaf.grad.isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("name", LINEAR + LOGPROBS)
def test_large_logits_and_a_loss_near_zero(name):
    hidden = torch.tensor([[60.0, 0, 0], [-60.0, 0, 0]], device=DEVICE)
    weight, labels = torch.eye(3, device=DEVICE) * 60, torch.tensor([0, 0], device=DEVICE)
    result = getattr(file, name)(hidden, weight, labels)
    expected = 3600 + torch.log(torch.tensor(2.0)).item()
    assert result.abs().sum().item() == pytest.approx(expected, rel=1e-6)


class _Largest(TorchDispatchMode):
    """The most values of any tensor that an operation gives."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if torch.is_tensor(result):
                self.values = max(self.values, result.numel())
        return results


@pytest.mark.parametrize("name", LINEAR + LOGPROBS)
def test_logits_of_all_rows_never_exist(name):
    rows, size, classes = 60, 7, 131
    hidden, weight, labels, _ = operands(rows, size, classes)
    with _Largest() as largest:
        getattr(file, name)(hidden.requires_grad_(True), weight, labels).sum().backward()
    assert max(rows * size, classes * size) <= largest.values <= rows * classes / 2
    with _Largest() as largest:
        linear_cross_entropy_reference(hidden, weight, labels)
    assert largest.values == rows * classes  # what the test would see


def test_logprobs_keep_their_inputs_and_nothing_else():
    kept = []
    hidden, weight, labels, _ = operands(9, 33, 131)
    hidden.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        file.linear_logprobs_triton(hidden, weight, labels)
    assert set(kept) == {x.data_ptr() for x in (hidden, weight, labels)}


def test_chunks_of_a_gpu_fit_the_workspace_and_have_about_one_size(monkeypatch):
    monkeypatch.undo()
    rows = file._TritonChunks.rows
    assert rows(8192, 32000, torch.bfloat16) == 4096 and rows(8192, 128256, torch.bfloat16) == 1024
    assert rows(1100, 128256, torch.bfloat16) == 640  # not 1024 and 76
    assert rows(5, 32000, torch.bfloat16) == 128  # the workspace itself is cut to 5
    for classes in (577, 32000, 50257, 151936, 262144):
        for count in (1, 1000, 8192, 100_000):
            for dtype in (torch.bfloat16, torch.float32):
                step = rows(count, classes, dtype)
                assert step % 128 == 0
                assert step * file._row_stride(classes) * dtype.itemsize <= 256 * 2**20


@pytest.mark.parametrize(
    "terms, message",
    [
        ({"softcap": 0.0}, "softcap: 0.0 must be above 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing: 1.5 is not in \[0, 1\]"),
        ({"z_loss": -1.0}, "z_loss: -1.0 is below 0"),
    ],
)
def test_bad_terms_name_themselves(terms, message):
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(*operands(2, 3, 5), **terms)


def test_the_choice_passes_every_term_on():
    inputs = operands(9, 33, 131, biased=True)
    found = kernels.linear_cross_entropy(*inputs, **TERMS[-1])
    torch.testing.assert_close(
        found, linear_cross_entropy_reference(*inputs, **TERMS[-1]), rtol=1e-5, atol=1e-5
    )
    found = kernels.linear_logprobs(*inputs, softcap=2.0, logit_scale=0.5)
    expected = linear_logprobs_reference(*inputs, softcap=2.0, logit_scale=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    logits = random(9, 131)
    expected = file.cross_entropy_reference(logits, inputs[2], **TERMS[-1])
    torch.testing.assert_close(
        kernels.cross_entropy(logits, inputs[2], **TERMS[-1]), expected, rtol=1e-5, atol=1e-5
    )
