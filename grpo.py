"""Reinforcement learning without a value function: a group of answers to each prompt is its own baseline.

GRPO        arXiv 2402.03300   advantage = (reward - mean of the group) / standard deviation of the group
Dr. GRPO    arXiv 2503.20783   no division: scale_rewards=none, loss_type=dr_grpo
DAPO        arXiv 2503.14476   mean over tokens, epsilon_high, mask_truncated_completions
RLOO        arXiv 2402.14740   advantage = reward - mean of the others: advantage_estimator=rloo, loss_type=rloo
GSPO        arXiv 2507.18071   one ratio per answer: importance_sampling_level=sequence

Keys are spelled as in trl's GRPOConfig. Per micro-batch, per_device_train_batch_size PROMPTS are answered
num_generations times each (trl counts answers); one update is made of gradient_accumulation_steps micro-batches and
num_iterations updates are made of the same answers. Every mean is over the whole accumulation group and all ranks.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from heads import segment_sums

SCALE_EPS = 1e-4  # trl's: keeps a group of equal rewards at advantage 0


@dataclass(frozen=True)
class GRPOOptions:
    num_generations: Annotated[int, "grpo: answers to each prompt, which are compared with one another"] = 8
    num_iterations: Annotated[int, "grpo: updates made of the same answers"] = 1
    advantage_estimator: Annotated[
        Literal["grpo", "rloo"], "grpo: an answer is compared with the mean of its group, or (rloo) of the others in it"
    ] = "grpo"
    scale_rewards: Annotated[
        Literal["auto", "group", "batch", "none", "true", "false"],
        "grpo: advantages are divided by the standard deviation of their group (true), of all rewards at once, or not "
        "(false); auto = group with advantage_estimator=grpo, none with rloo",
    ] = "auto"
    loss_type: Annotated[
        Literal["dapo", "bnpo", "grpo", "dr_grpo", "rloo"],
        "grpo: mean over all tokens (dapo, bnpo), over answers of their tokens' mean (grpo), over answers of their "
        "tokens' sum / max_new_tokens (dr_grpo), over answers with one ratio each, that of their whole text (rloo)",
    ] = "dapo"
    importance_sampling_level: Annotated[
        Literal["token", "sequence"], "grpo: a ratio for each token, or one for each answer, of mean log-probabilities"
    ] = "token"
    epsilon: Annotated[float, "grpo: ratios below 1 - epsilon get no gradient from a bad answer"] = 0.2
    epsilon_high: Annotated[float | None, "grpo: ratios above 1 + this get none from a good one; default epsilon"] = None
    beta: Annotated[float, "grpo: weight of the KL divergence from the reference; 0 = no reference"] = 0.0
    kl_in_reward: Annotated[bool, "grpo: take the KL divergence off the rewards, not add it to the loss"] = False
    mask_truncated_completions: Annotated[
        bool, "grpo: learn nothing from answers that were cut off at max_new_tokens (they still count in their group)"
    ] = False

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(f"num_generations: {self.num_generations}; a group needs at least 2 answers to compare")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations: {self.num_iterations} must be at least 1")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon: {self.epsilon} is not between 0 and 1")
        if self.epsilon_high is not None and not self.epsilon_high > 0:
            raise ValueError(f"epsilon_high: {self.epsilon_high} must be above 0")
        if not self.beta >= 0:
            raise ValueError(f"beta: {self.beta} must be 0 (no reference) or more")
        if self.kl_in_reward and self.beta == 0:
            raise ValueError("kl_in_reward: true, but beta is 0, so there is no KL; set beta, or drop kl_in_reward")
        if self.loss_type == "rloo" and self.importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level: sequence, but loss_type=rloo has one ratio per answer already, that of the "
                "summed log-probabilities; drop one of the two"
            )

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


def mean_baseline(rewards: Tensor) -> Tensor:
    """rewards (P, G) -> (P, G): the reward less the mean of its group. GRPO, section 4.1.2."""
    return rewards - rewards.mean(1, keepdim=True)


def leave_one_out(rewards: Tensor) -> Tensor:
    """rewards (P, G) -> (P, G): the reward less the mean of the other answers' rewards. RLOO, eq. 9."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def group_deviation(rewards: Tensor) -> Tensor:
    """rewards (P, G) -> (P, 1): unbiased standard deviation of each group."""
    return rewards.std(1, keepdim=True)


def k3_divergence(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) on tokens of the policy: never negative. (L,), (L,) -> (L,)."""
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


def clipped_losses(log_ratio: Tensor, advantages: Tensor, lower: float, upper: float) -> Tensor:
    """-min(r A, clip(r, 1 - lower, 1 + upper) A), r = exp(log_ratio); all (n,). arXiv 1707.06347 eq. 7."""
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - lower, 1 + upper) * advantages)


def spread(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """(N,) numbers of segments -> (total,) of their tokens, without waiting for the device."""
    return torch.repeat_interleave(values, counts, output_size=total)


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, reference: Tensor | None, counts: Tensor, options: GRPOOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `options.loss_type` as a SUM, () in the dtype given, and sums over the tokens for the metrics.

    logprobs (L,) of the policy that learns, old (L,) of the one that wrote the answers, reference (L,) or None (no KL
    in the loss); advantages (N,), counts (N,) tokens of each answer, 0 for one that is left out.
    """
    log_ratio = logprobs - old
    tokens = len(logprobs)
    if options.loss_type == "rloo":
        losses = clipped_losses(segment_sums(log_ratio, counts), advantages, options.epsilon, options.upper)
        losses = losses * (counts > 0)  # an answer that is left out has ratio 1, and would still add its advantage
        log_ratio = spread(segment_sums(log_ratio.detach(), counts), counts, tokens)
        by_token = None
    else:
        if options.importance_sampling_level == "sequence":
            log_ratio = spread(segment_sums(log_ratio, counts) / counts.clamp(min=1), counts, tokens)
        by_token = clipped_losses(log_ratio, spread(advantages, counts, tokens), options.epsilon, options.upper)
    sums = _clip_sums(log_ratio.detach(), spread(advantages, counts, tokens), options)
    if reference is not None:
        divergence = k3_divergence(logprobs, reference)
        sums["kl"] = divergence.detach().sum()
        if by_token is None:
            losses = losses + options.beta * segment_sums(divergence, counts)
        else:
            by_token = by_token + options.beta * divergence
    if by_token is None:
        return losses.sum(), sums
    if options.loss_type == "grpo":
        return (segment_sums(by_token, counts) / counts.clamp(min=1)).sum(), sums
    return by_token.sum(), sums


def _clip_sums(log_ratio: Tensor, advantages: Tensor, options: GRPOOptions) -> dict[str, Tensor]:
    """Tokens whose gradient the clipping takes away, as trl counts them."""
    ratio = torch.exp(log_ratio)
    low = (ratio < 1 - options.epsilon) & (advantages < 0)
    high = (ratio > 1 + options.upper) & (advantages > 0)
    named = {"low": low, "high": high, "region": low | high}
    return {f"clip_ratio/{name}_mean": clipped.to(log_ratio.dtype).sum() for name, clipped in named.items()}


def loss_weight(options: GRPOOptions, answers: int, tokens: int, max_new_tokens: int) -> float:
    """What the sum of policy_loss is divided by, of each micro-batch."""
    if options.loss_type in ("dapo", "bnpo"):
        return tokens
    return answers * max_new_tokens if options.loss_type == "dr_grpo" else answers
