"""What bench/kernels.py measures: per operation its inputs, the systems that compute it, and the least work
there is.

Work counts each input read once and each output written once, and the multiply-adds (times 2) of the
products; so floor = max(bytes / bandwidth, operations / rate) and nothing can show more than 100% of it. bf16
on a GPU; on a CPU (smoke test) fp32 at tiny sizes. Systems beside `anvil`: `eager` (plain torch), `compile`
(torch.compile of it), torch's own fused operations, Liger-Kernel and bitsandbytes where they are installed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from bench.four_bits import codes_and_state
from kernels.attention import attention_reference
from kernels.cross_entropy import (
    cross_entropy_reference,
    linear_cross_entropy_reference,
    linear_logprobs_reference,
)
from kernels.decode_attention import decode_attention_reference
from kernels.gated_mlp import gated_mlp_reference
from kernels.layer_norm import layer_norm_reference
from kernels.linear import Part
from kernels.lora_linear import lora_linears_reference
from kernels.nf4 import dequantise_reference
from kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from kernels.rope import rope_reference
from quant.nf4 import NF4Format, NF4Linear

EPS = 1e-5


@dataclass(frozen=True)
class Work:
    """The least that must be moved and computed. limit: which ceiling bounds the bytes, copy or read."""

    bytes: float
    operations: float = 0.0
    limit: str = "copy"


@dataclass(frozen=True)
class System:
    """function(*inputs, **setup(*inputs)) -> one or several tensors. setup is outside of the time."""

    function: Callable
    setup: Callable[..., dict[str, Any]] = lambda *inputs: {}
    slow: bool = False  # compiles for seconds: measured last, if there is time
    graph: bool = True  # False: it waits for the GPU inside, so it cannot be captured
    cpu: bool = True  # False: does not exist on a CPU


@dataclass(frozen=True)
class Case:
    name: str
    files: tuple[str, ...]  # of kernels/ that it measures
    sizes: str
    inputs: Callable[
        [int, bool], list
    ]  # (seed, small: for the comparison with fp64) -> tensors, numbers, None
    systems: dict[str, System]  # `anvil` among them
    trained: tuple[int, ...]  # places of the inputs that get a gradient
    passes: dict[
        str, Work
    ]  # forward, backward apart; or both, for operations that take the gradient on the way
    reference: Callable | None = None  # the oracle; None: nothing to compare
    quick: bool = True  # part of the quick run


@dataclass(frozen=True)
class Sizes:
    """Of the shapes K1-K4 (performance goals), or tiny ones for a smoke test."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    small: int  # tokens of the comparison with fp64
    hidden: int
    mlp: int
    heads: int
    head: int
    vocabularies: tuple[int, ...]
    lengths: tuple[int, ...]  # of attention
    rank: int
    adapters: int  # LoRA matrices that the optimizer steps


def sizes_for(device: torch.device) -> Sizes:
    if device.type == "cuda":
        lengths = (4096, 2048, 8192, 16384)  # the first is part of the quick run
        return Sizes(
            device, torch.bfloat16, 8192, 257, 4096, 11008, 32, 128, (32000, 128256), lengths, 16, 448
        )
    return Sizes(device, torch.float32, 32, 17, 64, 96, 4, 16, (101, 257), (24, 40), 4, 8)


class Draw:
    """Random tensors of one set, reproducible by the seed. Never zeros: they read faster than data."""

    def __init__(self, sizes: Sizes, seed: int):
        self.sizes = sizes
        self.generator = torch.Generator(sizes.device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.sizes.device) * scale
        return values.to(dtype or self.sizes.dtype)

    def integers(self, high: int, count: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.sizes.device)


def all_cases(sizes: Sizes) -> Iterator[Case]:
    """In order of importance: what a short budget leaves out stands last."""
    yield from norms(sizes)
    yield rope(sizes)
    yield gated_mlp(sizes)
    yield from attention(sizes)
    yield from four_bits(sizes)
    yield from decode_attention(sizes)
    yield from losses(sizes)
    yield from lora(sizes)
    yield adamw(sizes)


def compiled(function: Callable) -> System:
    """torch.compile with static shapes; on a CPU (smoke test) without its code generator."""
    # a timed backward pass runs again and again on what one forward pass saved, so none of it may be given
    # away
    import torch._functorch.config as settings

    settings.donated_buffer = False
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return System(torch.compile(function, dynamic=False, backend=backend), slow=True)


def liger(name: str, **keywords) -> Callable:
    """A function of Liger-Kernel's public interface, looked up when it is called."""

    def call(*inputs):
        from liger_kernel.transformers import functional

        return getattr(functional, name)(*inputs, **keywords)

    return call


# Norms, rotation, activation: bound by bandwidth


def norms(sizes: Sizes) -> Iterator[Case]:
    pass_bytes = sizes.tokens * sizes.hidden * sizes.dtype.itemsize  # one pass over (T, E)
    text = f"{sizes.tokens}x{sizes.hidden}"

    def one(seed: int, small: bool) -> list:
        draw, tokens = Draw(sizes, seed), sizes.small if small else sizes.tokens
        return [draw(tokens, sizes.hidden), draw(sizes.hidden)]

    yield Case(
        "rms_norm",
        ("rms_norm", "norms"),
        text,
        one,
        {
            "anvil": System(lambda x, weight: kernels.rms_norm(x, weight, EPS)),
            "eager": System(lambda x, weight: rms_norm_reference(x, weight, EPS)),
            "torch": System(lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)),
            "compile": compiled(lambda x, weight: rms_norm_reference(x, weight, EPS)),
            "liger": System(lambda x, weight: liger("liger_rms_norm")(x, weight, EPS), cpu=False),
        },
        (0, 1),
        {"forward": Work(2 * pass_bytes), "backward": Work(3 * pass_bytes)},
        lambda x, weight: rms_norm_reference(x, weight, EPS),
    )

    def two(seed: int, small: bool) -> list:
        draw, tokens = Draw(sizes, seed), sizes.small if small else sizes.tokens
        return [draw(tokens, sizes.hidden), draw(tokens, sizes.hidden), draw(sizes.hidden)]

    def plain_add(x, delta, weight):
        return add_rms_norm_reference(x, delta, weight, EPS)

    yield Case(
        "add_rms_norm",
        ("rms_norm", "norms"),
        text,
        two,
        {
            "anvil": System(lambda x, delta, weight: kernels.add_rms_norm(x, delta, weight, EPS)),
            "eager": System(plain_add),
            "compile": compiled(plain_add),
            "liger": System(
                lambda x, r, weight: liger("liger_fused_add_rms_norm")(x, r, weight, EPS), cpu=False
            ),
        },
        (0, 1, 2),
        {"forward": Work(4 * pass_bytes), "backward": Work(4 * pass_bytes)},
        plain_add,
    )

    def three(seed: int, small: bool) -> list:
        draw, tokens = Draw(sizes, seed), sizes.small if small else sizes.tokens
        return [draw(tokens, sizes.hidden), draw(sizes.hidden), draw(sizes.hidden)]

    def plain_layer(x, weight, bias):
        return layer_norm_reference(x, weight, bias, EPS)

    yield Case(
        "layer_norm",
        ("layer_norm", "norms"),
        text,
        three,
        {
            "anvil": System(lambda x, weight, bias: kernels.layer_norm(x, weight, bias, EPS)),
            "eager": System(plain_layer),
            "compile": compiled(plain_layer),
        },
        (0, 1, 2),
        {"forward": Work(2 * pass_bytes), "backward": Work(3 * pass_bytes)},
        plain_layer,
        quick=False,
    )


def rope(sizes: Sizes) -> Case:
    heads, kv_heads = sizes.heads, sizes.heads // 4
    pass_bytes = sizes.tokens * (heads + kv_heads) * sizes.head * sizes.dtype.itemsize

    def inputs(seed: int, small: bool) -> list:
        draw, tokens = Draw(sizes, seed), sizes.small if small else sizes.tokens
        angle = draw(tokens, sizes.head // 2, scale=100.0, dtype=torch.float32)
        tables = [angle.cos().to(sizes.dtype), angle.sin().to(sizes.dtype)]
        return [draw(tokens, heads, sizes.head), draw(tokens, kv_heads, sizes.head), *tables]

    def plain(q, k, cos, sin):
        """As transformers writes it."""
        cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]

        def turned(x):
            first, second = x.chunk(2, -1)
            return torch.cat((-second, first), -1)

        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    return Case(
        "rope",
        ("rope",),
        f"{sizes.tokens} tokens, {heads}+{kv_heads} heads of {sizes.head}",
        inputs,
        {"anvil": System(kernels.rope), "eager": System(plain), "compile": compiled(plain)},
        (0, 1),
        {"forward": Work(2 * pass_bytes), "backward": Work(2 * pass_bytes)},
        rope_reference,
    )


def gated_mlp(sizes: Sizes) -> Case:
    pass_bytes = sizes.tokens * sizes.mlp * sizes.dtype.itemsize

    def inputs(seed: int, small: bool) -> list:
        draw, tokens = Draw(sizes, seed), sizes.small if small else sizes.tokens
        return [draw(tokens, sizes.mlp), draw(tokens, sizes.mlp)]

    def plain(gate, up):
        return gated_mlp_reference(gate, up, "silu")

    return Case(
        "gated_mlp",
        ("gated_mlp",),
        f"{sizes.tokens}x{sizes.mlp} silu",
        inputs,
        {
            "anvil": System(lambda gate, up: kernels.gated_mlp(gate, up, "silu")),
            "eager": System(plain),
            "compile": compiled(plain),
            "liger": System(liger("liger_swiglu"), cpu=False),
        },
        (0, 1),
        {"forward": Work(3 * pass_bytes), "backward": Work(5 * pass_bytes)},
        plain,
    )


# Attention: bound by the matrix units


def attention(sizes: Sizes) -> Iterator[Case]:
    batch = 4 if sizes.device.type == "cuda" else 2
    for place, length in enumerate(sizes.lengths):
        for head in (sizes.head, sizes.head // 2):
            yield _equal_lengths(sizes, batch, length, head, quick=place == 0)
            if place == 0 and head == sizes.head:
                yield packed_attention(sizes)


def _attention_work(sizes: Sizes, lengths: list[int], head: int) -> dict[str, Work]:
    """Causal: half of the scores; backward: five products for the two of forward (flash recompute)."""
    forward = sum(2 * length**2 * head * sizes.heads for length in lengths)
    pass_bytes = sum(lengths) * sizes.heads * head * sizes.dtype.itemsize
    return {"forward": Work(4 * pass_bytes, forward), "backward": Work(8 * pass_bytes, 2.5 * forward)}


def _flat_inputs(sizes: Sizes, lengths: list[int], head: int, seed: int) -> list:
    draw, borders = Draw(sizes, seed), [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=sizes.device)
    return [*(draw(borders[-1], sizes.heads, head) for _ in range(3)), cu_seqlens, max(lengths)]


def _anvil_attention(q, k, v, cu_seqlens, max_seqlen):
    """What users get: on a GPU whichever `auto` measured to be the fastest, which it says."""
    return kernels.attention(q, k, v, cu_seqlens, max_seqlen, None, q.shape[-1] ** -0.5)


def _triton_attention(q, k, v, cu_seqlens, max_seqlen):
    return kernels.attention(q, k, v, cu_seqlens, max_seqlen, None, q.shape[-1] ** -0.5, flash_attn="triton")


def _reference_attention(q, k, v, cu_seqlens, max_seqlen):
    return attention_reference(q, k, v, cu_seqlens, max_seqlen, None, q.shape[-1] ** -0.5)


def _sdpa(backend: str) -> Callable:
    def call(q, k, v, cu_seqlens, max_seqlen):
        batch = cu_seqlens.shape[0] - 1
        rows = [x.view(batch, max_seqlen, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]  # (B, H, S, D)
        with sdpa_kernel(getattr(SDPBackend, backend if q.is_cuda else "MATH")):
            return F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2).reshape(q.shape)

    return call


def _equal_lengths(sizes: Sizes, batch: int, length: int, head: int, quick: bool) -> Case:
    return Case(
        "attention",
        ("flash_attention",),
        f"B{batch} H{sizes.heads} S{length} D{head} causal",
        lambda seed, small: _flat_inputs(sizes, [sizes.small if small else length] * batch, head, seed),
        {
            "anvil": System(_anvil_attention),
            "anvil triton": System(_triton_attention, cpu=False),
            "cudnn": System(_sdpa("CUDNN_ATTENTION")),
            "flash": System(_sdpa("FLASH_ATTENTION")),
        },
        (0, 1, 2),
        _attention_work(sizes, [length] * batch, head),
        _reference_attention,
        quick=quick,
    )


def _varlen_flash(q, k, v, cu_seqlens, max_seqlen):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0))  # causal


def _document_mask(q, k, v, cu_seqlens, max_seqlen) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = q.shape[0]
    document = torch.searchsorted(
        cu_seqlens[1:].contiguous(), torch.arange(tokens, device=q.device), right=True
    )

    def same_document(b, h, query, key):
        return (query >= key) & (document[query] == document[key])

    function = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    return {
        "flex": function,
        "mask": create_block_mask(same_document, None, None, tokens, tokens, device=q.device),
    }


def _flex(q, k, v, cu_seqlens, max_seqlen, flex, mask):
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, D)
    return flex(*rows, block_mask=mask)[0].transpose(0, 1)


def packed_attention(sizes: Sizes) -> Case:
    """Documents of many lengths in one row, about as long as chat data packs."""
    count = 16384 if sizes.device.type == "cuda" else 64
    lengths, generator = [], torch.Generator().manual_seed(0)
    while sum(lengths) < count:
        longest = min(count // 4, count - sum(lengths))
        lengths.append(
            min(longest, int(torch.randint(count // 256 + 1, count // 4, (1,), generator=generator)))
        )
    return Case(
        "attention packed",
        ("flash_attention",),
        f"{len(lengths)} documents of {min(lengths)}..{max(lengths)}, H{sizes.heads} D{sizes.head} causal",
        lambda seed, small: _flat_inputs(sizes, [5, 17, sizes.small] if small else lengths, sizes.head, seed),
        {
            "anvil": System(_anvil_attention),
            "anvil triton": System(_triton_attention, cpu=False),
            "flash varlen": System(_varlen_flash, cpu=False),
            "flex document": System(_flex, _document_mask, slow=True, cpu=False),
        },
        (0, 1, 2),
        _attention_work(sizes, lengths, sizes.head),
        _reference_attention,
    )


def decode_attention(sizes: Sizes) -> Iterator[Case]:
    """One new token per sequence against a full cache, four query heads to a KV head: bound by reading the
    cache."""
    on_gpu = sizes.device.type == "cuda"
    for sequences, capacity in ((1, 8192), (32, 2048)) if on_gpu else ((1, 24), (3, 16)):
        yield _decode_case(sizes, sequences, capacity)


def _decode_case(sizes: Sizes, sequences: int, capacity: int) -> Case:
    heads, kv_heads = sizes.heads, sizes.heads // 4

    def inputs(seed: int, small: bool) -> list:
        draw, device = Draw(sizes, seed), sizes.device
        room = min(capacity, sizes.small) if small else capacity
        keys, values = (draw(sequences, kv_heads, room, sizes.head) for _ in range(2))
        borders = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        lengths = torch.full((sequences,), room, dtype=torch.int32, device=device)
        return [draw(sequences, heads, sizes.head), keys, values, borders, lengths]

    def ours(q, keys, values, borders, lengths):
        return kernels.decode_attention(q, keys, values, borders, lengths, 1, None, q.shape[-1] ** -0.5)

    def reference(q, keys, values, borders, lengths):
        scale = q.shape[-1] ** -0.5
        return decode_attention_reference(q, keys, values, borders, lengths, 1, None, scale, None, None)

    def sdpa(q, keys, values, borders, lengths):
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    cache_bytes = 2.0 * sequences * kv_heads * capacity * sizes.head * sizes.dtype.itemsize
    return Case(
        "decode_attention",
        ("decode_attention",),
        f"{sequences} x {capacity} cached, heads {heads}/{kv_heads} of {sizes.head}",
        inputs,
        {"anvil": System(ours), "sdpa": System(sdpa)},
        (),
        {"forward": Work(cache_bytes, limit="read")},
        reference,
    )


# Losses: the head's products and one read and write of the logits


def losses(sizes: Sizes) -> Iterator[Case]:
    yield cross_entropy(sizes)
    for vocabulary in sizes.vocabularies:
        yield linear_cross_entropy(sizes, vocabulary)
    yield linear_logprobs(sizes)


def cross_entropy(sizes: Sizes) -> Case:
    """Of logits that exist. Anvil and Liger write the gradient over them, so later rounds see that in their
    place."""
    vocabulary = sizes.vocabularies[0]

    def inputs(seed: int, small: bool) -> list:
        draw, rows = Draw(sizes, seed), sizes.small if small else sizes.tokens
        return [draw(rows, vocabulary), draw.integers(vocabulary, rows)]

    def plain(logits, labels):
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    return Case(
        "cross_entropy",
        ("cross_entropy",),
        f"{sizes.tokens}x{vocabulary}",
        inputs,
        {
            "anvil": System(kernels.cross_entropy),
            "eager": System(plain),
            "compile": compiled(plain),
            "liger": System(liger("liger_cross_entropy", reduction="sum"), graph=False, cpu=False),
        },
        (0,),
        {"both": Work(2.0 * sizes.tokens * vocabulary * sizes.dtype.itemsize)},
        cross_entropy_reference,
    )


def linear_cross_entropy(sizes: Sizes, vocabulary: int) -> Case:
    """Frozen head: the gradient goes to the hidden rows only."""

    def inputs(seed: int, small: bool) -> list:
        draw, rows = Draw(sizes, seed), sizes.small if small else sizes.tokens
        head = draw(vocabulary, sizes.hidden, scale=sizes.hidden**-0.5)
        return [draw(rows, sizes.hidden), head, draw.integers(vocabulary, rows)]

    def two_products(hidden, weight, labels):
        return (hidden @ weight.T) @ weight  # what any implementation has to multiply, and nothing else

    liger_loss = liger("liger_fused_linear_cross_entropy", reduction="sum")
    return Case(
        "linear_cross_entropy",
        ("cross_entropy",),
        f"{sizes.tokens}x{sizes.hidden}, V {vocabulary}, frozen head",
        inputs,
        {
            "anvil": System(kernels.linear_cross_entropy),
            "two products": System(lambda *x: two_products(*(t.detach() for t in x))),
            "eager": System(linear_cross_entropy_reference),
            "compile": compiled(linear_cross_entropy_reference),
            "liger": System(liger_loss, graph=False, cpu=False),
        },
        (0,),
        {"both": Work(0, 4.0 * sizes.tokens * vocabulary * sizes.hidden)},
        linear_cross_entropy_reference,
    )


def linear_logprobs(sizes: Sizes) -> Case:
    """One log-probability per row, for preference losses; frozen head."""
    vocabulary = sizes.vocabularies[0]
    case = linear_cross_entropy(sizes, vocabulary)
    return replace(
        case,
        name="linear_logprobs",
        systems={
            "anvil": System(kernels.linear_logprobs),
            "two products": case.systems["two products"],
            "eager": System(linear_logprobs_reference),
        },
        reference=linear_logprobs_reference,
        quick=False,
    )


# Products with adapters


def lora(sizes: Sizes) -> Iterator[Case]:
    for outputs in (sizes.hidden, sizes.mlp):
        yield lora_linear(sizes, outputs)


def lora_linear(sizes: Sizes, outputs: int) -> Case:
    tokens, size, rank = sizes.tokens, sizes.hidden, sizes.rank

    def inputs(seed: int, small: bool) -> list:
        draw, rows = Draw(sizes, seed), sizes.small if small else tokens
        weight = draw(outputs, size, scale=size**-0.5)
        low = (
            draw(rank, size, scale=size**-0.5, dtype=torch.float32),
            draw(outputs, rank, dtype=torch.float32),
        )
        return [draw(rows, size), weight, None, *low, 0.5]

    def as_peft(x, weight, bias, lora_a, lora_b, scale):
        """Adapter in fp32 as peft keeps it, cast as autocast would."""
        low = F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))
        return F.linear(x, weight, bias) + low * scale

    def base_only(x, weight, bias, lora_a, lora_b, scale):
        return F.linear(x, weight)  # so the rest of the time is what the adapter costs

    base, branch = 2.0 * tokens * size * outputs, 2.0 * tokens * rank * (size + outputs)
    return Case(
        "lora_linear",
        ("lora_linear",),
        f"{tokens}x{size} -> {outputs}, rank {rank}",
        inputs,
        {
            "anvil": System(lambda x, *part: kernels.linears(x, [Part(*part)])[0]),
            "eager": System(as_peft),
            "compile": compiled(as_peft),
            "base only": System(base_only),
        },
        (0, 3, 4),
        {"forward": Work(0, base + branch), "backward": Work(0, base + 2 * branch)},
        lambda x, *part: lora_linears_reference(x, [Part(*part)])[0],
    )


# Weights in 4 bits: bound by bandwidth


def four_bits(sizes: Sizes) -> Iterator[Case]:
    for double in (True, False):
        yield dequantise_4bit(sizes, double)
    for rows in (1, 4, 16):
        for inputs, outputs in (
            (sizes.hidden, sizes.mlp),
            (sizes.mlp, sizes.hidden),
            (sizes.hidden, sizes.hidden),
        ):
            yield small_batch_4bit(sizes, rows, inputs, outputs)
    yield small_batch_4bit(sizes, 1, sizes.hidden, sizes.mlp, sizes.rank)


def _quantised(sizes: Sizes, seed: int, outputs: int, inputs: int, double: bool) -> NF4Linear:
    weight = Draw(sizes, seed)(outputs, inputs, scale=inputs**-0.5)
    return NF4Format("nf4", double).quantise(weight, None, sizes.dtype)


def bitsandbytes_state(layer: NF4Linear) -> dict[str, Any]:
    """The layer's own codes as bitsandbytes holds them: what its functions take beside the input."""
    from bitsandbytes.functional import QuantState

    codes, state = codes_and_state(layer)
    return {"codes": codes, "state": QuantState.from_dict(state, device=codes.device)}


def dequantise_4bit(sizes: Sizes, double: bool) -> Case:
    shape = sizes.mlp, sizes.hidden

    def inputs(seed: int, small: bool) -> list:
        outputs = sizes.small if small else shape[0]
        out = torch.empty(outputs, shape[1], dtype=sizes.dtype, device=sizes.device)
        return [out, _quantised(sizes, seed, outputs, shape[1], double)]

    def ours(out, layer):
        return layer.dequantize(out=out)

    def plain(out, layer):
        dequantise_reference(layer.for_kernels(), out)
        return out

    def baseline(out, layer, codes, state):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(codes, state, out=out if out.is_cuda else None)  # its CPU build takes none

    def copy(out, layer, dense):
        return out.copy_(dense)  # the same bytes written, four times as many read

    weights, scales = (
        shape[0] * shape[1],
        (8 + 32 / 256) / 64 if double else 32 / 64,
    )  # bits of scales a weight
    return Case(
        "dequantise_4bit",
        ("nf4",),
        f"{shape[0]}x{shape[1]} nf4{', double quantisation' if double else ''}",
        inputs,
        {
            "anvil": System(ours),
            "bitsandbytes": System(baseline, lambda out, layer: bitsandbytes_state(layer)),
            "eager": System(plain),
            "copy of 16 bit": System(copy, lambda out, layer: {"dense": layer.dequantize()}),
        },
        (),
        {"forward": Work(weights * ((4 + scales) / 8 + sizes.dtype.itemsize))},
        plain,
        quick=double,
    )


def small_batch_4bit(sizes: Sizes, rows: int, inputs: int, outputs: int, rank: int = 0) -> Case:
    """Decoding's product; a layer with double quantisation."""

    def draw(seed: int, small: bool) -> list:
        some, wide = Draw(sizes, seed), min(outputs, sizes.small) if small else outputs
        low = [None, None]
        if rank:
            low = [
                some(rank, inputs, scale=inputs**-0.5, dtype=torch.float32),
                some(wide, rank, dtype=torch.float32),
            ]
        return [some(rows, inputs), _quantised(sizes, seed, wide, inputs, True), *low]

    @torch.no_grad()
    def ours(x, layer, lora_a, lora_b):
        part = Part(layer, None, lora_a, lora_b, 0.5)
        return (layer.from_codes(x, [part]) or lora_linears_reference(x, [part]))[0]

    @torch.no_grad()
    def plain(x, layer, lora_a, lora_b):
        return lora_linears_reference(x, [Part(layer, None, lora_a, lora_b, 0.5)])[0]

    @torch.no_grad()
    def baseline(x, layer, lora_a, lora_b, codes, state):
        import bitsandbytes

        result = bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)
        return result if lora_a is None else result + F.linear(F.linear(x, lora_a.to(x)), lora_b.to(x)) * 0.5

    def dense(x, layer, lora_a, lora_b, dense):
        return F.linear(x, dense)

    weights = inputs * outputs
    return Case(
        "small_batch_4bit",
        ("nf4",),
        f"{rows} x {inputs} -> {outputs}" + (f", rank {rank}" if rank else ""),
        draw,
        {
            "anvil": System(ours),
            "bitsandbytes": System(baseline, lambda x, layer, *_: bitsandbytes_state(layer)),
            "16 bit": System(dense, lambda x, layer, *_: {"dense": layer.dequantize()}),
        },
        (),
        {
            "forward": Work(
                weights * 4.127 / 8 + 4.0 * rank * (inputs + outputs), 2.0 * rows * weights, limit="read"
            )
        },
        plain,
        quick=(inputs, outputs) == (sizes.hidden, sizes.mlp) and rows != 4 and not rank,
    )


# The optimizer: a streaming pass over the state


def adamw(sizes: Sizes) -> Case:
    """Steps of the adapters of Llama-2-7B at rank 16: fp32 weight, gradient and two moments, 28 bytes a
    value."""
    shape = (sizes.rank, sizes.hidden + sizes.mlp // 2)

    def inputs(seed: int, small: bool) -> list:
        draw = Draw(sizes, seed)
        parameters = [draw(*shape, dtype=torch.float32) for _ in range(sizes.adapters)]
        for parameter in parameters:
            parameter.grad = draw(*shape, dtype=torch.float32)
        return parameters

    def stepper(graph: bool = False, **keywords) -> System:
        def setup(*parameters) -> dict[str, Any]:
            return {"step": torch.optim.AdamW(parameters, lr=1e-6, capturable=graph, **keywords).step}

        return System(lambda *parameters, step: step() or (), setup, graph=graph, cpu=not graph)

    values = sizes.adapters * shape[0] * shape[1]
    return Case(
        "adamw",
        (),
        f"{sizes.adapters} tensors, {values / 1e6:.1f} M values",
        inputs,
        # the first as training starts it, the second without the host's part
        {
            "anvil": stepper(fused=True),
            "captured": stepper(True, fused=True),
            "foreach": stepper(foreach=True),
        },
        (),
        {"forward": Work(28 * values)},
    )
