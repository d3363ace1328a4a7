"""Putting adapters back into a quantised base: what is lost on the way, and a small adapter that keeps it.

Base and adapters are together the matrix T = W + s B A with W the values of the quantised base. Its nearest
codes Q(T) mostly are those of W again: an update is smaller than the steps between levels, so rounding takes
it away. Hence

requantise   Q = Q(T), and the rank-R part of T - Q that is nearest in Frobenius norm stays as an adapter
             (its R largest singular triples: Eckart and Young, 1936)
loftq        Q and the rank-R part in turns, each fitted to what the other leaves (LoftQ, arXiv 2310.08659,
             alg. 1); where the base has the same format its own codes are a candidate too; the best counts

Without an adapter T is the 16-bit weight, and the same two give a quantised model with LoftQ's start for
training.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from architectures.config import ModelConfig, to_hf_name
from checkpoints.peft import save_adapter
from lora import LoraLinear, replace_module
from model import Decoder
from options.errors import UserError, located, refuse
from options.option import COMMON, option
from options.progress import Bar
from quant.linear import Format, QuantLinear

RANK = 16  # of the kept part, where the user names none: LoftQ's and LLaMA-Factory's scripts' default
EXACT_SIDE = 2048  # up to this many rows singular vectors are computed exactly, above by iteration
OVERSAMPLING, ROUNDS = 16, 6  # of that iteration: further columns, and products with M M^T


@dataclass(frozen=True)
class MergeOptions:
    export_merge: Literal["dequantise", "requantise", "loftq"] | None = option(
        None,
        "adapters on a quantised base: into 16 bit; or quantised again, what that loses kept as an adapter "
        "of small rank; or both fitted in turns. Default dequantise, with quantization_bit requantise",
        COMMON,
    )
    export_merge_rank: int | None = option(
        None, "rank of the adapter that keeps what quantising loses; 0 = none. Default 16, without adapters 0"
    )
    loftq_iter: int = option(4, "export_merge=loftq: how often the two are fitted in turns")

    def __post_init__(self):
        way, rank = self.export_merge, self.export_merge_rank
        refuse((rank or 0) < 0, f"export_merge_rank: {rank}; expected 0 or more")
        remedy = "use export_merge=requantise"
        refuse(way == "loftq" and rank == 0, f"export_merge_rank: 0 leaves loftq nothing to fit; {remedy}")
        lossless = way == "dequantise" and rank
        refuse(lossless, f"export_merge_rank: nothing is lost in 16 bit; {remedy} or loftq")
        refuse(self.loftq_iter < 1, f"loftq_iter: {self.loftq_iter}; expected 1 or more")


@dataclass(frozen=True)
class Piece:
    """A tensor of the merged model on its way into files."""

    name: str  # ours
    tensor: Tensor  # not yet rounded: fp32 where an update was added
    dtype: torch.dtype  # what it is in the base
    in_codes: bool = False  # the weight of a linear that is quantised
    base: QuantLinear | None = None  # that linear before the update

    def rounded(self, dtype: torch.dtype | None) -> Tensor:
        """On the CPU, in `dtype` or else its own. Raises UserError for numbers too large for it."""
        result = self.tensor.to(dtype or self.dtype)
        narrow = result.dtype is torch.float16 and not torch.isfinite(result).all()
        if narrow and torch.isfinite(self.tensor).all():
            raise UserError(f"infer_dtype: {self.name} holds numbers too large for float16; use bfloat16")
        return result.cpu()


# One linear


@dataclass(frozen=True)
class Fit:
    """Codes for one weight T, and b @ a, which stands beside them.

    norm  ||T||;  error  ||T - Q - b a|| / ||T||;  naive_error  the same of Q(T) alone;  update  ||T - W|| /
    ||T||, None without a quantised base
    """

    layer: QuantLinear | None
    b: Tensor | None  # (out, R) fp32
    a: Tensor | None  # (R, in) fp32
    norm: float
    error: float
    naive_error: float
    update: float | None
    keeps_codes: bool = False  # the base's


def fit_once(target: Tensor, base: QuantLinear | None, format: Format, dtype: torch.dtype, rank: int) -> Fit:
    """Quantise T (out, in), then keep the rank-R part of the rest."""
    layer = format.quantise(target, None, dtype)
    norm = max(_norm(target.float()), torch.finfo(torch.float32).tiny)
    rest = _rest(target, layer)
    update = None if base is None else _norm(_rest(target, base)) / norm
    b, a, error = _kept(rest, rank)
    return Fit(layer, b, a, norm, error / norm, _norm(rest) / norm, update)


def fit_in_turns(
    target: Tensor, base: QuantLinear | None, format: Format, dtype: torch.dtype, rank: int, rounds: int
) -> Fit:
    """LoftQ's alternation. The error need not fall in every round, so the best round counts."""
    best = fit_once(target, base, format, dtype, rank)
    b, a = best.b, best.a
    for _ in range(rounds - 1):
        layer = format.quantise(target - b @ a, None, dtype)
        b, a, error = _kept(_rest(target, layer), rank)
        if error / best.norm < best.error:
            best = replace(best, layer=layer, b=b, a=a, error=error / best.norm)
    if base is not None and base.format == format:
        b, a, error = _kept(_rest(target, base), rank)
        if error / best.norm <= best.error:
            best = replace(best, layer=base, b=b, a=a, error=error / best.norm, keeps_codes=True)
    return best


def _kept(rest: Tensor, rank: int) -> tuple[Tensor | None, Tensor | None, float]:
    """The rank-R part of a matrix in two factors, and the norm of what is left of it."""
    if rank == 0:
        return None, None, _norm(rest)
    b, a = best_low_rank(rest, rank)
    return b, a, _norm(rest - b @ a)


def _rest(target: Tensor, layer: QuantLinear) -> Tensor:
    """T - Q in fp32."""
    return layer.dequantize(torch.float32).neg_().add_(target)


def _norm(matrix: Tensor) -> float:
    return torch.linalg.vector_norm(matrix).item()


def best_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """M (m, n) fp32 -> b (m, R), a (R, n) with b @ a the nearest matrix of rank R <= min(m, n), both sharing
    the singular values alike: b = U sqrt(S), a = sqrt(S) V^T (LoftQ, alg. 1)."""
    rank = min(rank, *matrix.shape)
    if matrix.shape[0] > matrix.shape[1]:
        b, a = best_low_rank(matrix.T, rank)
        return a.T.contiguous(), b.T.contiguous()
    if matrix.shape[0] > EXACT_SIDE:
        span = _leading_span(matrix, min(rank + OVERSAMPLING, matrix.shape[0]))  # (m, k), orthonormal
        b, a = best_low_rank(span.T @ matrix, rank)
        return span @ b, a
    wide = matrix.double()  # the product below squares the condition number
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # in ascending order
    u = vectors[:, -rank:].flip(1)  # (m, R)
    projected = u.T @ wide  # S V^T (R, n)
    root = torch.linalg.vector_norm(projected, dim=1).sqrt()  # (R,)
    a = projected / root.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return (u * root).float().contiguous(), a.float().contiguous()


def _leading_span(matrix: Tensor, columns: int) -> Tensor:
    """Orthonormal columns that nearly span the leading singular vectors: subspace iteration from a fixed
    random start (Halko et al., arXiv 0909.4061, alg. 4.4)."""
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    span = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(ROUNDS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span).Q).Q
    return span


# The model


@dataclass
class Requantiser:
    """Turns a merged model's pieces into the tensors of a quantised checkpoint; remembers what was lost."""

    config: ModelConfig
    format: Format | None  # of the result; None = each piece's own base's
    dtype: torch.dtype | None  # of the codes' values and of the rest of the model; None = as in the base
    rank: int
    rounds: int | None  # None = requantise, otherwise LoftQ's
    fits: dict[str, Fit] = field(default_factory=dict)  # by our name of the linear; without the codes

    def tensors(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor on the CPU). UserError names the linear that cannot be quantised."""
        for piece in Bar(pieces, desc="quantising", unit="tensor"):
            if not piece.in_codes:
                yield to_hf_name(self.config, piece.name), piece.rounded(self.dtype)
                continue
            module = piece.name.removesuffix(".weight")
            layer = self.fitted(module, piece)
            for part, tensor in layer.tensors().items():
                yield to_hf_name(self.config, f"{module}.{part}"), tensor.cpu()
        refuse(self.format is None, "export_merge: no linear of the base is quantised; give quantization_bit")

    def fitted(self, module: str, piece: Piece) -> QuantLinear:
        """The codes for one weight; the rest of its fit is kept in fits."""
        self.format = self.format or piece.base.format
        if type(self.format).quantise is Format.quantise:
            fault = f"{self.format.method} can only be read, not made from weights as they are"
            remedy = "give quantization_bit (and quantization_method) for the result"
            raise UserError(f"export_merge: {fault}; {remedy}, or export_merge=dequantise")
        dtype = self.dtype or piece.dtype
        with located(module):
            if self.rounds is None:
                fit = fit_once(piece.tensor, piece.base, self.format, dtype, self.rank)
            else:
                fit = fit_in_turns(piece.tensor, piece.base, self.format, dtype, self.rank, self.rounds)
        kept = {} if fit.b is None else {"b": fit.b.cpu(), "a": fit.a.cpu()}
        self.fits[module] = replace(fit, layer=None, **kept)
        return fit.layer

    def save_adapter(self, folder: Path, base_name: str) -> None:
        """What the codes cannot hold, as a PEFT adapter of scale 2 (alpha = 2 R, LoRA's default here)."""
        model = Decoder(self.config, device="meta")
        for module, fit in self.fits.items():
            linear, rank = model.get_submodule(module), len(fit.a)
            layer = LoraLinear(linear, rank, 2.0 * rank, generator=torch.Generator())
            share = 1 / math.sqrt(layer.scale)
            layer.lora_a = nn.Parameter((fit.a * share).to(self.dtype or torch.float32))
            layer.lora_b = nn.Parameter((fit.b * share).to(self.dtype or torch.float32))
            replace_module(model, module, layer)
        model.requires_grad_(False)  # else every other tensor would count as trained in full
        folder.mkdir()
        save_adapter(model, folder, base_name)

    def summary(self) -> str:
        """'error 0.0912 -> 0.0801 ...' over all linears as one vector."""
        fits = list(self.fits.values())
        whole = sum(fit.norm**2 for fit in fits)

        def total(part: str) -> float:
            return math.sqrt(sum((getattr(fit, part) * fit.norm) ** 2 for fit in fits) / whole)

        head = f"{len(fits)} linears in {self.format.describe()}"
        text = f"{head}: relative error {total('naive_error'):.5f} quantised"
        if self.rank:
            text += f", {total('error'):.5f} with the adapter of rank {self.rank} beside them"
        if all(fit.update is not None for fit in fits) and any(fit.update for fit in fits):
            text += f"; the adapters had changed the weights by {total('update'):.5f}"
        kept = sum(fit.keeps_codes for fit in fits)
        return text + (f"; {kept} keep the base's codes" if kept else "")
