"""Reinforcement learning without a value function: a group of answers to each prompt is its own baseline.

GRPO        arXiv 2402.03300   advantage = (reward - mean of the group) / standard deviation of the group
Dr. GRPO    arXiv 2503.20783   no division: scale_rewards=none, loss_type=dr_grpo
DAPO        arXiv 2503.14476   mean over tokens, epsilon_high, mask_truncated_completions
RLOO        arXiv 2402.14740   advantage = reward - mean of the others: advantage_estimator=rloo, loss_type=rloo
GSPO        arXiv 2507.18071   one ratio per answer: importance_sampling_level=sequence

Keys are spelled as in trl's GRPOConfig. Per micro-batch, per_device_train_batch_size PROMPTS are answered
num_generations times each (trl counts answers); one update is made of gradient_accumulation_steps
micro-batches and num_iterations updates are made of the same answers. Every mean is over the whole
accumulation group and all ranks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from evaluation.answers import same_answer
from generation.generate import Completion
from generation.sampling import GenerateOptions
from model import Decoder
from options.option import option
from parallel.world import World
from pipeline.batch import IGNORED, ROW_MULTIPLE, Batch
from stages.logprobs import batch_logprobs, label_counts, segment_sums, spread
from stages.reference import Reference
from stages.rewards import RewardSource, samples_of
from stages.rollouts import Prompt, completions_batch, prompts_of, roll_out, seed_of
from stages.stage import Metrics, Stage, clipped_losses

SCALE_EPS = 1e-4  # trl's: keeps a group of equal rewards at advantage 0


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
        "grpo: advantages are divided by the standard deviation of their group (true), of all rewards at "
        "once, or not (false); auto = group with advantage_estimator=grpo, none with rloo",
    )
    loss_type: Literal["dapo", "bnpo", "grpo", "dr_grpo", "rloo"] = option(
        "dapo",
        "grpo: mean over all tokens (dapo, bnpo), over answers of their tokens' mean (grpo), over "
        "answers of their tokens' sum / max_new_tokens (dr_grpo), over answers with one ratio each, that "
        "of their whole text (rloo)",
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "grpo: a ratio for each token, or one for each answer, of mean log-probabilities"
    )
    epsilon: float = option(0.2, "grpo: ratios below 1 - epsilon get no gradient from a bad answer")
    epsilon_high: float | None = option(
        None, "grpo: those above 1 + this none from a good one; default: epsilon"
    )
    beta: float = option(0.0, "grpo: weight of the KL divergence from the reference; 0 = no reference")
    kl_in_reward: bool = option(False, "grpo: take the KL divergence off the rewards, not add it to the loss")
    mask_truncated_completions: bool = option(
        False,
        "grpo: learn nothing from answers that were cut off at max_new_tokens (they still count in their "
        "group)",
    )

    def __post_init__(self):
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations: {self.num_generations}; a group needs at least 2 answers to compare"
            )
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations: {self.num_iterations} must be at least 1")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon: {self.epsilon} is not between 0 and 1")
        if self.epsilon_high is not None and not self.epsilon_high > 0:
            raise ValueError(f"epsilon_high: {self.epsilon_high} must be above 0")
        if not self.beta >= 0:
            raise ValueError(f"beta: {self.beta} must be 0 (no reference) or more")
        if self.kl_in_reward and self.beta == 0:
            raise ValueError(
                "kl_in_reward: true, but beta is 0, so there is no KL; set beta, or drop kl_in_reward"
            )
        if self.loss_type == "rloo" and self.importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level: sequence, but loss_type=rloo has one ratio per answer already, "
                "that of the "
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
    return (
        rewards.std(1, keepdim=True) if len(rewards) else rewards[:, :1]
    )  # a rank without prompts: std would warn


def k3_divergence(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) on tokens of the policy: never negative. (L,), (L,) ->
    (L,)."""
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    reference: Tensor | None,
    counts: Tensor,
    options: GRPOOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `options.loss_type` as a SUM, () in the dtype given, and sums over the tokens for the
    metrics.

    logprobs (L,) of the policy that learns, old (L,) of the one that wrote the answers, reference (L,) or
    None (no KL in the loss); advantages (N,), counts (N,) tokens of each answer, 0 for one that is left out.
    """
    log_ratio = logprobs - old
    tokens = len(logprobs)
    if options.loss_type == "rloo":
        losses = clipped_losses(segment_sums(log_ratio, counts), advantages, options.epsilon, options.upper)
        losses = losses * (
            counts > 0
        )  # an answer that is left out has ratio 1, and would still add its advantage
        log_ratio = spread(segment_sums(log_ratio.detach(), counts), counts, tokens)
        by_token = None
    else:
        if options.importance_sampling_level == "sequence":
            log_ratio = spread(segment_sums(log_ratio, counts) / counts.clamp(min=1), counts, tokens)
        by_token = clipped_losses(
            log_ratio, spread(advantages, counts, tokens), options.epsilon, options.upper
        )
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


# The stage


class GroupPolicy(Stage):
    """Answers to prompts, sampled from the model, scored, and learnt from.

    A draw rolls out what was drawn from the data at once and serves num_iterations updates; between these a
    checkpoint holds the answers with all that is known of them, so that a resumed run goes on with the same
    ones.
    """

    uses_dropout = False  # texts are written, and old log-probabilities taken, without it
    evaluation_names = ("reward", "exact_match", "completions/mean_length", "completions/clipped_ratio")
    drawn_names = (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
    )
    clip_names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")

    def __init__(
        self,
        options: GRPOOptions,
        generation: GenerateOptions,
        reward: RewardSource,
        *,
        tokenizer,
        stop_ids: Iterable[int],
        reference: Reference | None,
        seed: int,
        world: World,
    ):
        """reference: None = no KL divergence anywhere (beta 0)."""
        self.options, self.generation, self.reward = options, generation, reward
        self.tokenizer, self.stop_ids, self.reference = tokenizer, tuple(stop_ids), reference
        self.seed, self.world = seed, world
        if len(reward.names) > 1:
            self.drawn_names = (*self.drawn_names, *(f"rewards/{name}/mean" for name in reward.names))
        kl = () if reference is None else ("kl",)
        self.metric_names = (*self.drawn_names, *self.clip_names, *kl)
        self.draws = 0  # rolled out so far
        self.held: list[Batch] | None = None  # answers of a draw that further updates are made of

    def state(self) -> dict:
        held = None if self.held is None else [batch.plain() for batch in self.held]
        return {"draws": self.draws, "held": held}

    def restore(self, state: dict) -> None:
        self.draws = state["draws"]
        self.held = None if state["held"] is None else [Batch(**values) for values in state["held"]]

    # Drawing

    def groups(self, model: Decoder, drawn: list[Batch], first: int) -> Iterator[list[Batch]]:
        if first == 0:
            self.held = self._draw(model, drawn)
            self.draws += 1
        group = self.held
        for update in range(first, self.options.num_iterations):
            if update == self.options.num_iterations - 1:
                self.held = None  # a checkpoint after the last update of the draw needs no answers
            yield group

    def _draw(self, model: Decoder, drawn: list[Batch]) -> list[Batch]:
        """Each micro-batch of prompts as a micro-batch of answers, on the host."""
        asked = [
            [p for p in prompts_of(batch, self.tokenizer) for _ in range(self.options.num_generations)]
            for batch in drawn
        ]
        prompts = [prompt for each in asked for prompt in each]
        size = self.options.num_generations
        seeds = [
            seed_of(self.seed, self.draws, prompt, number % size, size)
            for number, prompt in enumerate(prompts)
        ]
        completions = self._write(model, prompts, seeds, self.generation)
        parts = self.reward.parts(samples_of(prompts, completions)).double()  # (N, K)
        rewards = parts @ torch.tensor(self.reward.weights, dtype=torch.float64)  # (N,)
        measured = self._measures(completions, rewards, parts)
        batches, begin = [], 0
        for each in asked:
            rows = slice(begin, begin + len(each))
            begin = rows.stop
            batch = completions_batch(each, completions[rows])
            if self.options.mask_truncated_completions:
                batch = without_labels(batch, [c.finish_reason == "length" for c in completions[rows]])
            batch = self._known(model, batch.rounded(ROW_MULTIPLE[self.world.device.type]))
            batch.extras["measured"] = measured[rows]
            batches.append(batch)
        if self.options.kl_in_reward:
            rewards = rewards - self.options.beta * torch.cat(
                [_summed_divergence(batch) for batch in batches]
            )
        advantages = self._advantages(rewards.view(-1, self.options.num_generations)).flatten().float()
        for batch, values in zip(batches, advantages.split([len(each) for each in asked])):
            batch.extras["advantages"] = values
        return batches

    def _write(self, model: Decoder, prompts: list[Prompt], seeds: list[int], options) -> list[Completion]:
        return roll_out(model, prompts, seeds, options, stop_ids=self.stop_ids, tokenizer=self.tokenizer)

    def _measures(self, completions: list[Completion], rewards: Tensor, parts: Tensor) -> Tensor:
        """(N, M) fp32: drawn_names of every answer; what is said of a group is said of each answer in it."""
        size = self.options.num_generations
        deviation = group_deviation(rewards.view(-1, size)).expand(-1, size).reshape(-1)
        columns = [
            rewards,
            deviation,
            (deviation == 0).double(),
            torch.tensor([len(completion.ids) for completion in completions], dtype=torch.float64),
            torch.tensor(
                [completion.finish_reason == "length" for completion in completions], dtype=torch.float64
            ),
        ]
        if parts.shape[1] > 1:
            columns += parts.unbind(1)
        return torch.stack(columns, 1).float()

    @torch.no_grad()
    def _known(self, model: Decoder, batch: Batch) -> Batch:
        """What is asked of the policies before the first update: log-probabilities of each label, (L,)."""
        batch = replace(batch, extras={})
        on_device, was_training = batch.to(self.world.device), model.training
        if self.options.num_iterations > 1 or self.options.kl_in_reward:
            model.eval()
            batch.extras["old"] = batch_logprobs(model, on_device, self.temperature).cpu()
            model.train(was_training)
        if self.reference is not None:
            batch.extras["reference"] = self.reference.logprobs(model, on_device, self.temperature).cpu()
        return batch

    @property
    def temperature(self) -> float:
        """Of the policy that writes, and so of the one that learns."""
        return self.generation.temperature

    def _advantages(self, rewards: Tensor) -> Tensor:
        """(P, G) fp64 -> (P, G). Every rank has to call."""
        baseline = leave_one_out if self.options.advantage_estimator == "rloo" else mean_baseline
        advantages = baseline(rewards)
        if self.options.scale == "group":
            advantages = advantages / (group_deviation(rewards) + SCALE_EPS)
        if self.options.scale == "batch":
            advantages = advantages / (deviation_over_ranks(rewards, self.world) + SCALE_EPS)
        return advantages

    # Learning

    def weight(self, batch: Batch) -> float:
        tokens = batch.label_rows.shape[0]
        return loss_weight(self.options, len(batch.sources), tokens, self.generation.max_new_tokens)

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        logprobs, counts = batch_logprobs(model, batch, self.temperature), label_counts(batch)
        old = batch.extras.get("old", logprobs.detach())
        reference = batch.extras.get("reference")
        in_loss = None if self.options.kl_in_reward else reference
        total, sums = policy_loss(logprobs, old, batch.extras["advantages"], in_loss, counts, self.options)
        if reference is not None and in_loss is None:
            sums["kl"] = k3_divergence(logprobs.detach(), reference).sum()
        tokens = torch.full((), float(len(logprobs)), device=total.device)
        metrics = {name: torch.stack([value, tokens]) for name, value in sums.items()}
        measured = batch.extras["measured"]
        answers = torch.full((), float(len(measured)), device=total.device)
        metrics |= {
            name: torch.stack([column.sum(), answers])
            for name, column in zip(self.drawn_names, measured.unbind(1))
        }
        return total, metrics

    def evaluate(self, model: Decoder, batches: Iterator[Batch], world: World) -> dict[str, float]:
        """One answer to each prompt, the likeliest tokens: its reward, and whether it is the row's own
        answer.

        exact_match counts rows that have an answer; it is 0 where none has.
        """
        prompts = [prompt for batch in batches for prompt in prompts_of(batch, self.tokenizer)]
        greedy = replace(self.generation, do_sample=False)
        completions = self._write(model, prompts, [0] * len(prompts), greedy)
        samples = samples_of(prompts, completions)
        columns = [
            self.reward.scores(samples).tolist(),
            [
                same_answer(sample.completion, sample.answer)
                for sample in samples
                if sample.answer is not None
            ],
            [len(sample.completion_ids) for sample in samples],
            [sample.finish_reason == "length" for sample in samples],
        ]
        sums = torch.tensor([[sum(column), len(column)] for column in columns], dtype=torch.float64)
        means = [total / max(count, 1) for total, count in world.sum(sums.to(world.device)).tolist()]
        return dict(zip(self.evaluation_names, means))


def without_labels(batch: Batch, left_out: list[bool]) -> Batch:
    """The same batch (before it is rounded), on the host, with nothing to learn from these segments."""
    labels = batch.labels.clone()
    for out, start, stop in zip(left_out, batch.borders, batch.borders[1:]):
        if out:
            labels[start:stop] = IGNORED
    return replace(batch, labels=labels, label_rows=(labels != IGNORED).nonzero()[:, 0])


def deviation_over_ranks(rewards: Tensor, world: World) -> Tensor:
    """Unbiased standard deviation of the rewards (P, G) fp64 of all ranks, () on the host."""
    first = torch.tensor([rewards.numel(), rewards.sum().item()], dtype=torch.float64, device=world.device)
    count, total = world.sum(first).tolist()
    squares = ((rewards - total / max(count, 1)) ** 2).sum().to(world.device)
    return (world.sum(squares).cpu() / max(count - 1, 1)).sqrt()


def _summed_divergence(batch: Batch) -> Tensor:
    """(N,) fp64: log policy - log reference of each whole answer, as trl's RLOO takes it off the reward."""
    return segment_sums((batch.extras["old"] - batch.extras["reference"]).double(), label_counts(batch))
