"""The flash attention kernels against their formula, forward and every gradient; how one of several is
chosen."""

import importlib
import itertools
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as, random

import kernels
from kernels import attention_backends as backends
from kernels import launch
from kernels.attention import attention_reference, attention_sdpa

pytest.importorskip("triton")
flash = importlib.import_module("kernels.flash_attention")
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not kernels.launch.interpreted(), reason="kernels need a GPU or TRITON_INTERPRET=1"
)


def borders_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def operands(tokens, heads, kv_heads, size):
    return [
        random(tokens, number, size, seed=seed) for seed, number in enumerate((heads, kv_heads, kv_heads))
    ]


def check(lengths, heads, kv_heads, size, dtype, window=None, **options):
    borders, longest = borders_of(lengths), max(lengths)

    def call(function):
        return lambda q, k, v: function(q, k, v, borders, longest, window, 0.9 * size**-0.5, **options)

    inputs = operands(sum(lengths), heads, kv_heads, size)
    assert_as_exact_as(
        call(flash.flash_attention_triton), call(attention_reference), inputs, dtype, (0, 1, 2)
    )


# in the interpreter blocks are 32 x 16 and 16 x 32, so these cross several of each
SWITCHES = {
    "causal": {},
    "window": {"window": 19},
    "window-of-two": {"window": 2},
    "window-of-more-than-a-block": {"window": 41},
    "wide-window": {"window": 300},
    "bidirectional": {"causal": False},
    "soft-cap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "alibi-bidirectional": {"alibi": True, "causal": False},
    "window-cap-alibi": {"window": 21, "softcap": 2.0, "alibi": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch(name, dtype):
    options = dict(SWITCHES[name])
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.tensor([0.5, 0.03], device=DEVICE)
    check((37, 0, 50), 2, 1, 16, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10, 80, 96, 256])
def test_head_sizes_that_are_padded_or_large(size, dtype):
    check((19, 23), 1, 1, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.integers(0, 3), st.integers(4, 60)), min_size=1, max_size=4).filter(any),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([None, None, 2, 16, 33]),
    st.sampled_from([16, 20, 32]),
)
def test_any_segments(dtype, lengths, heads, window, size):
    if max(lengths) > 1:  # with segments of one token only, q and k have no gradient to compare
        check(tuple(lengths), *heads, size, dtype, window)


def test_a_token_that_sees_only_itself_gives_its_value():
    q, k, v = (x.requires_grad_(True) for x in operands(5, 2, 2, 16))
    for borders, window in ((borders_of((1,) * 5), None), (borders_of((5,)), 1)):
        out = flash.flash_attention_triton(q, k, v, borders, 1 if window is None else 5, window, 0.3)
        torch.testing.assert_close(out, v)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        torch.testing.assert_close(grads[2], 2 * v)
        assert grads[0].abs().max() < 1e-5 and grads[1].abs().max() < 1e-5


def test_no_segment_sees_another():
    """A row gives the bits of its segments alone, whatever stands beside them."""
    lengths, q, k, v = (33, 7, 40), *operands(80, 2, 1, 16)
    whole = flash.flash_attention_triton(q, k, v, borders_of(lengths), 40, None, 0.3)
    for start, length in zip((0, 33, 40), lengths):
        part = (x[start : start + length] for x in (q, k, v))
        alone = flash.flash_attention_triton(*part, borders_of((length,)), length, None, 0.3)
        assert torch.equal(whole[start : start + length], alone)


def test_blocks_outside_of_the_window_are_not_read():
    """Not a number in one of them would spoil every result it meets, even with a weight of 0."""
    q, k, v = (x.requires_grad_(True) for x in operands(640, 1, 1, 16))
    with torch.no_grad():
        v[:100] = torch.nan
    out = flash.flash_attention_triton(q, k, v, borders_of((640,)), 640, 20, 0.3)
    assert out[512:].isfinite().all() and not out[:100].isfinite().any()
    with torch.no_grad():
        v[:100] = 0.0
    out = flash.flash_attention_triton(q, k, v, borders_of((640,)), 640, 20, 0.3)
    grad = torch.ones_like(out)
    grad[512:] = torch.nan
    for one in torch.autograd.grad(out, (q, k, v), grad):
        assert one[:256].isfinite().all() and not one[620:].isfinite().any()


def test_the_gradients_are_the_same_bits_every_time_and_only_those_asked_for():
    inputs = operands(70, 4, 2, 16)

    def gradients(trained):
        leaves = [x.clone().requires_grad_(i in trained) for i, x in enumerate(inputs)]
        out = flash.flash_attention_triton(*leaves, borders_of((41, 29)), 41, None, 0.3)
        return torch.autograd.grad(out.square().sum(), [leaves[i] for i in trained])

    all_of_them = gradients((0, 1, 2))
    assert all(torch.equal(one, other) for one, other in zip(all_of_them, gradients((0, 1, 2))))
    assert torch.equal(gradients((0,))[0], all_of_them[0])
    assert torch.equal(gradients((2,))[0], all_of_them[2])


def test_strided_inputs_and_a_broadcast_gradient():
    fused = random(40, 4, 16).requires_grad_(True)
    q, k, v = fused.split([2, 1, 1], dim=1)
    out = flash.flash_attention_triton(q, k, v, borders_of((40,)), 40, None, 0.3)
    (found,) = torch.autograd.grad(out.sum(), fused)
    expected = torch.autograd.grad(
        attention_reference(q, k, v, borders_of((40,)), 40, None, 0.3).sum(), fused
    )[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    q, k, v = operands(50, 1, 1, 16)
    arguments = (q * 100, k * 100, v, borders_of((50,)), 50, None, 1.0)
    torch.testing.assert_close(flash.flash_attention_triton(*arguments), attention_reference(*arguments))


def test_a_block_without_a_key_that_a_row_sees_adds_nothing_at_any_scale():
    """A window begins within or behind the first block of keys. At such a scale a finite mask would be
    infinite; at a usual one it would be off by its rounding, which a GPU's FMA sees and the interpreter does
    not."""
    q, k, v = operands(80, 1, 1, 16)
    arguments = (q * 1e-5, k * 1e-5, v, borders_of((80,)), 80, 19, 3e9)
    torch.testing.assert_close(
        flash.flash_attention_triton(*arguments), attention_reference(*arguments), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("together", [1, 2, 5, 7, 10])
def test_heads_run_in_chunks_that_leave_none_over(together, monkeypatch):
    """Also those of keys: of 5 there are no chunks of two, as 4 or 5 query heads at a time would ask for."""
    lengths, size = (40, 9), 16
    monkeypatch.setattr(flash, "L2_BYTES", together * 2 * 40 * size * 4 / 2)
    check(lengths, 10, 5, size, torch.float32)


def test_what_the_kernels_refuse():
    q, k, v = operands(3, 1, 1, 16)
    assert "head size 512" in flash.unsupported(*operands(3, 1, 1, 512))
    assert "dtype torch.float64" in flash.unsupported(q.double(), k.double(), v.double())
    for function in (flash.flash_attention_triton, attention_reference, attention_sdpa):
        with pytest.raises(ValueError, match="window 0"):
            function(q, k, v, borders_of((3,)), 3, 0, 0.3)
        with pytest.raises(ValueError, match="causal attention only"):
            function(q, k, v, borders_of((3,)), 3, 2, 0.3, causal=False)
    assert flash.flash_attention_triton(q[:0], k[:0], v[:0], borders_of((0,)), 0, None, 0.3).shape == (
        0,
        1,
        16,
    )


def test_the_grid_has_room_for_every_block():
    """T // BLOCK + N blocks are enough, and at most one a segment is idle, whatever the lengths."""
    for lengths in itertools.product((0, 1, 15, 16, 17, 40), repeat=3):
        borders = [0, *itertools.accumulate(lengths)]
        for block in (16, 32):
            starts = [border // block + i for i, border in enumerate(borders)]
            assert starts[-1] == sum(lengths) // block + len(lengths)
            for length, first, after in zip(lengths, starts, starts[1:]):
                assert -(-length // block) <= after - first <= -(-length // block) + 1


@pytest.mark.parametrize("name", SWITCHES)
def test_torch_path_equals_the_formula(name):
    """attention_sdpa in both of its ways; a soft cap is left to the formula."""
    options = dict(SWITCHES[name])
    window = options.pop("window", None)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.tensor([0.5, 0.03], device=DEVICE)
    arguments = (*operands(50, 2, 1, 16), borders_of((20, 0, 30)), 30, window, 0.3)
    expected = attention_reference(*arguments, **options)
    switches = options.get("causal", True), options.get("softcap"), options.get("alibi_slopes")
    torch.testing.assert_close(kernels.attention(*arguments, *switches, flash_attn="sdpa"), expected)
    if "softcap" in options:
        with pytest.raises(ValueError, match="no soft cap"):
            attention_sdpa(*arguments, **options)
        return
    one_mask = importlib.import_module("kernels.attention")._one_mask
    torch.testing.assert_close(one_mask(*arguments[:4], window, 0.3, *switches[::2]), expected)


# The choice


def test_flash_attn_takes_what_it_names(monkeypatch):
    arguments = (*operands(9, 2, 1, 16), borders_of((9,)), 9, None, 0.3)
    expected = attention_reference(*arguments)
    called = []
    monkeypatch.setattr(flash, "flash_attention_triton", lambda *a: called.append("triton") or expected)
    monkeypatch.setattr(kernels, "attention_reference", lambda *a: called.append("formula") or expected)
    kernels.attention(*arguments, flash_attn="triton")
    kernels.attention(*arguments, flash_attn="disabled")
    assert called == (["formula"] * 2 if "reference" in kernels.choices("cpu") else ["triton", "formula"])


@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_a_package_is_called_or_named_when_it_is_missing(name, monkeypatch, capsys):
    """LLaMA-Factory's files ask for fa2, and it goes on without it."""
    if "reference" in kernels.choices("cpu"):
        pytest.skip("KERNELS=reference takes the formula for everything")
    module = backends.PACKAGES[name][0]
    arguments = (*operands(9, 2, 1, 16), borders_of((9,)), 9, 4, 0.3)
    if importlib.util.find_spec(module) is None:
        with pytest.raises(ValueError, match=f"{name} needs the package {module}.*pip install"):
            kernels.attention(*arguments, flash_attn=name)
        assert kernels.require_attention(name, "cpu") == "auto"
    fake, seen = types.ModuleType(module), {}
    fake.__spec__ = importlib.machinery.ModuleSpec(module, None)
    fake.flash_attn_varlen_func = lambda q, *rest, **options: seen.update(options) or q
    monkeypatch.setitem(sys.modules, module, fake)
    assert kernels.attention(*arguments, flash_attn=name) is arguments[0]
    launch.say_once.cache_clear()
    capsys.readouterr()
    for _ in range(2):
        assert kernels.require_attention(name, "cpu", torch.bfloat16) == "auto"
        assert kernels.require_attention(name, "cuda", torch.float32) == "auto"
        assert kernels.require_attention(name, "cuda", torch.bfloat16) == name
    said = capsys.readouterr().err
    assert said.count(f"flash_attn={name} runs on a GPU, not on cpu, so attention is chosen as by") == 1
    assert said.count(f"flash_attn={name} knows no fp32") == 1
    assert seen == {"softmax_scale": 0.3, "causal": True, "window_size": (3, 0)}


def test_auto_measures_once_per_class_of_shapes_and_says_so(capsys):
    milliseconds, timed, results = {"ours": 3.0, "fast": 1.0, "impossible": None}, [], [random(9, 2, 16)]

    def timer(function, arguments):
        timed.append(function())
        if milliseconds[function()] is None:
            raise RuntimeError("No available kernel. Aborting execution.\nmore")
        return milliseconds[function()], results

    candidates = {name: lambda name=name: name for name in milliseconds}
    chooser = backends.Chooser(timer)
    arguments = (*operands(9, 2, 1, 16), borders_of((9,)), 9)
    assert chooser.choose(("a",), candidates, arguments)() == "fast"
    assert chooser.choose(("a",), candidates, arguments)() == "fast" and len(timed) == 3
    said = capsys.readouterr().err
    assert "ours 3.000 ms, fast 1.000 ms, impossible not possible (No available kernel" in said
    assert said.strip().endswith("-> fast") and said.count("\n") == 1
    milliseconds["ours"] = 0.5
    assert chooser.choose(("b",), candidates, arguments)() == "ours"
    assert chooser.choose(("c",), {"ours": candidates["ours"]}, arguments)() == "ours" and len(timed) == 6


OUT = random(20, 2, 8)


@pytest.mark.parametrize(
    "found, said",
    [
        ([OUT * 1.05, OUT], "fast dropped, its numbers are off by 0.05"),
        ([OUT, OUT * 1.05], "fast dropped, its numbers are off by 0.05"),  # a gradient alone
        ([OUT, torch.cat([OUT[:19], OUT[19:] * 1.2])], "in a row by 0."),  # one row of it
        ([OUT, OUT * torch.nan], "off by inf"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "fast not measured, out of memory",
        ),
    ],
    ids=["result", "gradient", "one row", "no number", "memory"],
)
def test_auto_never_takes_one_whose_numbers_are_off_or_for_which_there_is_no_memory(found, said, capsys):
    given = {"ours": (3.0, [OUT, OUT]), "fast": (1.0, found), "fair": (2.0, [OUT.bfloat16(), OUT.half()])}

    def timer(function, arguments):
        time, results = given[function()]
        if isinstance(results, Exception):
            raise results
        return time, results

    chooser, arguments = backends.Chooser(timer), (*operands(21, 2, 1, 16), borders_of((21,)), 21)
    candidates = {name: lambda name=name: name for name in given}
    launch.say_once.cache_clear()
    assert chooser.choose((said,), candidates, arguments)() == "fair"
    line = capsys.readouterr().err
    assert said in line and line.strip().endswith("-> fair")


def test_ours_is_taken_where_there_is_no_memory_to_compare():
    def timer(function, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    chooser = backends.Chooser(timer)
    candidates = {"ours": lambda: "ours", "fast": lambda: "fast"}
    assert chooser.choose(("a",), candidates, (*operands(22, 2, 1, 16), borders_of((22,)), 22))() == "ours"

    def broken(function, arguments):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):  # of our own kernel: a bug, not a choice
        backends.Chooser(broken).choose(("a",), candidates, ())


def test_within_a_captured_graph_nothing_is_timed_and_what_was_chosen_is_taken():
    times = {"ours": 2.0, "fast": 1.0}
    chooser = backends.Chooser(lambda function, arguments: (times[function()], [OUT]))
    candidates = {name: lambda name=name: name for name in times}
    arguments = (*operands(23, 2, 1, 16), borders_of((23,)), 23)
    assert chooser.choose(("a",), candidates, arguments, measure=False)() == "ours"
    assert chooser.choose(("a",), candidates, arguments)() == "fast"
    assert chooser.choose(("a",), candidates, arguments, measure=False)() == "fast"


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_timed_gives_results_and_gradients_to_compare(trained, monkeypatch):
    """Of a long row some, the last one among them; a call that takes long is made once more, then no more."""
    monkeypatch.setattr(backends, "COMPARED_ROWS", 10)
    q, k, v = operands(35, 4, 2, 16)
    arguments = (q.requires_grad_(trained), k, v, borders_of((35,)), 35, None, 0.3)
    calls = []

    def clock(call):
        calls.append(call)
        return 60.0 if len(calls) > 1 else 900.0, call()

    time, results = backends._timed(attention_reference, arguments, True, clock)
    assert time == 60.0 and len(calls) == 2 and len(results) == (4 if trained else 1)
    expected = attention_reference(*arguments)
    torch.testing.assert_close(results[0][-1], expected[34].detach())
    assert [len(x) for x in results] == [12] * len(results)
    assert backends._timed(attention_reference, arguments, True, lambda call: (1.0, call()))[0] == 1.0


def test_a_plan_of_cudnn_is_made_for_lengths_that_stay_and_never_for_prompts():
    """Layers of one row share its borders: they count once."""
    steady = backends.Steady()

    def layers(lengths):
        borders = borders_of(lengths)
        return [steady(borders, sum(lengths), max(lengths)) for _ in range(3)]

    same = [layers((8, 8)) for _ in range(5)]
    assert same == [[False] * 3] * 3 + [[True] * 3] * 2
    assert [layers((length,)) for length in (9, 10, 11, 12, 13)] == [[False] * 3] * 5
    assert layers((8, 8)) == [False] * 3


def test_the_packed_kernel_of_torch_takes_what_it_is_given():
    """It is private: a torch that names its arguments otherwise is found here, not on a GPU."""
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} < set(names)


def test_what_torch_can_serve():
    def names(lengths, dtype=torch.bfloat16, size=64, window=None, softcap=None, longest=None, steady=True):
        q, k, v = (x.to(dtype) for x in operands(sum(lengths), 2, 1, size))
        row = borders_of(lengths), longest or max(lengths), window, 0.3, True, softcap, None
        return sorted(backends.backends(q, k, v, *row, steady=steady))

    assert names((8, 8)) == ["batched sdpa", "cudnn", "torch flash"]
    assert names((8, 8), steady=False) == ["batched sdpa", "torch flash"]
    assert names((8, 8), window=8) == ["batched sdpa", "cudnn", "torch flash"]  # a window that hides nothing
    assert names((8, 8), window=7) == names((8, 7)) == ["torch flash"]
    assert names((8, 8), dtype=torch.float32) == ["batched sdpa"]
    assert names((8, 8), softcap=3.0) == names((8, 7), size=12) == []


def test_batched_sdpa_is_attention_of_equal_segments():
    arguments = (*operands(24, 4, 2, 16), borders_of((8, 8, 8)), 8, None, 0.3)
    for causal in (True, False):
        expected = attention_reference(*arguments, causal)
        torch.testing.assert_close(backends.batched(*arguments, causal), expected)


def test_shape_classes():
    def of(lengths, **options):
        q, k, _ = operands(sum(lengths), 2, 1, 16)
        return backends.shape_class(
            q, k, borders_of(lengths), max(lengths), None, True, options.get("trained", True)
        )

    assert of((30, 20)) == of((29, 22))
    assert len({of((30, 20)), of((25, 25)), of((60, 20)), of((30, 20), trained=False)}) == 4


def test_the_option_reaches_the_attention_of_every_layer(monkeypatch):
    from architectures import config_from_hf
    from model import Decoder

    hf = {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
    }
    model = Decoder(
        config_from_hf({**hf, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5})
    )
    seen = []
    real = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a, **b: seen.append(b["flash_attn"]) or real(*a, **b))
    tokens = torch.arange(5)
    borders = torch.tensor([0, 5], dtype=torch.int32)
    expected = model(tokens, tokens, borders, 5)
    model.runtime.flash_attn = "triton" if DEVICE == "cpu" else "disabled"
    torch.testing.assert_close(model(tokens, tokens, borders, 5), expected, rtol=1e-4, atol=1e-5)
    assert seen == ["auto"] * 2 + [model.runtime.flash_attn] * 2
