"""What a run minimises: one small class per kind of loss, used by several stages.

The contract with the loop (train.py): `weight(batch)` is the number of things the loss is a sum over (tokens here), known
on the host; `loss(model, batch)` is the fp32 SUM over them and a dict of tensors to log. The loop divides by the weights
of all micro-batches and all ranks, so batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 give the same gradients.
"""

from torch import Tensor

import kernels
from batches import Batch
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
        return kernels.linear_cross_entropy(rows, model.head_weight(), labels), {}


STAGES = {"pt": TokenLoss, "sft": TokenLoss}
