"""Decoding's kernels against their references, and those against the cached attention that knows lengths on
the host: ragged new tokens, shared key/value heads, windows, soft cap, ALiBi, every number of splits, slots
never filled."""

import importlib
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as, random

from kernels.attention import cached_attention_reference

pytest.importorskip("triton")
operation = importlib.import_module("kernels.decode_attention")  # the package has a function of this name


def problem(new, filled, heads, kv_heads, size, capacity, seed=0):
    """q, keys, values, borders, lengths. Slots beyond the filled ones hold large numbers: they must not
    matter."""
    lengths = torch.tensor([n + f for n, f in zip(new, filled)], dtype=torch.int32, device=DEVICE)
    borders = torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    q = random(sum(new), heads, size, seed=seed)
    cache = random(2, len(new), kv_heads, capacity, size, seed=seed + 1)
    beyond = torch.arange(capacity, device=DEVICE) >= lengths[:, None]  # (N, capacity)
    cache[:, beyond[:, None].expand(-1, kv_heads, -1)] = 1000.0
    return q, cache[0], cache[1], borders, lengths


@st.composite
def shapes(draw):
    count = draw(st.integers(1, 4))
    new = draw(st.lists(st.integers(1, draw(st.sampled_from([1, 3, 16]))), min_size=count, max_size=count))
    filled = draw(st.lists(st.integers(0, 150), min_size=count, max_size=count))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 7]))
    return {
        "new": new, "filled": filled, "heads": kv_heads * group, "kv_heads": kv_heads,
        "size": draw(st.sampled_from([5, 16, 40, 64])),
        "capacity": max(map(sum, zip(new, filled))) + draw(st.integers(0, 99)),
    }  # fmt: skip


MANY_ROWS = {
    "new": [16, 2],
    "filled": [77, 3],
    "heads": 14,
    "kv_heads": 2,
    "size": 33,
    "capacity": 130,
}  # 112 rows
ONE = {"new": [1], "filled": [0], "heads": 3, "kv_heads": 3, "size": 8, "capacity": 1}
WIDE = {"new": [1, 1], "filled": [40, 90], "heads": 2, "kv_heads": 1, "size": 256, "capacity": 128}


@settings(max_examples=6, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from([None, 1, 20, 64]), st.sampled_from([None, 3.0]), st.booleans())
@example(MANY_ROWS, None, None, False)
@example(MANY_ROWS, 30, 2.0, True)
@example(ONE, None, None, False)
@example(WIDE, None, None, True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(dtype, shape, window, softcap, alibi):
    q, keys, values, borders, lengths = problem(**shape)
    slopes = 2.0 ** -torch.arange(1.0, shape["heads"] + 1, device=DEVICE) if alibi else None
    scale = 1 / math.sqrt(shape["size"])

    def call(function):
        def with_inputs(q, keys, values):
            return function(
                q, keys, values, borders, lengths, max(shape["new"]), window, scale, softcap, slopes
            )

        return with_inputs

    implementations = operation.decode_attention_triton, operation.decode_attention_reference
    assert_as_exact_as(*map(call, implementations), [q, keys, values], dtype, [])


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
def test_any_number_of_splits_gives_the_same(splits, monkeypatch):
    """More splits than blocks of keys, too: those that find nothing write nothing that counts."""
    monkeypatch.setattr(operation, "choose_splits", lambda *_: splits)
    q, keys, values, borders, lengths = problem([1, 1, 2], [0, 200, 70], 4, 2, 16, 256)
    for window in (None, 100):
        operands = q, keys, values, borders, lengths, 2, window, 0.3, None, None
        expected = operation.decode_attention_reference(*operands)
        torch.testing.assert_close(
            operation.decode_attention_triton(*operands), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("new", [[1], [1, 1, 1], [3, 1, 16]])
def test_reference_equals_the_attention_that_knows_its_lengths(new, window):
    q, keys, values, borders, lengths = problem(new, [20, 0, 13][: len(new)], 6, 2, 12, 40)
    expected = cached_attention_reference(q, keys, values, borders.tolist(), lengths.tolist(), window, 0.3)
    found = operation.decode_attention_reference(
        q, keys, values, borders, lengths, max(new), window, 0.3, None, None
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("new", [[37], [1, 80, 16], [17, 3, 70]])
def test_any_number_of_new_tokens_against_a_cache(new, window):
    """The second turn of a chat: pieces of it are sequences to the kernel, whose cache ends with them."""
    q, keys, values, borders, lengths = problem(new, [50, 0, 13][: len(new)], 6, 3, 12, 100)
    host = borders.tolist(), lengths.tolist()
    expected = cached_attention_reference(q, keys, values, *host, window, 0.3)
    found = operation.cached_attention_triton(q, keys, values, *host, window, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_soft_cap_and_alibi_are_their_formulas():
    """One query, three keys, by hand."""
    q, keys = torch.tensor([[[2.0]]]), torch.tensor([[[[1.0], [-3.0], [2.0], [7.0]]]])
    values = torch.tensor([[[[1.0], [10.0], [100.0], [math.nan]]]])[..., :1]
    values[0, 0, 3] = 0
    scores = [
        3 * math.tanh(0.5 * 2 * key / 3) + 0.25 * distance for key, distance in ((1, -2), (-3, -1), (2, 0))
    ]
    weights = [math.exp(score) for score in scores]
    expected = (weights[0] + 10 * weights[1] + 100 * weights[2]) / sum(weights)
    borders, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    operands = [x.to(DEVICE) for x in (q, keys, values, borders, lengths)]
    for function in (operation.decode_attention_reference, operation.decode_attention_triton):
        found = function(*operands, 1, None, 0.5, 3.0, torch.tensor([0.25], device=DEVICE))
        assert abs(found.item() - expected) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [[1, 1, 1], [4, 1, 2]])
def test_storing_fills_the_last_slots_and_no_other(new, dtype):
    _, keys, values, borders, lengths = problem(new, [5, 0, 30], 3, 3, 20, 40)
    keys, values = keys.to(dtype), values.to(dtype)
    rows = random(sum(new), 8, 20, seed=5).to(dtype)
    k, v = rows[:, 1:4], rows[:, 5:]  # slices of one product, as a joined projection gives them
    expected = keys.clone(), values.clone()
    for i, (stop, length) in enumerate(zip(borders[1:].tolist(), lengths.tolist())):
        for back in range(1, new[i] + 1):
            expected[0][i, :, length - back], expected[1][i, :, length - back] = (
                k[stop - back],
                v[stop - back],
            )
    for store in (operation.store_reference, operation.store_triton):
        found = keys.clone(), values.clone()
        store(k, v, *found, borders, lengths, max(new))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_queries_may_be_a_slice_and_what_is_not_known_says_why():
    q, keys, values, borders, lengths = problem([1, 2], [6, 3], 4, 2, 16, 12)
    wide = torch.cat([q, q * 2], dim=1)
    operands = keys, values, borders, lengths, 2, None, 0.3, None, None
    for function in (operation.decode_attention_reference, operation.decode_attention_triton):
        assert torch.equal(function(wide[:, :4], *operands), function(q, *operands))
    assert operation.unsupported(q, keys, 2) is None
    assert operation.unsupported(q, keys, 17) == "17 new tokens in a sequence; at most 16"
    assert operation.unsupported(q.half(), keys, 1) == "queries in torch.float16, cache in torch.float32"
    with pytest.raises(ValueError, match="must lie alike"):
        operation.decode_attention_triton(
            q, keys, values.transpose(2, 3).contiguous().transpose(2, 3), *operands[2:]
        )


def test_splits_fill_the_gpu_without_asking_the_device():
    gpu = torch.device("cpu")  # 4 multiprocessors, as kernels.launch says of the interpreter
    assert operation.choose_splits(1, 4096, 64, gpu) == 8
    assert operation.choose_splits(3, 4096, 64, gpu) == 3
    assert operation.choose_splits(1, 100, 64, gpu) == 2  # no split gets less than a block
    assert operation.choose_splits(9, 4096, 64, gpu) == 1
