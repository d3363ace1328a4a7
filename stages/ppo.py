"""PPO with a value head on the policy's trunk: the algorithm of trl 0.7.11 / 0.8, which LLaMA-Factory runs.

A draw: roll out on the prompts, score the texts, and with kl_t = log pi(t) - log ref(t) of a text's token t:
    reward_t = -kl_coef kl_t, at the last token + score
    advantages = GAE (arXiv 1506.02438), V = 0 behind the text; then whitened over the draw and all ranks
    returns = advantages before whitening + values
Updates on it (arXiv 1707.06347 eq. 7), each a mean over the tokens of its group, with rho = pi / old pi:
    max(-A rho, -A clip(rho, 1 -+ cliprange))
        + vf_coef 1/2 max((V - R)^2, (clip(V, old V -+ cliprange_value) - R)^2)
kl_coef is steered so that a text's sum of kl_t nears ppo_target (arXiv 1909.08593 section 2.2).

One update takes gradient_accumulation_steps x per_device_train_batch_size texts (x ranks). One draw takes
ppo_buffer_size times as many, and ppo_epochs x ppo_buffer_size updates are made of it; max_steps, save_steps
and logging_steps count updates. Departures from trl: all statistics are of the whole draw on all ranks (trl:
one process); a text whose mean rho is above ratio_threshold is left out (trl: the minibatch that it is in;
the same with minibatches of 1); the parts of a draw keep their order in every epoch; pi and ref are of the
temperature that the texts are sampled at (trl 0.7.11: of 1; its later versions as here).

Replay: with ppo_save_draws=true the run keeps output_dir/draws/draw-<n>-rank-<r>.pt, all that the updates of
a draw are made of (tokens, log-probabilities, values, KL a token, advantages, ...). ppo_replay=<file>, beside
the settings of the run (or a checkpoint from before that draw), makes exactly these updates again, whatever
texts would be rolled out now.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.safetensors_files import read_plain
from model import Decoder
from options.errors import StopRun, UserError, refuse, require
from options.option import RESUMABLE, option
from parallel.world import World
from pipeline.batch import Batch
from stages.logprobs import batch_logprobs, in_eval_mode, label_logprobs, label_states, segment_sums, spread
from stages.metrics import Metrics, means_over_ranks, summed
from stages.rewards import samples_of
from stages.rollouts import Prompt, clipped_losses, seed_of
from stages.stage import RolloutStage

EVALUATION = 0  # number of the draw whose seeds evaluations use; training counts from 1


@dataclass(frozen=True)
class PPOOptions:
    STAGES = "ppo"

    ppo_buffer_size: int = option(1, "ppo: texts rolled out at once, in groups of one update")
    ppo_epochs: int = option(4, "ppo: how often each text is trained on")
    ppo_target: float = option(6.0, "ppo: sum of a text's KL in nats that the adaptive coefficient steers to")
    ppo_score_norm: bool = option(False, "ppo: rewards minus their running mean, by their running deviation")
    ppo_whiten_rewards: bool = option(False, "ppo: rewards a token, with the KL, divided by their deviation")
    init_kl_coef: float = option(0.2, "ppo: what a nat of KL costs, at the start")
    adap_kl_ctrl: bool = option(True, "ppo: steer the KL coefficient to ppo_target; false = it stays")
    horizon: float = option(10000.0, "ppo: texts over which the KL coefficient adapts")
    gamma: float = option(1.0, "ppo: discount a token")
    lam: float = option(0.95, "ppo: lambda of the generalised advantage estimate")
    cliprange: float = option(0.2, "ppo: how far a token's probability ratio may count away from 1")
    cliprange_value: float = option(0.2, "ppo: how far a value may count away from that at the rollout")
    vf_coef: float = option(0.1, "ppo: weight of the value loss")
    ratio_threshold: float = option(10.0, "ppo: a text whose mean probability ratio is above it is left out")
    ppo_value_warmup: int = option(0, "ppo: draws at the start that train the value head alone")
    ppo_save_draws: bool = option(False, "ppo: keep each draw in output_dir/draws, for ppo_replay", RESUMABLE)
    ppo_replay: str | None = option(None, "ppo: a file of output_dir/draws as the first draw", RESUMABLE)

    def __post_init__(self):
        require(self, "ppo_buffer_size ppo_epochs", lambda value: value >= 1, "must be at least 1")
        above_zero = "ppo_target horizon cliprange cliprange_value ratio_threshold"
        require(self, above_zero, lambda value: value > 0, "must be above 0")
        not_below = "init_kl_coef vf_coef ppo_value_warmup"
        require(self, not_below, lambda value: value >= 0, "must not be negative")
        require(self, "gamma lam", lambda value: 0 <= value <= 1, "is not between 0 and 1")

    @property
    def groups_per_rollout(self) -> int:
        return self.ppo_buffer_size

    @property
    def updates_per_rollout(self) -> int:
        return self.ppo_epochs * self.ppo_buffer_size


# Formulas


def token_rewards(kl: Tensor, score: float, kl_coef: float) -> Tensor:
    """kl (n,) of one text's tokens -> (n,): -kl_coef kl, and the text's score at the last."""
    rewards = -kl_coef * kl
    rewards[-1] += score
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """(n,), (n,) of one text's tokens -> (n,) advantages in float64, not whitened. arXiv 1506.02438 eq. 16.

    A_t = delta_t + gamma lam A_(t+1),  delta_t = r_t + gamma V_(t+1) - V_t,  0 behind the end.
    """
    advantages, advantage, value_after = [], 0.0, 0.0
    for reward, value in zip(rewards.flip(0).tolist(), values.flip(0).tolist()):
        advantage = reward + gamma * value_after - value + gamma * lam * advantage
        advantages.append(advantage)
        value_after = value
    return torch.tensor(advantages[::-1], dtype=torch.float64)


def mean_and_variance(values: Tensor, world: World) -> tuple[float, float, int]:
    """Of the values (n,) of all ranks: mean, unbiased variance (0 of less than two), how many."""

    def over_ranks(*numbers: float) -> list[float]:
        # on the device: a GPU's group reduces what is on GPUs
        return world.sum(torch.tensor(numbers, dtype=torch.float64).to(world.device)).tolist()

    values = values.double()
    total, count = over_ranks(values.sum().item(), len(values))
    mean = total / max(count, 1)
    (squares,) = over_ranks((values - mean).square().sum().item())
    return mean, squares / max(count - 1, 1), int(count)


def whiten(values: Tensor, mean: float, variance: float, keep_mean: bool = False) -> Tensor:
    """(n,) -> (n,) of variance 1 and mean 0, or their own mean. trl's masked_whiten."""
    whitened = (values - mean) / math.sqrt(variance + 1e-8)
    return whitened + mean if keep_mean else whitened


def value_loss(values: Tensor, old: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """1/2 max((V - R)^2, (V clipped around old V - R)^2), all (L,)."""
    clipped = torch.clamp(values, old - cliprange, old + cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


@dataclass
class KLController:
    """What a nat of KL costs. arXiv 1909.08593 section 2.2."""

    value: float
    target: float
    horizon: float

    def update(self, kl: float, texts: int) -> None:
        """After a draw of so many texts with this mean sum of KL a text."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * texts / self.horizon


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far: trl's RunningMoments, by Chan's parallel formula."""

    mean: float = 0.0
    variance: float = 1.0  # biased
    count: float = 1e-24

    def update(self, mean: float, variance: float, count: int) -> None:
        """Of a draw; variance: unbiased."""
        if count == 0:
            return
        total, delta = self.count + count, mean - self.mean
        squares = variance * (count - 1) + self.variance * self.count + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.variance, self.count = squares / total, total

    @property
    def deviation(self) -> float:
        """Unbiased; 1 of fewer than two scores."""
        return math.sqrt(self.variance * self.count / (self.count - 1)) if self.count > 1.5 else 1.0


class PPO(RolloutStage):
    evaluation_names = ("reward", "kl", "completions/mean_length", "completions/clipped_ratio")
    has_value_head = True

    def __init__(self, options: PPOOptions, *parts, group_size: int, output_dir: Path, **shared):
        """parts, shared: as RolloutStage has them; the reference is needed."""
        super().__init__(options, *parts, **shared)
        self.group_size, self.output_dir, self.replay = group_size, output_dir, options.ppo_replay
        self.controller = KLController(options.init_kl_coef, options.ppo_target, options.horizon)
        self.moments = RunningMoments()
        self.kl_coef = options.init_kl_coef  # that the drawn texts were rewarded with
        missing = self.replay is not None and not Path(self.replay).is_file()
        refuse(missing, f"ppo_replay: {self.replay}: file not found; ppo_save_draws=true writes such files")

    def weight(self, batch: Batch) -> int:
        return batch.label_rows.shape[0]

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the tokens of the texts."""
        options, known, counts = self.options, batch.per_label, batch.label_counts
        hidden, labels = label_states(model, batch)  # (L, E), (L,)
        warming = self.draws <= options.ppo_value_warmup
        values = model.v_head(hidden.detach() if warming else hidden)
        log_ratio = label_logprobs(model, hidden / self.temperature, labels) - known["logprobs"]
        with torch.no_grad():
            kept = segment_sums(log_ratio.exp(), counts) <= options.ratio_threshold * counts  # (N,), no NaN
            kept_tokens = spread(kept, counts, len(labels))
        # before exp: the gradient of an infinite ratio times 0 would be NaN
        log_ratio = torch.where(kept_tokens, log_ratio, 0.0)
        policy = clipped_losses(log_ratio, known["advantages"], options.cliprange, options.cliprange)
        policy = policy * kept_tokens
        value = value_loss(values, known["values"], known["returns"], options.cliprange_value) * kept_tokens
        loss = options.vf_coef * value.sum() + policy.sum() * (0.0 if warming else 1.0)
        with torch.no_grad():
            by_token = {"policy_loss": policy, "value_loss": value, "values": values}
            by_token["returns"] = known["returns"]
            by_token["clip_ratio"] = (log_ratio.exp() - 1).abs() > options.cliprange
            by_token["value_clip_ratio"] = (values - known["values"]).abs() > options.cliprange_value
            by_token["approx_kl"] = 0.5 * log_ratio.square()
            of_texts = {"reward": known["score"], "kl": known["kl"]}
            of_texts["kl_coef"] = torch.full_like(loss, self.kl_coef * len(counts))
            of_texts["completions/mean_length"] = torch.full_like(loss, len(labels))
            of_texts["completions/clipped_ratio"] = known["cut"]
            metrics = summed(of_texts, len(counts)) | summed(by_token, len(labels))
            return loss, metrics | summed({"skipped": ~kept}, len(counts))

    def state(self) -> dict:
        moments = (self.moments.mean, self.moments.variance, self.moments.count)
        own = {"kl_coef": self.kl_coef, "controller": self.controller.value, "moments": moments}
        return super().state() | own

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.kl_coef, self.controller.value = state["kl_coef"], state["controller"]
        self.moments = RunningMoments(*state["moments"])

    def evaluate(self, model: Decoder, prompts: Iterator[list[Prompt]], world: World) -> dict[str, float]:
        """On held-out prompts, with the same seeds each time: means of reward, KL a text, tokens, cut off."""
        prompts = list(prompts)
        completions, scores = self._texts(model, prompts, EVALUATION)
        kl = torch.zeros((), dtype=torch.float64)
        for each in zip(prompts, completions):
            batch = self.batch_of(*each).to(world.device)
            reference = self.reference.logprobs(model, batch, self.temperature)
            kl += (batch_logprobs(model, batch, self.temperature) - reference).double().sum().cpu()
        texts = [text for each in completions for text in each]
        lengths = torch.tensor([len(text.ids) for text in texts]).double()
        cut = torch.tensor([text.finish_reason == "length" for text in texts]).double()
        columns = (scores.double(), kl, lengths, cut)
        sums = summed(dict(zip(self.evaluation_names, columns)), len(texts))
        return means_over_ranks({name: pair.to(world.device) for name, pair in sums.items()}, world)

    @torch.no_grad()
    def write_texts(self, model: Decoder, prompts: list[list[Prompt]]) -> list[Batch]:
        """Roll out, score, and note for every token what the updates need."""
        number = self.draws + 1
        if self.replay is not None:
            mine = self.replay
            if self.world.size > 1:  # each rank has a file of its own
                mine = re.sub(r"rank-\d+(?=\.pt$)", f"rank-{self.world.rank}", mine)
            self._take_over(Path(mine))
            self.replay, self.draws = None, number
            return self.drawn
        self.kl_coef = self.controller.value
        completions, scores = self._texts(model, prompts, number)
        self.draws = number  # not before: where the reward fails, the draw has not been
        batches = [self.batch_of(*each) for each in zip(prompts, completions)]
        with in_eval_mode(model):
            noted = [self._note(model, batch.to(self.world.device)) for batch in batches]
        texts = [text for each in completions for text in each]
        counts, cut = [len(text.ids) for text in texts], [text.finish_reason == "length" for text in texts]
        flat = {name: torch.cat([each[name] for each in noted]) for name in noted[0]}
        flat |= self._taught(flat, counts, scores)
        flat |= {"cut": _at_the_ends(torch.tensor(cut), counts), "score": _at_the_ends(scores, counts)}
        parts = zip(*(values.split([len(batch.label_rows) for batch in batches]) for values in flat.values()))
        self.drawn = [replace(batch, per_label=dict(zip(flat, part))) for batch, part in zip(batches, parts)]
        if self.options.ppo_save_draws:
            self._keep_draw(self.output_dir / "draws" / f"draw-{self.draws}-rank-{self.world.rank}.pt")
        return self.drawn

    def _keep_draw(self, path: Path) -> None:
        """Raises StopRun, on all ranks where one cannot write its file."""
        failure = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.state(), path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            path.unlink(missing_ok=True)
            failure = error
        if self.world.any(failure is not None):
            why = str(failure or "another rank's file").splitlines()[0]
            text = f"ppo_save_draws: {path} could not be written ({why})"
            raise StopRun(f"{text}; make room and run the same command to continue") from failure

    def _take_over(self, path: Path) -> None:
        """The draw in this file, in place of one of our own."""
        remedy = "name a file of output_dir/draws, which ppo_save_draws=true writes"
        try:
            state = read_plain(path)
        except UserError as error:
            raise UserError(f"ppo_replay: {path}: {error}; {remedy}") from error
        if not isinstance(state, dict) or not isinstance(state.get("drawn"), list):
            raise UserError(f"ppo_replay: {path} holds no draw of this version; {remedy}")
        self.restore(state)

    def _texts(self, model: Decoder, prompts: list[list[Prompt]], draw: int) -> tuple[list, Tensor]:
        """The Completions to each micro-batch's prompts, and the score of each text in that order."""
        flat = [prompt for each in prompts for prompt in each]
        seeds = [seed_of(self.seed, draw, prompt) for prompt in flat]
        texts = self.roll_out(model, flat, seeds)
        scores, remaining = self.reward.scores(samples_of(flat, texts)).nan_to_num(0.0), iter(texts)
        return [[next(remaining) for _ in each] for each in prompts], scores

    def _note(self, model: Decoder, batch: Batch) -> dict[str, Tensor]:
        """(L,) fp32 on the CPU of the texts' tokens: log-probabilities, values, log(policy / reference)."""
        hidden, labels = label_states(model, batch)
        logprobs = label_logprobs(model, hidden / self.temperature, labels)
        kl = logprobs - self.reference.logprobs(model, batch, self.temperature)
        return {"logprobs": logprobs.cpu(), "values": model.v_head(hidden).cpu(), "kl": kl.cpu()}

    def _taught(self, noted: dict[str, Tensor], counts: list[int], scores: Tensor) -> dict[str, Tensor]:
        """Advantages and returns (n,) fp32 of all tokens, by statistics of all texts of all ranks.

        noted: (n,) as of _note; counts: tokens of each text; scores: of each text, as the reward gave them.
        """
        options, values, kl = self.options, noted["values"].split(counts), noted["kl"].double().split(counts)
        scores = self._normalised(scores).tolist()
        rewards = _joined([token_rewards(each, score, self.kl_coef) for each, score in zip(kl, scores)])
        if options.ppo_whiten_rewards:
            mean, variance, _ = mean_and_variance(rewards, self.world)
            rewards = whiten(rewards, mean, variance, keep_mean=True)
        raw = _joined([gae(*text, options.gamma, options.lam) for text in zip(rewards.split(counts), values)])
        mean, variance, _ = mean_and_variance(raw, self.world)
        mean_kl, _, texts = mean_and_variance(_joined([each.sum()[None] for each in kl]), self.world)
        if options.adap_kl_ctrl:  # what comes of it counts from the next draw on
            self.controller.update(mean_kl, texts)
        returns = (raw + noted["values"]).float()
        return {"returns": returns, "advantages": whiten(raw, mean, variance).float()}

    def _normalised(self, scores: Tensor) -> Tensor:
        """Scores as they enter the rewards, float64."""
        scores = scores.double()
        if not self.options.ppo_score_norm:
            return scores
        self.moments.update(*mean_and_variance(scores, self.world))
        return (scores - self.moments.mean) / (self.moments.deviation + torch.finfo(torch.float32).eps)


def _joined(parts: list[Tensor]) -> Tensor:
    """float64; a rank may have no text."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])


def _at_the_ends(numbers: Tensor, counts: list[int]) -> Tensor:
    """numbers (N,) of texts -> (n,) fp32 of their tokens: zeros, but for the last token of each text."""
    values, ends = torch.zeros(sum(counts)), torch.tensor(counts, dtype=torch.int64).cumsum(0)
    values[ends - 1] = numbers.float()
    return values
