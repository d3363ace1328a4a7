"""What a run minimises: one small class per kind of loss, used by several stages.

The contract with the loop (train.py): `weight(batch)` is the number of things the loss is a sum over (tokens here),
known on the host; `loss(model, batch)` is the fp32 SUM over them and a dict of tensors to log. The loop divides by the
weights of all micro-batches and all ranks, so batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 give the same gradients.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from batches import Batch
from kernels.cross_entropy import CHUNK_BYTES
from model import Decoder


class TokenLoss:
    """Next-token cross entropy over the labelled tokens: stages pt and sft."""

    def weight(self, batch: Batch) -> int:
        return batch.label_rows.shape[0]

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over labelled tokens of -log p(label), in nats, () fp32. The head runs on these rows only."""
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)  # (T, E)
        rows = hidden[batch.label_rows]  # (L, E)
        labels = batch.labels[batch.label_rows]  # (L,)
        return head_loss(model, rows, labels), {}


def head_loss(model: Decoder, rows: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) for hidden rows (L, E) and labels (L,), () fp32; all (L, V) logits never exist at once."""
    if model.config.tied_head or isinstance(model.lm_head, nn.Linear):
        return kernels.linear_cross_entropy(rows, model.head_weight(), labels)

    # a head with an adapter is no single matrix (dropout; in bf16 the sum W + s B A would round the update away), so
    # the layer itself runs, some rows at a time, and once more in the backward pass
    def layer_loss(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(rows).float(), labels, reduction="sum")

    step = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))  # rows
    chunks = zip(rows.split(step), labels.split(step))
    return sum(checkpoint(layer_loss, *chunk, use_reentrant=False) for chunk in chunks)


STAGES = {"pt": TokenLoss, "sft": TokenLoss}
