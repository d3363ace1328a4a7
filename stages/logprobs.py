"""What is read off the decoder's hidden states: log-probabilities of labels, their sums, one number a token.

All heads run on the rows that need them only, and the (T, V) logits never exist: design of every loss here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.cross_entropy import CHUNK_BYTES
from model import Decoder
from parallel.context import divided
from pipeline.batch import Batch


@contextmanager
def in_eval_mode(model: Decoder) -> Iterator[None]:
    """Without dropout; afterwards the model's mode is what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def device_of(model: Decoder) -> torch.device:
    """Where the model computes; shares of its weights may wait in host memory (fsdp_offload)."""
    weight = model.embed_tokens.weight
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or mesh.device_type == "cpu":
        return weight.device
    return torch.device(mesh.device_type, torch.cuda.current_device())


def hidden_states(model: Decoder, batch: Batch) -> Tensor:
    """(T, E) in the compute dtype."""
    return model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)


def label_states(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden rows (L, E) that predict the labels, and the labels (L,)."""
    return hidden_states(model, batch)[batch.label_rows], batch.labels[batch.label_rows]


def head_loss(model: Decoder, rows: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) for hidden rows (L, E) and labels (L,), () fp32."""
    if model.runtime.context is not None:
        return -label_logprobs(model, rows, labels).sum()
    if is_one_matrix(model):
        return kernels.linear_cross_entropy(rows, model.head_weight(), labels)
    return sum(chunk.sum() for chunk in _chunked_losses(model, rows, labels))


def label_logprobs(model: Decoder, rows: Tensor, labels: Tensor) -> Tensor:
    """log p(label) of hidden rows (L, E) and labels (L,) -> (L,) fp32, with gradient; memory as head_loss."""

    def of_rows(rows: Tensor, labels: Tensor) -> Tensor:
        if is_one_matrix(model):
            return kernels.linear_logprobs(rows, model.head_weight(), labels)
        return -torch.cat(_chunked_losses(model, rows, labels))

    return divided(model.runtime.context, rows, labels, of_rows)


def is_one_matrix(model: Decoder) -> bool:
    """A head with an adapter is none (dropout; in bf16 the sum W + s B A would round the update away)."""
    return model.config.tied_head or isinstance(model.lm_head, nn.Linear)


def _chunked_losses(model: Decoder, rows: Tensor, labels: Tensor) -> list[Tensor]:
    """-log p(label) through the layer itself, some rows at a time, and once more in the backward pass."""

    def layer_loss(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(rows).float(), labels, reduction="none")

    step = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))  # rows
    chunks = zip(rows.split(step), labels.split(step))
    return [checkpoint(layer_loss, *chunk, use_reentrant=False) for chunk in chunks]


def batch_logprobs(model: Decoder, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(L,) fp32: log-probability of each label of the batch, in the order of label_rows.

    temperature: of the sampling that these are the probabilities of; it divides the logits, linear in rows.
    """
    rows, labels = label_states(model, batch)
    return label_logprobs(model, rows if temperature == 1 else rows / temperature, labels)


class MeanLogits:
    """The mean logit over the vocabulary of hidden rows, without a logit: it is linear in the row."""

    def __init__(self):
        self.head_row: Tensor | None = None  # (E,) fp32; kept as long as the head does not train

    @torch.no_grad()
    def __call__(self, model: Decoder, rows: Tensor) -> Tensor:
        """rows (L, E) -> (L,) fp32."""
        head = model.embed_tokens if model.config.tied_head else model.lm_head
        if self.head_row is None or any(parameter.requires_grad for parameter in head.parameters()):
            self.head_row = mean_head_row(model)
        return rows.float() @ self.head_row


@torch.no_grad()
def mean_head_row(model: Decoder) -> Tensor:
    """(E,) fp32: hidden @ row is the mean of a token's logits over the vocabulary.

    An adapted or quantised head is linear too: the row is the slope of its mean output.
    """
    if is_one_matrix(model):
        return model.head_weight().mean(0, dtype=torch.float32)
    weight = model.embed_tokens.weight
    dtype = model.compute_dtype
    nothing = torch.zeros(1, model.config.hidden_size, dtype=dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        return torch.autograd.grad(model.logits(nothing).float().mean(), nothing)[0][0].float()


def segment_sums(values: Tensor, counts: Tensor) -> Tensor:
    """values (L,) in segment order, counts (N,) -> (N,) sums. Deterministic, with gradient."""
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True, initial=0)


def spread(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """(N,) numbers of segments -> (total,) of their tokens, without waiting for the device."""
    return torch.repeat_interleave(values, counts, output_size=total)


def answer_sums(values: Tensor, batch: Batch, ld_alpha: float | None = None) -> Tensor:
    """values (L,) of each label -> (N,) sums over each answer, with gradient.

    ld_alpha (pairs only): labels beyond the length of the shorter answer of the pair count this much. LD-DPO,
    arXiv 2409.06411; for policy and reference alike.
    """
    counts, labels = batch.label_counts, len(values)
    if ld_alpha is not None:
        shared = counts.view(2, batch.pairs).amin(0).repeat(2)  # (N,) labels that both answers of a pair have
        starts = counts.cumsum(0) - counts
        place = torch.arange(labels, device=counts.device) - spread(starts, counts, labels)  # (L,) within it
        values = torch.where(place < spread(shared, counts, labels), values, ld_alpha * values)
    return segment_sums(values, counts)
