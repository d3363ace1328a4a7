"""Every kernel at real sizes, and the attention of others against ours: first in `make gpu`.

That these tests run and notice errors is shown without a GPU by tests/kernels/test_gpu_cases.py.
"""

import pytest
import torch
from gpu_cases import HEADS, attention_case, borders_of, cases
from kernel_checks import evaluate, random

from kernels import attention_backends as backends
from kernels.flash_attention import flash_attention_triton

CASES = list(cases("gpu"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_at_the_tiles_of_a_gpu(case):
    for dtype in case.dtypes:
        case.check(dtype)


@pytest.mark.parametrize("lengths", [(512, 512, 512, 512), (700, 1, 0, 1300)], ids=["equal", "ragged"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 129])
def test_attention_of_others_agrees_with_ours(lengths, heads, window):
    """What `auto` compares once in a run; here each kernel has to agree, forward and every gradient."""
    inputs = [random(sum(lengths), count, 128, seed=seed) for seed, count in enumerate((*heads, heads[1]))]
    row = borders_of(lengths), max(lengths), window, 128**-0.5, True, None, None
    q, k, v = (x.bfloat16() for x in inputs)
    served = backends.backends(q, k, v, *row, steady=True)
    assert "torch flash" in served and ("cudnn" in served) == (len(set(lengths)) == 1 and window is None)
    ours = evaluate(lambda *x: flash_attention_triton(*x, *row), inputs, torch.bfloat16, (0, 1, 2))
    for name, function in served.items():
        theirs = evaluate(lambda *x, function=function: function(*x, *row), inputs, torch.bfloat16, (0, 1, 2))
        for found, expected in zip(theirs, ours, strict=True):
            whole, worst = backends.difference(found, expected)
            assert whole <= backends.MAY_DIFFER and worst <= backends.ROW_MAY_DIFFER, name


def test_a_failing_case_fails_here_too():
    case = attention_case("gpu", "window below a tile", (4, 4), 64, (torch.float16,))
    wrong = attention_case("gpu", "window of a tile and one", (4, 4), 64, (torch.float16,))
    with pytest.raises(AssertionError, match="error"):
        case.check(torch.float16, wrong.kernel)
