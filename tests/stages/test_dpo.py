"""Stages dpo and orpo: every loss is trl's or its paper's in value and gradient, means over a group do not
depend on how it is cut, the metrics are those of full logits, and train.py trains with each of them."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import make_rows, tiny_runs
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from options.config import UserError
from options.config import load as load_config
from parallel.world import World
from pipeline.batch import IGNORED, Example, collate
from stages import reference
from stages.dpo import PairPreference, PreferenceOptions, bco_loss, kto_pair_loss
from stages.logprobs import answer_sums, hidden_states
from stages.orpo import OddsRatio, odds_ratio_loss
from stages.reference import Reference
from tests.stages.test_sft import KINDS, base, prepared  # noqa: F401
from training.options import TrainOptions

ALONE = World(0, 1, 0, torch.device("cpu"))
# tokens of the prompt, of the chosen and of the rejected answer
LENGTHS = [(3, 5, 2), (1, 1, 9), (4, 7, 7), (2, 3, 1), (6, 2, 4)]
METRICS = PairPreference.evaluation_names[1:]


def example(prompt, chosen, rejected, row=0, seed=5):
    random = np.random.default_rng([seed, row])
    start, answers = random.integers(3, 131, prompt), [random.integers(3, 131, n) for n in (chosen, rejected)]
    tokens = np.concatenate([start, answers[0], start, answers[1]]).astype(np.int32)
    trained = np.arange(prompt + chosen) >= prompt, np.arange(prompt + rejected) >= prompt
    zeros = np.zeros(len(tokens))
    arrays = (tokens, np.concatenate(trained), zeros.astype(np.int16), zeros.astype(np.uint8))
    return Example(*arrays, (0, row), split=prompt + chosen)


EXAMPLES = [example(*lengths, row=row) for row, lengths in enumerate(LENGTHS)]


def draw(batch, seed):
    """(L,) fp64 log-probabilities, one for each label."""
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(len(batch.label_rows), dtype=torch.float64, generator=generator) * 3


def stage_of(loss="sigmoid", reference=None, world=ALONE, **options):
    kind = OddsRatio if loss == "orpo" else PairPreference
    return kind(PreferenceOptions(pref_loss=loss, **options), reference, world)


def ours(stage, logprobs, reference, batch):
    """(P,) losses without the chosen answer's own."""
    ratios = stage.answers(logprobs, batch)
    if stage.options.needs_reference:
        ratios = ratios - stage.per_answer(answer_sums(reference, batch, stage.options.ld_alpha), batch)
    return stage.losses(ratios)


def padded(values, batch):
    """(L,) -> (2P, longest answer), and its mask; each row begins with a token that is not trained."""
    rows = values.split(batch.label_counts.tolist())
    longest = max(map(len, rows))
    table = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    mask = torch.stack([F.pad(torch.ones(len(row)), (1, longest - len(row))) for row in rows])
    return table, mask


class Trl:
    """DPOTrainer._compute_loss on given log-probabilities: what it asks of itself and of its models."""

    def __init__(self, loss, beta, smoothing, ld_alpha):
        self.loss_types, self.loss_weights, self.beta, self.label_smoothing = [loss], [1.0], beta, smoothing
        self.ld_alpha, self.model, self.ref_model = ld_alpha, SimpleNamespace(training=True), None
        self.precompute_ref_logps, self.use_weighting, self.aux_loss_enabled = False, False, False
        self.f_divergence_type, self._total_train_tokens, self._tp_size = "reverse_kl", 0, 1
        self.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
        same = lambda value: value  # noqa: E731
        self.accelerator = SimpleNamespace(
            device="cpu", gather=same, gather_for_metrics=same, autocast=nullcontext
        )
        self._metrics = {"train": {name: [] for name in (*METRICS, "entropy", "mean_token_accuracy")}}

    def loss(self, logprobs, reference, batch):
        (policy, mask), (known, _) = padded(logprobs, batch), padded(reference, batch)

        def answer(values):
            zeros = torch.zeros_like(values)
            return SimpleNamespace(log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

        self.ref_model = lambda **_: answer(known)
        self.ref_model.gradient_checkpointing_disable = self.ref_model.is_gradient_checkpointing = None
        inputs = {"completion_mask": mask.long(), "input_ids": mask.long(), "attention_mask": mask.long()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trl.trainer.dpo_trainer.disable_gradient_checkpointing", lambda *_: nullcontext())
            patch.setattr("trl.trainer.dpo_trainer.is_peft_model", lambda _: False)
            return DPOTrainer._compute_loss(self, lambda **_: answer(policy), inputs, False)


def assert_same(mine, theirs, inputs, tolerance=1e-12):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True)[0] for value in (mine, theirs)]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize(
    "loss, smoothing",
    [
        ("sigmoid", 0.0),
        ("robust", 0.1),
        ("robust", 0.0),
        ("hinge", 0.0),
        ("ipo", 0.0),
        ("exo_pair", 0.1),
        ("exo_pair", 1e-3),
    ],
)
def test_a_loss_against_the_reference_is_trls(loss, smoothing, ld_alpha):
    batch = collate(EXAMPLES)
    logprobs, reference = draw(batch, 1).requires_grad_(), draw(batch, 2)
    stage = stage_of(loss, pref_beta=0.23, dpo_label_smoothing=smoothing, ld_alpha=ld_alpha)
    trl = Trl(loss, 0.23, smoothing, ld_alpha)
    tolerance = 1e-6 if loss == "exo_pair" else 1e-12  # trl rounds the smoothing to fp32
    mine = ours(stage, logprobs, reference, batch).mean()
    assert_same(mine, trl.loss(logprobs, reference, batch), logprobs, tolerance)


def test_the_smoothed_sigmoid_is_trls():
    """trl has it in CPO only, of log-probabilities in place of ratios."""
    batch = collate(EXAMPLES)
    logprobs, reference = draw(batch, 1).requires_grad_(), draw(batch, 2)
    trl = SimpleNamespace(
        alpha=0.0,
        beta=0.23,
        label_smoothing=0.2,
        loss_type="sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = CPOTrainer.cpo_loss(trl, *answer_sums(logprobs - reference, batch).split(batch.pairs))[0]
    stage = stage_of("sigmoid", pref_beta=0.23, dpo_label_smoothing=0.2)
    assert_same(ours(stage, logprobs, reference, batch).mean(), theirs.mean(), logprobs)


def test_bco_without_a_baseline_is_trls():
    batch = collate(EXAMPLES)
    logprobs, reference = draw(batch, 3).requires_grad_(), draw(batch, 4)
    mine = ours(stage_of("bco_pair", pref_beta=0.23), logprobs, reference, batch).mean()
    assert_same(mine, Trl("bco_pair", 0.23, 0.0, None).loss(logprobs, reference, batch), logprobs)


def test_exo_without_smoothing_takes_trls_default():
    batch = collate(EXAMPLES)
    logprobs, reference = draw(batch, 1), draw(batch, 2)
    mine, given = stage_of("exo_pair"), stage_of("exo_pair", dpo_label_smoothing=1e-3)
    assert torch.equal(ours(mine, logprobs, reference, batch), ours(given, logprobs, reference, batch))


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("loss", ["cpo", "simpo"])
def test_a_loss_without_reference_is_trls(loss, smoothing):
    batch = collate(EXAMPLES)
    logprobs = draw(batch, 1).requires_grad_()
    stage = stage_of(loss, pref_beta=1.7, simpo_gamma=0.6, dpo_label_smoothing=smoothing)
    trl = SimpleNamespace(
        alpha=0.0,
        beta=1.7,
        simpo_gamma=0.6,
        label_smoothing=smoothing,
        loss_type="simpo" if loss == "simpo" else "sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )
    sums, counts = answer_sums(logprobs, batch), batch.label_counts
    chosen, rejected = (sums / counts if loss == "simpo" else sums).split(batch.pairs)
    theirs = CPOTrainer.cpo_loss(trl, chosen, rejected)[0]
    assert_same(ours(stage, logprobs, None, batch).mean(), theirs.mean(), logprobs)


def test_the_odds_ratio_loss_is_the_papers_and_trls():
    batch = collate(EXAMPLES)
    logprobs = draw(batch, 6).requires_grad_()
    chosen, rejected = (answer_sums(logprobs, batch) / batch.label_counts).split(batch.pairs)
    odds = [p / (1 - p) for p in (chosen.exp(), rejected.exp())]
    mine = ours(stage_of("orpo", pref_beta=0.4), logprobs, None, batch)
    assert_same(mine.mean(), (-0.4 * F.logsigmoid(torch.log(odds[0] / odds[1]))).mean(), logprobs)
    trl = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(trl, chosen, rejected)[0]  # in fp32
    assert_same(mine.mean(), theirs.mean().double(), logprobs, tolerance=1e-5)


def test_the_odds_ratio_of_a_certain_answer_is_finite():
    """c = 0 is probability 1; 1 - exp(c) would be 0 for all c above -6e-8 in fp32."""
    chosen = torch.tensor([0.0, -1e-8, -1e-6, -40.0], requires_grad=True)
    rejected = torch.tensor([-3.0, 0.0, -1e-6, 0.0], requires_grad=True)
    losses = odds_ratio_loss(chosen, rejected)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert all(value.isfinite().all() for value in (losses, *gradients))
    near = torch.tensor([-1e-5], dtype=torch.float64)
    expected = -F.logsigmoid(near + 3 - torch.log(1 - near.exp()) + math.log(1 - math.exp(-3)))
    found = odds_ratio_loss(near.float(), torch.tensor([-3.0]))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_kto_pair_and_bco_by_hand():
    """Ratios 2 and -1 of the chosen, 1 and 3 of the rejected answers; sigma(x) = 1 / (1 + e^-x)."""
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    found = kto_pair_loss(chosen, rejected, torch.tensor([0.5, 2.0]), 0.1)
    expected = [(1 - sigma(0.1 * (c - 2.0)) + 1 - sigma(0.1 * (0.5 - r))) / 2 for c, r in ((2, 1), (-1, 3))]
    np.testing.assert_allclose(found.tolist(), expected, rtol=1e-6)
    found = bco_loss(0.1 * chosen, 0.1 * rejected, torch.tensor(0.125))
    expected = [
        -math.log(sigma(0.1 * c - 0.125)) - math.log(sigma(0.125 - 0.1 * r)) for c, r in ((2, 1), (-1, 3))
    ]
    np.testing.assert_allclose(found.tolist(), expected, rtol=1e-6)


def test_bcos_loss_is_mixed_in_by_its_weight_about_the_mean_reward_so_far():
    """A weight of 0.5 is a third of the whole; rewards of 1.8 in 6 answers before."""
    batch = collate(EXAMPLES)
    logprobs, reference = draw(batch, 1).requires_grad_(), draw(batch, 2)
    stage = stage_of("hinge", pref_beta=0.23, pref_bco_weight=0.5)
    stage.rewards += torch.tensor([1.8, 6.0], dtype=torch.float64)
    chosen, rejected = 0.23 * answer_sums(logprobs - reference, batch).view(2, -1)
    sigma = [1 / (1 + torch.exp(-side)) for side in (chosen - 0.3, 0.3 - rejected)]
    expected = (2 * (1 - chosen + rejected).clamp(min=0) - sigma[0].log() - sigma[1].log()) / 3
    assert_same((ours(stage, logprobs, reference, batch) ** 2).sum(), (expected**2).sum(), logprobs)


def policy(base):  # noqa: F811
    """A policy that differs from its reference, fp64."""
    return prepared(base, KINDS["lora"], torch.float64)


def run(stage, model, batches):
    """(losses of the group summed, metrics summed, {name: gradient}) as the loop makes them."""
    model.zero_grad()
    stage.prepare(model, batches)
    names = stage.evaluation_names[1:]
    total, sums = 0.0, {name: torch.zeros(2) for name in names}
    for batch in batches:
        loss, metrics = stage.loss(model, batch)
        assert set(metrics) == set(names)
        loss.backward()
        total += loss.item()
        sums = {name: sums[name] + metrics[name] for name in sums}
    return total, sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


GROUPS = {
    "together": [EXAMPLES],
    "one by one": [[one] for one in EXAMPLES],
    "and an empty batch": [EXAMPLES[:3], [], EXAMPLES[3:]],
}
LOSSES = {
    "sigmoid": {"ld_alpha": 0.5, "pref_ftx": 0.3},
    "kto_pair": {},
    "bco_pair": {},
    "ipo": {"pref_bco_weight": 0.7},
    "orpo": {},
    "simpo": {"ld_alpha": 0.2},
    "cpo": {},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_has_the_same_gradient_however_it_is_cut(base, loss):  # noqa: F811
    model, found = policy(base), {}
    for name, group in GROUPS.items():
        stage = stage_of(loss, None, **LOSSES[loss])
        stage.reference = (
            Reference(ld_alpha=stage.options.ld_alpha) if stage.options.needs_reference else None
        )
        batches = [collate(part).rounded(8) for part in group]
        found[name] = run(stage, model, batches)
        again = run(stage, model, batches)  # bco follows the rewards of the second group as well
        if loss == "bco_pair":
            assert stage.rewards[1] == 4 * len(EXAMPLES) and again[0] == pytest.approx(found[name][0])
    first = found["together"]
    assert max(gradient.abs().max() for gradient in first[2].values()) > 1e-3
    for name in ("one by one", "and an empty batch"):
        assert found[name][0] == pytest.approx(first[0], rel=1e-6)
        for metric, value in first[1].items():
            torch.testing.assert_close(found[name][1][metric], value, rtol=2e-5, atol=1e-5, msg=metric)
        for parameter, gradient in first[2].items():
            torch.testing.assert_close(found[name][2][parameter], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_evaluation_does_not_depend_on_the_batches_nor_change_the_training(base, loss):  # noqa: F811
    model, found = policy(base).eval(), []
    for group in GROUPS.values():
        stage = stage_of(loss, None, **LOSSES[loss])
        stage.reference = (
            Reference(ld_alpha=stage.options.ld_alpha) if stage.options.needs_reference else None
        )
        with torch.no_grad():
            found.append(stage.evaluate(model, iter([collate(part).rounded(8) for part in group]), ALONE))
        assert not stage.rewards.any()
    assert found[1] == pytest.approx(found[0], rel=2e-5, abs=1e-5)
    assert found[2] == pytest.approx(found[0], rel=2e-5, abs=1e-5)


def test_an_evaluation_of_kto_pair_is_held_against_the_kl_of_the_whole_set(base):  # noqa: F811
    model, stage = policy(base).eval(), stage_of("kto_pair", Reference(), pref_beta=0.3)
    stage.kl = torch.tensor([70.0, 80.0])  # of the last group that was trained on
    with torch.no_grad():
        found = stage.evaluate(model, iter([collate(EXAMPLES[:2]), collate(EXAMPLES[2:])]), ALONE)["loss"]
        batch = collate(EXAMPLES)
        sums = answer_sums(label_logprobs_of(model, batch), batch) - Reference().sums(model, batch)
    chosen, rejected = sums.view(2, -1).numpy()
    kl = [max(ratios.mean(), 0) for ratios in (chosen, rejected)]
    assert max(kl) > 0.05
    sides = 0.3 * np.stack([chosen - kl[1], kl[0] - rejected])
    assert found == pytest.approx((1 - 1 / (1 + np.exp(-sides))).mean(), rel=1e-5)


def test_an_empty_batch_gives_a_zero_loss_that_goes_backward(base):  # noqa: F811
    model = policy(base)
    for loss in LOSSES:
        stage = stage_of(loss, Reference())
        stage.reference = stage.reference if stage.options.needs_reference else None
        total, metrics, _ = run(stage, model, [collate([]).rounded(8)])
        assert total == 0 and all((value == 0).all() for value in metrics.values())


def test_kto_pair_holds_answers_against_the_mean_over_all_ranks(base):  # noqa: F811
    """The other rank has as many pairs, all with a ratio of 5 for the chosen and -90 for the rejected
    answers."""

    class Two(World):
        def sum(self, tensor):
            return tensor.add_(torch.tensor([5.0, -90.0, 1.0]) * len(EXAMPLES))

    model, batch = policy(base), collate(EXAMPLES)
    stage = stage_of("kto_pair", Reference(), Two(0, 2, 0, torch.device("cpu")))
    stage.prepare(model, [batch])
    logprobs = label_logprobs_of(model, batch)
    ratios = (answer_sums(logprobs, batch) - Reference().sums(model, batch)).view(2, -1)
    expected = [(ratios[0].mean().item() + 5) / 2, 0.0]
    np.testing.assert_allclose(stage.kl.tolist(), expected, rtol=1e-6)
    assert model.training


def label_logprobs_of(model, batch):
    with torch.no_grad():
        logits = model.logits(hidden_states(model, batch)[batch.label_rows]).double()
    return logits.log_softmax(-1).gather(1, batch.labels[batch.label_rows][:, None])[:, 0]


@pytest.mark.parametrize("kind", ["lora", "lora with head", "dora with head", "full"])
def test_metrics_are_those_of_full_logits(base, kind):  # noqa: F811
    model, batch = prepared(base, KINDS[kind], torch.float64), collate(EXAMPLES).rounded(16)
    generator = torch.Generator().manual_seed(3)
    known = -20 * torch.rand(2 * len(EXAMPLES), generator=generator)
    batch.per_segment["reference"] = known
    _, metrics = stage_of("sigmoid", Reference(), pref_beta=0.3).loss(model, batch)
    rows = (batch.labels != IGNORED).nonzero()[:, 0]
    counts = batch.label_counts.tolist()
    with torch.no_grad():
        logits = model.logits(hidden_states(model, batch)[rows])
    sums = [part.sum().item() for part in label_logprobs_of(model, batch).split(counts)]
    kinds = logits.mean(-1).split([sum(counts[:5]), sum(counts[5:])])
    policy, base_sums = np.array(sums).reshape(2, 5), known.double().numpy().reshape(2, 5)
    rewards = 0.3 * (policy - base_sums)
    expected = {
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "logps/chosen": policy[0].mean(),
        "logps/rejected": policy[1].mean(),
        "logits/chosen": kinds[0].mean().item(),
        "logits/rejected": kinds[1].mean().item(),
        "sft_loss": -(policy[0] / counts[:5]).mean(),
    }
    for name, value in expected.items():
        total, count = metrics[name].tolist()
        assert total / count == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_a_trained_head_gives_its_present_mean_logit(base):  # noqa: F811
    """The mean row of a frozen head is kept; that of a trained one changes with it."""
    batch = collate(EXAMPLES)
    for kind, kept in (("lora", True), ("lora with head", False), ("full", False)):
        model, stage = prepared(base, KINDS[kind]), stage_of("simpo")
        before = stage.loss(model, batch)[1]["logits/chosen"]
        row = stage.mean_logits.head_row
        if not kept:
            head = model.lm_head.lora_b if kind == "lora with head" else model.lm_head.weight
            head.data += 0.1
        after = stage.loss(model, batch)[1]["logits/chosen"]
        assert torch.equal(after, before) == (stage.mean_logits.head_row is row) == kept


def test_ld_alpha_counts_what_is_longer_than_the_other_answer_less():
    """Answers of 5 and 2 labels, then of 1 and 9: the last 3 of the first, and the last 8 of the second's
    rejected."""
    batch = collate(EXAMPLES[:2])
    ones = torch.ones(len(batch.label_rows))
    assert answer_sums(ones, batch, 0.25).tolist() == [2 + 3 / 4, 1, 2, 1 + 8 / 4]
    assert answer_sums(ones, batch, 0.0).tolist() == [2, 1, 2, 1]
    assert answer_sums(ones, batch).tolist() == [5, 1, 2, 9]


def test_the_chosen_answers_own_loss_is_added():
    assert PreferenceOptions(pref_ftx=0.4).chosen_weight == 0.4
    assert PreferenceOptions().chosen_weight == 0
    assert PreferenceOptions(pref_loss="cpo").chosen_weight == 1
    assert PreferenceOptions(pref_loss="cpo", pref_ftx=0).chosen_weight == 0
    assert PreferenceOptions(pref_ftx=0.5).for_stage("orpo").chosen_weight == 1.5


@pytest.mark.parametrize("loss, weight", [("cpo", 1.0), ("orpo", 1.0), ("hinge", 0.0), ("ipo", 0.25)])
def test_the_sum_of_a_batch_is_preference_and_own_loss(base, loss, weight):  # noqa: F811
    model, batch = policy(base), collate(EXAMPLES)
    stage = stage_of(loss, pref_beta=0.7, pref_ftx=0.25 if loss == "ipo" else None, ld_alpha=0.4)
    stage.reference = Reference(ld_alpha=0.4) if stage.options.needs_reference else None
    with torch.no_grad():
        total, metrics = stage.loss(model, batch)
        logprobs = label_logprobs_of(model, batch)
        known = Reference().logprobs(model, batch) if stage.reference else None
        own = -(answer_sums(logprobs, batch) / batch.label_counts)[: batch.pairs].sum()
        preference = ours(stage, logprobs, known, batch).sum()
    torch.testing.assert_close(total.double(), preference + weight * own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["sft_loss"][0].double(), own, rtol=1e-5, atol=1e-5)
    if loss == "orpo":
        torch.testing.assert_close(
            metrics["odds_ratio_loss"][0].double(), preference / 0.7, rtol=1e-5, atol=1e-5
        )


# Options


@pytest.mark.parametrize(
    "words, key",
    [
        (["pref_beta=0"], "pref_beta"),
        (["pref_beta=inf"], "pref_beta"),
        (["simpo_gamma=-1"], "simpo_gamma"),
        (["dpo_label_smoothing=0.5"], "dpo_label_smoothing"),
        (["pref_loss=hinge", "dpo_label_smoothing=0.1"], "dpo_label_smoothing"),
        (["ld_alpha=1.5"], "ld_alpha"),
        (["pref_loss=simpo", "pref_bco_weight=0.3"], "pref_bco_weight"),
        (["pref_loss=bco_pair", "pref_bco_weight=0.3"], "pref_bco_weight"),
        (["stage=orpo", "pref_loss=ipo"], "pref_loss"),
        (["stage=orpo", "dpo_label_smoothing=0.1"], "dpo_label_smoothing"),
        (["stage=orpo", "pref_bco_weight=1"], "pref_bco_weight"),
        (["pref_loss=slic"], "pref_loss"),
    ],
)
def test_a_pair_of_options_that_means_nothing_is_refused(words, key):
    words = ["output_dir=out", *(words if any("stage" in word for word in words) else ["stage=dpo", *words])]
    with pytest.raises(UserError, match=key):
        load_config(words, [TrainOptions, PreferenceOptions], program="x", description="x")


def test_names_of_other_systems_are_understood():
    words = [
        "output_dir=out",
        "stage=dpo",
        "dpo_beta=0.3",
        "dpo_loss=exo",
        "dpo_ftx=0.5",
        "label_smoothing=0.1",
    ]
    options = load_config(words, [TrainOptions, PreferenceOptions], program="x", description="x")[
        PreferenceOptions
    ]
    assert options == PreferenceOptions("exo_pair", 0.3, 0.5, dpo_label_smoothing=0.1)
    words = ["output_dir=out", "stage=orpo", "orpo_beta=0.3"]
    options = load_config(words, [TrainOptions, PreferenceOptions], program="x", description="x")[
        PreferenceOptions
    ]
    assert options.for_stage("orpo") == PreferenceOptions("orpo", 0.3)


# Runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("preference")) as made:
        rows = zip(make_rows(17), make_rows(17, seed=4))
        pairs = [
            {
                "instruction": one["instruction"],
                "chosen": one["output"] + " sparks",
                "rejected": other["output"] + " 12",
            }
            for one, other in rows
        ]
        (made.folder / "pairs.json").write_text(json.dumps(pairs))
        columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
        info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
        (made.folder / "dataset_info.json").write_text(json.dumps(info))
        yield made


def train(tiny, name, **keys):
    return tiny.train(
        name, dataset="pairs", dataset_dir=tiny.folder, cutoff_len=256, **{"stage": "dpo"} | keys
    )


@pytest.mark.parametrize(
    "loss", ["sigmoid", "robust", "hinge", "ipo", "exo_pair", "kto_pair", "bco_pair", "orpo", "simpo", "cpo"]
)
def test_each_loss_raises_the_margin_from_the_command_line(tiny, loss):
    keys = (
        {"pref_beta": 2.0, "simpo_gamma": 0.5}
        if loss == "simpo"
        else {"pref_ftx": 0}
        if loss == "cpo"
        else {}
    )
    keys |= {"dpo_label_smoothing": 0.1} if loss == "robust" else {}
    keys |= {"evaluation_strategy": "steps", "eval_steps": 1, "eval_dataset": "pairs"}
    assert train(tiny, loss, pref_loss=loss, max_steps=7, gradient_accumulation_steps=2, **keys) == 0
    margins = list(tiny.losses(loss, "eval_rewards/margins").values())
    assert margins[-1] > margins[0] + 1e-3
    entry = tiny.log(loss)[0]
    assert set(METRICS) < set(entry) and ("odds_ratio_loss" in entry) == (loss == "orpo")
    assert entry["rewards/margins"] == pytest.approx(
        entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-5
    )


def test_stage_orpo_is_the_loss_orpo_and_evaluates(tiny):
    keys = {"val_size": 5, "evaluation_strategy": "epoch", "metric_for_best_model": "eval_odds_ratio_loss"}
    assert train(tiny, "stage-orpo", stage="orpo", **keys) == 0
    assert train(tiny, "loss-orpo", pref_loss="orpo", val_size=5) == 0
    assert tiny.losses("stage-orpo") == tiny.losses("loss-orpo")
    evaluated = tiny.log("stage-orpo")[-1]
    expected = evaluated["eval_sft_loss"] + 0.1 * evaluated["eval_odds_ratio_loss"]
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_without_reference_never_asks_for_one(tiny, monkeypatch):
    def refuse(*_):
        raise AssertionError("a reference was made")

    monkeypatch.setattr(reference.Reference, "sums", refuse)
    monkeypatch.setattr(reference.Reference, "logprobs", refuse)
    for stage, loss in (("orpo", None), ("dpo", "simpo"), ("dpo", "cpo"), ("dpo", "orpo")):
        assert train(tiny, f"free-{stage}-{loss}", stage=stage, pref_loss=loss, max_steps=1) == 0


def test_dropout_is_off_and_the_run_says_so(tiny, capsys):
    assert train(tiny, "plain", max_steps=2) == 0
    capsys.readouterr()
    assert train(tiny, "dropout", max_steps=2, lora_dropout=0.3) == 0
    assert "lora_dropout 0.3 is not used" in capsys.readouterr().out
    assert tiny.losses("dropout") == tiny.losses("plain")


def test_bco_resumes_with_the_rewards_that_it_has_seen(tiny):
    keys = {"pref_bco_weight": 0.5, "pref_loss": "hinge", "lr_scheduler_type": "constant"}
    saves = {"save_strategy": "steps", "save_steps": 3}
    assert train(tiny, "whole", max_steps=7, **keys) == 0
    assert train(tiny, "resumed", max_steps=3, **saves, **keys) == 0
    assert train(tiny, "resumed", max_steps=7, **saves, **keys) == 0
    assert tiny.losses("resumed") == tiny.losses("whole")
