"""The cases that a GPU runs first (tests/gpu_cases.py), proven without one: they run, they notice errors."""

import dataclasses
import itertools
import re

import pytest
import torch
from gpu_cases import HEAD_SIZES, LENGTHS, SWITCHES, attention_case, cases
from kernel_checks import DEVICE, random, relative_error

import kernels
from kernels import attention_backends as backends
from kernels.attention import attention_reference
from kernels.flash_attention import _blocks

pytest.importorskip("triton")
SMALL = list(cases("interpreter"))
OTHERS = [case for case in SMALL if "up to" not in case.name]  # than flash attention, which takes longest
# of that, one here: test_triton_flash_attention.py runs its every switch
RUN = [case for case in SMALL if "cap and alibi, heads 4" in case.name] + OTHERS
interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and not kernels.launch.interpreted(), reason="kernels need a GPU or TRITON_INTERPRET=1"
)


def kind(case):
    return re.match("[a-z_ ]+", case.name)[0].strip()


def test_the_cases_of_a_gpu_are_those_that_are_proven_here():
    """One for one, attention before the others; every switch, head size and kernel among them."""
    on_gpu = list(cases("gpu"))
    attention = [[kind(case) for case in some].count("attention") for some in (on_gpu, SMALL)]
    assert [kind(case) for case in on_gpu[:30]] == ["attention"] * 30 and attention[0] == attention[1]
    assert {kind(case) for case in on_gpu} == {kind(case) for case in SMALL}
    names = " ".join(case.name for case in on_gpu)
    assert all(f", {switch}, " in names for switch in SWITCHES)
    assert all(f" of {size}, up to" in names for size in HEAD_SIZES["gpu"])


@pytest.mark.parametrize("generation", [80, 86, 89, 90, 100])
def test_segments_cross_several_tiles_of_every_gpu(generation):
    """Two segments of more than two tiles, queries and keys, that end within a tile; windows begin in one."""
    long = [length for length in LENGTHS["gpu"] if length > 1]
    windows = [options["window"]["gpu"] for options in SWITCHES.values() if "window" in options]
    for kernel, size, plain in itertools.product(
        ("forward", "keys", "queries"), (64, 128, 256), (True, False)
    ):
        blocks = _blocks(kernel, size, torch.bfloat16, generation, plain)
        tiles = blocks["BLOCK_M"], blocks["BLOCK_N"]
        assert all(length > 2 * tile and length % tile for length in long for tile in tiles)
        assert 2 * max(tiles) < max(windows) and any(window % max(tiles) for window in windows)


@interpreted
@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_a_case_runs_and_its_kernel_is_exact(case):
    case.check(torch.float16 if case.dtypes[-1] is torch.float16 else torch.float32)


@pytest.mark.parametrize("case", SMALL[1:18:2] + OTHERS, ids=lambda case: case.name)
def test_a_case_notices_an_error(case):
    """A value of the results' last row, or of any gradient, that is off by a tenth of the size of all."""
    results = 2 if "rms" in case.name or "rope" in case.name else 1
    for place in range(results + len(case.trained)):
        with pytest.raises(AssertionError, match=f"result {place} .*error"):
            case.check(torch.float32, planted(case, place, results))


def planted(case, place, results):
    """case.reference with an error in one of its results or gradients."""

    def wrong(*inputs):
        inputs = list(inputs)
        if place >= results:
            at = case.trained[place - results]
            inputs[at] = _Off.apply(inputs[at])
        found = case.reference(*inputs)
        if place >= results:
            return found
        several = [found] if torch.is_tensor(found) else list(found)
        several[place] = several[place] + off(several[place])
        return several[0] if torch.is_tensor(found) else several

    return wrong


def off(x):
    error = torch.zeros_like(x)
    error[(-1,) * x.dim()] = 0.1 * x.detach().norm()
    return error


class _Off(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + off(grad)


WRONG = {  # what a kernel could do wrong, as another case's reference: (the case, its look-alike)
    "a window that is one too long": ("window below a tile", {"window": 8}),
    "a window that is not there": ("window of many tiles", {"window": None}),
    "no causal mask": ("causal", {"causal": False}),
    "no cap": ("soft cap", {"softcap": None}),
    "no slopes": ("alibi", {"alibi_slopes": None}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_switch_that_is_not_obeyed_is_noticed(name):
    switch, changed = WRONG[name]
    case = attention_case("interpreter", switch, (4, 2), 16, (torch.float32,))

    def wrong(q, k, v):
        options = {key: value for key, value in SWITCHES[switch].items() if key != "window"}
        window = SWITCHES[switch].get("window", {}).get("interpreter")
        if options.pop("alibi", False):
            options["alibi_slopes"] = torch.ones(4, device=DEVICE)
        options |= changed
        window = options.pop("window", window)
        lengths = LENGTHS["interpreter"]
        borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
        return attention_reference(q, k, v, borders, max(lengths), window, 0.9 * 16**-0.5, **options)

    with pytest.raises(AssertionError, match="error"):
        case.check(torch.float32, wrong)


def test_heads_that_read_another_heads_keys_are_noticed():
    case = attention_case("interpreter", "causal", (4, 2), 16, (torch.float32,))
    with pytest.raises(AssertionError, match="error"):
        case.check(torch.float32, lambda q, k, v: case.reference(q, k.flip(1), v.flip(1)))


def test_the_comparison_of_two_attentions_sees_one_wrong_row_and_what_is_no_number():
    truth = random(500, 4, 8)
    assert backends.difference(truth, truth) == (0.0, 0.0)
    found = truth.clone()
    found[499, 2] *= 1.7
    whole, row = backends.difference(found, truth)
    assert whole < backends.MAY_DIFFER and row > backends.ROW_MAY_DIFFER
    whole, _ = backends.difference(truth * 1.05, truth)
    assert whole > backends.MAY_DIFFER
    found[0, 0, 0] = torch.nan
    assert not all(number < 1e9 for number in backends.difference(found, truth))
    rounded = truth.bfloat16()
    assert max(backends.difference(rounded, truth)) < 0.005
    assert relative_error(rounded, truth.double()) == pytest.approx(
        backends.difference(rounded, truth)[0], rel=1e-3
    )


def test_a_case_is_not_changed_by_its_check():
    case = dataclasses.replace(SMALL[0], kernel=SMALL[0].reference)
    case.check(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(case.inputs(), case.inputs()))
