"""Advantages and losses of groups, against trl's own code in float64 and the papers' formulas."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from grpo import (
    GRPOOptions,
    clipped_losses,
    group_deviation,
    k3_divergence,
    leave_one_out,
    loss_weight,
    mean_baseline,
    policy_loss,
)

COUNTS = [3, 1, 0, 7, 4, 5]  # tokens of each answer; the third one is left out, as mask_truncated_completions does
LONGEST = 9  # max_new_tokens


def flat_numbers(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probabilities (20,) whose ratios go far beyond the clipping on both sides, advantages (6,)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(COUNTS)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -draw(tokens).abs() - 0.1
    return {
        "logprobs": (old + 0.5 * draw(tokens)).requires_grad_(),
        "old": old,
        "reference": old + 0.3 * draw(tokens),
        "advantages": draw(len(COUNTS)),
        "counts": torch.tensor(COUNTS),
    }


def padded(values: torch.Tensor) -> torch.Tensor:
    """(20,) -> (6, 7): trl's rectangle, with gradient."""
    rows = torch.nn.utils.rnn.pad_sequence(list(values.split([count for count in COUNTS if count])), batch_first=True)
    missing = COUNTS.index(0)
    return torch.cat([rows[:missing], torch.zeros_like(rows[:1]), rows[missing:]])


class OneProcess:
    num_processes = 1

    def reduce(self, tensor, reduction):
        return tensor

    def gather(self, tensor):
        return tensor


def trl_loss(numbers: dict[str, torch.Tensor], options: GRPOOptions) -> tuple[torch.Tensor, dict]:
    """trl's _compute_loss on the same log-probabilities, and its metrics. trl takes what is left out by mask."""
    mask = torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]
    logprobs = padded(numbers["logprobs"])
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *words, **names: (logprobs, torch.zeros_like(logprobs), None),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=OneProcess(), model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, importance_sampling_level=options.importance_sampling_level,
        beta=options.beta, loss_type=options.loss_type, epsilon_low=options.epsilon, epsilon_high=options.upper,
        max_completion_length=LONGEST, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask.int(),
        "advantages": numbers["advantages"], "old_per_token_logps": padded(numbers["old"]),
        "ref_per_token_logps": padded(numbers["reference"]), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    kind = GRPOTrainer
    if options.loss_type == "rloo":
        kind, inputs["old_logps"] = RLOOTrainer, (inputs["old_per_token_logps"] * mask).sum(1)
    return kind._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def our_loss(numbers: dict[str, torch.Tensor], options: GRPOOptions) -> tuple[torch.Tensor, dict]:
    reference = numbers["reference"] if options.beta else None
    total, sums = policy_loss(
        numbers["logprobs"], numbers["old"], numbers["advantages"], reference, numbers["counts"], options
    )
    return total / loss_weight(options, len(COUNTS), sum(COUNTS), LONGEST), sums


@pytest.mark.parametrize(
    "keys",
    [
        {"loss_type": "dapo"},
        {"loss_type": "dapo", "beta": 0.04, "epsilon": 0.1, "epsilon_high": 0.28},
        {"loss_type": "bnpo", "beta": 0.04},
        {"loss_type": "grpo", "beta": 0.04},
        {"loss_type": "dr_grpo", "epsilon_high": 0.5},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_losses_gradients_and_clip_ratios_are_trls(keys):
    numbers, options = flat_numbers(), GRPOOptions(**keys)
    theirs, their_metrics = trl_loss(numbers, options)
    (their_gradient,) = torch.autograd.grad(theirs, numbers["logprobs"])
    ours, sums = our_loss(numbers, options)
    (our_gradient,) = torch.autograd.grad(ours, numbers["logprobs"])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-12)
    if options.beta:
        assert sums["kl"].item() / sum(COUNTS) == pytest.approx(their_metrics["kl"][0], rel=1e-6)
    if options.importance_sampling_level == "token":  # trl counts answers otherwise, we count tokens throughout
        for name in ("low", "high", "region"):
            name = f"clip_ratio/{name}_mean"
            assert sums[name].item() > 0, "the numbers should reach beyond the clipping"
            assert sums[name].item() / sum(COUNTS) == pytest.approx(their_metrics[name][0])


def test_rloo_loss_is_trls_but_for_answers_that_are_left_out():
    """trl's keeps the advantage of a masked answer in the loss (no gradient comes of it); ours is without it."""
    numbers, options = flat_numbers(), GRPOOptions(loss_type="rloo")
    theirs, _ = trl_loss(numbers, options)
    theirs = theirs + numbers["advantages"][COUNTS.index(0)] / len(COUNTS)
    (their_gradient,) = torch.autograd.grad(theirs, numbers["logprobs"])
    ours, _ = our_loss(numbers, options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, numbers["logprobs"])[0], their_gradient, rtol=1e-12, atol=0)


def test_first_update_of_rloo_is_reinforce():
    """At ratio 1 the gradient of each token's log-probability is minus its answer's advantage."""
    numbers = flat_numbers()
    logprobs = numbers["old"].clone().requires_grad_()
    total, _ = our_loss(numbers | {"logprobs": logprobs}, GRPOOptions(loss_type="rloo"))
    expected = -torch.repeat_interleave(numbers["advantages"], numbers["counts"]) / len(COUNTS)
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], expected)


def test_a_row_without_an_answer_has_loss_zero_with_a_gradient():
    nothing = torch.zeros(0, requires_grad=True)
    for loss_type in ("dapo", "grpo", "dr_grpo", "rloo"):
        options = GRPOOptions(loss_type=loss_type, beta=0.1)
        empty = torch.zeros(0)
        total, _ = policy_loss(nothing, empty, empty, empty, torch.zeros(0, dtype=torch.int64), options)
        assert total.item() == 0 and total.requires_grad


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 6.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0, -2, -1, 3], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(mean_baseline(rewards), centred)
    torch.testing.assert_close(leave_one_out(rewards), centred * 4 / 3)  # reward - mean of the other three
    assert leave_one_out(rewards)[1, 0].item() == pytest.approx(3 - (1 + 2 + 6) / 3)
    deviations = torch.tensor([[(1 / 3) ** 0.5], [(14 / 3) ** 0.5], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_deviation(rewards), deviations)


def test_divergence_and_clipping_by_hand():
    policy, reference = torch.tensor([0.5, 0.2]).double().log(), torch.tensor([0.25, 0.4]).double().log()
    expected = torch.tensor([0.5 + torch.log(torch.tensor(2.0)), 2 - torch.log(torch.tensor(2.0)) - 1]) - torch.tensor(
        [1.0, 0.0]
    )
    torch.testing.assert_close(k3_divergence(policy, reference).float(), expected)
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).double()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]).double()
    losses = clipped_losses(ratios.log(), advantages, 0.2, 0.28)
    torch.testing.assert_close(losses, torch.tensor([-1.28, 1.5, -0.5, 0.8, -2.2]).double())


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"num_generations": 1}, "num_generations: 1"),
        ({"num_iterations": 0}, "num_iterations: 0"),
        ({"epsilon": 1.0}, "epsilon: 1.0"),
        ({"epsilon_high": 0.0}, "epsilon_high: 0.0"),
        ({"beta": -0.1}, "beta: -0.1"),
        ({"kl_in_reward": True}, "set beta"),
        ({"loss_type": "rloo", "importance_sampling_level": "sequence"}, "drop one"),
    ],
)
def test_options_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        GRPOOptions(**keys)
