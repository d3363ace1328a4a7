"""What a run minimises. A stage is what the loop (train.py) asks for, and nothing in the loop knows which one it is.

The contract: `weight(batch)` is the number of things the loss is a sum over (tokens, pairs), known on the host;
`loss(model, batch)` is the fp32 SUM over them and metrics. The loop divides by the weights of all micro-batches
and all ranks, so batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 give the same gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import Decoder
from parallel.world import World
from pipeline.batch import Batch
from stages.rollouts import Prompt

Metrics = dict[str, Tensor]  # name -> (2,) fp32: a sum, and the number of things it is a sum over


class Stage:
    """What the loop asks for, with the answers of a stage that learns from given examples."""

    evaluation_names: tuple[str, ...] = ("loss",)  # what `evaluate` gives, for metric_for_best_model
    has_value_head = False
    uses_dropout = True  # whether lora_dropout is of any use to it

    def groups(self, model: Decoder, drawn: list[Batch], first: int) -> Iterator[list[Batch]]:
        """The accumulation group of each update from number `first` on that is made of what was drawn at once."""
        yield drawn

    def prepare(self, model: Decoder, group: list[Batch]) -> None:
        """Before the losses of an accumulation group: what needs all of its batches, on all ranks."""

    def weight(self, batch: Batch) -> float:
        raise NotImplementedError

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """The same names of metrics in the same order whatever the batch, an empty one too."""
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
        sums: Metrics = {}
        for batch in batches:
            batch = batch.to(world.device)
            self.prepare(model, [batch])
            value, metrics = self.loss(model, batch)
            value = value.double()
            loss = torch.stack([value, torch.full_like(value, self.weight(batch))])
            for name, pair in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + pair.double()
        return means_over_ranks(sums, world)


def means_over_ranks(sums: Metrics, world: World) -> dict[str, float]:
    """name -> mean, of the sums (2,) of every rank; all have the same names. Waits for the device."""
    totals = world.sum(torch.stack(list(sums.values())).double()).tolist()
    return {name: total / max(count, 1) for name, (total, count) in zip(sums, totals)}


class RolloutStage(Stage):
    """What PPO and GRPO add: prompts are drawn, and updates made of the texts that the model wrote to them.

    What was drawn is rolled out once and serves `options.updates_per_rollout` updates. Between these a checkpoint holds
    the texts with all that is known of them, so a resumed run goes on with the same ones.
    """

    uses_dropout = False  # texts are written, and old log-probabilities taken, without it
    group_size: int | None = None  # micro-batches of an update; None: all that were drawn

    def __init__(
        self, options, generation, reward, *, tokenizer, stop_ids, reference, seed: int, world: World
    ):
        """options: of the stage. generation: how texts are sampled; its stop words are those of the template, too.
        reward: a rewards.RewardSource. reference: a Reference, or None where nothing asks for it."""
        self.options, self.generation, self.reward = options, generation, reward
        self.tokenizer, self.stop_ids, self.reference = tokenizer, tuple(stop_ids), reference
        self.seed, self.world = seed, world
        self.draws = 0  # rolled out so far
        self.drawn: list[Batch] = []  # micro-batches of the rollout that updates are being made of

    @property
    def temperature(self) -> float:
        """Of the policy that writes, and so of the one that learns."""
        return self.generation.temperature if self.generation.do_sample else 1.0

    def write_texts(self, model: Decoder, prompts: list[list[Prompt]]) -> list[Batch]:
        """Each micro-batch of prompts as a micro-batch of texts with all that the updates need, on the host."""
        raise NotImplementedError

    def groups(self, model: Decoder, drawn: list[list[Prompt]], first: int) -> Iterator[list[Batch]]:
        if first == 0:  # else `restore` has brought it back
            self.drawn = self.write_texts(model, drawn)
        size = self.group_size or len(self.drawn)
        groups = [self.drawn[start : start + size] for start in range(0, len(self.drawn), size)]
        updates = self.options.updates_per_rollout
        for number in range(first, updates):
            if number == updates - 1:
                self.drawn = []  # a checkpoint after the last update needs none of it
            # the last rollout of an epoch may hold fewer groups: they come more often
            yield groups[number % len(groups)]

    def state(self) -> dict:
        return {"draws": self.draws, "drawn": [batch.plain() for batch in self.drawn]}

    def restore(self, state: dict) -> None:
        self.draws, self.drawn = state["draws"], [Batch(**values) for values in state["drawn"]]
