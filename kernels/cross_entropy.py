"""Language-model losses without the logits: cross entropy and log-probabilities straight from hidden rows.

For a row with scores s = h W^T + b and label y:
    z = a s                                    a: logit_scale
    z = c tanh(a s / c)                       softcap c; dz/ds = a (1 - (z / c)^2).  Gemma 2, arXiv 2408.00118
    lse = log sum_j exp(z_j)
    loss = lse - (1 - e) z_y - e mean_j z_j    e: label_smoothing, as torch's cross_entropy has it
         + w lse^2                             w: z_loss.  PaLM, arXiv 2204.02311, section 5
    dloss/dz_j = (1 + 2 w lse) exp(z_j - lse) - (1 - e) [j = y] - e / V

The head's product, the softmax and the gradient are taken chunk by chunk in the forward pass, so at most one
chunk of logits exists at a time, whatever L and V are: CHUNK_BYTES of fp32 ones in torch, WORKSPACE_BYTES in
the compute dtype with Triton. The gradient of the hidden rows is kept (L, E); with a frozen head the work is
two products, 4 L E V. A trained head takes a third and an fp32 buffer (V, E) that sums over the chunks: 2.1
GB for 128256 x 4096. Idea: arXiv 2411.09009 and Liger-Kernel's chunked loss. linear_logprobs keeps nothing of
size (L, V) or (L, E) but its inputs and computes the logits again.

The products are cuBLAS's or oneDNN's, in the compute dtype with fp32 sums; everything from the logits on is
fp32. In Triton one pass turns a chunk of logits into losses and, in the same memory, gradients. A row of up
to 32768 stands in registers, so it is read once and written once; other rows (longer; with bias, cap or
smoothing; fp32) are read twice, the second time from the end, where the L2 cache still holds them. Times on a
GPU: unmeasured.

A label outside 0..V-1: on a CPU ValueError; a GPU cannot be asked without stopping the host, so there the
row's loss and gradient are NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import ceil_divide, jit, next_power_of_2, processors, run, tanh, tl
from kernels.linear import matmul_transposed

# of fp32 logits on a CPU: large enough for full-rate products, small beside any model
CHUNK_BYTES = 32 * 2**20
WORKSPACE_BYTES = 256 * 2**20  # of logits on a GPU: 4096 rows of 32000 in bf16 keep all multiprocessors busy
ROW_MULTIPLE = 128  # rows of a tile of cuBLAS's products
STRIDE_MULTIPLE = 64  # values between rows of logits: rows start at 128 bytes, for 16-byte loads with any V
MAX_REGISTER_ROW = 32768  # values of a row that the 1024 threads of a program hold in registers, in fp32
LOOP_BLOCK = 4096  # values at a time of other rows, 8 a thread: twice that spills registers
# of rows under work that are to be found in L2 again: an A100 has 40 MB, an H100 50 MB
CACHE_BYTES = 32 * 2**20


class Terms(NamedTuple):
    """What is done to the logits and added to the loss; see the file's head."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check(self) -> "Terms":
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: {self.softcap} must be above 0 (or None)")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing} is not in [0, 1]")
        if self.z_loss < 0:
            raise ValueError(f"z_loss: {self.z_loss} is below 0")
        return self


# References


def cross_entropy_reference(logits, labels, **terms) -> Tensor:
    """Sum of the row losses, the plain way. Shapes as cross_entropy; logits stay as they are."""
    return row_losses_reference(logits, labels, Terms(**terms).check()).sum()


def linear_cross_entropy_reference(hidden, weight, labels, bias=None, **terms) -> Tensor:
    """Sum of the row losses with all logits at once. Shapes as linear_cross_entropy."""
    return row_losses_reference(_all_logits(hidden, weight, bias), labels, Terms(**terms).check()).sum()


def linear_logprobs_reference(hidden, weight, labels, bias=None, **terms) -> Tensor:
    """(L,) log-probabilities with all logits at once. Shapes as linear_logprobs."""
    return -row_losses_reference(_all_logits(hidden, weight, bias), labels, Terms(**terms).check())


def row_losses_reference(logits, labels, terms: Terms) -> Tensor:
    """logits (L, V), labels (L,) -> (L,) fp32 (fp64 stays), in nats."""
    z = _wide(logits) * terms.logit_scale
    if terms.softcap is not None:
        z = terms.softcap * torch.tanh(z / terms.softcap)
    smoothing = terms.label_smoothing
    losses = torch.nn.functional.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    return losses + terms.z_loss * z.logsumexp(-1).square() if terms.z_loss else losses


def _all_logits(hidden, weight, bias) -> Tensor:
    logits = _wide(hidden @ weight.to(hidden.dtype).T)
    return logits if bias is None else logits + _wide(bias)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# The operations, with the chunks in torch and in Triton


def linear_cross_entropy(hidden, weight, labels, bias=None, **terms) -> Tensor:
    """Sum over the L rows of the loss in nats; the formula and its terms are in the file's head.

    hidden (L, E) compute dtype; weight (V, E); labels (L,) int64 in 0..V-1; bias (V,) or None -> () fp32. L
    may be 0: the loss is 0 and every gradient exists. Gradients: hidden, weight, bias, each only if it is
    asked for.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias, Terms(**terms).check(), _TorchChunks)


def linear_cross_entropy_triton(hidden, weight, labels, bias=None, **terms) -> Tensor:
    """linear_cross_entropy with the chunks' softmax in Triton."""
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias, Terms(**terms).check(), _TritonChunks)


def linear_logprobs(hidden, weight, labels, bias=None, **terms) -> Tensor:
    """log p(label) of each row -> (L,) fp32, with gradient. Operands and terms as above."""
    return _LinearLogprobs.apply(hidden, weight, labels, bias, Terms(**terms).check(), _TorchChunks)


def linear_logprobs_triton(hidden, weight, labels, bias=None, **terms) -> Tensor:
    """linear_logprobs with the chunks' softmax in Triton."""
    return _LinearLogprobs.apply(hidden, weight, labels, bias, Terms(**terms).check(), _TritonChunks)


def cross_entropy(logits, labels, **terms) -> Tensor:
    """Sum of the row losses of logits (L, V) that exist already -> () fp32; terms as in the file's head.

    Where a gradient is asked for it is written over the logits, which nobody may use afterwards (autograd
    refuses where it can see it; a second backward pass is refused too).
    """
    return _CrossEntropy.apply(logits, labels, Terms(**terms).check(), _TorchChunks)


def cross_entropy_triton(logits, labels, **terms) -> Tensor:
    """cross_entropy in one kernel: one read and one write of the logits."""
    return _CrossEntropy.apply(logits, labels, Terms(**terms).check(), _TritonChunks)


def unsupported(logits_or_hidden: Tensor) -> str | None:
    """Why the kernels do not serve these tensors; None if they do."""
    if logits_or_hidden.dtype is torch.float64:
        return "float64; the kernels compute in float32"
    return None


class _TorchChunks:
    """A chunk of logits in plain torch."""

    @staticmethod
    def rows(count: int, vocabulary: int, dtype: torch.dtype) -> int:
        return max(1, CHUNK_BYTES // (4 * vocabulary))

    @staticmethod
    def workspace(rows: int, vocabulary: int, like: Tensor) -> None:
        return None

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, workspace: None) -> Tensor:
        return matmul_transposed(hidden, weight)

    @staticmethod
    def losses(logits, classes: int, labels, bias, terms: Terms, gradient: bool, factors=None):
        """(L,) losses and, if asked for, the gradients (L, V) of each by its logits, times factors (L,).

        Both fp32 (fp64 stays); logits are overwritten if they have that dtype. classes: all columns of the
        logits.
        """
        z, target = _wide(logits), labels[:, None]
        if bias is not None:
            z += bias
        if terms.logit_scale != 1.0:
            z *= terms.logit_scale
        if terms.softcap is not None:
            z.div_(terms.softcap).tanh_()
            slope = 1 - z.square() if gradient else None
            z *= terms.softcap
        smoothing = terms.label_smoothing
        try:
            chosen = z.gather(1, target)[:, 0]
        except RuntimeError as error:  # asked beforehand, the labels would make the host wait for the GPU
            raise ValueError(f"labels: not all are in 0..{classes - 1} ({error})") from error
        best = z.amax(1)
        if smoothing:
            chosen = (1 - smoothing) * chosen + smoothing * z.mean(1)
        grad = torch.softmax(z, 1, out=z)  # in the logits' own memory: fresh pages cost more
        largest = grad.amax(1).log()  # lse = best - largest; in this order a loss near 0 keeps its digits
        losses = best - chosen - largest
        if terms.z_loss:
            normaliser = best - largest
            losses += terms.z_loss * normaliser.square()
        if not gradient:
            return losses, None
        if terms.z_loss:
            grad *= (1 + 2 * terms.z_loss * normaliser)[:, None]
        if smoothing:
            grad -= smoothing / grad.shape[1]
        grad.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=grad.dtype))
        if terms.softcap is not None:
            grad *= slope
        if terms.logit_scale != 1.0:
            grad *= terms.logit_scale
        return losses, grad if factors is None else grad.mul_(factors[:, None])

    @staticmethod
    def scale(grad: Tensor, factor: Tensor) -> Tensor:
        return grad.mul_(factor)


class _TritonChunks:
    """A chunk of logits in Triton, in place; products by cuBLAS."""

    @staticmethod
    def rows(count: int, vocabulary: int, dtype: torch.dtype) -> int:
        row_bytes = _row_stride(vocabulary) * dtype.itemsize
        most = max(1, WORKSPACE_BYTES // (row_bytes * ROW_MULTIPLE)) * ROW_MULTIPLE
        chunks = max(1, ceil_divide(count, most))
        one = max(1, ceil_divide(count, chunks))  # of about one size
        return ceil_divide(one, ROW_MULTIPLE) * ROW_MULTIPLE

    @staticmethod
    def workspace(rows: int, vocabulary: int, like: Tensor) -> Tensor:
        return like.new_empty(rows, _row_stride(vocabulary))

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, workspace: Tensor) -> Tensor:
        logits = workspace[: hidden.shape[0]]
        torch.mm(hidden, weight.T, out=logits[:, : weight.shape[0]])
        return logits

    @staticmethod
    def losses(logits, classes: int, labels, bias, terms: Terms, gradient: bool, factors=None):
        """(L,) losses, fp32, and, if asked for, the gradients (L, V) of each, times factors (L,), over the
        logits.

        Columns from `classes` on are read and written, but what stands there means nothing.
        """
        rows, width = logits.shape
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        if rows and _register_row(classes, logits, bias, terms):
            programs, constants = _row_constants(classes)
            at_label = torch.empty_like(losses)
            grid = (min(rows, programs * processors(logits.device)),)
            sizes = rows, classes, logits.stride(0)
            numbers = float(terms.logit_scale), float(terms.z_loss)
            tensors = logits, labels, factors, losses, at_label
            run(_row_kernel, grid, *tensors, *sizes, *numbers, GRADIENT=gradient, **constants)
            if gradient:
                grid = (ceil_divide(rows, 128),)
                run(_label_kernel, grid, logits, labels, at_label, *sizes, BLOCK=128, num_warps=4)
        elif rows:
            softcap = None if terms.softcap is None else float(terms.softcap)
            constants = _long_row_constants(bias is not None)
            multiprocessors = processors(logits.device)
            twice = 2 * multiprocessors * width * logits.element_size() <= CACHE_BYTES
            grid = (min(rows, multiprocessors * (2 if twice else 1)),)
            sizes = rows, classes, width, logits.stride(0)
            numbers = softcap, float(terms.logit_scale), terms.label_smoothing or None, float(terms.z_loss)
            tensors = logits, labels, bias, factors, losses
            run(_long_row_kernel, grid, *tensors, *sizes, *numbers, GRADIENT=gradient, **constants)
        if not gradient:
            return losses, None
        torch.autograd.graph.increment_version(logits)
        return losses, logits[:, :classes]

    @staticmethod
    def scale(grad: Tensor, factor: Tensor) -> Tensor:
        rows, columns = grad.shape
        block = 4096
        grid = (rows, ceil_divide(columns, block))
        if grad.numel():
            run(_scale_kernel, grid, grad, factor, columns, grad.stride(0), BLOCK=block, num_warps=4)
            torch.autograd.graph.increment_version(grad)
        return grad


def _row_stride(vocabulary: int) -> int:
    return ceil_divide(vocabulary, STRIDE_MULTIPLE) * STRIDE_MULTIPLE


def _register_row(classes: int, logits: Tensor, bias: Tensor | None, terms: Terms) -> bool:
    """Whether _row_kernel serves: what it has registers for, and rows of whole 16-byte loads."""
    usual = bias is None and terms.softcap is None and terms.label_smoothing == 0 and terms.logit_scale > 0
    return usual and logits.element_size() == 2 and classes <= MAX_REGISTER_ROW and classes % 16 == 0


def _row_constants(classes: int) -> tuple[int, dict[str, int]]:
    """Programs on a multiprocessor, and the constants of _row_kernel."""
    block = max(256, next_power_of_2(classes))
    warps = 32 if block == MAX_REGISTER_ROW else max(4, block // 2048)
    return MAX_REGISTER_ROW // max(block, 4096), {"BLOCK": block, "STAGES": 2, "num_warps": warps}


def _long_row_constants(biased: bool) -> dict[str, int]:
    """Constants of _long_row_kernel. With a bias, threads need more registers than 512 of them can have."""
    block = LOOP_BLOCK // 2 if biased else LOOP_BLOCK
    return {"BLOCK": block, "STAGES": 4, "num_warps": 8 if biased else 16}


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, terms, chunks):
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        narrow = weight.to(hidden.dtype)
        gradients = _Gradients(hidden, narrow, bias, (need_hidden, need_weight, need_bias))
        for rows, logits in _chunks_of_logits(hidden, narrow, chunks):
            losses, grad = chunks.losses(logits, weight.shape[0], labels[rows], bias, terms, gradients.needed)
            total += losses.sum()
            if gradients.needed:
                gradients.add(rows, grad)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        def scaled(grad, dtype):
            if grad is None:
                return None
            # multiplied in fp32: with fp16 loss scaling grad_total may be 2^16. No third buffer of the head's
            # size. On a GPU a number without dimensions would be rounded to grad's dtype first; one with a
            # dimension is not
            factor = grad_total if grad_total.device.type == "cpu" else grad_total.reshape(1)
            return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))

        hidden, weight, bias = (scaled(*each) for each in zip(ctx.saved_tensors, ctx.dtypes))
        return hidden, weight, None, bias, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, terms, chunks):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        result = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        for rows, logits in _chunks_of_logits(hidden, weight.to(hidden.dtype), chunks):
            losses, _ = chunks.losses(logits, weight.shape[0], labels[rows], bias, terms, False)
            torch.neg(losses, out=result[rows])
        ctx.save_for_backward(hidden, weight, labels, bias)
        ctx.terms, ctx.chunks = terms, chunks
        return result

    @staticmethod
    def backward(ctx, grad_result):
        hidden, weight, labels, bias = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        narrow = weight.to(hidden.dtype)
        gradients = _Gradients(hidden, narrow, bias, (need_hidden, need_weight, need_bias))
        factors = grad_result.neg()
        for rows, logits in _chunks_of_logits(hidden, narrow, ctx.chunks):
            operands = logits, weight.shape[0], labels[rows], bias, ctx.terms
            gradients.add(rows, ctx.chunks.losses(*operands, True, factors[rows])[1])
        weight_grad = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        bias_grad = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return gradients.hidden, weight_grad, None, bias_grad, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, terms, chunks):
        needed = ctx.needs_input_grad[0]
        logits = logits.detach()  # the same memory and version
        if chunks is _TritonChunks and logits.stride(-1) != 1:
            logits = logits.contiguous()
        if chunks is _TorchChunks and not needed:
            logits = logits.clone()  # else changed by what is done to them on the way
        losses, grad = chunks.losses(logits, logits.shape[1], labels, None, terms, needed)
        if needed:
            if grad.dtype is not logits.dtype:  # fp32 gradients of bf16 logits in torch
                logits.copy_(grad)
            ctx.save_for_backward(logits)
        ctx.chunks = chunks
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_total):
        (grad,) = ctx.saved_tensors
        return ctx.chunks.scale(grad, grad_total), None, None, None


def chunk_bytes(count: int, vocabulary: int, dtype: torch.dtype, device: str, trained: bool) -> int:
    """The most that logits of `count` rows take at a time on a device of this type, by torch on a CPU.
    trained: the head; then there is more when the product that is its gradient stands beside one chunk."""
    if device != "cpu":  # one memory for all chunks
        return min(count * _row_stride(vocabulary) * dtype.itemsize, WORKSPACE_BYTES)
    rows = _TorchChunks.rows(count, vocabulary, dtype)
    wide = min(rows, count) * vocabulary * 4
    narrow = wide * dtype.itemsize // 4 if dtype.itemsize < 4 else 0
    return narrow + wide * (1 + (count > rows and not trained))  # two while the next one is made


def _chunks_of_logits(hidden: Tensor, weight: Tensor, chunks):
    """Yield (slice of rows, their logits), in one memory for all where the kind of chunk has one."""
    count, vocabulary = hidden.shape[0], weight.shape[0]
    step = chunks.rows(count, vocabulary, hidden.dtype)
    workspace = chunks.workspace(min(step, count), vocabulary, hidden)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        yield rows, chunks.logits(hidden[rows], weight, workspace)


class _Gradients:
    """Sums up the gradients of hidden (its dtype), weight and bias (fp32), each None unless needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.inputs, self.head = hidden, weight
        self.needed = any(needed)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if needed[2] else None

    def add(self, rows: slice, grad: Tensor) -> None:
        """grad (rows, V): of the logits."""
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)
        inputs = self.inputs[rows]
        grad = grad.to(inputs.dtype)
        if grad.device.type == "cpu":
            if self.hidden is not None:
                self.hidden[rows] = matmul_transposed(grad, self.head.T)
            if self.weight is not None:
                self.weight += matmul_transposed(grad.T, inputs.T)
            return
        if self.hidden is not None:
            torch.mm(grad, self.head, out=self.hidden[rows])
        if self.weight is not None:
            # summed by the product itself, in fp32: a sum in bf16 would round once per chunk
            torch.addmm(self.weight, grad.T, inputs, out_dtype=self.weight.dtype, out=self.weight)


# Kernels


@jit
def _adjust(logits, bias, places, mask, softcap, logit_scale):
    """Logits as stored -> z in fp32: bias, scale and cap."""
    z = logits.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + places, mask=mask, other=0.0).to(tl.float32)
    z *= logit_scale
    if softcap is not None:
        z = softcap * tanh(z / softcap, True)
    return z


@jit
def _target(start, label, size, bias, softcap, logit_scale):
    """z of the label; NaN for a label that there is not."""
    valid = (label >= 0) & (label < size)
    raw = tl.load(start + label, mask=valid, other=float("nan"))
    return _adjust(raw, bias, label, valid, softcap, logit_scale)


@jit
def _loss(target, normaliser, mean, smoothing, z_weight):
    if smoothing is not None:
        target = (1.0 - smoothing) * target + smoothing * mean
    return normaliser - target + z_weight * normaliser * normaliser


@jit
def _factor(target, row, factors, logit_scale):
    """What every gradient of a row is multiplied by; NaN for a label that there is not."""
    factor = logit_scale
    if factors is not None:
        factor *= tl.load(factors + row).to(tl.float32)
    return tl.where(target == target, factor, float("nan"))


@jit
def _slope(grad, z, softcap):
    """Through the cap: times 1 - (z / c)^2."""
    if softcap is not None:
        ratio = z / softcap
        grad = grad * (1.0 - ratio * ratio)
    return grad


@jit(do_not_specialize=["rows"])
def _row_kernel(
    logits, labels, factors, losses, at_label, rows, size, stride, logit_scale, z_weight,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The usual loss of rows that a program holds in registers: 32 values a thread of 1024, and no room for
    more.

    So bias, cap and smoothing are _long_row_kernel's, and so is the subtraction at the label _label_kernel's
    (telling where it stands spills 112 bytes a thread). Persistent: the next row is on its way to shared
    memory meanwhile.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    stride = tl.cast(stride, tl.int64)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        start = logits + row * stride
        z = tl.load(start + columns, mask=inside, other=float("-inf")).to(tl.float32) * logit_scale
        target = _target(start, tl.load(labels + row), size, None, None, logit_scale)
        maximum = tl.max(z)
        power = tl.exp(z - maximum)
        total = tl.sum(power)
        normaliser = maximum + tl.log(total)
        tl.store(losses + row, _loss(target, normaliser, 0.0, None, z_weight))
        if GRADIENT:
            factor = _factor(target, row, factors, logit_scale)
            share = factor * (1.0 + 2.0 * z_weight * normaliser)
            tl.store(start + columns, (power * (share / total)).to(logits.dtype.element_ty), mask=inside)
            tl.store(at_label + row, tl.exp(target - normaliser) * share - factor)


@jit(do_not_specialize=["rows"])
def _label_kernel(logits, labels, at_label, rows, size, stride, BLOCK: tl.constexpr):
    """What _row_kernel leaves: the gradient at the label."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    label = tl.load(labels + row, mask=inside, other=-1)
    place = logits + row.to(tl.int64) * stride + label
    value = tl.load(at_label + row, mask=inside, other=0.0)
    tl.store(place, value.to(logits.dtype.element_ty), mask=(label >= 0) & (label < size))


@jit(do_not_specialize=["rows"])
def _long_row_kernel(
    logits, labels, bias, factors, losses, rows, size, width, stride, softcap, logit_scale, smoothing,
    z_weight,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Any row, BLOCK values at a time: once for the sum (online, arXiv 1805.02867), once for the gradient.

    size: classes; width: columns that may be read and written, a multiple of 16 where the memory is this
    file's own (a mask that ends in the middle of 16 bytes would make every load and store one of single
    values).
    """
    columns = tl.arange(0, BLOCK)
    blocks = tl.cdiv(size, BLOCK)
    stride = tl.cast(stride, tl.int64)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        start = logits + row * stride
        label = tl.load(labels + row)
        target = _target(start, label, size, bias, softcap, logit_scale)
        maximum = float("-inf")
        sums = tl.zeros((BLOCK,), tl.float32)  # one of each lane; one maximum for all, so lanes can be added
        values = tl.zeros((BLOCK,), tl.float32)
        for block in tl.range(0, blocks, num_stages=STAGES):
            places = block * BLOCK + columns
            inside = places < size
            raw = tl.load(start + places, mask=places < width, other=0.0)
            z = _adjust(raw, bias, places, inside, softcap, logit_scale)
            if smoothing is not None:
                values += tl.where(inside, z, 0.0)
            z = tl.where(inside, z, float("-inf"))
            larger = tl.maximum(maximum, tl.max(z))
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # nothing but -inf so far
            sums = sums * tl.exp(maximum - shift) + tl.exp(z - shift)
            maximum = larger
        normaliser = maximum + tl.log(tl.sum(sums))
        mean = 0.0
        if smoothing is not None:
            mean = tl.sum(values) / size
        tl.store(losses + row, _loss(target, normaliser, mean, smoothing, z_weight))
        if GRADIENT:
            factor = _factor(target, row, factors, logit_scale)
            at_label, elsewhere = factor, 0.0
            if smoothing is not None:
                at_label, elsewhere = factor * (1.0 - smoothing), factor * smoothing / size
            share = factor * (1.0 + 2.0 * z_weight * normaliser)
            for block in tl.range(0, blocks, num_stages=STAGES):
                places = (blocks - 1 - block) * BLOCK + columns
                inside = places < size
                raw = tl.load(start + places, mask=places < width, other=0.0)
                z = _adjust(raw, bias, places, inside, softcap, logit_scale)
                grad = tl.exp(z - normaliser) * share - elsewhere
                grad = _slope(tl.where(places == label, grad - at_label, grad), z, softcap)
                tl.store(start + places, grad.to(logits.dtype.element_ty), mask=places < width)


@jit
def _scale_kernel(grad, factor, size, stride, BLOCK: tl.constexpr):
    """grad (rows, size) times a number on the device; nothing is touched where that is 1, as it mostly is."""
    number = tl.load(factor).to(tl.float32)
    if number != 1.0:
        places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = grad + tl.program_id(0).to(tl.int64) * stride + places
        inside = places < size
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, (value * number).to(grad.dtype.element_ty), mask=inside)
