"""What a run minimises. The loop (train.py) asks a stage for what stands here, and never which one it is.

The contract: `weight(batch)` is the number of things the loss is a sum over (tokens, pairs), known on the
host; `loss(model, batch)` is the fp32 SUM over them and metrics. The loop divides by the weights of all
micro-batches and all ranks, so batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 give the same gradients.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from generation.generate import Completion
from model import Decoder
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, Batch
from stages.metrics import Metrics, means_over_ranks, summed
from stages.rollouts import Prompt, completions_batch, roll_out


class Stage:
    """With the answers of a stage that learns from given examples."""

    evaluation_names: tuple[str, ...] = ("loss",)  # what `evaluate` gives, for metric_for_best_model
    has_value_head = False
    uses_dropout = True  # whether lora_dropout is of any use to it

    def groups(self, model: Decoder, drawn: list[Batch], first: int) -> Iterator[list[Batch]]:
        """The accumulation groups of the updates, from number `first` on, made of what was drawn at once."""
        yield drawn

    def prepare(self, model: Decoder, group: list[Batch]) -> None:
        """Before the losses of an accumulation group: what needs all of its batches, on all ranks."""

    def weight(self, batch: Batch) -> float:
        raise NotImplementedError

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """The metrics have the same names in the same order whatever the batch, an empty one too."""
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
            for name, pair in (summed({"loss": value.double()}, self.weight(batch)) | metrics).items():
                sums[name] = sums.get(name, 0.0) + pair.double()
        return means_over_ranks(sums, world)


class RolloutStage(Stage):
    """What PPO and GRPO add: prompts are drawn, and options.updates_per_rollout updates made of the texts
    that the model writes to them; a checkpoint in between holds the texts and all that is known of them."""

    uses_dropout = False  # texts are written, and old log-probabilities taken, without it
    group_size: int | None = None  # micro-batches of an update; None: all that were drawn

    def __init__(self, options, generation, reward, *, tokenizer, stop_ids, reference, seed, world):
        """generation: GenerateOptions with the template's stop words; reward: RewardSource; reference:
        Reference, or None where nothing asks for it."""
        self.options, self.generation, self.reward = options, generation, reward
        self.tokenizer, self.stop_ids, self.reference = tokenizer, tuple(stop_ids), reference
        self.seed, self.world = seed, world
        reward.world = world
        self.temperature = generation.temperature if generation.do_sample else 1.0  # of learning too
        self.draws = 0  # rolled out so far
        self.drawn: list[Batch] = []  # micro-batches of the rollout that updates are being made of

    def write_texts(self, model: Decoder, prompts: list[list[Prompt]]) -> list[Batch]:
        """Each micro-batch of prompts as one of texts with all that the updates need, on the host."""
        raise NotImplementedError

    def roll_out(self, model: Decoder, prompts: list[Prompt], seeds: list[int], **changes):
        """-> list[Completion], see rollouts.roll_out; changes: to the GenerateOptions."""
        how = {"stop_ids": self.stop_ids, "tokenizer": self.tokenizer}
        return roll_out(model, prompts, seeds, replace(self.generation, **changes), **how)

    def batch_of(self, prompts: list[Prompt], completions: list[Completion]) -> Batch:
        return completions_batch(prompts, completions).rounded(ROW_MULTIPLE[self.world.device.type])

    def groups(self, model: Decoder, drawn: list[list[Prompt]], first: int) -> Iterator[list[Batch]]:
        if first == 0:  # else `restore` has brought it back
            self.drawn = self.write_texts(model, drawn)
        size, updates = self.group_size or len(self.drawn), self.options.updates_per_rollout
        groups = [self.drawn[start : start + size] for start in range(0, len(self.drawn), size)]
        for number in range(first, updates):
            if number == updates - 1:
                self.drawn = []  # a checkpoint after the last update needs none of it
            yield groups[number % len(groups)]  # an epoch's last rollout may hold fewer: they come more often

    def state(self) -> dict:
        return {"draws": self.draws, "drawn": [batch.plain() for batch in self.drawn]}

    def restore(self, state: dict) -> None:
        self.draws, self.drawn = state["draws"], [Batch(**values) for values in state["drawn"]]
