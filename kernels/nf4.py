"""Weights in NF4 or FP4 (quant/nf4.py): to numbers, and the product of a few rows straight from the codes.

w = table[code] * absmax[block], blocks of 64 along the flattened weight, the first weight of a byte in its
high half; with double quantisation absmax[b] = map[q[b]] * nested[b / 256] + mean. arXiv 2305.14314, sec. 3.

Two ways to a product x W^T. For many rows the weight is written out once (K5, a stream: 0.52 bytes read, 2
written a weight) and the library multiplies. For 1 to 16 rows, decoding, reading the weight is all the time
it takes, so the codes are multiplied as they are read (K6): a quarter of the bytes of a bf16 weight. One row:
ordinary arithmetic in fp32, several outputs per program, since a tensor core would be fed 15 rows of zeros.
More: matrix units on blocks of 64 outputs, rounded to x's dtype as the dense weight would be; outputs alone
are too few programs for a GPU: the inputs are divided too (`splits`), and added up in a fixed order.

The table of 16 is gathered from shared memory: its entries lie in different banks, so a warp's 32 look-ups
take one access whatever the codes are (a table of pairs would not fit into the banks). x A^T, the narrow half
of an adapter, needs all of x and goes first; s (x A^T) B^T and the bias are added in the launch of the
product. Linears with one input share their launches. Nothing waits for the GPU: a graph can hold all of it.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import ceil_divide, jit, next_power_of_2, processors, run, tl
from kernels.linear import SMALL_BATCH, Part
from kernels.lora_linear import low_rank

BLOCK = 64  # weights per scale, the format's
NESTED_BLOCK = 256  # scales per scale of scales
MOST_PARTS = 3  # linears in one launch: q, k, v
# of codes that a program of the one-row kernel has on their way: 32 a thread, and with it so few registers
# (128) that four programs fit a multiprocessor, 528 an H100: 4,096 outputs are 512, 8 each
TILE_BYTES = 4096


class Codes(NamedTuple):
    """A weight (out, in) in 4 bits, on one device; the last three are None without double quantisation."""

    codes: Tensor  # (ceil(out * in / 2),) uint8
    absmax: Tensor  # (ceil(out * in / 64),) fp32, or uint8 with double quantisation
    table: Tensor  # (16,) fp32
    nested_absmax: Tensor | None = None  # (ceil(blocks / 256),) fp32
    nested_table: Tensor | None = None  # (256,) fp32
    mean: Tensor | None = None  # () fp32


def dequantise_reference(weight: Codes, out: Tensor) -> None:
    """Write the weight into out (out, in): fp32 arithmetic, rounded to out's dtype. The plain form."""
    pairs = torch.stack((weight.codes >> 4, weight.codes & 15), dim=1).view(-1)[: out.numel()]
    scales = scales_reference(weight).repeat_interleave(BLOCK)[: out.numel()]
    out.copy_((weight.table[pairs.int()] * scales).view_as(out))


def scales_reference(weight: Codes) -> Tensor:
    """(blocks,) fp32, whether they are quantised themselves or not."""
    if weight.nested_absmax is None:
        return weight.absmax
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    return weight.nested_table[weight.absmax.int()] * nested + weight.mean


def small_batch_reference(x: Tensor, part: Part) -> Tensor:
    """x (T, in) -> x W^T + bias + scale (x A^T) B^T (T, out) in x's dtype; part.weight is Codes."""
    dense = torch.empty(outputs_of(x, part), x.shape[1], dtype=x.dtype, device=x.device)
    dequantise_reference(part.weight, dense)
    result = torch.nn.functional.linear(x, dense, None if part.bias is None else part.bias.to(x.dtype))
    return result if part.lora_a is None else result + low_rank(x, part)


def outputs_of(x: Tensor, part: Part) -> int:
    return 2 * part.weight.codes.numel() // x.shape[1]


def unsupported_fill(out: Tensor) -> str | None:
    """Why the kernel does not write this tensor; None if it does."""
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"a weight in {out.dtype}"
    return None if out.is_contiguous() else "a weight that is not contiguous"


def unsupported(x: Tensor) -> str | None:
    """Why the kernels do not multiply this x (T, in); None if they do."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{x.dtype}"
    if x.shape[1] % BLOCK:
        return f"rows of {x.shape[1]} weights, so that scales of {BLOCK} cross from one to the next"
    return None if 0 < x.shape[0] <= SMALL_BATCH else f"{x.shape[0]} rows; 1 to {SMALL_BATCH}"


# Writing the weight out (K5)


def dequantise_triton(weight: Codes, out: Tensor) -> None:
    """dequantise_reference as one kernel, to the bit: what it rounds it rounds in the same order."""
    # with 4 warps: 4 bytes of codes a thread and step, so 16 bytes of bf16, side by side
    groups, steps = 16, 4
    each = groups * BLOCK * steps
    shape = {"GROUPS": groups, "STEPS": steps, "WHOLE": out.numel() % each == 0, "num_warps": 4}
    grid = (ceil_divide(out.numel(), each),)
    run(_dequantise_kernel, grid, *weight, out, out.numel(), enable_fp_fusion=False, **shape)


@jit
def _scales(absmax, nested_absmax, nested_table, mean, block, inside):
    """absmax of these blocks, fp32."""
    scales = tl.load(absmax + block, mask=inside, other=0)
    if nested_absmax is not None:
        nested = tl.load(nested_absmax + block // 256, mask=inside, other=0.0)
        scales = tl.load(nested_table + scales.to(tl.int32)) * nested + tl.load(mean)
    return scales


@jit
def _dequantise_kernel(
    codes, absmax, table, nested_absmax, nested_table, mean, out, numel,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: every program has all of its weights. Masks of single bytes would forbid loads of several."""
    levels = tl.load(table + tl.arange(0, 16))
    for step in tl.static_range(STEPS):
        first = (tl.program_id(0).to(tl.int64) * STEPS + step) * GROUPS  # block of 64
        group = tl.arange(0, GROUPS)
        byte = group[:, None] * 32 + tl.arange(0, 32)
        place = group[:, None] * 64 + tl.arange(0, 64)
        inside, some, is_weight = group < GROUPS, byte >= 0, place >= 0
        if not WHOLE:
            left = tl.minimum(numel - first * 64, GROUPS * 64).to(tl.int32)  # weights of this step
            inside, some, is_weight = group * 64 < left, byte * 2 < left, place < left
        pair = tl.load(codes + first * 32 + byte, mask=some, other=0).to(tl.int32)
        scale = _scales(absmax, nested_absmax, nested_table, mean, first + group, inside)
        code = tl.interleave(pair >> 4, pair & 15)  # (GROUPS, 64)
        values = tl.reshape(tl.gather(levels, tl.reshape(code, (GROUPS * 64,)), 0), (GROUPS, 64))
        values = (values * scale[:, None]).to(out.dtype.element_ty)
        tl.store(out + first * 64 + place, values, mask=is_weight)


# The product of a few rows (K6)


def small_batch_triton(x: Tensor, parts: list[Part]) -> list[Tensor]:
    """small_batch_reference for several linears; no gradient. Results may be columns of one tensor."""
    if len(parts) > MOST_PARTS or len({_kind(part) for part in parts}) > 1:
        return [result for part in parts for result in small_batch_triton(x, [part])]
    x = x if x.stride(1) == 1 else x.contiguous()
    sizes = [outputs_of(x, part) for part in parts]
    result = torch.empty(x.shape[0], sum(sizes), dtype=x.dtype, device=x.device)
    multiply = _one_row if x.shape[0] == 1 else _some_rows
    multiply(x, parts, sizes, _low(x, parts), result)
    return list(result.split(sizes, dim=1))


def _kind(part: Part) -> tuple:
    """What the parts of one launch have in common."""
    bias, lora_b = (None if x is None else x.dtype for x in (part.bias, part.lora_b))
    return id(part.weight.table), id(part.weight.nested_table), bias, lora_b, _rank(part)


def _rank(part: Part) -> int:
    return 0 if part.lora_a is None else part.lora_a.shape[0]


def _low(x: Tensor, parts: list[Part]) -> Tensor | None:
    """x A^T of all parts side by side, (T, sum of R) fp32."""
    rank, columns = _rank(parts[0]), _rank(parts[0]) * len(parts)
    if rank == 0:
        return None
    low = torch.empty(x.shape[0], columns, dtype=torch.float32, device=x.device)
    tables = [part.lora_a.contiguous() for part in parts]
    tables += tables[:1] * (MOST_PARTS - len(tables))  # of parts that are not there: never read
    rows = max(2, next_power_of_2(x.shape[0]))
    shape = {"ROWS": rows, "BLOCK": max(128, 4096 // rows), "num_warps": 4}
    run(_low_kernel, (columns,), x, *tables, low, x.stride(0), *x.shape, rank, columns, **shape)
    return low


def _arguments(parts: list[Part], sizes: list[int], block: int) -> tuple[list, int]:
    """What the kernels take of the parts, missing ones as the first, and the number of blocks of outputs."""
    missing = MOST_PARTS - len(parts)
    firsts = list(itertools.accumulate(ceil_divide(size, block) for size in sizes))  # of the next part
    blocks = firsts[-1]
    columns = [0, *itertools.accumulate(sizes[:-1])] + [0] * missing
    given = [*parts, *parts[:1] * missing]
    tensors = [parts[0].weight.table, parts[0].weight.nested_table]
    for part in given:
        weight = part.weight
        tensors += [weight.codes.view(torch.int32), weight.absmax, weight.nested_absmax, weight.mean]
        tensors += [part.bias, None if part.lora_b is None else part.lora_b.contiguous()]
    numbers = [*sizes, *sizes[:1] * missing, *(float(part.scale) for part in given)]
    return [*tensors, *numbers, *(firsts + [blocks] * missing)[:-1], *columns[1:]], blocks


def _one_row(x: Tensor, parts: list[Part], sizes: list[int], low: Tensor | None, result: Tensor) -> None:
    groups = x.shape[1] // BLOCK
    tile = min(16, max(8, next_power_of_2(groups)))
    shape = {"ROWS": TILE_BYTES // (tile * BLOCK // 2), "GROUPS": tile, "num_warps": 4}
    shape |= {"RANK": _rank(parts[0]), "RANKS": next_power_of_2(max(2, _rank(parts[0])))}
    arguments, blocks = _arguments(parts, sizes, shape["ROWS"])
    run(_one_row_kernel, (blocks,), x, low, result, *arguments, groups, **shape)


def _some_rows(x: Tensor, parts: list[Part], sizes: list[int], low: Tensor | None, result: Tensor) -> None:
    groups, rank = x.shape[1] // BLOCK, _rank(parts[0])
    shape = {"ROWS": 64, "GROUPS": 2, "RANK": rank, "RANKS": next_power_of_2(max(16, rank))}
    shape |= {"PRECISION": "ieee" if x.dtype is torch.float32 else "tf32", "num_warps": 4, "num_stages": 4}
    arguments, blocks = _arguments(parts, sizes, shape["ROWS"])
    turns = ceil_divide(groups, shape["GROUPS"])  # of the loop; four and more each, so that copies run ahead
    splits = max(1, min(ceil_divide(4 * processors(x.device), blocks), turns // 4, 16))
    splits = ceil_divide(turns, ceil_divide(turns, splits))  # without empty ones
    target = result
    if splits > 1:
        target = torch.empty(splits, *result.shape, dtype=torch.float32, device=x.device)
    numbers = groups, splits, x.stride(0), x.shape[0], result.shape[1], rank * len(parts)
    run(_some_rows_kernel, (blocks, splits), x, low, target, *arguments, *numbers, **shape)
    if splits > 1:
        count = result.numel()
        run(_add_kernel, (ceil_divide(count, 512),), target, result, count, splits, BLOCK=512, num_warps=4)


@jit
def _of(part, first, second, third):
    """The pointer of this part. Branches: a choice between pointers would lose what is known of alignment."""
    chosen = first
    if part == 1:
        chosen = second
    if part == 2:
        chosen = third
    return chosen


@jit
def _number(part, first, second, third):
    return tl.where(part == 2, third, tl.where(part == 1, second, first))


@jit(do_not_specialize=["tokens"])
def _low_kernel(
    x, a0, a1, a2, low, x_stride, tokens, inputs, rank, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per column: x times one row of one A."""
    column = tl.program_id(0)
    part, row = column // rank, column % rank
    table = _of(part, a0, a1, a2)
    token = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, inputs, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(table + row.to(tl.int64) * inputs + place, mask=place < inputs, other=0.0)
        inside = (token < tokens)[:, None] & (place < inputs)
        rows = tl.load(x + token[:, None] * x_stride + place, mask=inside, other=0.0)
        total += rows.to(tl.float32) * values.to(tl.float32)
    tl.store(low + token * columns + column, tl.sum(total, 1), mask=token < tokens)


@jit
def _weights(word, levels):
    """word (A, B, C) int32, eight codes each -> (A, B, 8 C), their levels in the order of the weights.

    The first weight stands in the high half of the lowest byte. Each join adds a last dimension, the later
    one the faster, so the eight shifts are joined in bit-reversed order.
    """
    first = tl.join(tl.join(word >> 4, word >> 20), tl.join(word >> 12, word >> 28))
    second = tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24))
    code = tl.join(first, second) & 15
    values = tl.gather(levels, tl.reshape(code, (code.numel,)), 0)
    return tl.reshape(values, (word.shape[0], word.shape[1], word.shape[2] * 8))


@jit
def _words(codes, place, inside):
    """The codes of these blocks, (A, B) -> (A, B, 8) int32, eight each."""
    offset = place[:, :, None] * 8 + tl.arange(0, 8)
    return tl.load(codes + offset, mask=inside[:, :, None], other=0)


@jit
def _one_row_kernel(
    x, low, result, table, nested_table,
    codes0, absmax0, nested0, mean0, bias0, lora_b0,
    codes1, absmax1, nested1, mean1, bias1, lora_b1,
    codes2, absmax2, nested2, mean2, bias2, lora_b2,
    outs0, outs1, outs2, scale0, scale1, scale2, block1, block2, column1, column2,
    groups, RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one linear. x (1, in); result (1, sum of out); groups: in / 64."""
    block = tl.program_id(0)
    part = (block >= block1).to(tl.int32) + (block >= block2).to(tl.int32)
    codes, absmax = _of(part, codes0, codes1, codes2), _of(part, absmax0, absmax1, absmax2)
    nested, mean = nested0, mean0
    if nested0 is not None:
        nested, mean = _of(part, nested0, nested1, nested2), _of(part, mean0, mean1, mean2)
    outs, column = _number(part, outs0, outs1, outs2), _number(part, 0, column1, column2)
    row = (block - _number(part, 0, block1, block2)) * ROWS + tl.arange(0, ROWS)
    levels = tl.load(table + tl.arange(0, 16))
    total = tl.zeros((ROWS, GROUPS), tl.float32)
    group = tl.arange(0, GROUPS)
    place = row[:, None] * groups + group  # block of 64
    word = _words(codes, place, (row < outs)[:, None] & (group < groups))
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside, place = (row < outs)[:, None] & (group < groups), row[:, None] * groups + group
        scales = _scales(absmax, nested, nested_table, mean, place, inside)
        here = group[:, None] * 64 + tl.arange(0, 64)
        values = tl.load(x + here, mask=(group < groups)[:, None], other=0.0)
        # the next codes are on their way while these are multiplied
        inside = (row < outs)[:, None] & (group + GROUPS < groups)
        following = _words(codes, place + GROUPS, inside)
        total += tl.sum(_weights(word, levels) * values.to(tl.float32), 2) * scales
        word = following
    sums = tl.sum(total, 1)
    if RANK > 0:
        rank = tl.arange(0, RANKS)
        narrow = tl.load(low + part * RANK + rank, mask=rank < RANK, other=0.0)
        inside = (row < outs)[:, None] & (rank < RANK)
        lora_b = _of(part, lora_b0, lora_b1, lora_b2)
        wide = tl.load(lora_b + row[:, None] * RANK + rank, mask=inside, other=0.0)
        sums += _number(part, scale0, scale1, scale2) * tl.sum(wide.to(tl.float32) * narrow, 1)
    if bias0 is not None:
        sums += tl.load(_of(part, bias0, bias1, bias2) + row, mask=row < outs, other=0.0).to(tl.float32)
    tl.store(result + column + row, sums.to(result.dtype.element_ty), mask=row < outs)


@jit(do_not_specialize=["splits", "tokens"])
def _some_rows_kernel(
    x, low, result, table, nested_table,
    codes0, absmax0, nested0, mean0, bias0, lora_b0,
    codes1, absmax1, nested1, mean1, bias1, lora_b1,
    codes2, absmax2, nested2, mean2, bias2, lora_b2,
    outs0, outs1, outs2, scale0, scale1, scale2, block1, block2, column1, column2,
    groups, splits, x_stride, tokens, columns, low_columns, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one linear over a split of the inputs. x (T, in); result ([splits,] T, sum of out)."""
    block, split = tl.program_id(0), tl.program_id(1)
    part = (block >= block1).to(tl.int32) + (block >= block2).to(tl.int32)
    codes, absmax = _of(part, codes0, codes1, codes2), _of(part, absmax0, absmax1, absmax2)
    nested, mean = nested0, mean0
    if nested0 is not None:
        nested, mean = _of(part, nested0, nested1, nested2), _of(part, mean0, mean1, mean2)
    outs, column = _number(part, outs0, outs1, outs2), _number(part, 0, column1, column2)
    row = (block - _number(part, 0, block1, block2)) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, 16)
    share = tl.cdiv(tl.cdiv(groups, GROUPS), splits) * GROUPS
    first = split * share
    last = tl.minimum(first + share, groups)
    levels = tl.load(table + tl.arange(0, 16))
    total = tl.zeros((ROWS, 16), tl.float32)
    for start in range(first, last, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = (row < outs)[:, None] & (group < last)
        place = row[:, None] * groups + group
        word = _words(codes, place, inside)
        scales = _scales(absmax, nested, nested_table, mean, place, inside)
        weights = _weights(word, levels) * tl.reshape(scales, (ROWS, GROUPS, 1))
        weights = tl.reshape(weights, (ROWS, GROUPS * 64)).to(x.dtype.element_ty)
        input = start * 64 + tl.arange(0, GROUPS * 64)
        mask = (token < tokens)[:, None] & (input < last * 64)
        values = tl.load(x + token[:, None] * x_stride + input, mask=mask, other=0.0)
        total = tl.dot(weights, values.T, total, input_precision=PRECISION)
    if split == 0:
        if RANK > 0:
            rank = tl.arange(0, RANKS)
            inside = (row < outs)[:, None] & (rank < RANK)
            lora_b = _of(part, lora_b0, lora_b1, lora_b2)
            wide = tl.load(lora_b + row[:, None] * RANK + rank, mask=inside, other=0.0)
            place = token[None] * low_columns + part * RANK + rank[:, None]
            inside = (token < tokens)[None] & (rank < RANK)[:, None]
            narrow = tl.load(low + place, mask=inside, other=0.0) * _number(part, scale0, scale1, scale2)
            kind = x.dtype.element_ty
            total = tl.dot(wide.to(kind), narrow.to(kind), total, input_precision=PRECISION)
        if bias0 is not None:
            bias = tl.load(_of(part, bias0, bias1, bias2) + row, mask=row < outs, other=0.0)
            total += bias.to(tl.float32)[:, None]
    target = (split.to(tl.int64) * tokens + token[None]) * columns + column + row[:, None]
    mask = (row < outs)[:, None] & (token < tokens)[None]
    tl.store(result + target, total.to(result.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["splits"])
def _add_kernel(parts, result, count, splits, BLOCK: tl.constexpr):
    """The sum over splits, always in the same order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + place, mask=place < count, other=0.0)
    tl.store(result + place, total.to(result.dtype.element_ty), mask=place < count)
