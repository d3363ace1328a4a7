"""Stage dpo: losses over pairs of answers.

Letters: c and r are log-probabilities of the chosen and the rejected answer under the policy, c0 and r0 under
the reference; the ratios are c - c0 and r - r0, and delta = (c - c0) - (r - r0). All are sums over the
answer's tokens, in nats, (P,) fp32; for ipo, orpo and simpo means over them. b is pref_beta, e
dpo_label_smoothing.

    sigmoid    -(1-e) log s(b delta) - e log s(-b delta)              DPO, arXiv 2305.18290 eq. 7; e: cDPO
    robust     the same, without the bias of labels flipped with probability e: arXiv 2403.00409
    hinge      max(0, 1 - b delta)                                    SLiC-HF, arXiv 2305.10425; 2309.06657
    ipo        (delta - 1/(2b))^2                                     arXiv 2310.12036 eq. 17
    exo_pair   KL(s(b delta), s(-b delta) || 1-e, e)                  arXiv 2402.00856 eq. 16
    kto_pair   each answer against the KL of the other kind           KTO's report; see kto_pair_loss
    bco_pair   -log s(b(c-c0) - d) - log s(d - b(r-r0))               arXiv 2404.04656; d: mean reward so far
    orpo       see stages/orpo.py
    simpo      -log s(b(c - r) - simpo_gamma)                         arXiv 2405.14734 eq. 6
    cpo        -log s(b(c - r)) - mean log-probability of the chosen  arXiv 2401.08417 eq. 5

orpo, simpo and cpo have no reference, so c and r stand in the place of the ratios.
Departures: kto_pair's KL and bco's d are means over the whole accumulation group and all ranks, where trl
took those of a micro-batch, so that batch 8 and 8 x 1 give the same gradients; the KL has no gradient, as in
the KTO paper; ld_alpha weighs the reference's answers too, as trl does (LLaMA-Factory: the policy's only).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Decoder
from options.errors import UserError, refuse, require
from options.option import COMMON, option
from parallel.world import World
from pipeline.batch import Batch
from stages.logprobs import (
    MeanLogits,
    answer_sums,
    batch_logprobs,
    device_of,
    in_eval_mode,
    label_logprobs,
    label_states,
)
from stages.metrics import ANSWER_METRICS, Metrics, by_kind, summed
from stages.reference import Reference
from stages.stage import Stage

WITHOUT_REFERENCE = ("orpo", "simpo", "cpo")
AVERAGED = ("ipo", "orpo", "simpo")  # over the answer's tokens
SMOOTHED = ("sigmoid", "robust", "exo_pair", "simpo", "cpo")  # these know dpo_label_smoothing
PAIRS = "dpo orpo"  # stages that learn from pairs
EXO_SMOOTHING = 1e-3  # with e = 0 the loss is infinite; trl's value


@dataclass(frozen=True)
class PreferenceOptions:
    STAGES = "dpo orpo kto"

    pref_loss: Literal[
        "sigmoid", "robust", "hinge", "ipo", "exo_pair", "kto_pair", "bco_pair", "orpo", "simpo", "cpo"
    ] = option("sigmoid", "loss of a pair; orpo, simpo, cpo: no reference", also="dpo_loss", stages=PAIRS)
    pref_beta: float = option(
        0.1, "how strongly a difference counts; simpo: about 2", COMMON, also="dpo_beta orpo_beta kto_beta"
    )
    pref_ftx: float | None = option(
        None,
        "weight of the chosen answer's loss per token; none = 1 for cpo, else 0",
        also="dpo_ftx kto_ftx rpo_alpha cpo_alpha",
    )
    pref_bco_weight: float = option(0.0, "weight of bco_pair's loss beside the pair's own", stages=PAIRS)
    dpo_label_smoothing: float = option(
        0.0, "chance that chosen and rejected are exchanged; below 0.5", also="label_smoothing", stages=PAIRS
    )
    simpo_gamma: float = option(0.5, "margin that simpo asks for", stages=PAIRS, when="pref_loss=simpo")
    ld_alpha: float | None = option(None, "LD-DPO: weight past the shorter answer; none = 1", stages=PAIRS)

    def __post_init__(self):
        loss, smoothing = self.pref_loss, self.dpo_label_smoothing
        require(self, "pref_beta", lambda value: 0 < value < math.inf, "must be above 0")
        weights = "pref_ftx pref_bco_weight simpo_gamma"
        require(self, weights, lambda value: 0 <= value < math.inf, "must be 0 or more")
        text = "is not in [0, 0.5); at 0.5 the labels say nothing"
        require(self, "dpo_label_smoothing", lambda value: 0 <= value < 0.5, text)
        require(self, "ld_alpha", lambda value: 0 <= value <= 1, "is not in [0, 1]")
        why = f"pref_loss {loss} has no smoothing; drop it, or choose one of {', '.join(SMOOTHED)}"
        refuse(smoothing and loss not in SMOOTHED, f"dpo_label_smoothing: {smoothing}, but {why}")
        if self.pref_bco_weight and loss in ("bco_pair", *WITHOUT_REFERENCE):
            why = "is bco's loss itself" if loss == "bco_pair" else "has no reference, which bco's loss needs"
            raise UserError(f"pref_bco_weight: {self.pref_bco_weight}, but pref_loss {loss} {why}; drop it")

    @property
    def needs_reference(self) -> bool:
        return self.pref_loss not in WITHOUT_REFERENCE

    @property
    def chosen_weight(self) -> float:
        """Of the chosen answer's negative log-probability per token."""
        given = 1.0 if self.pref_ftx is None and self.pref_loss == "cpo" else self.pref_ftx or 0.0
        return 1.0 + given if self.pref_loss == "orpo" else given

    def for_stage(self, stage: str) -> "PreferenceOptions":
        return replace(self, pref_loss="orpo") if stage == "orpo" else self


# The losses of pairs: (P,) -> (P,). The dtype stays. To add one: a function here, a value of pref_loss and a
# case in `losses`; nothing else lists them.


def sigmoid_loss(score: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of score = b delta. Also cpo's, and simpo's of b(c - r) - gamma."""
    if not smoothing:
        return -F.logsigmoid(score)
    return -(1 - smoothing) * F.logsigmoid(score) - smoothing * F.logsigmoid(-score)


def robust_loss(score: Tensor, smoothing: float) -> Tensor:
    """Its mean over labels flipped with probability `smoothing` is the sigmoid loss of the true ones."""
    kept, flipped = (1 - smoothing) * F.logsigmoid(score), smoothing * F.logsigmoid(-score)
    return (flipped - kept) / (1 - 2 * smoothing)


def exo_loss(score: Tensor, smoothing: float) -> Tensor:
    """Kullback-Leibler divergence of the policy's choice between the two from (1 - smoothing, smoothing)."""
    chosen, rejected = F.logsigmoid(score), F.logsigmoid(-score)
    first = chosen.exp() * (chosen - math.log1p(-smoothing))
    return first + rejected.exp() * (rejected - math.log(smoothing))


def kto_pair_loss(chosen: Tensor, rejected: Tensor, kl: Tensor, beta: float) -> Tensor:
    """chosen, rejected: ratios (P,); kl (2,): mean ratio, at least 0, of the chosen and the rejected answers.

    The KL of one kind is estimated on the answers of the other. Mean of an answer's two losses.
    """
    return 0.5 * (torch.sigmoid(beta * (kl[1] - chosen)) + torch.sigmoid(beta * (rejected - kl[0])))


def bco_loss(chosen: Tensor, rejected: Tensor, baseline: Tensor) -> Tensor:
    """chosen, rejected: rewards (P,); baseline (): mean reward."""
    return -F.logsigmoid(chosen - baseline) - F.logsigmoid(baseline - rejected)


def divergence(ratio_sums: Tensor) -> Tensor:
    """(3,) of PairPreference.ratio_sums -> (2,): an estimate of the KL divergence on each kind."""
    return (ratio_sums[:2] / ratio_sums[2].clamp(min=1)).clamp(min=0)


class PairPreference(Stage):
    """In ratios (2, P) the chosen answers come first; without a reference they are log-probabilities."""

    evaluation_names = ("loss", *ANSWER_METRICS, "rewards/accuracies", "rewards/margins", "sft_loss")
    uses_dropout = False

    def __init__(self, options: PreferenceOptions, reference: Reference | None, world: World):
        """reference: None exactly when the loss needs none."""
        self.options, self.reference, self.world = options, reference, world
        self.mean_logits = MeanLogits()
        self.kl: Tensor | None = None  # (2,) of the current group, or the whole evaluation set
        self.rewards = torch.zeros(2, dtype=torch.float64)  # sum over the answers seen so far, their number

    def weight(self, batch: Batch) -> int:
        return batch.pairs

    def state(self) -> dict:
        return {"rewards": self.rewards}

    def restore(self, state: dict) -> None:
        self.rewards = state["rewards"].to(self.rewards.device)

    @property
    def follows_rewards(self) -> bool:
        return self.options.pref_loss == "bco_pair" or self.options.pref_bco_weight > 0

    def prepare(self, model: Decoder, group: list[Batch]) -> None:
        """For kto_pair and bco, which hold answers against a mean over the group: one more forward pass."""
        if not (model.training and (self.follows_rewards or self.options.pref_loss == "kto_pair")):
            return
        with in_eval_mode(model):
            sums = self.ratio_sums(model, group)
        self.kl = divergence(sums)
        if self.follows_rewards:
            new = torch.stack([self.options.pref_beta * sums[:2].sum(), 2 * sums[2]])
            self.rewards = self.rewards.to(new.device) + new

    @torch.no_grad()
    def ratio_sums(self, model: Decoder, group: Iterable[Batch]) -> Tensor:
        """(3,) over all ranks: ratios of the chosen answers, of the rejected ones, pairs."""
        sums = torch.zeros(3, device=device_of(model))
        for batch in group:
            ratios = self.ratios(model, batch, self.answers(batch_logprobs(model, batch), batch))
            sums[:2] += ratios.sum(1)
            sums[2] += batch.pairs
        return self.world.sum(sums)

    def evaluate(self, model: Decoder, batches: Iterator[Batch], world: World) -> dict[str, float]:
        """As in training with the whole set as one group: the same numbers whatever the batches' size."""
        if self.options.pref_loss == "kto_pair":
            batches = [batch.to(world.device) for batch in batches]
            self.kl = divergence(self.ratio_sums(model, batches))
        return super().evaluate(model, batches, world)

    def answers(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """logprobs (L,) of the labels -> (2, P): c and r as the loss wants them."""
        return self.per_answer(answer_sums(logprobs, batch, self.options.ld_alpha), batch)

    def per_answer(self, sums: Tensor, batch: Batch) -> Tensor:
        """(2P,) -> (2, P), divided by the number of labels where the loss wants means."""
        if self.options.pref_loss in AVERAGED:
            sums = sums / batch.label_counts.clamp(min=1)
        return sums.view(2, batch.pairs)

    def ratios(self, model: Decoder, batch: Batch, policy: Tensor) -> Tensor:
        """policy (2, P) -> (2, P)."""
        if self.reference is None:
            return policy
        return policy - self.per_answer(self.reference.sums(model, batch), batch)

    def losses(self, ratios: Tensor) -> Tensor:
        """ratios (2, P) -> (P,), without the chosen answer's own loss."""
        options, (chosen, rejected) = self.options, ratios
        beta, smoothing, delta = options.pref_beta, options.dpo_label_smoothing, chosen - rejected
        match options.pref_loss:
            case "sigmoid" | "cpo":
                losses = sigmoid_loss(beta * delta, smoothing)
            case "simpo":
                losses = sigmoid_loss(beta * delta - options.simpo_gamma, smoothing)
            case "robust":
                losses = robust_loss(beta * delta, smoothing)
            case "hinge":
                losses = F.relu(1 - beta * delta)
            case "ipo":
                # of means over the tokens, as the authors do it: of sums it would grow with the lengths
                losses = (delta - 1 / (2 * beta)).square()
            case "exo_pair":
                losses = exo_loss(beta * delta, smoothing or EXO_SMOOTHING)
            case "kto_pair":
                losses = kto_pair_loss(chosen, rejected, self.kl, beta)
        if self.follows_rewards:
            # mean reward of all answers seen in training, this group's among them
            baseline = (self.rewards[0] / self.rewards[1].clamp(min=1)).to(ratios)  # ()
            second, weight = bco_loss(beta * chosen, beta * rejected, baseline), options.pref_bco_weight
            losses = (losses + weight * second) / (1 + weight) if weight else second
        return losses

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the pairs."""
        counts = batch.label_counts
        rows, labels = label_states(model, batch)
        logprobs = label_logprobs(model, rows, labels)  # (L,)
        policy = self.answers(logprobs, batch)
        ratios = self.ratios(model, batch, policy)
        preference = self.losses(ratios)
        totals = answer_sums(logprobs, batch)
        own = -(totals / counts.clamp(min=1)).view(2, batch.pairs)[0]  # of the chosen answer, per token
        losses = preference + self.options.chosen_weight * own if self.options.chosen_weight else preference
        with torch.no_grad():
            rewards = self.options.pref_beta * ratios
            logits = answer_sums(self.mean_logits(model, rows), batch).view(2, batch.pairs).sum(1)  # (2,)
            tokens = counts.view(2, batch.pairs).sum(1).to(logits)
            better, margins = (rewards[0] > rewards[1]).float(), rewards[0] - rewards[1]
            metrics = by_kind("rewards", rewards) | {"rewards/accuracies": better, "rewards/margins": margins}
            sums = summed(metrics | by_kind("logps", policy), batch.pairs)
            sums |= by_kind("logits", torch.stack([logits, tokens], dim=1))
            sums |= summed({"sft_loss": own, **self.own_metrics(preference)}, batch.pairs)
        return losses.sum(), sums

    def own_metrics(self, preference: Tensor) -> dict[str, Tensor]:
        """Further metrics (P,) of a loss of one's own, from the losses (P,) without the chosen answer's."""
        return {}
