"""Attention of one to sixteen new tokens per sequence against a cache, for decoding.

T new tokens of N sequences one after the other, H query heads, K key/value heads (H is a multiple of K), D
head size. A new token at position p sees keys 0 .. p of its sequence, with a sliding window W only p-W+1 .. p
(arXiv 2310.06825, section 2). score = scale * q k, then softcap * tanh(score / softcap) (Gemma 2, arXiv
2408.00118, section 2), then + slope * (key position - p) (ALiBi, arXiv 2108.12409, eq. 1).

Reading the cache is all the time this takes, so the kernel reads it once: one program serves all query heads
of a key/value head. A single sequence has few heads, so its keys are divided among `splits` programs ("flash
decoding", Dao et al., 2023); each gives its part of the sum and the logarithm of its softmax's denominator, a
second kernel merges:
    out = sum_s 2^(lse_s - m) out_s / sum_s 2^(lse_s - m),   m = max_s lse_s.
How much is filled only the device knows, and nothing here waits for it: the capacity gives the number of
splits, and the programs divide between them what they find filled.
"""

import torch

from kernels.launch import ceil_divide, jit, next_power_of_2, processors, run, tanh, tl

MAX_NEW = 16  # tokens per sequence
MAX_SPLITS = 64
LOG2_E = 1.4426950408889634  # exp2 is the processor's own exponential


def decode_attention_reference(q, keys, values, cu_seqlens, lengths, max_new, window, scale, softcap, slopes):
    """q (T, H, D); keys, values (N, K, capacity, D) that hold the new tokens already -> (T, H, D) in q's
    dtype.

    cu_seqlens (N+1,) int32: borders of the new tokens; lengths (N,) int32: filled slots, new tokens included;
    both on the device. max_new: most new tokens of a sequence, a host int. window: tokens or None. softcap:
    float or None. slopes: (H,) fp32 or None. No host synchronisation. Every score is masked over the whole
    capacity.
    """
    tokens, heads, size = q.shape
    kv_heads, capacity = keys.shape[1:3]
    token = torch.arange(tokens, device=q.device)
    if tokens != len(lengths):
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        keys, values, lengths = keys[sequence], values[sequence], lengths[sequence]
        stops = cu_seqlens[1:][sequence]
    else:  # one each
        stops = cu_seqlens[1:]
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, size)
    scores = (grouped @ keys.transpose(2, 3)).to(wide) * scale  # (T, K, H/K, capacity)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = lengths - (stops - token)  # (T,)
    distance = torch.arange(capacity, device=q.device) - position[:, None]  # (T, capacity), 0 = itself
    if slopes is not None:
        scores = scores + slopes.to(wide).view(1, kv_heads, -1, 1) * distance[:, None, None]
    hidden = distance > 0
    if window is not None:
        hidden = hidden | (distance <= -window)
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).to(q.dtype)
    return (weights @ values).view(tokens, heads, size)


def store_reference(k, v, keys, values, cu_seqlens, lengths, max_new: int) -> None:
    """Put the new k, v (T, K, D) into the cache's keys, values (N, K, capacity, D): the last slots that are
    filled.

    cu_seqlens, lengths, max_new: as above, so a sequence with two new tokens and length 7 gets them into
    slots 5 and 6.
    """
    token = torch.arange(k.shape[0], device=k.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    place = lengths[sequence] - (cu_seqlens[1:][sequence] - token)
    keys[sequence, :, place] = k
    values[sequence, :, place] = v


def unsupported(q, keys, max_new: int) -> str | None:
    """Why the kernels do not serve these tensors; None if they do."""
    if q.dtype is not keys.dtype:
        return f"queries in {q.dtype}, cache in {keys.dtype}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{q.dtype}"
    if q.shape[-1] > 256:
        return f"heads of {q.shape[-1]} values; at most 256"
    if max_new > MAX_NEW:
        return f"{max_new} new tokens in a sequence; at most {MAX_NEW}"
    return None


def sizes(group: int, max_new: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes. ROWS: queries of a program, new tokens x heads of a group; KEYS: keys per turn of its
    loop.

    A turn's keys and values are 32 KB at most, so that three turns are on their way at once in two programs
    per multiprocessor: enough to keep memory busy.
    """
    width = max(16, next_power_of_2(head_dim))
    rows = min(64 if width < 256 else 32, max(16, next_power_of_2(group * max_new)))
    keys = max(16, min(64, 32 * 1024 // (2 * width * dtype.itemsize)))
    return {"ROWS": rows, "KEYS": keys, "WIDTH": width}


def choose_splits(programs: int, capacity: int, block: int, device: torch.device) -> int:
    """Programs that share one head's keys: two for every multiprocessor, none with less than a block."""
    wanted = ceil_divide(2 * processors(device), programs)
    return max(1, min(wanted, ceil_divide(capacity, block), MAX_SPLITS))


def decode_attention_triton(
    q, keys, values, cu_seqlens, lengths, max_new, window, scale, softcap, slopes, owners=None
):
    """decode_attention_reference without its masked scores; no gradient.

    owners: (N,) int32, where each sequence stands in the cache; None: as it comes.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    sequences = len(lengths)
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError(f"keys and values must lie alike, not {keys.stride()}, {values.stride()}")
    q = q if q.stride(2) == 1 else q.contiguous()
    group = heads // kv_heads
    blocks = sizes(group, max_new, head_dim, q.dtype)
    row_blocks = ceil_divide(group * max_new, blocks["ROWS"])
    reach = capacity if window is None else min(capacity, window + max_new)
    splits = choose_splits(sequences * kv_heads * row_blocks, reach, blocks["KEYS"], q.device)
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    part, lse = out, out  # a single split writes the result at once
    if splits > 1:
        part = torch.empty((tokens, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tokens, heads, splits), dtype=torch.float32, device=q.device)
    tensors = q, keys, values, cu_seqlens, lengths, owners, slopes, part, lse
    strides = *q.stride()[:2], *keys.stride()[:3], *part.stride()[:2]
    constants = {"GROUP": group, "HEAD": head_dim, "WINDOW": window, "SOFTCAP": softcap is not None}
    constants |= {"MERGED": splits == 1, "PRECISION": "ieee" if q.dtype is torch.float32 else "tf32"}
    numbers = scale * LOG2_E, softcap or 0.0, kv_heads, splits
    grid = (splits, kv_heads * row_blocks, sequences)
    run(_decode_kernel, grid, *tensors, *strides, *numbers, **constants, **blocks, num_warps=4, num_stages=3)
    if splits > 1:
        constants = {"HEAD": head_dim, "WIDTH": blocks["WIDTH"], "SPLITS": next_power_of_2(splits)}
        run(_merge_kernel, (tokens, heads), part, lse, out, splits, **constants, num_warps=4)
    return out


def cached_attention_triton(q, keys, values, borders, lengths, window, scale):
    """attention.cached_attention_reference: any number of new tokens, a few at a time; no scores in memory.

    Operands as there, all on the device but borders and lengths. A piece of a sequence is to the kernel a
    sequence whose cache ends with the piece.
    """
    rows = max(MAX_NEW, 64 // (q.shape[1] // keys.shape[1]))  # new tokens of a piece: a program's queries
    stops, filled, owners = [0], [], []
    for owner, (start, stop, length) in enumerate(zip(borders, borders[1:], lengths)):
        for last in [*range(start + rows, stop, rows), stop]:
            stops.append(last)
            filled.append(length - (stop - last))
            owners.append(owner)
    stops, filled, owners = (
        torch.tensor(numbers, dtype=torch.int32, device=q.device) for numbers in (stops, filled, owners)
    )
    rows = min(rows, max(stop - start for start, stop in zip(borders, borders[1:])))
    return decode_attention_triton(q, keys, values, stops, filled, rows, window, scale, None, None, owners)


def store_triton(k, v, keys, values, cu_seqlens, lengths, max_new: int) -> None:
    """store_reference as one kernel."""
    _, kv_heads, head_dim = k.shape
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    strides = *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3]
    constants = {"HEADS": next_power_of_2(kv_heads), "WIDTH": next_power_of_2(head_dim), "num_warps": 4}
    tensors = k, v, keys, values, cu_seqlens, lengths
    run(_store_kernel, (max_new, keys.shape[0]), *tensors, *strides, kv_heads, head_dim, **constants)


@jit(do_not_specialize=["splits"])
def _decode_kernel(
    q, keys, values, borders, lengths, owners, slopes, part, lse, q_token, q_head, kv_sequence, kv_head,
    kv_slot, part_token, part_head, scale, softcap, kv_heads, splits,
    GROUP: tl.constexpr, HEAD: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MERGED:
    tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    own_head = tl.program_id(1) % kv_heads
    row = tl.program_id(1) // kv_heads * ROWS + tl.arange(0, ROWS)  # token-major, then heads of the group
    sequence = tl.program_id(2)
    token, head = row // GROUP, own_head * GROUP + row % GROUP
    first_token = tl.load(borders + sequence)
    new = tl.load(borders + sequence + 1) - first_token
    length = tl.load(lengths + sequence)
    is_row = token < new

    # the filled slots that anybody here may see, divided among the splits in whole blocks
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(length - new - WINDOW + 1, 0)
    share = tl.cdiv(tl.cdiv(length - begin, KEYS), splits) * KEYS
    first = begin + split * share
    last = tl.minimum(first + share, length)
    if first >= last:
        if not MERGED:  # the merge skips this part
            token_row = (first_token + token).to(tl.int64)
            place = (token_row * part_token + head * part_head) // HEAD + split
            tl.store(lse + place, -float("inf"), mask=is_row)
        return

    column = tl.arange(0, WIDTH)
    is_column = column < HEAD
    token_row = (first_token + token).to(tl.int64)
    place = token_row * q_token + head * q_head
    queries = tl.load(q + place[:, None] + column, mask=is_row[:, None] & is_column, other=0.0)
    position = length - new + token  # of the row's token
    owner = sequence
    if owners is not None:
        owner = tl.load(owners + sequence)
    cache = owner.to(tl.int64) * kv_sequence + own_head.to(tl.int64) * kv_head
    if slopes is not None:
        slope = tl.load(slopes + head, mask=is_row, other=0.0) * 1.4426950408889634
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, last, KEYS):
        slot = start + tl.arange(0, KEYS)
        offset = cache + slot[:, None] * kv_slot + column
        inside = (slot < last)[:, None] & is_column
        key = tl.load(keys + offset, mask=inside, other=0.0)
        score = tl.dot(queries, key.T, input_precision=PRECISION) * scale  # (ROWS, KEYS), in bits
        if SOFTCAP:
            cap = softcap * 1.4426950408889634  # log2 e
            score = cap * tanh(score / cap, PRECISION == "ieee")
        if slopes is not None:
            score += slope[:, None] * (slot - position[:, None]).to(tl.float32)
        seen = (slot <= position[:, None]) & (slot < last)
        if WINDOW is not None:
            seen &= slot > position[:, None] - WINDOW
        score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        pivot = tl.where(higher == -float("inf"), 0.0, higher)  # a row that saw nothing yet: no inf - inf
        weight = tl.exp2(score - pivot[:, None])
        shrink = tl.exp2(best - pivot)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(values + offset, mask=inside, other=0.0)
        result = result * shrink[:, None]
        result = tl.dot(weight.to(value.dtype), value, result, input_precision=PRECISION)
        best = higher
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    place = token_row * part_token + head * part_head
    if MERGED:
        result = result.to(part.dtype.element_ty)
    else:
        tl.store(lse + place // HEAD + split, best + tl.log2(total), mask=is_row)
        place += split * HEAD
    tl.store(part + place[:, None] + column, result, mask=is_row[:, None] & is_column)


@jit(do_not_specialize=["splits"])
def _merge_kernel(part, lse, out, splits, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One program per token and head: the parts weighted by their shares of the softmax."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    share = tl.load(lse + place * splits + split, mask=split < splits, other=-float("inf"))
    share = tl.exp2(share - tl.max(share, 0))  # every token sees itself, so one is finite
    is_used = share > 0.0  # parts of splits that found no key are not read: nobody wrote them
    mask = is_used[:, None] & (column < HEAD)
    parts = tl.load(part + (place * splits + split)[:, None] * HEAD + column, mask=mask, other=0.0)
    result = tl.sum(parts * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + place * HEAD + column, result.to(out.dtype.element_ty), mask=column < HEAD)


@jit
def _store_kernel(
    k,
    v,
    keys,
    values,
    borders,
    lengths,
    k_token,
    k_head,
    v_token,
    v_head,
    kv_sequence,
    kv_head,
    kv_slot,
    heads,
    head_dim,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token, sequence = tl.program_id(0), tl.program_id(1)
    first = tl.load(borders + sequence)
    new = tl.load(borders + sequence + 1) - first
    if token >= new:
        return
    slot = tl.load(lengths + sequence) - new + token
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)
    mask = (head < heads) & (column < head_dim)
    row = (first + token).to(tl.int64)
    target = sequence.to(tl.int64) * kv_sequence + head.to(tl.int64) * kv_head + slot * kv_slot + column
    tl.store(keys + target, tl.load(k + row * k_token + head * k_head + column, mask=mask), mask=mask)
    tl.store(values + target, tl.load(v + row * v_token + head * v_head + column, mask=mask), mask=mask)
