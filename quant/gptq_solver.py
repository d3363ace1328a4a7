"""GPTQ: weights onto a grid so that a layer's output changes least.  Frantar et al., arXiv 2210.17323.

Least is sum over tokens of |(W - W') x|^2 = tr((W - W') H (W - W')^T) with H = sum of x x^T. Columns are
rounded one after the other; what one loses is taken up by those still to come (optimal brain surgery, eq. 2-3
of the paper):

    error = (w_i - rounded w_i) / R_ii,   w_j -= error R_ij for j > i,   R the upper Cholesky factor of H^-1

R holds all that the successive inverses of the remaining columns would give (sec. 3.3, step 3). Columns far
ahead are updated once per block (step 2), which changes nothing but the speed. H gets damping times its mean
diagonal.

    hessian = Hessian(in_features)
    hessian.add(x)                                               # (T, in), as often as there is text
    integers = solve(weight, hessian, GPTQOptions(bits=4))       # weight (out, in) ~ scale (code - zero)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear import matmul_transposed
from options.errors import UserError, refuse

# Scales are stored as fp16: below this a scale loses digits, above the other it is infinite.
SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max


@dataclass(frozen=True)
class GPTQOptions:
    """act_order: columns in the order of falling activations, groups along that order."""

    bits: int = 4
    group_size: int = 128  # inputs that share a scale, -1 = all
    symmetric: bool = True
    act_order: bool = False
    damping: float = 0.1
    block: int = 128  # columns between two updates of what is far ahead; no result depends on it

    @property
    def most(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def size(self, inputs: int) -> int:
        """Inputs of a group."""
        return inputs if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Integers:
    """weight[o, i] ~ scales[o, g] * (codes[o, i] - zeros[o, g]) with g = group_of[i].

    codes (out, in) uint8; scales (out, groups) fp16; zeros (out, groups) uint8, at least 1: files hold zeros
    - 1; group_of (in,) int32. Means over the calibration text of the squared length of the layer's output
    (size), of what is wrong in it (error), and of what would be if each weight were rounded to the nearest
    point (rounded_error).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    size: float
    error: float
    rounded_error: float


class Hessian:
    """Mean of x x^T (in, in) over tokens, fp32 whatever x's dtype is."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu", dtype=torch.float32):
        self.matrix = torch.zeros(in_features, in_features, device=device, dtype=dtype)
        self.tokens = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x (T, in). Raises UserError for NaN and infinity."""
        x = x.to(self.matrix.dtype)
        product = matmul_transposed(x.T, x.T)  # (in, in)
        if not torch.isfinite(product.diagonal()).all():
            raise UserError("the activations are not finite or too large; infer_dtype=bfloat16 or float32")
        before, self.tokens = self.tokens, self.tokens + x.shape[0]
        self.matrix.mul_(before / self.tokens).add_(product, alpha=1 / self.tokens)  # the mean so far


@torch.no_grad()
def solve(weight: Tensor, hessian: Hessian, options: GPTQOptions) -> Integers:
    """weight (out, in) of any float dtype -> integers, computed in the Hessian's dtype on its device.

    Raises UserError for weights that are not finite or too large for an fp16 scale, or a singular Hessian.
    """
    matrix = hessian.matrix
    columns = weight.to(matrix).T.contiguous()  # (in, out): what is worked on lies together
    refuse(not torch.isfinite(columns).all(), "the weight holds NaN or infinity; the model is broken")
    order = None
    if options.act_order:
        order = matrix.diagonal().argsort(descending=True, stable=True)
        columns, matrix = columns[order], matrix[order][:, order]
    scales, zeros = _grids(columns, options)
    rounded = columns - _values(_codes(columns, scales, zeros, options), scales, zeros, options)
    size, rounded_error = _output_size(columns, matrix), _output_size(rounded, matrix)
    del rounded
    codes, scales, zeros = _one_by_one(columns.clone(), inverse_root(matrix, options.damping), options)
    error = _output_size(columns - _values(codes, scales, zeros, options), matrix)
    inputs = len(columns)
    group_of = torch.arange(inputs, dtype=torch.int32, device=columns.device) // options.size(inputs)
    if order is not None:
        back = order.argsort()
        codes, group_of = codes[back], group_of[back]
    codes, scales, zeros = (part.T.contiguous() for part in (codes, scales.half(), zeros.to(torch.uint8)))
    return Integers(codes, scales, zeros, group_of, size, error, rounded_error)


def inverse_root(matrix: Tensor, damping: float) -> Tensor:
    """Upper R with R^T R = (matrix + damping * mean diagonal)^-1.

    No inverse is formed: with J the reversal of rows, J H J = L L^T gives H = (J L J)(J L J)^T, J L J is
    upper, and R is its inverse. Inputs that never were anything but zero get a one, so that they are rounded
    and pass nothing on.
    """
    diagonal = matrix.diagonal()
    damped = matrix.clone()
    damped.diagonal().add_(damping * diagonal.mean())
    damped.diagonal()[diagonal == 0] = 1.0
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed.item():
        raise UserError(
            "the Hessian of the calibration text is not positive definite; raise "
            f"export_quantization_damp_percent (now {damping}) or export_quantization_nsamples"
        )
    upper = lower.flip(0, 1)
    one = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, one, upper=True)


def _one_by_one(columns: Tensor, root: Tensor, options: GPTQOptions) -> tuple[Tensor, Tensor, Tensor]:
    """columns (in, out), which are used up -> codes (in, out) uint8, scales and zeros (groups, out)."""
    inputs, outputs = columns.shape
    size = options.size(inputs)
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=columns.device)
    scales, zeros = [], []
    for start, stop in _blocks(inputs, size, options.block):
        errors = columns.new_empty(stop - start, outputs)
        for i in range(start, stop):
            if i % size == 0:  # blocks end where groups do, so all its weights are up to date
                scale, zero = _grid(columns[i : i + size], options)
                scales.append(scale)
                zeros.append(zero)
            codes[i] = code = (columns[i] / scale).round_().add_(zero).clamp_(0, options.most)
            error = torch.div(columns[i] - (code - zero) * scale, root[i, i], out=errors[i - start])
            columns[i + 1 : stop].addr_(root[i, i + 1 : stop], error, alpha=-1)
        if stop < inputs:
            columns[stop:] -= matmul_transposed(root[start:stop, stop:].T, errors.T)
    return codes, torch.stack(scales), torch.stack(zeros)


def _blocks(inputs: int, group: int, block: int) -> list[tuple[int, int]]:
    """Blocks of columns. None starts within a group and ends in another one."""
    if group <= block:
        step = block // group * group
        return [(start, min(start + step, inputs)) for start in range(0, inputs, step)]
    ends = [(first, min(first + group, inputs)) for first in range(0, inputs, group)]
    return [(start, min(start + block, end)) for first, end in ends for start in range(first, end, block)]


def _grid(columns: Tensor, options: GPTQOptions) -> tuple[Tensor, Tensor]:
    """columns (inputs of a group, out) -> scale and zero (out,), whole and scale as fp16 stores it.

    Symmetric: zero in the middle and the scale that the largest weight asks for (AutoGPTQ's). Else between
    smallest and largest, with zero among them. A zero of 0 would be stored as -1, which readers disagree
    about: it is at least 1.
    """
    most = options.most
    low, high = columns.amin(0).clamp_max(0), columns.amax(0).clamp_min(0)
    if options.symmetric:
        scale = 2 * torch.maximum(-low, high) / most
    else:
        scale = torch.maximum((high - low) / most, high / (most - 1))
    if scale.max() > LARGEST_SCALE:
        raise UserError(f"the weights are too large: a scale of {scale.max():.3g} does not fit GPTQ's fp16")
    scale = scale.clamp_min(SMALLEST_SCALE).half().to(columns.dtype)
    if options.symmetric:
        return scale, torch.full_like(scale, (most + 1) // 2)
    return scale, (-low / scale).round_().clamp_(1, most)


def _grids(columns: Tensor, options: GPTQOptions) -> tuple[Tensor, Tensor]:
    """The grids of all groups of weights as they are: scales, zeros (groups, out)."""
    grids = [_grid(part, options) for part in columns.split(options.size(len(columns)))]
    return torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])


def _codes(columns: Tensor, scales: Tensor, zeros: Tensor, options: GPTQOptions) -> Tensor:
    """Each weight's nearest point: (in, out) uint8."""
    parts = zip(columns.split(options.size(len(columns))), scales, zeros)
    codes = [(part / scale).round_().add_(zero).clamp_(0, options.most) for part, scale, zero in parts]
    return torch.cat([part.byte() for part in codes])


def _values(codes: Tensor, scales: Tensor, zeros: Tensor, options: GPTQOptions) -> Tensor:
    """What the codes (in, out) stand for."""
    parts = zip(codes.split(options.size(len(codes))), scales, zeros)
    return torch.cat([(part - zero) * scale for part, scale, zero in parts])


def _output_size(columns: Tensor, matrix: Tensor) -> float:
    """columns W^T (in, out) -> mean over tokens of |W x|^2 = tr(W H W^T)."""
    return (matmul_transposed(matrix, columns.T) * columns).sum().item()
