"""Reinforcement learning without a value function: a group of answers to each prompt is its own baseline.

GRPO        arXiv 2402.03300   advantage = (reward - mean of the group) / standard deviation of the group
Dr. GRPO    arXiv 2503.20783   no division: scale_rewards=none, loss_type=dr_grpo
DAPO        arXiv 2503.14476   mean over tokens, epsilon_high, mask_truncated_completions
RLOO        arXiv 2402.14740   reward - mean of the others: advantage_estimator=rloo, loss_type=rloo
GSPO        arXiv 2507.18071   one ratio per answer: importance_sampling_level=sequence

Keys are spelled as in trl's GRPOConfig. Per micro-batch, per_device_train_batch_size PROMPTS are answered
num_generations times each (trl counts answers); one update is made of gradient_accumulation_steps
micro-batches and num_iterations updates are made of the same answers. Every mean is over the whole
accumulation group and all ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from evaluation.answers import same_answer
from generation.generate import Completion
from model import Decoder
from options.errors import UserError, refuse, require
from options.option import option
from parallel.world import World
from pipeline.batch import IGNORED, Batch
from stages.logprobs import batch_logprobs, in_eval_mode, segment_sums, spread
from stages.metrics import Metrics, means_over_ranks, summed
from stages.rewards import samples_of, weighted_sum
from stages.rollouts import Prompt, clipped_losses, seed_of
from stages.stage import RolloutStage

SCALE_EPS = 1e-4  # trl's: keeps a group of equal rewards at advantage 0
NO_METRICS = ("labels", "tags", "reference", "advantages")  # of Batch.per_segment; others are of _measures


@dataclass(frozen=True)
class GRPOOptions:
    STAGES = "grpo"

    num_generations: int = option(8, "grpo: answers to each prompt, which are compared with one another")
    num_iterations: int = option(1, "grpo: updates made of the same answers")
    advantage_estimator: Literal["grpo", "rloo"] = option(
        "grpo", "grpo: an answer is compared with the mean of its group, or (rloo) of the others in it"
    )
    scale_rewards: Literal["auto", "group", "batch", "none", "true", "false"] = option(
        "auto",
        "grpo: advantages are divided by the deviation of group (true), batch, none; auto: none with rloo",
    )
    loss_type: Literal["dapo", "bnpo", "grpo", "dr_grpo", "rloo"] = option(
        "dapo",
        "grpo: mean over all tokens (dapo, bnpo), over answers of their tokens' mean (grpo) or of their "
        "sum / max_new_tokens (dr_grpo), over answers with one ratio each, that of their whole text (rloo)",
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "grpo: a ratio for each token, or one for each answer, of mean log-probabilities"
    )
    epsilon: float = option(0.2, "grpo: ratios below 1 - epsilon get no gradient from a bad answer")
    epsilon_high: float | None = option(None, "grpo: above 1 + this none from a good one; none = epsilon")
    beta: float = option(0.0, "grpo: weight of the KL divergence from the reference; 0 = no reference")
    kl_in_reward: bool = option(False, "grpo: take the KL divergence off the rewards, not add it to the loss")
    mask_truncated_completions: bool = option(
        False, "grpo: learn nothing from answers cut off at max_new_tokens (they still count in their group)"
    )

    def __post_init__(self):
        size = self.num_generations
        refuse(size < 2, f"num_generations: {size}; a group needs at least 2 to compare")
        require(self, "num_iterations", lambda value: value >= 1, "must be at least 1")
        require(self, "epsilon", lambda value: 0 < value < 1, "is not between 0 and 1")
        require(self, "epsilon_high", lambda value: value > 0, "must be above 0")
        require(self, "beta", lambda value: value >= 0, "must be 0 (no reference) or more")
        text = "true, but beta is 0, so there is no KL; set beta, or drop the key"
        refuse(self.kl_in_reward and self.beta == 0, f"kl_in_reward: {text}")
        if self.loss_type == "rloo" and self.importance_sampling_level == "sequence":
            already = "one ratio per answer already, of the summed log-probabilities; drop one of the two"
            raise UserError(f"importance_sampling_level: sequence, but loss_type=rloo has {already}")

    groups_per_rollout = 1

    @property
    def updates_per_rollout(self) -> int:
        return self.num_iterations

    @property
    def scale(self) -> str:
        """group, batch or none."""
        if self.scale_rewards == "auto":
            return "group" if self.advantage_estimator == "grpo" else "none"
        return {"true": "group", "false": "none"}.get(self.scale_rewards, self.scale_rewards)

    @property
    def upper(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


# Pure functions: P prompts with G answers each, N = P G answers, L answer tokens in a row


# rewards are NaN where no function had anything to say: such an answer is not in its group


def mean_baseline(rewards: Tensor) -> Tensor:
    """rewards (P, G) -> (P, G): the reward less the mean of its group. GRPO, section 4.1.2."""
    return rewards - rewards.nan_to_num(0.0).sum(1, keepdim=True) / (~rewards.isnan()).sum(1, keepdim=True)


def leave_one_out(rewards: Tensor) -> Tensor:
    """rewards (P, G) -> (P, G): the reward less the mean of the other answers' rewards. RLOO, eq. 9."""
    others = (~rewards.isnan()).sum(1, keepdim=True) - 1
    return rewards - (rewards.nan_to_num(0.0).sum(1, keepdim=True) - rewards) / others


def group_deviation(rewards: Tensor) -> Tensor:
    """rewards (P, G) -> (P, 1): unbiased standard deviation of each group; 0 of fewer than two rewards."""
    if not len(rewards):  # a rank without prompts: std would warn
        return rewards[:, :1]
    deviation = rewards.std(1, keepdim=True)
    for group in rewards.isnan().any(1).nonzero()[:, 0].tolist():
        known = rewards[group][~rewards[group].isnan()]
        deviation[group] = known.std() if len(known) > 1 else 0.0
    return deviation


def k3_divergence(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) on tokens of the policy, at least 0. All (L,)."""
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, reference, counts: Tensor, options: GRPOOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `options.loss_type` as a SUM, () in the dtype given, and sums over tokens for the metrics.

    logprobs (L,) of the policy that learns, old (L,) of the one that wrote the answers, reference (L,) or
    None (no KL in the loss); advantages (N,), counts (N,) tokens of each answer, 0 for one that is left out.
    """
    log_ratio, clip = logprobs - old, (options.epsilon, options.upper)
    by_token = spread(advantages, counts, len(logprobs))
    whole = options.loss_type == "rloo"  # losses of answers, not of tokens
    if whole:
        losses = clipped_losses(segment_sums(log_ratio, counts), advantages, *clip)
        losses = losses * (counts > 0)  # one that is left out has ratio 1, and would still add its advantage
        log_ratio = spread(segment_sums(log_ratio.detach(), counts), counts, len(logprobs))
    else:
        if options.importance_sampling_level == "sequence":
            means = segment_sums(log_ratio, counts) / counts.clamp(min=1)
            log_ratio = spread(means, counts, len(logprobs))
        losses = clipped_losses(log_ratio, by_token, *clip)
    # tokens whose gradient the clipping takes away, as trl counts them
    ratio = torch.exp(log_ratio.detach())
    low, high = (ratio < 1 - clip[0]) & (by_token < 0), (ratio > 1 + clip[1]) & (by_token > 0)
    clipped = {"low": low, "high": high, "region": low | high}
    sums = {f"clip_ratio/{name}_mean": each.to(ratio.dtype).sum() for name, each in clipped.items()}
    if reference is not None:
        divergence = k3_divergence(logprobs, reference)
        sums["kl"] = divergence.detach().sum()
        losses = losses + options.beta * (segment_sums(divergence, counts) if whole else divergence)
    if options.loss_type == "grpo":
        losses = segment_sums(losses, counts) / counts.clamp(min=1)
    return losses.sum(), sums


def loss_weight(options: GRPOOptions, answers: int, tokens: int, max_new_tokens: int) -> float:
    """What the sum of policy_loss is divided by, of each micro-batch."""
    if options.loss_type in ("dapo", "bnpo"):
        return tokens
    return answers * max_new_tokens if options.loss_type == "dr_grpo" else answers


class GroupPolicy(RolloutStage):
    """Answers to prompts, sampled from the model, scored, and learnt from. Without a reference: no KL
    divergence anywhere (beta 0)."""

    evaluation_names = ("reward", "exact_match", "completions/mean_length", "completions/clipped_ratio")

    def write_texts(self, model: Decoder, prompts: list[list[Prompt]]) -> list[Batch]:
        size = self.options.num_generations
        asked = [[prompt for prompt in each for _ in range(size)] for each in prompts]
        flat = [prompt for each in asked for prompt in each]
        seeds = [seed_of(self.seed, self.draws, each, i % size, size) for i, each in enumerate(flat)]
        completions = self.roll_out(model, flat, seeds)
        parts = self.reward.parts(samples_of(flat, completions)).double()  # (N, K)
        rewards = weighted_sum(parts, self.reward.weights)  # (N,)
        measured = self._measures(completions, rewards, parts)
        batches, begin = [], 0
        for each in asked:
            rows = slice(begin, begin + len(each))
            begin = rows.stop
            batch = self.batch_of(each, completions[rows])
            if self.options.mask_truncated_completions:
                batch = without_labels(batch, [text.finish_reason == "length" for text in completions[rows]])
            batch = self._known(model, batch)
            batch.per_segment |= {name: values[rows] for name, values in measured.items()}
            batches.append(batch)
        if self.options.kl_in_reward:
            divergences = [summed_divergence(batch) for batch in batches]
            rewards = rewards - self.options.beta * torch.cat(divergences)
        advantages = self._advantages(rewards.view(-1, size)).flatten().nan_to_num(0.0).float()
        for batch, values in zip(batches, advantages.split([len(each) for each in asked])):
            batch.per_segment["advantages"] = values
        self.draws += 1  # not before: where the reward fails, the draw has not been
        return batches

    def _measures(self, completions: list[Completion], rewards: Tensor, parts: Tensor) -> dict[str, Tensor]:
        """(N,) fp32 of every answer by metric; what is said of a group is said of each answer in it."""
        size = self.options.num_generations
        deviation = group_deviation(rewards.view(-1, size)).expand(-1, size).reshape(-1)
        measured = {"reward": rewards, "reward_std": deviation, "frac_reward_zero_std": deviation == 0}
        cut_off = [text.finish_reason == "length" for text in completions]
        measured["completions/mean_length"] = torch.tensor([len(text.ids) for text in completions])
        measured["completions/clipped_ratio"] = torch.tensor(cut_off)
        if len(self.reward.names) > 1:
            measured |= {f"rewards/{name}/mean": part for name, part in zip(self.reward.names, parts.T)}
        return {name: values.float() for name, values in measured.items()}

    @torch.no_grad()
    def _known(self, model: Decoder, batch: Batch) -> Batch:
        """What is asked of the policies before the first update: log-probabilities of each label, (L,)."""
        on_device, known = batch.to(self.world.device), {}
        if self.options.num_iterations > 1 or self.options.kl_in_reward:
            with in_eval_mode(model):
                known["old"] = batch_logprobs(model, on_device, self.temperature).cpu()
        if self.reference is not None:
            known["reference"] = self.reference.logprobs(model, on_device, self.temperature).cpu()
        return replace(batch, per_label=known)

    def _advantages(self, rewards: Tensor) -> Tensor:
        """(P, G) fp64 -> (P, G). Every rank has to call."""
        baseline = leave_one_out if self.options.advantage_estimator == "rloo" else mean_baseline
        advantages, scale = baseline(rewards), self.options.scale
        if scale == "none":
            return advantages
        deviation = group_deviation(rewards) if scale == "group" else deviation_of_all(rewards, self.world)
        return advantages / (deviation + SCALE_EPS)

    def weight(self, batch: Batch) -> float:
        tokens = batch.label_rows.shape[0]
        return loss_weight(self.options, len(batch.sources), tokens, self.generation.max_new_tokens)

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        known = batch.per_segment
        logprobs, counts = batch_logprobs(model, batch, self.temperature), batch.label_counts
        old = batch.per_label.get("old", logprobs.detach())
        reference = batch.per_label.get("reference")
        in_loss = None if self.options.kl_in_reward else reference
        total, sums = policy_loss(logprobs, old, known["advantages"], in_loss, counts, self.options)
        if reference is not None and in_loss is None:
            sums["kl"] = k3_divergence(logprobs.detach(), reference).sum()
        measured = {name: values for name, values in known.items() if name not in NO_METRICS}
        return total, {name: of_known(each) for name, each in measured.items()} | summed(sums, len(logprobs))

    def evaluate(self, model: Decoder, prompts: Iterator[list[Prompt]], world: World) -> dict[str, float]:
        """One answer to each prompt, the likeliest tokens: its reward, and whether it is the row's own answer
        (exact_match, of the rows that have one)."""
        asked = [prompt for each in prompts for prompt in each]
        samples = samples_of(asked, self.roll_out(model, asked, [0] * len(asked), do_sample=False))
        columns = [
            [score for score in self.reward.scores(samples).tolist() if not math.isnan(score)],
            [same_answer(each.completion, each.answer) for each in samples if each.answer is not None],
            [len(sample.completion_ids) for sample in samples],
            [sample.finish_reason == "length" for sample in samples],
        ]
        sums = torch.tensor([[sum(column), len(column)] for column in columns], dtype=torch.float64)
        return means_over_ranks(dict(zip(self.evaluation_names, sums.to(world.device))), world)


def of_known(values: Tensor) -> Tensor:
    """(N,) -> (2,): the sum of those that are no NaN, and their number."""
    known = ~values.isnan()
    return torch.stack([values.masked_fill(~known, 0.0).sum(), known.sum().to(values.dtype)])


def without_labels(batch: Batch, left_out: list[bool]) -> Batch:
    """The same batch, on the host, with nothing to learn from these segments."""
    labels, counts, borders = batch.labels.clone(), batch.label_counts.clone(), batch.borders
    for segment, out in enumerate(left_out):
        if out:
            labels[borders[segment] : borders[segment + 1]] = IGNORED
            counts[segment] = 0
    rows = (labels != IGNORED).nonzero()[:, 0]
    return replace(batch, labels=labels, label_rows=rows, per_segment=batch.per_segment | {"labels": counts})


def deviation_of_all(rewards: Tensor, world: World) -> Tensor:
    """Unbiased standard deviation of the rewards (P, G) fp64 of all ranks that are known, () on the host."""
    rewards = rewards[~rewards.isnan()]
    first = torch.tensor([rewards.numel(), rewards.sum().item()], dtype=torch.float64, device=world.device)
    count, total = world.sum(first).tolist()
    squares = ((rewards - total / max(count, 1)) ** 2).sum().to(world.device)
    return (world.sum(squares).cpu() / max(count - 1, 1)).sqrt()


def summed_divergence(batch: Batch) -> Tensor:
    """(N,) fp64: log policy - log reference of each whole answer, as trl's RLOO takes it off the reward."""
    return segment_sums((batch.per_label["old"] - batch.per_label["reference"]).double(), batch.label_counts)
