"""Rotary position embedding of q and k.  Su et al., arXiv 2104.09864, section 3.4.

The pair (x1, x2) at angle a = position * inverse_frequency[i] becomes (x1 cos a - x2 sin a, x2 cos a + x1 sin
a). Half-split (Llama): x1 = x[i], x2 = x[i + R/2]; interleaved (GPT-J): x1 = x[2i], x2 = x[2i + 1]. R = 2 *
len(cos) may be less than the head size D: the other D - R values pass through (partial rotary, GPT-NeoX).
Backward: -a.

Nothing of q and k is kept. Results are fresh tensors. In place would move as many bytes, and is not sound: q
and k are often views of one product, which autograd does not let a function of two results change; and an
incoming gradient may be another node's too (that of x in x + y is), which a function cannot see.
"""

import torch

from kernels.launch import ceil_divide, jit, next_power_of_2, run, tl

PAIRS = 2048  # of one program: 16 per thread, so two 16-byte loads of each half in bf16


def rope_reference(q, k, cos, sin, interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """q (T, H, D), k (T, K, D); cos, sin (T, R/2), R <= D -> q and k, rotated, in their dtype."""
    return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved)


def rope(q, k, cos, sin, interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """rope_reference in two passes over q and k that keep nothing of them: the backward pass rotates back."""
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return _turn_both(q, k, cos, sin, interleaved)
    return _RopeTorch.apply(q, k, cos, sin, interleaved)


class _RopeTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn_both(q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, q_grad, k_grad):
        cos, sin = ctx.saved_tensors
        return *_turn_both(q_grad, k_grad, cos, -sin, ctx.interleaved), None, None, None


def _turn_both(q, k, cos, sin, interleaved):
    if interleaved or 2 * cos.shape[-1] < q.shape[-1]:
        return rope_reference(q, k, cos, sin, interleaved)
    if q.shape[0] == 1:  # one token: each operation costs more than what it computes
        first, second = torch.cat((q, k), dim=1).chunk(2, dim=-1)
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat(turned, dim=-1).split((q.shape[1], k.shape[1]), dim=1)
    tables = rotation_tables(cos, sin)
    return rotate(q, *tables), rotate(k, *tables)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, R/2)
    rotary = 2 * cos.shape[-1]
    turning, rest = x[..., :rotary], x[..., rotary:]
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return torch.cat((torch.stack(turned, dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((*turned, rest), dim=-1)


def rotation_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (T, D/2) -> (cos, cos) and (-sin, sin), each (T, 1, D)."""
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (T, heads, D) * (cos, cos) + (x2, x1) * (-sin, sin); cos, sin by rotation_tables."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)


def unsupported(q: torch.Tensor, k: torch.Tensor) -> str | None:
    """Why the kernel does not serve these tensors; None if it does."""
    if q.dtype is torch.float64:
        return "float64; it computes in float32"
    return None


def rope_triton(q, k, cos, sin, interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """rope_reference as one kernel, and one backward. q, k: any strides between tokens and heads."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _RopeTriton.apply(q, k, cos, sin, interleaved)
    return _start(q, k, cos, sin, interleaved, backward=False)


class _RopeTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _start(q, k, cos, sin, interleaved, backward=False)

    @staticmethod
    def backward(ctx, q_grad, k_grad):
        return *_start(q_grad, k_grad, *ctx.saved_tensors, ctx.interleaved, backward=True), None, None, None


def _start(q, k, cos, sin, interleaved: bool, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    tokens, q_heads, size = q.shape
    k_heads, half = k.shape[1], cos.shape[-1]
    turned_q, turned_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    half_block, rest = next_power_of_2(half), size - 2 * half
    lines = max(1, PAIRS // half_block)  # heads of tokens per program
    # powers of two that divide the heads, so that no thread idles
    q_block, k_block = (min(heads & -heads, lines) for heads in (q_heads, k_heads))
    q_programs = ceil_divide(tokens, lines // q_block) * (q_heads // q_block)
    k_programs = ceil_divide(tokens, lines // k_block) * (k_heads // k_block)
    strides = *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0)
    sizes = q_programs, tokens, q_heads, k_heads, size, half
    switches = {"INTERLEAVED": interleaved, "BACKWARD": backward}
    blocks = {"LINES": lines, "Q_HEADS": q_block, "K_HEADS": k_block, "HALF": half_block}
    blocks["REST"] = next_power_of_2(rest) if rest else 0
    tensors = q, k, turned_q, turned_k, cos, sin
    run(
        _rope_kernel,
        (q_programs + k_programs,),
        *tensors,
        *sizes,
        *strides,
        **switches,
        **blocks,
        num_warps=4,
    )
    return turned_q, turned_k


@jit(do_not_specialize=["q_programs", "tokens"])
def _rope_kernel(
    q, k, turned_q, turned_k, cos, sin, q_programs, tokens, q_heads, k_heads, size, half, q_token,
    q_head, k_token, k_head, cos_token, sin_token,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, LINES: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The first programs serve q, the others k. q_token, ...: strides, in values."""
    program = tl.program_id(0)
    if program < q_programs:
        _turn_lines(
            q, turned_q, cos, sin, program, tokens, q_heads, size, half, q_token, q_head,
            cos_token, sin_token, INTERLEAVED, BACKWARD, LINES, Q_HEADS, HALF, REST,
        )  # fmt: skip
    else:
        _turn_lines(
            k, turned_k, cos, sin, program - q_programs, tokens, k_heads, size, half, k_token, k_head,
            cos_token, sin_token, INTERLEAVED, BACKWARD, LINES, K_HEADS, HALF, REST,
        )  # fmt: skip


@jit
def _turn_lines(
    x, turned, cos, sin, block, tokens, heads, size, half, x_token, x_head, cos_token, sin_token,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, LINES: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """LINES rows of (token, head): HEADS heads of some tokens; the next block takes their other heads."""
    line = tl.arange(0, LINES)[:, None]
    head_blocks = heads // HEADS
    token = (block // head_blocks * (LINES // HEADS) + line // HEADS).to(tl.int64)
    head = block % head_blocks * HEADS + line % HEADS
    source = x + token * x_token + head * x_head
    target = turned + (token * heads + head) * size
    pair = tl.arange(0, HALF)[None, :]
    inside = (token < tokens) & (pair < half)
    cosine = tl.load(cos + token * cos_token + pair, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * sin_token + pair, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        sine = -sine
    dtype = turned.dtype.element_ty
    if INTERLEAVED:
        value = tl.arange(0, 2 * HALF)[None, :]
        there = (token < tokens) & (value < 2 * half)
        both = tl.load(source + value, mask=there, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (LINES, HALF, 2)))
        both = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        tl.store(target + value, tl.reshape(both, (LINES, 2 * HALF)).to(dtype), mask=there)
    else:
        first = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pair, (first * cosine - second * sine).to(dtype), mask=inside)
        tl.store(target + half + pair, (second * cosine + first * sine).to(dtype), mask=inside)
    if REST > 0:
        value = 2 * half + tl.arange(0, REST)[None, :]
        there = (token < tokens) & (value < size)
        tl.store(target + value, tl.load(source + value, mask=there), mask=there)
