"""The Triton kernels that rms_norm and layer_norm share: rows are normalised, then scaled and shifted.

    n = (x - mean) / deviation    y = (offset + weight) n + bias    total = x + delta, then the x above
Without CENTERED (RMSNorm) the mean is 0. Backward, with g = grad * (offset + weight) and averages over a row:
    dx = (g - average(g) - n average(g n)) / deviation + grad of total         average(g): with CENTERED only
    dweight = sum over rows of grad * n        dbias = sum over rows of grad

Both directions are bound by memory: every tensor is read or written once, 16 bytes per thread and load. The
gradients of weight and bias are summed without atomics, hence the same bits in every run: the backward kernel
runs as few programs as fill the GPU, each keeps its sums in registers over all its rows, and a second small
kernel adds them up.
"""

import torch

from kernels.launch import ceil_divide, jit, next_power_of_2, processors, run, tl

TILE = 4096  # values per program of narrow rows; 16 per thread with 8 warps
THREAD_VALUES = (
    16  # two 16-byte loads per tensor in bf16; 8 warps and 3 tensors are enough under way to hide latency
)
MAX_SIZE = 65536  # values per row
# values of a row that fit in the registers of one program; wider rows are read twice, the second time from
# the L2 cache
MAX_BLOCK, MAX_BLOCK_BACKWARD = 16384, 8192
WIDE_BLOCK = 4096
PIPELINE_BYTES = 10000  # of shared memory per warp: 16 warps then fit A100's 163 KB and what it reserves


def unsupported(x: torch.Tensor, delta: torch.Tensor | None = None) -> str | None:
    """Why the kernels do not serve x, or x + delta; None if they do."""
    if x.dtype is torch.float64:
        return "float64; it computes in float32"
    if x.shape[-1] > MAX_SIZE:
        return f"rows of {x.shape[-1]} values; at most {MAX_SIZE}"
    if delta is not None and (delta.shape != x.shape or delta.dtype.itemsize > x.dtype.itemsize):
        return "summands of two shapes, or the second in a wider dtype"
    return None


def forward(x, delta, weight, bias, eps: float, offset: float, centered: bool, dtype=None):
    """x (..., E), delta like x or None, weight and bias (E,) or None -> y, total (..., E), mean and rstd
    (rows,) fp32.

    y has x's dtype, or the one given; total is x when delta is None; mean is None unless centered.
    """
    rows, inner, outer_stride, inner_stride = _row_strides(x)
    count, size = x.numel() // x.shape[-1], x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if delta is not None else None
    if delta is not None:
        delta = delta.contiguous()
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else None
    # as in Llama, the normalised value is rounded to y's dtype before it meets the weight, if that is no
    # wider
    wide_weight = weight is not None and weight.dtype.itemsize > y.dtype.itemsize
    flags = {"CENTERED": centered, "ROUNDED": not centered and offset == 0.0 and not wide_weight}
    tensors = rows, delta, weight, bias, total, y, mean, rstd
    arguments = (*tensors, count, inner, outer_stride, inner_stride, size, eps, float(offset))
    tile_rows, block, warps = _tile(size)
    if block > MAX_BLOCK:
        run(_wide_forward_kernel, (count,), *arguments, **flags, BLOCK=WIDE_BLOCK, num_warps=16)
    else:
        grid = (ceil_divide(count, tile_rows),)
        run(_forward_kernel, grid, *arguments, **flags, ROWS=tile_rows, BLOCK=block, num_warps=warps)
    return y, x if total is None else total, mean, rstd


def backward(grad, total_grad, x, weight, mean, rstd, offset: float, want_weight: bool, want_bias: bool):
    """Gradients of y and total (or None) -> dx like x, dweight and dbias (E,) fp32, or None."""
    rows, inner, outer_stride, inner_stride = _row_strides(x)
    count, size = rstd.shape[0], x.shape[-1]
    grad = grad.contiguous()
    total_grad = None if total_grad is None else total_grad.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile_rows, block, warps = _tile(size)
    sums = int(want_weight) + int(want_bias)
    wide = block > MAX_BLOCK_BACKWARD
    tiles = count if wide else ceil_divide(count, tile_rows)
    programs = _programs(tiles, 16 if wide else warps, x.device) if sums else tiles
    # the wide kernel adds to its sums in memory
    allocate = torch.zeros if wide else torch.empty
    parts = allocate((sums, programs, size), dtype=torch.float32, device=x.device)
    dweight = parts[0] if want_weight else None
    dbias = parts[-1] if want_bias else None
    tensors = rows, grad, total_grad, weight, mean, rstd, dx, dweight, dbias
    arguments = (*tensors, count, inner, outer_stride, inner_stride, size, float(offset))
    if wide:
        run(_wide_backward_kernel, (programs,), *arguments, BLOCK=WIDE_BLOCK, num_warps=16)
    else:
        tensors = 2 if total_grad is None else 3
        stages = _stages(tile_rows * block, warps, x.element_size(), tensors) if sums else 1
        constants = {"ROWS": tile_rows, "BLOCK": block, "STAGES": stages}
        run(_backward_kernel, (programs,), *arguments, **constants, num_warps=warps)
    if not sums:
        return dx, None, None
    summed = torch.empty((sums, size), dtype=torch.float32, device=x.device)
    run(_sum_programs_kernel, (ceil_divide(size, 32), sums), parts, summed, programs, size, num_warps=4)
    return dx, summed[0] if want_weight else None, summed[-1] if want_bias else None


def _row_strides(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x (or a copy where it must be), rows in a group, stride of groups, stride of rows in a group.

    Row r begins at r // inner * outer_stride + r % inner * inner_stride: enough for (T, heads, D) views of a
    product.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1 or x.dim() > 3:
        x = x.contiguous()
    if x.is_contiguous() or x.dim() < 2:
        return x, 1, x.shape[-1], 0
    if x.dim() == 2:
        return x, 1, x.stride(0), 0
    return x, x.shape[1], x.stride(0), x.stride(1)


def _tile(size: int) -> tuple[int, int, int]:
    """Rows per program, values per row (a power of two) and warps."""
    block = next_power_of_2(size)
    rows = max(1, TILE // block)
    return rows, block, min(16, rows * block // (32 * THREAD_VALUES))


def _programs(tiles: int, warps: int, device: torch.device) -> int:
    """Of a kernel that goes on until no tile is left: 16 warps on every processor, of equal work."""
    rounds = ceil_divide(tiles, processors(device) * max(1, 16 // warps))
    return ceil_divide(tiles, max(1, rounds))


def _stages(tile: int, warps: int, value_bytes: int, tensors: int) -> int:
    """Depth of the pipeline that fetches the next tiles while one is worked on; 1 = none."""
    return max(1, min(3, PIPELINE_BYTES * warps // (tile * value_bytes * tensors)))


@jit
def _load_sum(x, delta, place, delta_place, inside):
    """x + delta in x's dtype, as fp32."""
    value = tl.load(x + place, mask=inside, other=0.0)
    if delta is not None:
        value = (value.to(tl.float32) + tl.load(delta + delta_place, mask=inside, other=0.0)).to(value.dtype)
    return value.to(tl.float32)


@jit
def _scale_and_shift(normal, factor, shift, offset, ROUNDED: tl.constexpr, dtype: tl.constexpr):
    """factor, shift: pieces of weight and bias, or None."""
    if ROUNDED:
        normal = normal.to(dtype).to(tl.float32)
    if factor is not None:
        normal *= offset + (factor.to(dtype) if ROUNDED else factor).to(tl.float32)
    if shift is not None:
        normal += shift.to(tl.float32)
    return normal.to(dtype)


# the count of rows differs from step to step: specialised for 1 and for multiples of 16, as Triton does it, a
# kernel would be compiled again in the middle of a run
@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, delta, weight, bias, total, y, mean, rstd, rows, inner, outer_stride, inner_stride, size, eps,
    offset,
    CENTERED: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < size)
    begin = (row // inner).to(tl.int64) * outer_stride + row % inner * inner_stride
    place = row.to(tl.int64) * size + column  # in what is contiguous
    value = _load_sum(x, delta, begin + column, place, inside)
    factor, shift = weight, bias
    if weight is not None:  # loaded here, before the sums wait for x
        factor = tl.load(weight + column, mask=column < size, other=0.0)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < size, other=0.0)
    if delta is not None:
        tl.store(total + place, value.to(total.dtype.element_ty), mask=inside)
    if CENTERED:
        average = tl.sum(value, axis=1, keep_dims=True) / size
        value = tl.where(inside, value - average, 0.0)
        tl.store(mean + row, average, mask=row < rows)
    scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / size + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    result = _scale_and_shift(value * scale, factor, shift, offset, ROUNDED, y.dtype.element_ty)
    tl.store(y + place, result, mask=inside)


@jit(do_not_specialize=["rows"])
def _wide_forward_kernel(
    x, delta, weight, bias, total, y, mean, rstd, rows, inner, outer_stride, inner_stride, size, eps,
    offset,
    CENTERED: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program, piece by piece."""
    row = tl.program_id(0)
    begin = (row // inner).to(tl.int64) * outer_stride + row % inner * inner_stride
    place = row.to(tl.int64) * size
    average = 0.0
    if CENTERED:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            sums += _load_sum(x, delta, begin + column, place + column, column < size)
        average = tl.sum(sums, axis=0) / size
        tl.store(mean + row, average)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = _load_sum(x, delta, begin + column, place + column, column < size)
        value = tl.where(column < size, value - average, 0.0)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, axis=0) / size + eps)
    tl.store(rstd + row, scale)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < size
        value = _load_sum(x, delta, begin + column, place + column, inside)
        if delta is not None:
            tl.store(total + place + column, value.to(total.dtype.element_ty), mask=inside)
        factor, shift = weight, bias
        if weight is not None:
            factor = tl.load(weight + column, mask=inside, other=0.0)
        if bias is not None:
            shift = tl.load(bias + column, mask=inside, other=0.0)
        normal = (value - average) * scale
        result = _scale_and_shift(normal, factor, shift, offset, ROUNDED, y.dtype.element_ty)
        tl.store(y + place + column, result, mask=inside)


@jit(do_not_specialize=["rows"])
def _backward_kernel(
    x, grad, total_grad, weight, mean, rstd, dx, dweight, dbias, rows, inner, outer_stride,
    inner_stride, size, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows; dweight, dbias (programs, size) fp32 take the sums over this program's tiles."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        factor = offset + tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    if dweight is not None:
        weight_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    if dbias is not None:
        bias_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < size)
        begin = (row // inner).to(tl.int64) * outer_stride + row % inner * inner_stride
        place = row.to(tl.int64) * size + column
        normal = tl.load(x + begin + column, mask=inside, other=0.0).to(tl.float32)
        change = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        if total_grad is not None:
            passed = tl.load(total_grad + place, mask=inside, other=0.0)  # here, before the sums wait for x
        if mean is not None:
            normal -= tl.load(mean + row, mask=row < rows, other=0.0)
        normal *= scale  # beyond the row's end it is no zero with a mean, but there the gradient is
        if dweight is not None:
            weight_sums += change * normal
        if dbias is not None:
            bias_sums += change
        if weight is not None:
            change *= factor
        result = change - normal * (tl.sum(change * normal, axis=1, keep_dims=True) / size)
        if mean is not None:
            result -= tl.sum(change, axis=1, keep_dims=True) / size
        result *= scale
        if total_grad is not None:
            result += passed.to(tl.float32)
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
    columns = tl.arange(0, BLOCK)
    if dweight is not None:
        tl.store(dweight + program * size + columns, tl.sum(weight_sums, axis=0), mask=columns < size)
    if dbias is not None:
        tl.store(dbias + program * size + columns, tl.sum(bias_sums, axis=0), mask=columns < size)


@jit(do_not_specialize=["rows"])
def _wide_backward_kernel(
    x, grad, total_grad, weight, mean, rstd, dx, dweight, dbias, rows, inner, outer_stride,
    inner_stride, size, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row at a time, piece by piece; dweight and dbias begin as zeros."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for step in range(tl.cdiv(rows - program, programs)):
        row = program + step * programs
        begin = (row // inner).to(tl.int64) * outer_stride + row % inner * inner_stride
        place = row.to(tl.int64) * size
        scale = tl.load(rstd + row)
        average = 0.0
        if mean is not None:
            average = tl.load(mean + row)
        products, changes = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            normal = (tl.load(x + begin + column, mask=inside, other=0.0).to(tl.float32) - average) * scale
            change = tl.load(grad + place + column, mask=inside, other=0.0).to(tl.float32)
            if weight is not None:
                change *= offset + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            products += change * normal
            changes += change
        product = tl.sum(products, axis=0) / size
        shift = 0.0
        if mean is not None:
            shift = tl.sum(changes, axis=0) / size
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            normal = (tl.load(x + begin + column, mask=inside, other=0.0).to(tl.float32) - average) * scale
            change = tl.load(grad + place + column, mask=inside, other=0.0).to(tl.float32)
            if dweight is not None:
                sums = dweight + program * size + column
                tl.store(sums, tl.load(sums, mask=inside, other=0.0) + change * normal, mask=inside)
            if dbias is not None:
                sums = dbias + program * size + column
                tl.store(sums, tl.load(sums, mask=inside, other=0.0) + change, mask=inside)
            if weight is not None:
                change *= offset + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            result = (change - normal * product - shift) * scale
            if total_grad is not None:
                result += tl.load(total_grad + place + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + place + column, result.to(dx.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the sums just stored may be loaded by other threads for the next row


@jit(do_not_specialize=["programs"])
def _sum_programs_kernel(parts, sums, programs, size):
    """parts (n, programs, size) -> sums (n, size), 32 columns at a time, always in the same order."""
    which = tl.program_id(1)
    column = (tl.program_id(0) * 32 + tl.arange(0, 32))[None, :]
    total = tl.zeros((64, 32), tl.float32)
    for start in range(0, programs, 64):
        program = start + tl.arange(0, 64)[:, None]
        place = (which * programs + program).to(tl.int64) * size + column
        total += tl.load(parts + place, mask=(program < programs) & (column < size), other=0.0)
    columns = tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(sums + which * size + columns, tl.sum(total, axis=0), mask=columns < size)
