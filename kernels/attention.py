"""Attention over flat rows: softmax(q k^T * scale) v inside every segment, never across a border.

T tokens, N segments, H query heads, K key/value heads (H is a multiple of K), D head size. Query head h reads
key/value head h // (H / K). Of the scores s = q k^T * scale, in this order:
    soft cap c:        s = c tanh(s / c)                 (Gemma 2, arXiv 2408.00118, section 2)
    ALiBi slope m_h:   s = s - m_h |query - key|         (arXiv 2108.12409, section 3)
    causal:            a query sees its own position and those before it
    window W:          position p sees keys p-W+1 .. p   (arXiv 2310.06825, section 2); causal only

`attention_reference` is the formula and the oracle of the tests. `attention_sdpa` is what runs on a CPU:
segment by segment into torch's flash kernel (nothing (T, T) exists), or through two products where those are
faster; elsewhere its one block-diagonal mask keeps the host out of it. The Triton kernels are in
flash_attention.py, torch's own for the GPU in attention_backends.py.
`cached_attention_reference` serves rows whose keys stand in a cache.
"""

from math import inf

import torch
import torch.nn.functional as F


def attention_reference(
    q, k, v, cu_seqlens, max_seqlen, window, scale, causal=True, softcap=None, alibi_slopes=None
) -> torch.Tensor:
    """Every score written out, (H, T, T) of them: memory grows with the square of the row.

    q (T, H, D), k and v (T, K, D), one dtype; cu_seqlens (N+1,) int32; max_seqlen, window: tokens; softcap:
    logits; alibi_slopes (H,) fp32 -> (T, H, D). Products in q's dtype, softmax in fp32 (fp64 stays). Raises
    ValueError for a window without causal.
    """
    check(window, causal)
    place = torch.arange(q.shape[0], device=q.device)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
    allowed = (segment[:, None] == segment[None, :]) & _seen(place[:, None], place[None, :], window, causal)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q, k)  # (H, T, T)
    scores = (scores if q.dtype is torch.float64 else scores.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = (place[:, None] - place[None, :]).abs()
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("hnm,mhd->nhd", weights, v)


def attention_sdpa(
    q,
    k,
    v,
    cu_seqlens,
    max_seqlen,
    window,
    scale,
    causal=True,
    softcap=None,
    alibi_slopes=None,
    whole=(None, inf),
) -> torch.Tensor:
    """attention_reference through torch's own attention, which knows no soft cap (ValueError).

    whole: (function of q, k, v, segments, scale; shortest length): it does causal segments of one length.
    """
    check(window, causal)
    if softcap is not None:
        raise ValueError("torch's attention has no soft cap; take flash_attn: triton or disabled")
    if q.device.type != "cpu":
        return _one_mask(q, k, v, cu_seqlens, window, scale, causal, alibi_slopes)
    pieces = []
    for start, count, length in _runs_of_equal_length(cu_seqlens.tolist()):
        stop = start + count * length
        plain = causal and alibi_slopes is None and (window is None or window >= length)
        if plain and length >= whole[1]:
            pieces.append(whole[0](q[start:stop], k[start:stop], v[start:stop], count, scale))
            continue
        mask = None
        if window is not None and window < length:
            mask = _window_mask(length, length, window, q.device)
        if alibi_slopes is not None:
            mask = _alibi_bias(length, window, causal, alibi_slopes, q.dtype)
        heads_first = [x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
        causal_alone = causal and mask is None
        options = {"is_causal": causal_alone, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
        out = F.scaled_dot_product_attention(*heads_first, mask, **options)  # (count, H, length, D)
        pieces.append(out.transpose(1, 2).reshape(count * length, *q.shape[1:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.zeros_like(q)


def check(window: int | None, causal: bool) -> None:
    """Raise ValueError for what has no meaning."""
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention window {window}: at least 1 token, and causal attention only")


def cached_attention_reference(
    q, keys, values, borders, lengths, window: int | None, scale: float, whole=(None, inf)
) -> torch.Tensor:
    """Attention of new tokens against a cache that already holds their own keys; whole as in attention_sdpa.

    q (T, H, D): the new tokens of sequences 0..N-1 one after the other; borders: N+1 host ints into T. keys,
    values (N, K, capacity, D); lengths: N host ints, filled slots per sequence, new tokens included -> (T, H,
    D).
    """
    gqa = q.shape[1] != keys.shape[1]
    count = len(lengths)
    if q.shape[0] == count == 1:  # one new token of one sequence: no mask, no loop
        first = 0 if window is None else max(0, lengths[0] - window)
        keys, values = keys[:, :, first : lengths[0]], values[:, :, first : lengths[0]]
        # a group's heads as rows of one query: in bf16 torch's kernel is 2 to 5 times as fast with it
        rows = q.reshape(1, keys.shape[1], -1, q.shape[2])
        return F.scaled_dot_product_attention(rows, keys, values, scale=scale).flatten(1, 2)
    if q.shape[0] == count:  # one new token each: one call for all sequences
        longest = max(lengths)
        positions = torch.arange(longest, device=q.device)
        ends = torch.tensor(lengths, device=q.device)[:, None]
        allowed = positions < ends
        if window is not None:
            allowed &= positions >= ends - window
        operands = q[:, :, None], keys[:, :, :longest], values[:, :, :longest], allowed[:, None, None, :]
        out = F.scaled_dot_product_attention(*operands, scale=scale, enable_gqa=gqa)  # (N, H, 1, D)
        return out[:, :, 0]
    pieces = []
    for i, length in enumerate(lengths):
        rows = q[borders[i] : borders[i + 1]]  # (new, H, D)
        new = rows.shape[0]
        if length >= whole[1] and new == length and (window is None or window >= length):  # a first prompt
            k, v = (x[i, :, :length].transpose(0, 1) for x in (keys, values))
            pieces.append(whole[0](rows, k, v, 1, scale))
            continue
        first = max(0, length - window) if window is not None and new == 1 else 0
        mask = None
        if new > 1 and (new < length or (window is not None and window < length)):
            mask = _window_mask(new, length, window or length, q.device)
        k, v = (x[i : i + 1, :, first:length] for x in (keys, values))
        options = {"is_causal": mask is None and new > 1, "scale": scale, "enable_gqa": gqa}
        out = F.scaled_dot_product_attention(rows.transpose(0, 1)[None], k, v, mask, **options)
        pieces.append(out[0].transpose(0, 1))  # (1, H, new, D) -> (new, H, D)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _runs_of_equal_length(borders: list[int]):
    """Yield (start, count, length) for runs of neighbouring segments of one length, which one call serves."""
    i, last = 0, len(borders) - 1
    while i < last:
        length, j = borders[i + 1] - borders[i], i + 1
        while j < last and borders[j + 1] - borders[j] == length:
            j += 1
        if length:
            yield borders[i], j - i, length
        i = j


def _window_mask(queries: int, keys: int, window: int, device) -> torch.Tensor:
    """(queries, keys) bool; the queries are the last positions of the keys."""
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    return _seen(query, key, window, True)


def _seen(query, key, window: int | None, causal: bool) -> torch.Tensor:
    """Which keys a query sees, by their places; without causal all of them."""
    if not causal:
        return torch.ones((), dtype=torch.bool, device=query.device)
    return key <= query if window is None else (key <= query) & (key > query - window)


def _alibi_bias(length: int, window, causal: bool, slopes, dtype) -> torch.Tensor:
    """(H, length, length): what is added to the scores, -inf where a key is not seen."""
    place = torch.arange(length, device=slopes.device)
    distance = (place[:, None] - place[None, :]).abs()
    bias = -slopes.to(dtype)[:, None, None] * distance
    return bias.masked_fill(~_seen(place[:, None], place[None, :], window, causal), -torch.inf)


def _one_mask(q, k, v, cu_seqlens, window, scale, causal=True, alibi_slopes=None):
    """The same on any device without a host synchronisation; (T, T) mask, so for short rows only."""
    place = torch.arange(q.shape[0], device=q.device)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
    mask = (segment[:, None] == segment[None, :]) & _seen(place[:, None], place[None, :], window, causal)
    if alibi_slopes is not None:
        mask = _alibi_bias(q.shape[0], window, causal, alibi_slopes, q.dtype).masked_fill(~mask, -torch.inf)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    mask = mask[None] if mask.dim() == 3 else mask[None, None]
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(*heads_first, mask, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)
