"""Flash attention on flat rows: forward and backward of attention.attention_reference without its (H, T, T)
scores.

Forward, one program per block of queries and query head, over blocks of keys (Dao, arXiv 2307.08691,
algorithm 1):
    top' = max(top, s)    p = 2^(s - top')    total' = total 2^(top - top') + sum p
    acc' = acc 2^(top - top') + p v    out = acc / total    lse = top + log2 total, saved (H, T) fp32
s is in units of log 2, so that exp is one exp2.
Backward (the same, algorithm 2), with delta = sum over D of grad * out:
    p = 2^(s - lse)    dv = p^T grad    ds = p (grad v^T - delta)    dq = scale ds k    dk = scale ds^T q
with ds times 1 - tanh^2 under a soft cap. dk and dv: one program per block of keys and key/value head,
through the query heads of the group; dq: one program per block of queries, which takes the scores once
more. No atomics: 7 products instead of 5, and the same bits every time.

Where the work is: a segment's blocks never cross its borders. Block b of the grid belongs to the segment i
with the largest cu_seqlens[i] // BLOCK + i <= b, found by bisection in the kernel; so T // BLOCK + N blocks
serve any segments, at most one each is idle, and the host never looks at cu_seqlens. Blocks outside of the
window or above the diagonal are not run, those in between are not masked. One loop serves all: a branch
around the mask costs less than draining the pipeline between loops, and a third of the code. Long programs
come first. Head sizes that are no power of two are padded with zeros in registers.
"""

import math

import torch

from kernels.attention import check
from kernels.launch import capability, ceil_divide, jit, next_power_of_2, run, tanh, tl

MAX_HEAD_DIM = 256  # beyond it the accumulators do not fit the registers
DELTA_ROWS = 64
LOG2E = math.log2(math.e)
L2_BYTES = 24 * 2**20  # keys and values in use at a time; half of an H100's cache, to leave room for the rest


def unsupported(q, k, v) -> str | None:
    """Why the kernels do not serve these tensors; None if they do."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head size {q.shape[-1]}; at most {MAX_HEAD_DIM}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v of different dtypes: {q.dtype}, {k.dtype}, {v.dtype}"
    return None


def flash_attention_triton(
    q, k, v, cu_seqlens, max_seqlen, window, scale, causal=True, softcap=None, alibi_slopes=None
) -> torch.Tensor:
    """attention.attention_reference, with gradients. scale > 0; q, k, v not contiguous are copied."""
    check(window, causal)
    if scale <= 0:
        raise ValueError(f"attention scale {scale}: the kernels need a positive one")
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    settings = max_seqlen, window, scale, causal, softcap
    return _FlashAttention.apply(q, k, v, cu_seqlens, *settings, alibi_slopes)


def _blocks(kernel: str, head_block: int, dtype: torch.dtype, generation: int, plain: bool) -> dict[str, int]:
    """Block sizes, warps and stages of forward, keys (dk, dv) and queries (dq). plain: no soft cap, no ALiBi.

    Bounds: registers (the fp32 accumulators of BLOCK x D and the scores, 255 a thread) and shared memory (163
    KB on an A100, 227 KB on an H100, 99 KB on others: the block that stays, plus `num_stages` of the blocks
    that stream).
    """
    if generation == 0:  # the interpreter: small, so that small tests have several blocks
        return {"BLOCK_M": 16 if kernel == "keys" else 32, "BLOCK_N": 32 if kernel == "keys" else 16}
    if dtype is torch.float32:  # no tensor cores: products of fp32 numbers keep fp32's precision
        m, n = (32, 32) if head_block <= 64 else (16, 32) if kernel == "keys" else (32, 16)
        return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}
    m, n, warps, stages = _tiles(generation)[kernel][max(64, head_block)]
    if (m, n) == (128, 128) and not plain:
        n = 64  # what changes the scores takes registers too
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


# kernel -> padded head size -> BLOCK_M (queries), BLOCK_N (keys), warps, stages. With two stages the copy of
# the next block is started when this one is done and waited for at once, so it takes three to hide it. Chosen
# by what compiles without spilling; none of them has been timed yet. keys at 128 on a GPU of the H100's kind
# could also take (64, 128, 8, 3): fewer blocks, but some 60 bytes spilled.
_AMPERE = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 32, 4, 3), 256: (128, 32, 8, 2)},
    "keys": {64: (32, 128, 8, 3), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "queries": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
}
_HOPPER = {
    "forward": {64: (128, 128, 8, 3), 128: (128, 128, 8, 3), 256: (128, 32, 8, 3)},
    "keys": {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 32, 8, 3)},
    "queries": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
}
_SMALL = {  # 99 KB of shared memory: RTX 30, 40 and 50, L4, L40, A10
    **_AMPERE,
    "forward": _AMPERE["forward"] | {256: (64, 32, 8, 2)},
    "queries": _AMPERE["queries"] | {128: (64, 32, 4, 3), 256: (32, 32, 8, 2)},
}


def _tiles(generation: int) -> dict[str, dict[int, tuple[int, int, int, int]]]:
    if 90 <= generation < 120:
        return _HOPPER
    return _AMPERE if generation in (80, 87) else _SMALL


def _heads_together(q, k, max_seqlen: int) -> int:
    """How many query heads run side by side: as many as have their keys and values in the L2 cache at a time.

    More heads side by side keep the heavy blocks first for all of them; fewer read keys and values from the
    cache.
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    bytes_per_head = 2 * max_seqlen * k.shape[2] * k.element_size() / group
    return _largest_divisor(heads, int(L2_BYTES // max(1, bytes_per_head)))


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of number up to `most`, at least 1: _place takes heads in equal chunks."""
    return max(n for n in range(1, max(1, min(number, most)) + 1) if number % n == 0)


class _Shared:
    """What the kernels of one call share: sizes, switches, numbers that change the scores. No tensor."""

    def __init__(self, q, k, cu_seqlens, max_seqlen, window, scale, causal, softcap, alibi):
        self.tokens, self.heads, self.head_dim = q.shape
        self.kv_heads, self.segments = k.shape[1], cu_seqlens.shape[0] - 1
        self.dtype, self.generation, self.scale = q.dtype, capability(q.device), scale
        self.plain = softcap is None and not alibi
        self.together = _heads_together(q, k, max_seqlen)
        self.numbers = (
            min(window or 0, 2**30),
            scale * LOG2E
            if softcap is None
            else scale / softcap,  # of q k^T: to units of log 2, or to tanh's
            0.0 if softcap is None else softcap * LOG2E,
        )
        self.switches = {
            "GROUP": self.heads // self.kv_heads,
            "KV_HEADS": self.kv_heads,
            "D": self.head_dim,
            "BLOCK_D": max(16, next_power_of_2(self.head_dim)),
            "CAUSAL": causal,
            "WINDOW": window is not None,
            "CAP": softcap is not None,
            "PRECISION": "ieee" if q.dtype is torch.float32 else "tf32",  # of no effect on 16-bit products
        }

    def start(self, kernel, name: str, *arguments) -> None:
        """Start one of the three kernels on its grid (blocks, heads)."""
        options = _blocks(name, self.switches["BLOCK_D"], self.dtype, self.generation, self.plain)
        block = options["BLOCK_N" if name == "keys" else "BLOCK_M"]
        heads, together = self.heads, self.together
        if name == "keys":
            heads = self.kv_heads
            together = _largest_divisor(heads, together // self.switches["GROUP"])
        grid = (self.tokens // block + self.segments, heads)
        sizes = (self.tokens, self.segments, together)
        run(kernel, grid, *arguments, *sizes, *self.numbers, **self.switches, **options)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, window, scale, causal, softcap, alibi_slopes):
        # contiguous, so that steps between rows are constants: addresses in registers would spill
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        settings = max_seqlen, window, scale, causal, softcap
        shared = _Shared(q, k, cu_seqlens, *settings, alibi=alibi_slopes is not None)
        slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        shared.start(_forward_kernel, "forward", q, k, v, out, lse, cu_seqlens, slopes)
        ctx.shared = shared
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, slopes)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, cu_seqlens, slopes = ctx.saved_tensors
        shared, grad = ctx.shared, grad.contiguous()
        delta = torch.empty_like(lse)
        constants = {"HEADS": shared.heads, "ROWS": DELTA_ROWS, "D": shared.head_dim}
        constants["BLOCK_D"] = shared.switches["BLOCK_D"]
        grid = (ceil_divide(shared.tokens, DELTA_ROWS), shared.heads)
        run(_delta_kernel, grid, out, grad, delta, shared.tokens, **constants, num_warps=4)
        dq = dk = dv = None
        inputs = (q, k, v, grad, lse, delta)
        if any(ctx.needs_input_grad[1:3]):
            dk, dv = torch.empty_like(k), torch.empty_like(v)
            shared.start(_keys_kernel, "keys", *inputs, dk, dv, cu_seqlens, slopes, shared.scale)
        if ctx.needs_input_grad[0]:
            dq = torch.empty_like(q)
            shared.start(_queries_kernel, "queries", *inputs, dq, cu_seqlens, slopes, shared.scale)
        return dq, dk, dv, None, None, None, None, None, None, None


@jit
def _place(cu_seqlens, segments, together, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Program -> (head, first token of the segment (int64), its length, first row of the block within it).

    The grid (blocks, heads) is taken as one list: `together` heads at a time, their blocks side by side.
    LAST_FIRST: the blocks of a segment backwards, which under a causal mask puts the long programs first.
    """
    blocks = tl.num_programs(0)
    program = tl.program_id(0) + tl.program_id(1) * blocks
    chunk = program // (blocks * together)
    rest = program - chunk * blocks * together
    block = rest // together
    head = chunk * together + rest - block * together
    if LAST_FIRST:
        block = blocks - 1 - block
    low = block * 0
    high = low + segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        inside = tl.load(cu_seqlens + middle) // BLOCK + middle <= block
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    start = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - start
    first = (block - start // BLOCK - low) * BLOCK
    return head, start.to(tl.int64), length, first


@jit
def _rows(
    tensor, first, stride: tl.constexpr, length, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK rows of one head from row `first` of its segment on, where tensor points -> (BLOCK, BLOCK_D).

    Zeros past the end of the segment and of the head.
    """
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    inside = (first + row < length)[:, None]
    if D != BLOCK_D:
        inside = inside & (column < D)[None, :]
    return tl.load(tensor + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@jit
def _store(
    tensor,
    value,
    first,
    stride: tl.constexpr,
    length,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The reverse of _rows."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    place = tensor + row[:, None] * stride + column[None, :]
    inside = (first + row < length)[:, None] & (column < D)[None, :]
    tl.store(place, value.to(tensor.dtype.element_ty), mask=inside)


@jit
def _seen(query, key, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a query sees; query and key are places in the segment, one a row and the other a column."""
    if CAUSAL:
        seen = key <= query
        if WINDOW:
            seen = seen & (key > query - window)
    else:
        seen = key < length + 0 * query
    return seen


@jit
def _key_range(
    first,
    length,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Of queries first .. first + BLOCK_M - 1: keys start .. left and right .. stop need masks."""
    start, left, stop, right = first * 0, first * 0, length, length // BLOCK_N * BLOCK_N
    if CAUSAL:
        stop = tl.minimum(first + BLOCK_M, length)
        right = (first + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        start = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        left = tl.maximum(stop - window, 0)  # the first key that the last query sees
        left = tl.minimum((left + BLOCK_N - 1) // BLOCK_N * BLOCK_N, stop)
    return start, left, tl.maximum(left, right), stop


@jit(do_not_specialize=["tokens", "segments", "together", "window"])
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, slopes, tokens, segments, together, window, scale, cap,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL:
    tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M:
    tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    STRIDE_K: tl.constexpr = KV_HEADS * D
    STRIDE_Q: tl.constexpr = GROUP * STRIDE_K
    head, begin, length, first = _place(cu_seqlens, segments, together, BLOCK_M, CAUSAL)
    if first >= length:
        return
    query = _rows(q + (begin + first) * STRIDE_Q + head * D, first, STRIDE_Q, length, BLOCK_M, D, BLOCK_D)
    k += begin * STRIDE_K + head // GROUP * D
    v += begin * STRIDE_K + head // GROUP * D
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head) * 1.4426950408889634  # log2 e
    start, left, right, stop = _key_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # finite, while masked scores are -inf: a row may see nothing of a block, and 2^(-inf - top) is then 0.
    # Were both -inf it would be NaN; were both finite, s * unit - top in one rounding (FMA) would not be 0
    # but huge: 2^huge
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    row = first + tl.arange(0, BLOCK_M)
    k += start.to(tl.int64) * STRIDE_K
    v += start.to(tl.int64) * STRIDE_K
    for place in tl.range(start, stop, BLOCK_N):
        keys = _rows(k, place, STRIDE_K, length, BLOCK_N, D, BLOCK_D)
        s = tl.dot(query, tl.trans(keys), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        column = place + tl.arange(0, BLOCK_N)
        unit = scale
        if CAP:
            s = cap * tanh(s * scale, PRECISION == "ieee")
            unit = 1.0
        if slopes is not None:
            s = s * unit - slope * tl.abs(row[:, None] - column[None, :])
            unit = 1.0
        if (place < left) | (place >= right):
            s = tl.where(
                _seen(row[:, None], column[None, :], length, window, CAUSAL, WINDOW), s, float("-inf")
            )
        new = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        values = _rows(v, place, STRIDE_K, length, BLOCK_N, D, BLOCK_D)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
        top = new
        k += BLOCK_N * STRIDE_K
        v += BLOCK_N * STRIDE_K
    tl.store(lse + head.to(tl.int64) * tokens + begin + row, top + tl.log2(total), mask=row < length)
    out += (begin + first) * STRIDE_Q + head * D
    _store(out, acc / total[:, None], first, STRIDE_Q, length, BLOCK_M, D, BLOCK_D)


@jit(do_not_specialize=["tokens"])
def _delta_kernel(
    out, grad, delta, tokens, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """delta[h, t] = sum over D of grad * out."""
    STRIDE_Q: tl.constexpr = HEADS * D
    first, head = tl.program_id(0) * ROWS, tl.program_id(1)
    offset = first.to(tl.int64) * STRIDE_Q + head * D
    one = _rows(out + offset, first, STRIDE_Q, tokens, ROWS, D, BLOCK_D).to(tl.float32)
    other = _rows(grad + offset, first, STRIDE_Q, tokens, ROWS, D, BLOCK_D).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    tl.store(delta + head.to(tl.int64) * tokens + row, tl.sum(one * other, 1), mask=row < tokens)


@jit
def _probabilities(
    s,
    query,
    key,
    lse,
    free,
    length,
    window,
    scale,
    cap,
    slope,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q k^T -> (p, ds / d product without `scale`). query, key, lse along s; free: no mask touches s."""
    slack = 1.0
    if CAP:
        bent = tanh(s * scale, PRECISION == "ieee")
        s = cap * bent
        slack = 1.0 - bent * bent
    else:
        s = s * scale
    if ALIBI:
        s = s - slope * tl.abs(query - key)
    if not free:
        s = tl.where(_seen(query, key, length, window, CAUSAL, WINDOW), s, float("-inf"))
    return tl.exp2(s - lse), slack


@jit(do_not_specialize=["tokens", "segments", "together", "window"])
def _keys_kernel(
    q, k, v, grad, lse, delta, dk, dv, cu_seqlens, slopes, factor, tokens, segments, together, window,
    scale, cap,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL:
    tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M:
    tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk, dv of one block of keys and one key/value head; a segment's first blocks have most queries."""
    STRIDE_K: tl.constexpr = KV_HEADS * D
    STRIDE_Q: tl.constexpr = GROUP * STRIDE_K
    kv_head, begin, length, first = _place(cu_seqlens, segments, together, BLOCK_N, False)
    if first >= length:
        return
    keys = _rows(k + (begin + first) * STRIDE_K + kv_head * D, first, STRIDE_K, length, BLOCK_N, D, BLOCK_D)
    values = _rows(v + (begin + first) * STRIDE_K + kv_head * D, first, STRIDE_K, length, BLOCK_N, D, BLOCK_D)
    last = tl.minimum(first + BLOCK_N, length) - 1
    # queries start .. left and right .. stop need masks, left .. right none
    start, left, right, stop = first * 0, first * 0, length, length
    if CAUSAL:
        start = first // BLOCK_M * BLOCK_M
        left = (last + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if WINDOW:
        right = tl.minimum(length, first + window)
        stop = tl.minimum(length, last + window)
    left = tl.minimum(left, stop)
    right = tl.maximum(left, right // BLOCK_M * BLOCK_M)
    key = (first + tl.arange(0, BLOCK_N))[:, None]
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    # the blocks of all heads of the group in one loop: between heads the pipeline keeps running
    for step in tl.range(0, blocks * GROUP):
        member = step // blocks
        place = start + (step - member * blocks) * BLOCK_M
        head = kv_head * GROUP + member
        row = place + tl.arange(0, BLOCK_M)
        offset = (begin + place) * STRIDE_Q + head * D
        numbers = head.to(tl.int64) * tokens + begin + place + tl.arange(0, BLOCK_M)
        query = _rows(q + offset, place, STRIDE_Q, length, BLOCK_M, D, BLOCK_D)
        row_lse = tl.load(lse + numbers, mask=row < length, other=0.0)
        s = tl.dot(keys, tl.trans(query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M): transposed scores
        free = (place >= left) & (place < right)
        slope = 0.0
        if slopes is not None:
            slope = tl.load(slopes + head) * 1.4426950408889634  # log2 e
        p, slack = _probabilities(
            s,
            row[None, :],
            key,
            row_lse[None, :],
            free,
            length,
            window,
            scale,
            cap,
            slope,
            CAUSAL,
            WINDOW,
            CAP,
            slopes is not None,
            PRECISION,
        )
        rows = _rows(grad + offset, place, STRIDE_Q, length, BLOCK_M, D, BLOCK_D)
        row_delta = tl.load(delta + numbers, mask=row < length, other=0.0)
        sum_v = tl.dot(p.to(rows.dtype), rows, sum_v, input_precision=PRECISION)
        # starting the product at -delta, instead of subtracting it, frees its registers
        less = tl.broadcast_to(-row_delta[None, :], (BLOCK_N, BLOCK_M))
        dp = tl.dot(values, tl.trans(rows), less, input_precision=PRECISION)
        ds = p * dp * slack
        sum_k = tl.dot(ds.to(query.dtype), query, sum_k, input_precision=PRECISION)
    dk += (begin + first) * STRIDE_K + kv_head * D
    dv += (begin + first) * STRIDE_K + kv_head * D
    _store(dk, sum_k * factor, first, STRIDE_K, length, BLOCK_N, D, BLOCK_D)
    _store(dv, sum_v, first, STRIDE_K, length, BLOCK_N, D, BLOCK_D)


@jit(do_not_specialize=["tokens", "segments", "together", "window"])
def _queries_kernel(
    q, k, v, grad, lse, delta, dq, cu_seqlens, slopes, factor, tokens, segments, together, window,
    scale, cap,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL:
    tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M:
    tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries and one query head."""
    STRIDE_K: tl.constexpr = KV_HEADS * D
    STRIDE_Q: tl.constexpr = GROUP * STRIDE_K
    head, begin, length, first = _place(cu_seqlens, segments, together, BLOCK_M, CAUSAL)
    if first >= length:
        return
    query = _rows(q + (begin + first) * STRIDE_Q + head * D, first, STRIDE_Q, length, BLOCK_M, D, BLOCK_D)
    rows = _rows(grad + (begin + first) * STRIDE_Q + head * D, first, STRIDE_Q, length, BLOCK_M, D, BLOCK_D)
    numbers = head.to(tl.int64) * tokens + begin + first + tl.arange(0, BLOCK_M)
    inside = first + tl.arange(0, BLOCK_M) < length
    row_lse = tl.load(lse + numbers, mask=inside, other=0.0)
    row_delta = tl.load(delta + numbers, mask=inside, other=0.0)
    k += begin * STRIDE_K + head // GROUP * D
    v += begin * STRIDE_K + head // GROUP * D
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head) * 1.4426950408889634  # log2 e
    start, left, right, stop = _key_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row = (first + tl.arange(0, BLOCK_M))[:, None]
    less = tl.broadcast_to(-row_delta[:, None], (BLOCK_M, BLOCK_N))  # as in the kernel above
    k += start.to(tl.int64) * STRIDE_K
    v += start.to(tl.int64) * STRIDE_K
    for place in tl.range(start, stop, BLOCK_N):
        column = (place + tl.arange(0, BLOCK_N))[None, :]
        keys = _rows(k, place, STRIDE_K, length, BLOCK_N, D, BLOCK_D)
        values = _rows(v, place, STRIDE_K, length, BLOCK_N, D, BLOCK_D)
        s = tl.dot(query, tl.trans(keys), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(rows, tl.trans(values), less, input_precision=PRECISION)
        free = (place >= left) & (place < right)
        p, slack = _probabilities(
            s,
            row,
            column,
            row_lse[:, None],
            free,
            length,
            window,
            scale,
            cap,
            slope,
            CAUSAL,
            WINDOW,
            CAP,
            slopes is not None,
            PRECISION,
        )
        ds = p * dp * slack
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
        k += BLOCK_N * STRIDE_K
        v += BLOCK_N * STRIDE_K
    dq += (begin + first) * STRIDE_Q + head * D
    _store(dq, acc * factor, first, STRIDE_Q, length, BLOCK_M, D, BLOCK_D)
