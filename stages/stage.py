"""What a run minimises. A stage is what the loop (train.py) asks for, and nothing in the loop knows which one
it is.

The contract: `weight(batch)` is the number of things the loss is a sum over (tokens, pairs), known on the
host; `loss(model, batch)` is the fp32 SUM over them and metrics. The loop divides by the weights of all
micro-batches and all ranks, so batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 give the same gradients.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Decoder
from parallel.world import World
from pipeline.batch import Batch
from stages.logprobs import head_loss, hidden_states

Metrics = dict[str, Tensor]  # name -> (2,) fp32: a sum, and the number of things it is a sum over


@dataclass(frozen=True)
class Rhythm:
    """How updates are made of data: `draw` micro-batches at once, of which the stage makes `updates`
    updates."""

    draw: int
    updates: int = 1


class Stage:
    """What the loop asks for, with the answers of a stage that learns from given examples."""

    metric_names: tuple[str, ...] = ()  # of every `loss`, on every rank
    evaluation_names: tuple[str, ...] = ("loss",)  # what `evaluate` gives
    has_value_head = False
    uses_dropout = True  # whether lora_dropout is of any use to it

    def groups(self, model: Decoder, drawn: list[Batch], first: int) -> Iterator[list[Batch]]:
        """The accumulation group of each update from number `first` on that is made of what was drawn at
        once."""
        yield drawn

    def prepare(self, model: Decoder, group: list[Batch]) -> None:
        """Before the losses of an accumulation group: what needs all of its batches, on all ranks."""

    def weight(self, batch: Batch) -> float:
        raise NotImplementedError

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    def state(self) -> dict:
        """What a checkpoint must hold of it: tensors and plain values."""
        return {}

    def restore(self, state: dict) -> None:
        """Back to what `state` gave."""

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the means of the metrics."""
        return means

    def evaluate(self, model: Decoder, batches: Iterator[Batch], world: World) -> dict[str, float]:
        """Loss and metrics over all ranks. The model is in eval mode, gradients are off."""
        device = model.embed_tokens.weight.device
        sums = torch.zeros(1 + len(self.metric_names), 2, dtype=torch.float64, device=device)
        for batch in batches:
            self.prepare(model, [batch])
            value, metrics = self.loss(model, batch)
            sums[0, 0] += value
            sums[0, 1] += self.weight(batch)
            for row, name in enumerate(self.metric_names, start=1):
                sums[row] += metrics[name]
        means = [total / max(count, 1) for total, count in world.sum(sums).tolist()]
        return dict(zip(("loss", *self.metric_names), means))


def clipped_losses(log_ratio: Tensor, advantages: Tensor, lower: float, upper: float) -> Tensor:
    """-min(r A, clip(r, 1 - lower, 1 + upper) A), r = exp(log_ratio); all (n,). arXiv 1707.06347 eq. 7."""
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - lower, 1 + upper) * advantages)


class TokenLoss(Stage):
    """Next-token cross entropy over the labelled tokens: stages pt and sft."""

    evaluation_names = ("loss", "perplexity")

    def weight(self, batch: Batch) -> int:
        return batch.label_rows.shape[0]

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over labelled tokens of -log p(label), in nats, () fp32. The head runs on these rows only."""
        rows = hidden_states(model, batch)[batch.label_rows]  # (L, E)
        return head_loss(model, rows, batch.labels[batch.label_rows]), {}

    def evaluate(self, model: Decoder, batches: Iterator[Batch], world: World) -> dict[str, float]:
        results = super().evaluate(model, batches, world)
        return results | {"perplexity": math.exp(min(results["loss"], 700))}  # exp(710) overflows
