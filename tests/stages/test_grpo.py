"""Advantages and losses of groups, against trl's own code in float64 and the papers' formulas."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_weights, tiny_runs
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import nanstd

from checkpoints.huggingface import load_model
from checkpoints.trainable import prepare_trainable
from generation.generate import Completion
from generation.sampling import GenerateOptions
from lora import LoraOptions, lora_off
from parallel.world import World
from pipeline.batch import Example, collate
from stages.grpo import (
    GroupPolicy,
    GRPOOptions,
    deviation_of_all,
    group_deviation,
    k3_divergence,
    leave_one_out,
    loss_weight,
    mean_baseline,
    policy_loss,
)
from stages.logprobs import batch_logprobs
from stages.reference import Reference
from stages.rewards import RewardSource
from stages.rollouts import clipped_losses, prompts_of
from text.tokenizer import Tokenizer
from training.instruments import MetricWindow

ALONE = World(0, 1, 0, torch.device("cpu"))
COUNTS = [
    3,
    1,
    0,
    7,
    4,
    5,
]  # tokens of each answer; the third one is left out, as mask_truncated_completions does
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
    rows = torch.nn.utils.rnn.pad_sequence(
        list(values.split([count for count in COUNTS if count])), batch_first=True
    )
    missing = COUNTS.index(0)
    return torch.cat([rows[:missing], torch.zeros_like(rows[:1]), rows[missing:]])


class OneProcess:
    num_processes = 1

    def reduce(self, tensor, reduction):
        return tensor

    def gather(self, tensor):
        return tensor


def trl_loss(numbers: dict[str, torch.Tensor], options: GRPOOptions) -> tuple[torch.Tensor, dict]:
    """trl's _compute_loss on the same log-probabilities, and its metrics. trl takes what is left out by
    mask."""
    mask = torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]
    logprobs = padded(numbers["logprobs"])
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *words, **names: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        ),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        importance_sampling_level=options.importance_sampling_level,
        beta=options.beta,
        loss_type=options.loss_type,
        epsilon_low=options.epsilon,
        epsilon_high=options.upper,
        max_completion_length=LONGEST,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask.int(),
        "advantages": numbers["advantages"],
        "old_per_token_logps": padded(numbers["old"]),
        "ref_per_token_logps": padded(numbers["reference"]),
        "num_items_in_batch": mask.sum(),
    }
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
    if (
        options.importance_sampling_level == "token"
    ):  # trl counts answers otherwise, we count tokens throughout
        for name in ("low", "high", "region"):
            name = f"clip_ratio/{name}_mean"
            assert sums[name].item() > 0, "the numbers should reach beyond the clipping"
            assert sums[name].item() / sum(COUNTS) == pytest.approx(their_metrics[name][0])


def test_rloo_loss_is_trls_but_for_answers_that_are_left_out():
    """trl's keeps the advantage of a masked answer in the loss (no gradient comes of it); ours is without
    it."""
    numbers, options = flat_numbers(), GRPOOptions(loss_type="rloo")
    theirs, _ = trl_loss(numbers, options)
    theirs = theirs + numbers["advantages"][COUNTS.index(0)] / len(COUNTS)
    (their_gradient,) = torch.autograd.grad(theirs, numbers["logprobs"])
    ours, _ = our_loss(numbers, options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, numbers["logprobs"])[0], their_gradient, rtol=1e-12, atol=0
    )


def test_first_update_of_rloo_is_reinforce():
    """At ratio 1 the gradient of each token's log-probability is minus its answer's advantage."""
    numbers = flat_numbers()
    logprobs = numbers["old"].clone().requires_grad_()
    total, _ = our_loss(numbers | {"logprobs": logprobs}, GRPOOptions(loss_type="rloo"))
    expected = -torch.repeat_interleave(numbers["advantages"], numbers["counts"]) / len(COUNTS)
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], expected)


def test_rloo_adds_the_divergence_of_whole_answers():
    numbers = flat_numbers()
    (plain, _), (held, sums) = (
        our_loss(numbers, GRPOOptions(loss_type="rloo", beta=beta)) for beta in (0.0, 0.3)
    )
    difference = (numbers["reference"] - numbers["logprobs"]).detach().numpy()
    divergence = (np.exp(difference) - difference - 1).sum()
    assert (held - plain).item() == pytest.approx(0.3 * divergence / len(COUNTS), rel=1e-12)
    assert sums["kl"].item() == pytest.approx(divergence, rel=1e-12)


def test_a_row_without_an_answer_has_loss_zero_with_a_gradient():
    nothing = torch.zeros(0, requires_grad=True)
    for loss_type in ("dapo", "grpo", "dr_grpo", "rloo"):
        options = GRPOOptions(loss_type=loss_type, beta=0.1)
        empty = torch.zeros(0)
        total, _ = policy_loss(nothing, empty, empty, empty, torch.zeros(0, dtype=torch.int64), options)
        assert total.item() == 0 and total.requires_grad


def test_advantages_by_hand():
    rewards = torch.tensor(
        [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 6.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64
    )
    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0, -2, -1, 3], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(mean_baseline(rewards), centred)
    torch.testing.assert_close(leave_one_out(rewards), centred * 4 / 3)  # reward - mean of the other three
    assert leave_one_out(rewards)[1, 0].item() == pytest.approx(3 - (1 + 2 + 6) / 3)
    deviations = torch.tensor([[(1 / 3) ** 0.5], [(14 / 3) ** 0.5], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_deviation(rewards), deviations)


NONE = math.nan  # no function had anything to say of the answer


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_answer_without_a_reward_is_not_in_its_group_and_teaches_nothing(tiny, scale):
    """trl's formulas: nanmean, and its nanstd, over the answers that have a reward; advantage 0 elsewhere."""
    rewards = torch.tensor([[1.0, NONE, 0.0, 4.0], [NONE] * 4, [NONE, 2.0, NONE, NONE]]).double()
    stage, *_ = written_stage(tiny, scale_rewards=scale)
    found = stage._advantages(rewards).nan_to_num(0.0)
    expected = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "group":
        expected = expected / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        expected = expected / (nanstd(rewards) + 1e-4)
    torch.testing.assert_close(found, expected.nan_to_num(0.0))
    assert found[0, 0] != 0 and found[0, 1] == 0 and not found[1:].any()
    assert group_deviation(rewards)[1:].tolist() == [[0.0], [0.0]]
    # 1 - 2, 0 - 2.5, 4 - 0.5
    assert leave_one_out(rewards)[0].nan_to_num(0.0).tolist() == [-1.0, 0.0, -2.5, 3.5]


def test_means_are_of_the_answers_that_a_function_speaks_of(tiny):
    class Sometimes(RewardSource):
        names, weights, may_abstain = ("short", "all"), (1.0, 2.0), True

        def measure(self, samples):
            lengths = [len(sample.completion_ids) for sample in samples]
            rows = [[1.0 if n < 3 else NONE, n if n != 6 else NONE] for n in lengths]
            return torch.tensor(rows, dtype=torch.float32)

    stage, model, drawn = written_stage(tiny)  # texts of 1 4 7 2 2 2, then 6 3 5 tokens
    stage.reward = Sometimes()
    group = next(stage.groups(model, drawn, 0))
    sums = [stage.loss(model.eval(), batch)[1] for batch in group]

    def mean(name):
        total, number = sum(each[name] for each in sums).tolist()
        return total / number, number

    assert mean("rewards/short/mean") == (1.0, 4)
    assert mean("rewards/all/mean") == (pytest.approx(26 / 8), 8)
    assert mean("reward") == (pytest.approx((4 + 2 * 26) / 8), 8)  # the text of 6 tokens has none
    advantages = group[1].per_segment["advantages"]
    assert advantages[0] == 0 and advantages[1] == -advantages[2] != 0
    assert stage.evaluate(model, iter(drawn), ALONE)["reward"] == pytest.approx((3 + 8 + 14) / 3)


def test_what_nobody_said_anything_of_has_no_mean(tiny):
    """A column of NaN is trl's; a mean of 0 would be a reward."""

    class Silent(RewardSource):
        names, weights, may_abstain = ("never", "always"), (1.0, 1.0), True

        def measure(self, samples):
            return torch.tensor([[NONE, 1.0]] * len(samples))

    class Mute(Silent):
        def measure(self, samples):
            return torch.tensor([[NONE, NONE]] * len(samples))

    stage, model, drawn = written_stage(tiny)
    for reward, known in ((Silent(), {"rewards/always/mean", "reward"}), (Mute(), set())):
        stage.reward, window = reward, MetricWindow(ALONE)
        group = next(stage.groups(model, drawn, 0))
        window.add(torch.zeros(()), group, [stage.loss(model.eval(), batch)[1] for batch in group])
        means = window.totals().metrics
        assert {name for name in means if name == "reward" or name.startswith("rewards/")} == known
        evaluated = stage.evaluate(model, iter(drawn), ALONE)
        assert ("reward" in evaluated) == bool(known) and "completions/mean_length" in evaluated


def test_an_evaluation_without_a_reward_is_no_gain(tiny):
    (tiny.folder / "mute.py").write_text("def mute(completions, **others): return [None] * len(completions)")
    keys = tiny.keys | {"reward_file": tiny.folder / "mute.py", "val_size": 2, "evaluation_strategy": "steps"}
    keys |= {"early_stopping_steps": 2, "max_steps": 5, "eval_steps": 1, "save_strategy": "steps"}
    assert tiny.train("mute", **keys, metric_for_best_model="reward", save_steps=1) == 0
    assert "reward" not in tiny.log("mute")[0] and len(tiny.losses("mute")) == 2


@pytest.mark.parametrize("estimator, factor", [("grpo", 1.0), ("rloo", 4 / 3)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_divided_by_a_deviation_and_trls_ten_thousandth(scale, estimator, factor):
    """The second group deviates by half of that."""
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5001, 0.5, 0.5]])
    deviations = {
        "group": rewards.std(1, ddof=1, keepdims=True) + 1e-4,
        "batch": rewards.std(ddof=1) + 1e-4,
        "none": 1,
    }
    expected = factor * (rewards - rewards.mean(1, keepdims=True)) / deviations[scale]
    options = GRPOOptions(advantage_estimator=estimator, scale_rewards=scale)
    found = GroupPolicy._advantages(SimpleNamespace(options=options, world=ALONE), torch.tensor(rewards))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_divergence_and_clipping_by_hand():
    policy, reference = torch.tensor([0.5, 0.2]).double().log(), torch.tensor([0.25, 0.4]).double().log()
    expected = torch.tensor([0.5 + math.log(2) - 1, 2 - math.log(2) - 1]).double()
    torch.testing.assert_close(k3_divergence(policy, reference), expected, rtol=0, atol=1e-7)
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


# The stage, on a tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    with tiny_runs(folder) as made:
        rows = [{"instruction": f"{a} + {b} =", "output": str(a + b)} for a in (3, 11) for b in range(4)]
        (folder / "sums.json").write_text(json.dumps(rows))
        (folder / "letters.py").write_text(
            "def low(completion_ids, completions):\n"
            "    return [sum(token < 300 for token in ids) / len(ids) for ids in completion_ids]\n\n\n"
            "def vowels(completions):\n    return [float(text.count('e')) for text in completions]\n"
        )
        made.keys = {
            "stage": "grpo",
            "dataset": folder / "sums.json",
            "reward_file": folder / "letters.py",
            "top_p": 1,
            "top_k": 0,
            "temperature": 1,
            "max_new_tokens": 7,
            "num_generations": 4,
            "lora_rank": 4,
        }
        yield made


class ByLength(RewardSource):
    def measure(self, samples):
        return torch.tensor([[len(sample.completion_ids) ** 0.5] for sample in samples])


class Written(GroupPolicy):
    """Its answers are random tokens of given lengths; it keeps how they would have been sampled."""

    def roll_out(self, model, prompts, seeds, **changes):
        self.seeds = [*getattr(self, "seeds", []), *seeds]
        self.sampled = replace(self.generation, **changes)
        generator = torch.Generator().manual_seed(7)
        lengths = [1, 4, 7, 2, 2, 2, 6, 3, 5][: len(prompts)]
        return [
            Completion(torch.randint(5, 700, (n,), generator=generator).tolist(), "stop", "") for n in lengths
        ]


def whole_logprobs(model, batch) -> torch.Tensor:
    """(L,) fp64, of the temperature of written_stage."""
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)[batch.label_rows]
    logprobs = (model.logits(hidden).double() / 0.7).log_softmax(-1)
    return logprobs.gather(1, batch.labels[batch.label_rows][:, None])[:, 0]


def written_stage(tiny, **keys):
    """Stage, policy and two micro-batches of 3 prompts; 3 answers each."""
    model = load_model(tiny.model)
    prepare_trainable(model, LoraOptions(lora_rank=3, lora_dropout=0.5), torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    stage = Written(
        GRPOOptions(num_generations=3, num_iterations=2, beta=0.2, **keys),
        GenerateOptions(max_new_tokens=7, temperature=0.7),
        ByLength(),
        tokenizer=Tokenizer.from_folder(tiny.model),
        stop_ids=(),
        reference=Reference(),
        seed=1,
        world=ALONE,
    )
    nothing = np.zeros(6, bool)
    asked = [
        Example(
            np.arange(3, 9, dtype=np.int32) + row,
            nothing,
            nothing.astype(np.int16),
            nothing.astype(np.uint8),
            (0, row),
        )
        for row in range(3)
    ]
    return (
        stage,
        model.train(),
        [prompts_of(asked[:2], stage.tokenizer), prompts_of(asked[2:], stage.tokenizer)],
    )


@pytest.mark.parametrize("kl_in_reward", [False, True])
def test_a_draw_is_measured_at_the_sampling_temperature_and_trained_by_the_papers_formula(tiny, kl_in_reward):
    stage, model, drawn = written_stage(tiny, kl_in_reward=kl_in_reward)
    group = next(stage.groups(model, drawn, 0))
    assert model.training
    model.eval()
    rewards, summed = [], []
    with torch.no_grad():
        for batch in group:
            old = whole_logprobs(model, batch)
            with lora_off(model):
                reference = whole_logprobs(model, batch)
            torch.testing.assert_close(batch.per_label["old"].double(), old, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(batch.per_label["reference"].double(), reference, rtol=1e-5, atol=1e-5)
            counts = batch.label_counts.tolist()
            summed += [part.sum() for part in (old - reference).split(counts)]
            rewards += [count**0.5 for count in counts]
    rewards = torch.tensor(rewards).double().view(3, 3)
    if kl_in_reward:
        rewards -= 0.2 * torch.stack(summed).view(3, 3)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    found = torch.cat([batch.per_segment["advantages"] for batch in group]).double()
    torch.testing.assert_close(found, advantages, rtol=1e-4, atol=1e-4)

    for name, parameter in model.named_parameters():
        parameter.data *= 1.5 if name.endswith("lora_b") else 1.0  # as after an update
    expected = 0.0
    for batch, mine in zip(group, advantages.split([6, 3])):
        logprobs, old, reference = (
            whole_logprobs(model, batch),
            batch.per_label["old"],
            batch.per_label["reference"],
        )
        spread = mine.repeat_interleave(batch.label_counts)
        ratio = (logprobs - old).exp()
        losses = -torch.minimum(ratio * spread, ratio.clamp(0.8, 1.2) * spread)
        k3 = (reference - logprobs).exp() - (reference - logprobs) - 1
        expected += (losses + (0.0 if kl_in_reward else 0.2) * k3).sum()
    total = sum(stage.loss(model, batch)[0] for batch in group)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_every_answer_is_sampled_with_a_seed_of_its_own_and_evaluations_are_greedy(tiny):
    stage, model, drawn = written_stage(tiny)
    updates = stage.groups(model, drawn, 0)
    group = next(updates)
    assert len(stage.state()["drawn"]) == 2
    assert next(updates) is group and stage.state()["drawn"] == []
    next(stage.groups(model, drawn, 0))
    assert len(set(stage.seeds)) == len(stage.seeds) == 18 and stage.sampled.do_sample
    measured = stage.evaluate(model.eval(), iter(drawn), ALONE)
    assert not stage.sampled.do_sample
    assert (
        measured["reward"] == pytest.approx((1 + 2 + 7**0.5) / 3) and measured["completions/mean_length"] == 4
    )


def test_training_raises_the_reward_and_evaluation_measures_greedy_answers(tiny):
    keys = tiny.keys | {
        "num_generations": 8,
        "reward_weights": "1.0,0.0",
        "val_size": 2,
        "evaluation_strategy": "steps",
        "eval_steps": 10,
        "max_steps": 20,
        "learning_rate": 3e-2,
        "finetuning_type": "full",
        "save_strategy": "steps",
        "save_steps": 10,
        "lr_scheduler_type": "constant",
        "load_best_model_at_end": True,
    }
    assert tiny.train("rises", **keys) == 0
    rewards = list(tiny.losses("rises", "reward").values())
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    last = tiny.log("rises")[-1]
    assert last["eval_reward"] > rewards[0] and last["eval_exact_match"] == 0
    assert 1 <= last["eval_completions/mean_length"] <= 7
    first = tiny.log("rises")[0]
    assert first["reward"] == pytest.approx(first["rewards/low/mean"])  # weights 1 and 0


@pytest.mark.parametrize(
    "keys",
    [
        {"scale_rewards": "batch", "num_iterations": 2, "beta": 0.1},
        {"advantage_estimator": "rloo", "loss_type": "rloo", "beta": 0.1, "kl_in_reward": True},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "temperature": 0.7, "num_iterations": 2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ],
    ids=["batch", "rloo", "dr_grpo", "gspo"],
)
def test_partitions_agree(tiny, keys):
    """4 prompts at once or in 4 micro-batches: the same answers and the same weights."""
    keys = tiny.keys | keys | {"max_steps": 2, "learning_rate": 1e-3}
    name = keys.get("loss_type", "batch")
    assert tiny.train(f"{name}-whole", **keys, per_device_train_batch_size=4) == 0
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert tiny.train(f"{name}-parts", **keys, **split) == 0
    assert_same_weights(tiny.weights(f"{name}-whole"), tiny.weights(f"{name}-parts"), 2e-5)
    assert tiny.losses(f"{name}-whole", "reward")[1] == pytest.approx(
        tiny.losses(f"{name}-parts", "reward")[1]
    )


def test_batch_deviation_goes_over_ranks():
    mine, other = torch.rand(3, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64) + 1
    everything = torch.cat([mine.flatten(), other.flatten()])
    answers = iter([torch.tensor([8.0, other.sum()]).double(), ((other - everything.mean()) ** 2).sum()])
    world = SimpleNamespace(device="cpu", sum=lambda tensor: tensor + next(answers))
    torch.testing.assert_close(deviation_of_all(mine, world), everything.std())


def test_truncated_answers_teach_nothing(tiny):
    """With one token to write all answers are cut off (the tiny model's stop token is unlikely): no update at
    all."""
    keys = tiny.keys | {"max_new_tokens": 1, "mask_truncated_completions": True, "max_steps": 1}
    assert tiny.train("cut", **keys) == 0
    assert tiny.log("cut")[0]["completions/clipped_ratio"] == 1.0
    assert tiny.log("cut")[0]["grad_norm"] == 0.0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"do_sample": False}, "would all be the same"),
        ({"stage": "sft", "beta": 0.1}, "pref_beta"),
        ({"stage": "dpo", "loss_type": "grpo"}, "pref_loss"),
        ({"num_generations": 1}, "at least 2"),
        ({"reward_file": None}, "reward_file"),
    ],
)
def test_wrong_keys_are_named(tiny, capsys, keys, words):
    assert tiny.train("wrong", **(tiny.keys | keys)) == 2
    assert words in capsys.readouterr().err


def test_dropout_is_off_and_said_to_be(tiny, capsys):
    """With it the two updates on the same answers would compare different policies."""
    keys = tiny.keys | {"max_steps": 2, "num_iterations": 2}
    assert tiny.train("dry", **keys) == 0
    assert tiny.train("wet", **keys, lora_dropout=0.5) == 0
    assert "lora_dropout 0.5 is not used" in capsys.readouterr().out
    assert_same_weights(tiny.weights("dry"), tiny.weights("wet"))


def test_a_bent_distribution_is_announced(tiny, capsys):
    assert tiny.train("bent", **(tiny.keys | {"top_p": 0.9, "max_steps": 1})) == 0
    assert "sampled with top_p=0.9" in capsys.readouterr().out


def test_log_probabilities_are_those_of_the_sampling_temperature(tiny):
    """Against log_softmax(logits / temperature), through the logit-free head."""
    model = load_model(tiny.model).eval()
    batch = collate(
        [
            Example(
                np.arange(3, 12, dtype=np.int32),
                np.arange(9) > 3,
                np.zeros(9, np.int16),
                np.zeros(9, np.uint8),
                (0, 0),
            )
        ]
    )
    with torch.no_grad():
        logits = model.logits(model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen))
        expected = torch.log_softmax(logits.double() / 0.6, -1)[batch.label_rows]
        expected = expected.gather(1, batch.labels[batch.label_rows][:, None])[:, 0]
        torch.testing.assert_close(batch_logprobs(model, batch, 0.6).double(), expected, rtol=1e-5, atol=1e-5)
