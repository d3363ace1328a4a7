"""Stage kto: learn from single answers that were called good or bad; losses kto, apo_zero_unpaired and bco.

Letters: x a question, y its answer; r = log-probability of y under the policy - under the reference, sums
over its tokens in nats; b is pref_beta, s the sigmoid.

    kto                good: w+ (1 - s(b (r - z)))   bad: w- (1 - s(b (z - r)))     arXiv 2402.01306 eq. 7-8
    apo_zero_unpaired  good: w+ (1 - s(b r))         bad: w- s(b r)                 arXiv 2408.06266 eq. 7
    bco                good: -w+ log s(b r - d)      bad: -w- log s(d - b r)        arXiv 2404.04656 eq. 7

w+ = kto_chosen_weight, w- = kto_rejected_weight. z = max(0, mean r of questions with answers to other
questions), an estimate of the KL divergence, without gradient: each row's question with the answer of the
next row that asks something else, as a second segment of the example. d = mean b r of all answers so far.

Departures from trl and LLaMA-Factory: z is the mean over the whole accumulation group and all ranks (in an
evaluation: over the whole set), theirs that of a micro-batch (trl: averaged over ranks); and the other row is
one of the data set, theirs the next of the batch, so that batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 give
the same gradients, at batch size 1 too, and with a batch that asks one question only; theirs may answer the
same question, where rows with it stand together. pref_ftx adds the loss per token of each good answer, so
that (sum over answers) / (number of answers) is what trains; LLaMA-Factory divides by the number of good
ones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Prepared
from model import Decoder
from options.errors import UserError, refuse, require
from options.option import option
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, Batch, Example
from pipeline.store import ExampleStore
from stages.logprobs import (
    MeanLogits,
    batch_logprobs,
    in_eval_mode,
    label_logprobs,
    label_states,
    segment_sums,
)
from stages.metrics import ANSWER_METRICS, Metrics, means_over_ranks
from stages.reference import Reference
from stages.stage import Stage

MOST_WAITING = 1000  # examples of a stream that are held until one asks something else


@dataclass(frozen=True)
class KTOOptions:
    STAGES = "kto"

    kto_loss: Literal["kto", "apo_zero_unpaired", "bco"] = option("kto", "kto: loss of a good or bad answer")
    kto_chosen_weight: float = option(1.0, "weight of answers called good", also="desirable_weight")
    kto_rejected_weight: float = option(1.0, "weight of answers called bad", also="undesirable_weight")

    def __post_init__(self):
        weights = "kto_chosen_weight kto_rejected_weight"
        require(self, weights, lambda value: 0 <= value < math.inf, "must be 0 or more")
        idle = self.kto_chosen_weight == self.kto_rejected_weight == 0
        refuse(idle, "kto_chosen_weight: both weights are 0, so nothing is learned; raise one")

    @property
    def needs_mismatches(self) -> bool:
        return self.kto_loss == "kto"


# The losses: rewards (n,), good (n,) bool -> (n,). The dtype stays.


def kto_loss(rewards: Tensor, good: Tensor, baseline: Tensor) -> Tensor:
    """rewards b r, baseline b z; also apo_zero_unpaired, with baseline 0."""
    return torch.sigmoid(torch.where(good, baseline - rewards, rewards - baseline))


def bco_loss(rewards: Tensor, good: Tensor, baseline: Tensor) -> Tensor:
    return -F.logsigmoid(torch.where(good, rewards - baseline, baseline - rewards))


class MismatchedStore(ExampleStore):
    """The examples of a store, each `mismatched` with that of another_asker."""

    def __init__(self, store: ExampleStore, cutoff_len: int):
        super().__init__(store.parts, store.datasets, store.index)
        asked = self._gather("asked", np.int64)
        if len(np.unique(asked)) < 2:
            found = f"{', '.join(store.datasets)} has {len(np.unique(asked))}"
            needs = f"kto needs answers to other questions, so at least 2 questions; {found}"
            raise UserError(f"kto_loss: {needs}. Set kto_loss=apo_zero_unpaired or bco, or add rows")
        self.cutoff_len, self.others = cutoff_len, another_asker(asked)
        questions = self._gather("questions", np.int32)  # tokens
        answers = (self.lengths - questions)[self.others]
        self.lengths = self.lengths + questions + np.minimum(answers, cutoff_len - questions)

    def example(self, i: int) -> Example:
        return mismatched(super().example(i), super().example(int(self.others[i])), self.cutoff_len)


def another_asker(asked: np.ndarray) -> np.ndarray:
    """(n,) what rows ask, at least two different things -> (n,) for each row one that asks something else.

    Of rows that all differ the next one, and the first for the last. Rows that ask the same are first put
    together where the first of them stands, and their k-th one has the k-th row behind them.
    """
    _, first, number, sizes = np.unique(asked, return_index=True, return_inverse=True, return_counts=True)
    first, size = first[number], sizes[number]
    order = np.argsort(first, kind="stable")
    first, size, place = first[order], size[order], np.arange(len(asked))
    begin = np.searchsorted(first, first)  # of the rows that ask the same
    others = np.empty(len(asked), np.int64)
    others[order] = order[(begin + size + (place - begin) % (len(asked) - size)) % len(asked)]
    return others


def mismatched(example: Example, other: Example, cutoff_len: int) -> Example:
    """The example with a second segment: its question with the other's answer. Where cutoff_len is less, the
    end of its text is left out, not what ends an answer."""
    question, start = int(np.argmax(example.trained)), int(np.argmax(other.trained))
    room, answer = cutoff_len - question, np.arange(start, len(other))
    if len(answer) > room:
        last = min(len(other) - int(np.flatnonzero(other.trained)[-1]), room)
        answer = np.concatenate([answer[: room - last], answer[len(answer) - last :]])

    def joined(name: str) -> np.ndarray:
        mine = getattr(example, name)
        return np.concatenate([mine, mine[:question], getattr(other, name)[answer]])

    arrays = {name: joined(name) for name in ("tokens", "trained", "turns", "roles")}
    return replace(example, **arrays, split=len(example))


def mismatched_stream(examples: Iterator[Example], cutoff_len: int) -> Iterator[Example]:
    """Each example `mismatched` with the next that asks something else."""
    waiting: list[Example] = []  # ask the same
    for example in examples:
        if waiting and example.asked != waiting[0].asked:
            yield from (mismatched(each, example, cutoff_len) for each in waiting)
            waiting = []
        waiting.append(example)
        if len(waiting) > MOST_WAITING:
            found = f"{MOST_WAITING:,} rows of the stream ask the same one after another"
            remedy = "raise buffer_size to mix them, or set kto_loss=apo_zero_unpaired or bco"
            raise UserError(f"kto_loss: kto needs answers to other questions, but {found}; {remedy}")


def add_mismatches(prepared: Prepared, cutoff_len: int) -> None:
    """Give every example its second segment."""
    if isinstance(prepared.train, ExampleStore):
        prepared.train = MismatchedStore(prepared.train, cutoff_len)
    prepared.eval = {name: MismatchedStore(store, cutoff_len) for name, store in prepared.eval.items()}
    prepared.couple = partial(mismatched_stream, cutoff_len=cutoff_len)


@dataclass
class Measured:
    """What the loss and the metrics are made of, (n,) each: one entry an answer."""

    logprobs: Tensor  # fp32, of the whole answer, with gradient
    ratios: Tensor  # r, with gradient
    logits: Tensor  # fp32, sum over the answer's tokens of the mean logit
    tokens: Tensor  # of the answer
    good: Tensor  # bool

    @classmethod
    def join(cls, parts: list["Measured"]) -> "Measured":
        return cls(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(cls)))


class RatedPreference(Stage):
    """Stage kto. Of an example's two segments (loss kto) the second one is read without gradient only."""

    evaluation_names = ("loss", *ANSWER_METRICS, "kl", "sft_loss", "rewards/margins")
    uses_dropout = False

    def __init__(self, options: KTOOptions, beta: float, ftx: float, reference: Reference, world: World):
        """beta: pref_beta.  ftx: pref_ftx."""
        self.options, self.beta, self.ftx = options, beta, ftx
        self.reference, self.world, self.mean_logits = reference, world, MeanLogits()
        self.kl = torch.zeros((), device=world.device)  # z of the current group
        self.rewards = torch.zeros(2).double().to(world.device)  # sum of b r so far, number of answers

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def state(self) -> dict:
        return {"rewards": self.rewards.cpu().clone()}

    def restore(self, state: dict) -> None:
        self.rewards.copy_(state["rewards"])

    @torch.no_grad()
    def prepare(self, model: Decoder, group: list[Batch]) -> None:
        """For kto and bco, which hold answers against a mean over the group: one more forward pass."""
        if self.options.kto_loss == "apo_zero_unpaired":
            return
        with in_eval_mode(model):
            sums = sum(self.ratio_sums(model, batch, self.options.needs_mismatches) for batch in group)
        self.world.sum(sums)
        if self.options.needs_mismatches:
            self.kl = self.divergence(sums)
        else:
            self.rewards += torch.stack([self.beta * sums[0], sums[1]])

    def ratio_sums(self, model: Decoder, batch: Batch, other_answers: bool) -> Tensor:
        """(2,) fp64: sum of r over the batch, of other rows' answers or of its own; their number. An empty
        batch goes through the model too: other ranks may need this one's share of it."""
        part = half(batch, other_answers)
        logprobs = segment_sums(batch_logprobs(model, part), part.label_counts)
        total = (logprobs - self.reference.sums(model, part)).sum(dtype=torch.float64)
        return torch.stack([total, torch.full_like(total, len(part))])

    def divergence(self, sums: Tensor) -> Tensor:
        """z, () fp32."""
        return (sums[0] / sums[1].clamp(min=1)).clamp(min=0).float()

    def measure(self, model: Decoder, batch: Batch) -> Measured:
        part = half(batch, False)
        counts = part.label_counts
        rows, labels = label_states(model, part)
        logprobs = segment_sums(label_logprobs(model, rows, labels), counts)
        logits = segment_sums(self.mean_logits(model, rows), counts)
        ratios = logprobs - self.reference.sums(model, part)
        return Measured(logprobs, ratios, logits, counts, part.per_segment["tags"].bool())

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the answers."""
        return self.score(self.measure(model, batch))

    def score(self, answers: Measured) -> tuple[Tensor, Metrics]:
        options, good = self.options, answers.good
        rewards, baseline = self.beta * answers.ratios, self.beta * self.kl
        if options.kto_loss == "bco":
            baseline = (self.rewards[0] / self.rewards[1].clamp(min=1)).float()
        losses = (bco_loss if options.kto_loss == "bco" else kto_loss)(rewards, good, baseline)
        losses = torch.where(good, options.kto_chosen_weight * losses, options.kto_rejected_weight * losses)
        own = -answers.logprobs / answers.tokens.clamp(min=1)
        if self.ftx:
            losses = losses + self.ftx * torch.where(good, own, 0.0)
        with torch.no_grad():
            masks, ones = torch.stack([good, ~good]).float(), torch.ones_like(rewards)  # (2, n), (n,)
            pairs = ((rewards, ones), (answers.logprobs, ones), (answers.logits, answers.tokens))
            sums = [torch.stack([(mask * each).sum() for each in pair]) for pair in pairs for mask in masks]
            metrics = dict(zip(ANSWER_METRICS, sums))
            metrics["kl"] = torch.stack([self.kl, torch.ones_like(self.kl)]) * len(good)
            metrics["sft_loss"] = torch.stack([(masks[0] * own).sum(), masks[0].sum()])
        return losses.sum(), metrics

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        both = [means[name] for name in ANSWER_METRICS[:2] if name in means]
        return means | ({"rewards/margins": both[0] - both[1]} if len(both) == 2 else {})

    def evaluate(self, model: Decoder, batches: Iterator[Batch], world: World) -> dict[str, float]:
        """As in training with the whole set as one group: the same numbers whatever the batches' size."""
        parts, sums = [], torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in batches:
            batch = batch.to(world.device)
            parts.append(self.measure(model, batch))
            if self.options.needs_mismatches:
                sums += self.ratio_sums(model, batch, True)
        self.kl = self.divergence(world.sum(sums))
        value, metrics = self.score(Measured.join(parts))
        count = torch.full_like(value, float(sum(len(part.good) for part in parts)))
        return self.summary(means_over_ranks({"loss": torch.stack([value, count]), **metrics}, world))


def half(batch: Batch, second: bool) -> Batch:
    """The rows' own answers, or the other rows' answers to their questions, as a batch of single segments:
    views of the batch, for which nothing waits."""
    if not batch.pairs:
        return batch
    pairs, borders, last = batch.pairs, batch.borders, len(batch.label_rows)
    on_host = batch if batch.host is None else batch.host
    middle = int(on_host.label_counts[:pairs].sum())  # labels of the first half
    segments = slice(pairs, 2 * pairs) if second else slice(0, pairs)
    labels = slice(middle, last) if second else slice(0, middle)
    tokens = slice(borders[segments.start], borders[segments.stop])
    part = Batch(
        tokens=batch.tokens[tokens],
        positions=batch.positions[tokens],
        cu_seqlens=batch.cu_seqlens[segments.start : segments.stop + 1] - tokens.start,
        max_seqlen=max(end - start for start, end in pairwise(borders[segments.start : segments.stop + 1])),
        labels=batch.labels[tokens],
        label_rows=batch.label_rows[labels] - tokens.start,
        sources=batch.sources[segments],
        per_segment={name: values[segments] for name, values in batch.per_segment.items()},
    )
    return part.rounded(ROW_MULTIPLE[batch.tokens.device.type])
