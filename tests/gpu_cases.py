"""Every kernel at the sizes for which a GPU's tiles are made, by the error rule of kernel_checks.

Most tests of kernels have sizes for Triton's interpreter, whose blocks are 16 or 32 rows: of a GPU's block of
128 they fill one. Here segments cross several, so that loops turn, copies run ahead and masks begin and end
within a tile. `cases("gpu")` are run by tests/gpu/test_kernels_gpu.py; `cases("interpreter")` are the same
cases at sizes in proportion to its blocks, with which tests/kernels/test_gpu_cases.py shows on a CPU that
each of them runs, and that it notices an error.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from kernel_checks import DEVICE, assert_as_exact_as, random

from kernels.attention import attention_reference
from kernels.cross_entropy import linear_cross_entropy_reference, linear_cross_entropy_triton
from kernels.decode_attention import (
    cached_attention_triton,
    decode_attention_reference,
    decode_attention_triton,
)
from kernels.flash_attention import flash_attention_triton
from kernels.gated_mlp import gated_mlp_reference, gated_mlp_triton
from kernels.layer_norm import layer_norm_reference, layer_norm_triton
from kernels.rms_norm import add_rms_norm_reference, add_rms_norm_triton
from kernels.rope import rope_reference, rope_triton


@dataclass(frozen=True)
class Case:
    name: str
    kernel: Callable
    reference: Callable  # the same operands; the oracle too, in fp64
    inputs: Callable[[], list]
    trained: tuple[int, ...]  # places of the inputs that get a gradient
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def check(self, dtype: torch.dtype, kernel: Callable | None = None) -> None:
        """AssertionError where the kernel, or the one in its place, is less exact than the rule asks."""
        assert_as_exact_as(kernel or self.kernel, self.reference, self.inputs(), dtype, self.trained)


BOTH = (torch.bfloat16, torch.float16)
LENGTHS = {"gpu": (700, 1, 0, 1300), "interpreter": (27, 1, 0, 53)}
# Windows: shorter than a tile, one longer than a tile, several tiles
SWITCHES = {
    "causal": {},
    "window below a tile": {"window": {"gpu": 100, "interpreter": 7}},
    "window of a tile and one": {"window": {"gpu": 129, "interpreter": 17}},
    "window of many tiles": {"window": {"gpu": 1024, "interpreter": 40}},
    "bidirectional": {"causal": False},
    "soft cap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "alibi bidirectional": {"alibi": True, "causal": False},
    "window, cap and alibi": {"window": {"gpu": 300, "interpreter": 19}, "softcap": 2.0, "alibi": True},
}
HEADS = [(4, 4), (8, 2), (8, 1)]
HEAD_SIZES = {"gpu": (64, 80, 96, 128, 256), "interpreter": (16, 20, 24, 32, 64)}


def cases(where: str) -> Iterator[Case]:
    """where: gpu or interpreter. Attention first: the most to go wrong."""
    yield from _attention(where)
    yield from _against_a_cache(where)
    yield from _norms(where)
    yield from _pointwise(where)
    yield from _cross_entropy(where)


def borders_of(lengths) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def _attention(where: str) -> Iterator[Case]:
    sizes = HEAD_SIZES[where]
    for name in SWITCHES:
        yield attention_case(where, name, (8, 2), sizes[3], BOTH[:1])
        yield attention_case(where, name, (4, 4), sizes[0], BOTH[1:])
    for heads in HEADS:
        for size in sizes:
            if (heads, size) not in ((HEADS[1], sizes[3]), (HEADS[0], sizes[0])):  # those stand above
                yield attention_case(where, "causal", heads, size, BOTH[:1])
    yield attention_case(where, "window, cap and alibi", (8, 1), sizes[4], BOTH[:1])
    yield attention_case(where, "bidirectional", (4, 4), sizes[1], BOTH[1:])
    # the case that was wished for first: many tiles in one segment, and a window over several of them
    long = {"gpu": (8192,), "interpreter": (90,)}[where]
    yield attention_case(where, "window of many tiles", (2, 1), sizes[0], BOTH[:1], long)


def attention_case(where: str, switch: str, heads, size: int, dtypes, lengths=None) -> Case:
    lengths, options = lengths or LENGTHS[where], dict(SWITCHES[switch])
    window = options.pop("window", {where: None})[where]
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.tensor([0.5, 0.03, 0.1, 0.002] * 2, device=DEVICE)[: heads[0]]
    row = borders_of(lengths), max(lengths), window, 0.9 * size**-0.5

    def inputs() -> list:
        counts = enumerate((heads[0], heads[1], heads[1]))
        return [random(sum(lengths), count, size, seed=seed) for seed, count in counts]

    return Case(
        f"attention, {switch}, heads {heads[0]}/{heads[1]} of {size}, up to {max(lengths)} tokens",
        lambda q, k, v: flash_attention_triton(q, k, v, *row, **options),
        lambda q, k, v: attention_reference(q, k, v, *row, **options),
        inputs,
        (0, 1, 2),
        dtypes,
    )


def _against_a_cache(where: str) -> Iterator[Case]:
    """One token each, and the second turn of a chat: many new tokens behind many cached ones."""
    unit = {"gpu": 4, "interpreter": 1}[where]
    size, room = {"gpu": 128, "interpreter": 16}[where], 130 * unit

    def operands(new, heads, kv_heads) -> list:
        keys, values = (random(len(new), kv_heads, room, size, seed=seed) for seed in (1, 2))
        return [random(sum(new), heads, size), keys, values]

    lengths = [9 * unit, 121 * unit, 1]
    filled = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    for window, heads in ((None, (8, 2)), (20 * unit, (4, 4))):
        step = borders_of((1, 1, 1)), filled, 1, window, size**-0.5, None, None
        yield Case(
            f"decode attention, window {window}, heads {heads[0]}/{heads[1]}",
            lambda q, k, v, step=step: decode_attention_triton(q, k, v, *step),
            lambda q, k, v, step=step: decode_attention_reference(q, k, v, *step),
            lambda heads=heads: operands((1, 1, 1), *heads),
            (),
        )
        new = [5 * unit, 70 * unit, 1]
        host = [0, *itertools.accumulate(new)], lengths, window, size**-0.5
        whole = borders_of(new), filled, max(new), window, size**-0.5, None, None
        yield Case(
            f"attention of a second turn, window {window}, heads {heads[0]}/{heads[1]}",
            lambda q, k, v, host=host: cached_attention_triton(q, k, v, *host),
            lambda q, k, v, whole=whole: decode_attention_reference(q, k, v, *whole),
            lambda new=new, heads=heads: operands(new, *heads),
            (),
        )


def _norms(where: str) -> Iterator[Case]:
    for size in {"gpu": (4096, 8192, 577), "interpreter": (256, 577)}[where]:
        rows = {"gpu": 1000, "interpreter": 19}[where]
        yield Case(
            f"add_rms_norm {rows}x{size}",
            lambda x, delta, weight: add_rms_norm_triton(x, delta, weight, 1e-5),
            lambda x, delta, weight: add_rms_norm_reference(x, delta, weight, 1e-5),
            lambda rows=rows, size=size: [random(rows, size), random(rows, size, seed=1), random(size)],
            (0, 1, 2),
        )
        yield Case(
            f"layer_norm {rows}x{size}",
            lambda x, weight, bias: layer_norm_triton(x, weight, bias, 1e-5),
            lambda x, weight, bias: layer_norm_reference(x, weight, bias, 1e-5),
            lambda rows=rows, size=size: [random(rows, size), random(size), random(size, seed=1)],
            (0, 1, 2),
        )


def _pointwise(where: str) -> Iterator[Case]:
    tokens, heads, size, middle = {"gpu": (1001, 32, 128, 11008), "interpreter": (19, 4, 16, 96)}[where]

    def rotated() -> list:
        angle = random(tokens, size // 2, seed=1, scale=5.0)
        q, k = random(tokens, heads, size), random(tokens, heads // 4, size, seed=2)
        return [q, k, angle.cos(), angle.sin()]

    yield Case(f"rope {tokens} tokens", rope_triton, rope_reference, rotated, (0, 1))
    yield Case(
        f"gated_mlp {tokens}x{middle}",
        lambda gate, up: gated_mlp_triton(gate, up, "silu"),
        lambda gate, up: gated_mlp_reference(gate, up, "silu"),
        lambda: [random(tokens, middle), random(tokens, middle, seed=1)],
        (0, 1),
    )


def _cross_entropy(where: str) -> Iterator[Case]:
    """The head trains too: its gradient is a product that adds up in fp32. Labels stand at both edges."""
    rows, hidden = {"gpu": (300, 512), "interpreter": (9, 33)}[where]
    for classes in {"gpu": (32000, 50257, 128256), "interpreter": (577,)}[where]:

        def inputs(classes=classes) -> list:
            labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
            labels[0], labels[1] = 0, classes - 1
            weight = random(classes, hidden, seed=1, scale=1 / math.sqrt(hidden))
            return [random(rows, hidden), weight, labels.to(DEVICE)]

        yield Case(
            f"linear_cross_entropy of {classes} classes",
            linear_cross_entropy_triton,
            linear_cross_entropy_reference,
            inputs,
            (0, 1),
        )
