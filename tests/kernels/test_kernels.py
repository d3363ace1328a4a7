"""Every operation against its formula in fp64: values and all gradients, odd sizes, each dtype.

tests/kernel_checks.py states the error rule. The Triton kernels have files of their own, test_triton_*.py.
"""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_as_exact_as, evaluate, random, relative_error

import kernels
from kernels.attention import attention_reference, cached_attention_reference
from kernels.cross_entropy import linear_cross_entropy_reference
from kernels.gated_mlp import ACTIVATIONS, gated_mlp_reference
from kernels.linear import Part, linear_onednn, linear_reference, onednn_fp32_available
from kernels.lora_linear import lora_linears, lora_linears_reference
from kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from kernels.rope import rope_reference

ROOT = Path(__file__).resolve().parents[2]
cross_entropy, lora_linear = (
    importlib.import_module(f"kernels.{name}") for name in ("cross_entropy", "lora_linear")
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_onednn = pytest.mark.skipif(not onednn_fp32_available(), reason="no oneDNN with 512-bit registers here")


def test_references_in_fp64_are_the_formulas():
    """What the rest of this file leans on, written once more the long way."""
    x, weight, bias = (random(*shape).double() for shape in ((5, 7), (3, 7), (3,)))
    torch.testing.assert_close(linear_reference(x, weight, bias), x @ weight.T + bias)
    a, b = random(2, 7, seed=1).double(), random(3, 2, seed=2).double()
    expected = x @ (weight + 0.5 * b @ a).T + bias
    torch.testing.assert_close(one(lora_linears_reference)(x, weight, bias, a, b, 0.5), expected)
    torch.testing.assert_close(rms_norm_reference(x, x[0], 1e-3), F.rms_norm(x, (7,), x[0], 1e-3))
    torch.testing.assert_close(gated_mlp_reference(x, x * 2, "silu"), x * torch.sigmoid(x) * x * 2)
    angle = random(5, 4, seed=3).double()
    q = random(5, 2, 8, seed=4).double()
    turned = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    for found in rope_reference(q, q, angle.cos(), angle.sin()):
        torch.testing.assert_close(found, expected)
    labels = torch.tensor([0, 2, 1, 1, 0])
    logits = (x.float() @ weight.float().T + bias.float()).double()
    expected = (logits.logsumexp(1) - logits[torch.arange(5), labels]).sum()
    found = linear_cross_entropy_reference(x.float(), weight.float(), labels, bias.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_what_a_triton_kernel_supports_is_asked_on_its_device_only(monkeypatch):
    def unsupported(*tensors):
        raise AssertionError("asked on a CPU")

    monkeypatch.setattr(kernels, "_MODE", "auto")
    for name in ("_norms", "_rope", "_gated_mlp", "_cross_entropy", "_flash", "_decode_attention", "_nf4"):
        monkeypatch.setattr(getattr(kernels, name), "unsupported", unsupported)
    x, q = random(5, 8), random(5, 2, 4)
    kernels.rms_norm(x, x[0], 1e-6)
    kernels.layer_norm(x, x[0], x[0], 1e-6)
    kernels.gated_mlp(x, x, "silu")
    kernels.rope(q, q, x[:, :2], x[:, :2])
    kernels.attention(q, q, q, torch.tensor([0, 5], dtype=torch.int32), 5, None, 0.5)


# Products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 65), (123, 60, 77), (2, 128, 64)])
@pytest.mark.parametrize("kernel", [kernels.linear, pytest.param(linear_onednn, marks=needs_onednn)])
def test_linear(kernel, shape, with_bias, dtype):
    rows, inputs, outputs = shape
    bias = [random(outputs, seed=2)] if with_bias else []
    operands = [random(rows, inputs), random(outputs, inputs, seed=1), *bias]
    assert_as_exact_as(kernel, linear_reference, operands, dtype, range(len(operands)))
    assert_as_exact_as(kernel, linear_reference, operands, dtype, [])  # the path of decoding


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_linear_gives_the_gradients_that_are_asked_for(trained):
    operands = [random(9, 10), random(11, 10, seed=1), random(11, seed=2)]
    assert_as_exact_as(kernels.linear, linear_reference, operands, torch.float32, trained)


@pytest.mark.parametrize("rows", [1, 6])
def test_linear_reads_weights_in_any_layout(rows):
    """As a table for decoding (generation/layout.py) or a slice of one; with and without gradients."""
    table, x = random(40, 100), random(rows, 40, seed=1)
    for weight in (table.T, table[:, 13:64].T, random(51, 80, seed=2)[:, ::2]):
        with torch.no_grad():
            torch.testing.assert_close(kernels.linear(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)
        operands = [x, weight]
        assert_as_exact_as(kernels.linear, linear_reference, operands, torch.float32, (0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_casts_a_master_weight_and_gives_it_a_gradient_in_its_own_dtype(dtype):
    x, weight = random(9, 10).to(dtype), random(11, 10, seed=1).requires_grad_(True)
    bias = random(11, seed=2).requires_grad_(True)
    result = kernels.linear(x, weight, bias)
    assert result.dtype == dtype
    torch.testing.assert_close(result, F.linear(x, weight.to(dtype), bias.to(dtype)))
    result.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad[0], x.float().sum(0), rtol=1e-2, atol=1e-2)


def test_products_without_rows():
    weight, a, b = random(11, 10), random(2, 10, seed=1), random(11, 2, seed=2)
    for tensor in (weight, a, b):
        tensor.requires_grad_(True)
    with torch.no_grad():
        assert kernels.linear(torch.zeros(0, 10), weight).shape == (0, 11)
    kernels.linear(torch.zeros(0, 10), weight).sum().backward()
    one(kernels.linears)(
        torch.zeros(0, 10, requires_grad=True), weight.detach(), None, a, b, 2.0
    ).sum().backward()
    assert all(tensor.grad.eq(0).all() for tensor in (weight, a, b))


def one(function):
    """A function of several parts as one of the tensors of one part."""
    return lambda x, *part: function(x, [Part(*part)])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 12, 123])  # 60 * 77 / (60 + 77) = 33.7: both orders
def test_lora_linear(rows, with_bias, dtype):
    bias = random(77, seed=2) if with_bias else None
    low = [random(5, 60, seed=3, scale=0.3), random(77, 5, seed=4, scale=0.3)]
    operands = [random(rows, 60), random(77, 60, seed=1), bias, *low, 1.7]
    kernel, reference = one(kernels.linears), one(lora_linears_reference)
    assert_as_exact_as(kernel, reference, operands, dtype, (0, 3, 4))
    assert_as_exact_as(kernel, reference, operands, dtype, (3, 4))  # the first layer


@pytest.mark.parametrize("merged", [False, True])
def test_both_orders_of_lora_linear_agree(merged, monkeypatch):
    """Whatever the size at which the one becomes cheaper than the other."""
    monkeypatch.setattr(lora_linear, "_merged", lambda *_: merged)
    operands = [random(31, 20), random(24, 20, seed=1), random(24, seed=2), random(3, 20), random(24, 3), 0.6]
    assert_as_exact_as(one(lora_linears), one(lora_linears_reference), operands, torch.float32, (0, 3, 4))


def test_lora_linear_over_a_weight_that_trains():
    operands = [random(31, 20), random(24, 20, seed=1), random(24, seed=2), random(3, 20), random(24, 3), 0.6]

    def run(function):
        leaves = [x.clone().requires_grad_(True) for x in operands[:5]]
        return torch.autograd.grad(function(*leaves, 0.6).square().sum(), leaves)

    for found, expected in zip(run(one(kernels.linears)), run(one(lora_linears_reference))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_fp32_adapters_beside_a_bf16_base_get_fp32_gradients():
    x, weight = random(31, 20).bfloat16(), random(24, 20, seed=1).bfloat16()
    a, b = random(3, 20).requires_grad_(True), random(24, 3).requires_grad_(True)
    result = one(kernels.linears)(x, weight, None, a, b, 0.5)
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


# Cross entropy


@pytest.fixture(params=[None, 1, 5])
def rows_per_chunk(request, monkeypatch):
    """None: as shipped. Else chunks so small that borders fall inside the rows."""
    if request.param is not None:
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 131 * request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "head", "both", "nothing"])
def test_linear_cross_entropy(rows_per_chunk, trained, with_bias, dtype):
    labels = torch.randint(0, 131, (17,), generator=torch.Generator().manual_seed(5))
    bias = random(131, seed=2) if with_bias else None
    operands = [random(17, 33), random(131, 33, seed=1, scale=0.3), labels, bias]
    places = {"hidden": [0], "head": [1], "both": [0, 1], "nothing": []}[trained]
    if with_bias and trained in ("head", "both"):
        places.append(3)

    def in_dtype(hidden, weight, labels, bias):
        return kernels.linear_cross_entropy(hidden, weight, labels, bias)

    def oracle(hidden, weight, labels, bias):
        logits = hidden @ weight.T
        return F.cross_entropy(logits if bias is None else logits + bias, labels, reduction="sum").float()

    # the rule is about the reference's own error; a sum of few logits can be right by luck
    inputs = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in operands]
    exact = evaluate(oracle, inputs, torch.float64, places)
    plain = evaluate(linear_cross_entropy_reference, inputs, dtype, places)
    found = evaluate(in_dtype, inputs, dtype, places)
    slack = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for one, other, truth in zip(found, plain, exact):
        assert one.dtype == other.dtype
        assert relative_error(one, truth) <= 2 * relative_error(other, truth) + slack
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_of_no_rows_is_zero_with_gradients(with_bias):
    hidden, weight = torch.zeros(0, 33, requires_grad=True), random(131, 33).requires_grad_(True)
    bias = random(131).requires_grad_(True) if with_bias else None
    loss = kernels.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), bias)
    assert loss.item() == 0 and loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.shape == (0, 33)
    assert weight.grad.eq(0).all()
    assert bias is None or bias.grad.eq(0).all()


def test_cross_entropy_scales_with_what_follows_even_beyond_fp16(rows_per_chunk):
    """fp16 loss scaling multiplies by 2^16: the scaled gradient of the head must not pass through fp16
    infinity."""
    hidden, weight = random(9, 33, scale=0.1).half(), random(131, 33, seed=1, scale=0.1)
    labels = torch.arange(9)
    gradients = []
    for factor in (1.0, 2.0**12):
        leaves = [hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)]
        (kernels.linear_cross_entropy(leaves[0], leaves[1], labels) * factor).backward()
        gradients.append([leaf.grad for leaf in leaves])
        assert leaves[1].grad.dtype == torch.float32
    torch.testing.assert_close(gradients[1][1], gradients[0][1] * 2.0**12, rtol=1e-3, atol=1e-3)
    assert gradients[1][0].isfinite().all()


def test_cross_entropy_survives_large_logits():
    hidden, weight = torch.full((2, 3), 60.0), torch.eye(3) * 60
    loss = kernels.linear_cross_entropy(hidden * torch.tensor([[1.0], [-1.0]]), weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(2 * torch.log(torch.tensor(3.0)).item())


# Attention


def naive_attention(q, k, v, window, scale):
    """One segment, every score written out; q may be the last rows only. (n, H, D), (m, K, D) -> (n, H,
    D)."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    query = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def borders_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", [(17,), (1, 1, 1), (5, 1, 9, 9, 2)])
def test_attention(lengths, window, heads, dtype):
    tokens, borders = sum(lengths), borders_of(lengths)
    operands = [random(tokens, number, 10, seed=i) for i, number in enumerate((heads[0], heads[1], heads[1]))]

    def oracle(q, k, v):
        parts = zip(*(x.split(lengths) for x in (q, k, v)))
        return torch.cat([naive_attention(*part, window, 0.3) for part in parts])

    def kernel(q, k, v):
        return kernels.attention(q, k, v, borders, max(lengths), window, 0.3)

    def reference(q, k, v):
        return attention_reference(q, k, v, borders, max(lengths), window, 0.3)

    exact = evaluate(oracle, [x.to(dtype) for x in operands], torch.float64, (0, 1, 2))
    for function in (kernel, reference):
        found = evaluate(function, [x.to(dtype) for x in operands], dtype, (0, 1, 2))
        for one, truth in zip(found, exact):
            if truth.norm() > 1e-9:  # a window of one token: q and k have no gradient
                tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
                assert relative_error(one, truth) < tolerance
            else:
                assert one.abs().max() < 1e-5


def test_an_empty_segment_changes_nothing():
    q, k, v = (random(7, 2, 10, seed=i) for i in range(3))
    with_gap = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    without = torch.tensor([0, 3, 7], dtype=torch.int32)
    found = kernels.attention(q, k, v, with_gap, 4, None, 0.3)
    torch.testing.assert_close(found, kernels.attention(q, k, v, without, 4, None, 0.3))


def test_attention_with_one_mask_as_on_a_gpu_equals_that_by_segments():
    from kernels.attention import _one_mask

    q, k, v = random(26, 6, 10), random(26, 2, 10, seed=1), random(26, 2, 10, seed=2)
    borders = borders_of((5, 1, 9, 9, 2))
    for window in (None, 4):
        found = _one_mask(q, k, v, borders, window, 0.3)
        torch.testing.assert_close(found, attention_reference(q, k, v, borders, 9, window, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(
    ("new", "lengths"),
    [
        ((1,), (9,)),  # decoding one sequence
        ((1, 1, 1), (9, 1, 14)),  # decoding several
        ((7, 3, 1), (7, 3, 1)),  # a first prompt
        ((2, 5), (9, 12)),  # a next turn
        ((6,), (6,)),
        ((3, 1, 1), (5, 9, 1)),  # both
    ],
)
def test_cached_attention(new, lengths, window, heads, dtype):
    queries, capacity = sum(new), 16
    q = random(queries, heads[0], 10).to(dtype)
    keys, values = (random(len(new), heads[1], capacity, 10, seed=i).to(dtype) for i in (1, 2))
    borders = borders_of(new).tolist()
    exact = torch.cat([
        naive_attention(
            q[borders[i] : borders[i + 1]].double(),
            keys[i, :, :length].transpose(0, 1).double(),
            values[i, :, :length].transpose(0, 1).double(),
            window,
            0.3,
        )
        for i, length in enumerate(lengths)
    ])  # fmt: skip
    for function in (kernels.cached_attention, cached_attention_reference):
        with torch.no_grad():
            found = function(q, keys, values, borders, list(lengths), window, 0.3)
        assert found.dtype == dtype
        assert relative_error(found, exact) < (2e-6 if dtype is torch.float32 else 2e-2)


# Pointwise operations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 60), (5, 3, 14)])
def test_rms_norm(shape, dtype):
    operands = [random(*shape, scale=3.0), random(shape[-1], seed=1)]

    def kernel(x, weight):
        return kernels.rms_norm(x, weight, 1e-5)

    def oracle(x, weight):
        return F.rms_norm(x, shape[-1:], weight, 1e-5)

    assert_as_exact_as(kernel, lambda x, w: rms_norm_reference(x, w, 1e-5), operands, dtype, (0, 1), oracle)


def test_rms_norm_takes_the_mean_in_fp32():
    x = torch.full((1, 64), 300.0).half()  # its square is beyond fp16
    torch.testing.assert_close(kernels.rms_norm(x, torch.ones(64), 1e-6), torch.ones(1, 64).half())


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("wide_stream", [False, True])
def test_the_norm_of_one_token_in_decoding(wide_stream, offset, dtype):
    x, delta, weight = random(1, 123, scale=3.0), random(1, 123, seed=1), random(123, seed=2)
    given = (
        x.to(torch.float32 if wide_stream else dtype),
        delta.to(dtype),
        weight.to(dtype),
        1e-5,
        offset,
        dtype,
    )
    truth = rms_norm_reference(given[0].double() + given[1].double(), given[2].double(), 1e-5, offset)
    normed, total = kernels.add_rms_norm(*given)
    plain, expected = add_rms_norm_reference(*given)
    assert torch.equal(total, expected) and normed.dtype is dtype
    assert relative_error(normed, truth) <= 2 * relative_error(plain, truth) + 1e-6
    alone, same = kernels.add_rms_norm(expected, None, *given[2:])
    assert torch.equal(alone, normed) and same is expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "size", "rotary"), [((1, 1), 2, 2), ((3, 1), 14, 14), ((6, 2), 64, 24)])
def test_rope(heads, size, rotary, interleaved, dtype):
    for tokens, trained in ((17, (0, 1)), (17, (1,)), (17, ()), (1, ())):
        angle = random(tokens, rotary // 2, seed=1, scale=5.0)
        operands = [
            random(tokens, heads[0], size),
            random(tokens, heads[1], size, seed=2),
            angle.cos(),
            angle.sin(),
        ]
        kernel, reference = (
            partial(function, interleaved=interleaved) for function in (kernels.rope, rope_reference)
        )
        assert_as_exact_as(kernel, reference, operands, dtype, trained)


def test_the_two_rotary_conventions_are_the_same_up_to_the_order_of_the_values():
    q, k, angle = random(6, 3, 8), random(6, 1, 8, seed=2), random(6, 4, seed=1)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    half_split = rope_reference(q, k, angle.cos(), angle.sin())
    interleaved = rope_reference(q[..., order], k[..., order], angle.cos(), angle.sin(), interleaved=True)
    for one, other in zip(interleaved, half_split):
        torch.testing.assert_close(one, other[..., order])


def test_rope_reads_parts_of_a_wider_tensor_and_leaves_them_alone():
    """As the joined projections give them: q and k side by side."""
    wide, angle = random(6, 5, 8), random(6, 4, seed=1)
    q, k = wide[:, 1:4], wide[:, 4:]
    expected = rope_reference(q.clone(), k.clone(), angle.cos(), angle.sin())
    torch.testing.assert_close(kernels.rope(q, k, angle.cos(), angle.sin()), expected)
    assert torch.equal(wide, random(6, 5, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("trained", [(0, 1), (0,), (1,), ()])
def test_gated_mlp(trained, activation, dtype):
    operands = [random(17, 33, scale=2.0), random(17, 33, seed=1)]

    def reference(gate, up):
        return gated_mlp_reference(gate, up, activation)

    assert_as_exact_as(lambda g, u: kernels.gated_mlp(g, u, activation), reference, operands, dtype, trained)


def test_gated_mlp_leaves_its_inputs_alone():
    gate, up = random(17, 33).requires_grad_(True), random(17, 33, seed=1).requires_grad_(True)
    kernels.gated_mlp(gate, up, "silu").sum().backward()
    assert torch.equal(gate, random(17, 33)) and torch.equal(up, random(17, 33, seed=1))


# The choice


def test_the_environment_forces_the_references():
    """What autograd recorded says which implementation ran: the references have no functions of their own."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, kernels; "
        "print(kernels.choices('cpu'));"
        "x = torch.ones(3, 4, requires_grad=True); heads = x[:, None]; angle = torch.ones(3, 2);"
        "print(kernels.rope(heads, heads, angle, angle)[0].grad_fn.name(),"
        " kernels.gated_mlp(x, x, 'silu').grad_fn.name(),"
        " kernels.linear_cross_entropy(x, torch.ones(5, 4), torch.zeros(3).long()).grad_fn.name())"
    )

    def run(mode):
        environment = {**os.environ, "KERNELS": mode}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)

    forced, chosen = run("reference").stdout.split("\n"), run("auto").stdout.split("\n")
    assert "reference everywhere" in forced[0] and "reference everywhere" not in chosen[0]
    assert all(
        "::" not in name and name.endswith("0") for name in forced[1].split()
    )  # torch's own: MulBackward0
    assert not any(name.endswith("0") for name in chosen[1].split())
    wrong = run("fastest")
    assert wrong.returncode != 0
    assert "KERNELS=fastest: known are auto, triton and reference" in wrong.stderr


@pytest.mark.parametrize(
    "words", [["train.py", "dataset=identity", "output_dir={}"], ["chat.py", "prompt=Hi"]]
)
def test_a_wrong_choice_is_one_message_of_the_scripts(words, tmp_path):
    script, *options = (word.format(tmp_path / "out") for word in words)
    command = [sys.executable, str(ROOT / script), f"model_name_or_path={tmp_path}", *options]
    environment = {**os.environ, "KERNELS": "fastest"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{script}: KERNELS=fastest: known are" in done.stderr, done.stderr


def test_choices_names_every_operation_in_one_line():
    line = kernels.choices("cpu")
    assert line.startswith("kernels: ") and "\n" not in line
    for operation in (
        () if "reference everywhere" in line else ("linear", "attention", "cross entropy", "lora")
    ):
        assert operation in line
    if "reference everywhere" not in line:
        assert "attention by the plain formula" in kernels.choices("cpu", "disabled")


def test_a_compiled_block_is_left_to_torchs_compiler(monkeypatch):
    """Which cannot see into our launches. Insisting on Triton is obeyed."""
    monkeypatch.setattr(kernels, "_MODE", "auto")
    monkeypatch.setattr(kernels, "_REFERENCE", False)
    monkeypatch.setattr(kernels, "_missing", lambda device: None)
    gpu = torch.device("cuda")
    assert kernels._triton_serves("rms_norm", gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels._triton_serves("rms_norm", gpu)
    monkeypatch.setattr(kernels, "_MODE", "triton")
    assert kernels._triton_serves("rms_norm", gpu)
