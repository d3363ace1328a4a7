"""Stage sft: next-token cross entropy over the answers of dialogues.

loss = - sum over labelled tokens t of log p(token t | tokens before it in its segment)
"""

import math
from collections.abc import Iterator

from torch import Tensor

from model import Decoder
from parallel.world import World
from pipeline.batch import Batch
from stages.logprobs import head_loss
from stages.metrics import Metrics
from stages.stage import Stage


class TokenLoss(Stage):
    evaluation_names = ("loss", "perplexity")

    def weight(self, batch: Batch) -> int:
        return batch.label_rows.shape[0]

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over labelled tokens of -log p(label), in nats, () fp32. The head runs on these rows only."""
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)  # (T, E)
        rows = batch.label_rows  # (L,)
        return head_loss(model, hidden[rows], batch.labels[rows]), {}

    def evaluate(self, model: Decoder, batches: Iterator[Batch], world: World) -> dict[str, float]:
        results = super().evaluate(model, batches, world)
        return results | {"perplexity": math.exp(min(results["loss"], 700))}  # exp(710) overflows
