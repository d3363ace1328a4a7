"""Stage kto: its losses equal trl's and the papers'; questions meet the answers of the next rows of the
data."""

import json
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from stage_runs import stage_keys, write_stage_data
from tiny_runs import tiny_runs
from trl import KTOTrainer

from checkpoints.huggingface import load_model
from checkpoints.trainable import prepare_trainable
from data import DataOptions, load_datasets
from lora import LoraOptions
from options import config as configuration
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, Example, collate
from stages.kto import (
    KTOOptions,
    Measured,
    MismatchedStore,
    RatedPreference,
    another_asker,
    bco_loss,
    half,
    mismatched_stream,
)
from stages.reference import Reference
from templates import get_template
from tests.training.test_resume import halves
from text.tokenizer import Tokenizer
from training import setup

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("kto")) as made:
        write_stage_data(made)
        yield made


def kto(tiny, name: str, **keys) -> int:
    return tiny.train(name, **stage_keys(tiny, "kto", **{"num_train_epochs": 1, **keys}))


def stored(tiny, cutoff_len: int = 128):
    words = tiny.words("x", **stage_keys(tiny, "kto", cutoff_len=cutoff_len))
    options = configuration.load(words, setup.SECTIONS, program="", description="")[setup.DataOptions]
    tokenizer = Tokenizer.from_folder(tiny.model)
    return load_datasets(options, get_template("chatml", None, None), tokenizer, "kto", seed=1).train


def stage(
    loss: str = "kto", beta: float = 0.1, ftx: float = 0.0, reference=None, **options
) -> RatedPreference:
    return RatedPreference(KTOOptions(kto_loss=loss, **options), beta, ftx, reference or Reference(), ALONE)


def random_answers(seed: int, count: int = 7):
    """Per-token log-probabilities (count, longest), which tokens count, and other numbers, in float64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator)
    mask = torch.arange(8) < lengths[:, None]
    policy = -3 * torch.rand(count, 8, generator=generator, dtype=torch.float64) * mask
    others = -20 * torch.rand(3, count, generator=generator, dtype=torch.float64)
    good = torch.rand(count, generator=generator) < 0.6
    good[:2] = torch.tensor([True, False])
    return policy.requires_grad_(), mask, *others, good


def trl_loss(policy, mask, reference, kl, kl_reference, good, loss, beta, weights):
    """trl's own function, on these log-probabilities."""
    same = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    outputs = SimpleNamespace(log_probs=policy, entropy=policy * 0, mean_logits=policy * 2)
    trainer = SimpleNamespace(
        model=torch.nn.Module(),
        accelerator=same,
        precompute_ref_logps=True,
        calculate_KL=loss == "kto",
        _compute_kl_logps=lambda model, batch: kl,
        aux_loss_enabled=False,
        loss_type=loss,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    full = F.pad(mask, (1, 0)).long()
    inputs = {
        "input_ids": full,
        "completion_mask": full,
        "attention_mask": full,
        "label": good,
        "ref_logps": reference,
        "ref_KL_logps": kl_reference,
    }
    value = KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return value, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_loss_gradient_and_metrics_equal_trls(loss, seed):
    policy, mask, reference, kl, kl_reference, good = random_answers(seed)
    weights, beta = (1.3, 0.7), 0.35
    expected, theirs = trl_loss(policy, mask, reference, kl, kl_reference, good, loss, beta, weights)
    (gradient,) = torch.autograd.grad(expected, policy)
    ours = stage(loss, beta, kto_chosen_weight=weights[0], kto_rejected_weight=weights[1])
    if loss == "kto":
        ours.kl = (kl - kl_reference).mean().clamp(min=0)
        assert seed != 0 or ours.kl > 0
    sums = policy.sum(1)
    answers = Measured(sums, sums - reference, 2 * sums.detach(), mask.sum(1), good)
    value, metrics = ours.score(answers)
    assert value.item() / len(good) == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value, policy)[0] / len(good), gradient, rtol=1e-10, atol=1e-14
    )
    means = ours.summary({name: (total / count).item() for name, (total, count) in metrics.items()})
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "kl",
    ):
        assert means[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert set(ours.evaluation_names) == {"loss", "rewards/margins"} | set(metrics)


def test_bco_is_the_papers_cross_entropy_around_the_mean_reward():
    """arXiv 2404.04656: a classifier of good and bad whose logit is b r - d."""
    rewards, good = (
        torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64),
        torch.tensor([True, False, True, False]),
    )
    expected = F.binary_cross_entropy_with_logits(rewards - 0.4, good.double(), reduction="none")
    torch.testing.assert_close(bco_loss(rewards, good, torch.tensor(0.4, dtype=torch.float64)), expected)


def test_pref_ftx_adds_the_loss_per_token_of_good_answers():
    policy, mask, reference, *_, good = random_answers(4)
    sums = policy.sum(1)
    answers = Measured(sums, sums - reference, sums, mask.sum(1), good)
    plain, with_own = stage().score(answers)[0], stage(ftx=0.25).score(answers)[0]
    own = -(sums / mask.sum(1))[good].sum()
    assert (with_own - plain).item() == pytest.approx(0.25 * own.item(), rel=1e-12)


# Questions with the answers of other rows


def test_each_question_meets_the_next_rows_answer(tiny):
    store = stored(tiny)
    both = MismatchedStore(store, 128)
    tokenizer = Tokenizer.from_folder(tiny.model)
    rows = json.loads((tiny.folder / "stages" / "rated.json").read_text())
    assert len(both) == len(rows) == 12
    for i in range(12):
        example = both.example(i)
        assert len(example) == both.lengths[i] and example.tag == rows[i]["label"]
        matched, mismatched = (example.tokens[span] for span in example.segments)
        assert np.array_equal(matched, store.example(i).tokens)
        text = tokenizer.decode(mismatched, skip_special=False)
        assert text.endswith(f"<|im_start|>assistant\n{rows[(i + 1) % 12]['output']}<|im_end|>\n")
        assert f"<|im_start|>user\n{rows[i]['instruction']}<|im_end|>" in text
        answer = tokenizer.decode(mismatched[example.trained[example.segments[1]]], skip_special=False)
        assert answer == f"{rows[(i + 1) % 12]['output']}<|im_end|>"


def test_answers_of_other_rows_are_cut_to_cutoff_len(tiny):
    store = stored(tiny, cutoff_len=40)
    both = MismatchedStore(store, 40)
    seconds = [len(both.example(i)) - both.example(i).split for i in range(12)]
    assert max(seconds) == 40 and min(seconds) < 40
    assert [len(both.example(i)) for i in range(12)] == both.lengths.tolist()
    assert all(both.example(i).trained[both.example(i).split :].any() for i in range(12))


def test_halves_of_a_batch_are_batches_of_their_segments(tiny):
    both = MismatchedStore(stored(tiny), 128)
    both.reference = np.arange(24, dtype=np.float32).reshape(12, 2)
    examples = [both.example(i) for i in (4, 0, 11)]
    batch = collate(examples).rounded(32)
    for number in (0, 1):
        alone = collate(
            [
                Example(
                    *(
                        getattr(example, name)[example.segments[number]]
                        for name in ("tokens", "trained", "turns", "roles")
                    ),
                    example.source,
                    0,
                    example.tag,
                    (example.reference[number],),
                )
                for example in examples
            ]
        )
        mine, expected = vars(half(batch, number == 1)), vars(alone.rounded(ROW_MULTIPLE["cpu"]))
        assert mine["per_segment"].keys() == expected["per_segment"].keys() == {"labels", "tags", "reference"}
        for name in mine.keys() - {"per_token"}:  # what people look at
            torch.testing.assert_close(mine[name], expected[name], rtol=0, atol=0, msg=name)


def test_one_question_has_no_other_answer(tiny):
    for rows in ([0], [3, 3, 3]):
        with pytest.raises(ValueError, match="at least 2 questions; rated has 1. Set kto_loss=apo_zero"):
            MismatchedStore(stored(tiny).select(np.array(rows)), 128)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40).filter(lambda asked: len(set(asked)) > 1))
def test_a_question_never_meets_an_answer_to_itself(asked):
    asked = np.array(asked)
    others = another_asker(asked)
    assert (asked[others] != asked).all()
    if len(set(asked.tolist())) == len(asked):
        assert others.tolist() == [*range(1, len(asked)), 0]
    counts = np.bincount(np.unique(asked, return_inverse=True)[1])
    if len(set(counts.tolist())) == 1:  # as often as any other: then every answer is read once
        assert sorted(others.tolist()) == list(range(len(asked)))


def test_the_order_of_the_rows_makes_no_difference_to_which_answers_meet_a_question():
    pairs = np.repeat(np.arange(8), 2)  # good, bad, good, bad
    blocks = np.tile(np.arange(8), 2)  # all good, then all bad

    def met(asked):
        return {(int(asked[i]), int(asked[other])) for i, other in enumerate(another_asker(asked))}

    assert met(pairs) == met(blocks) == {(i, (i + 1) % 8) for i in range(8)}
    assert sorted(another_asker(pairs)) == list(range(16))  # of both kinds, not of good answers only


def test_a_question_that_was_cut_is_still_the_same(tiny, tmp_path):
    """By the length of its answer, so its tokens differ."""
    question = "the hammer sings upon an anvil " * 9
    answers = [("seven " * n, n % 2 > 0) for n in (1, 30, 60, 7)]
    rows = [{"instruction": question, "output": text, "label": good} for text, good in answers]
    rows.insert(2, {"instruction": "blue sparks", "output": "fly", "label": True})
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "label"}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    entry = {"rows": {"file_name": "rows.json", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry))
    options = DataOptions(dataset=("rows",), dataset_dir=str(tmp_path), cutoff_len=60)
    tokenizer = Tokenizer.from_folder(tiny.model)
    store = load_datasets(options, get_template("chatml"), tokenizer, "kto", seed=1).train
    both = MismatchedStore(store, 60)
    assert both.others.tolist() == [2, 2, 0, 2, 2]
    assert len({int(np.argmax(store.example(i).trained)) for i in (0, 1, 3, 4)}) > 1
    for i in range(5):
        example = both.example(i)
        assert len(example) == both.lengths[i]
        second = example.segments[1]
        text = tokenizer.decode(example.tokens[second], skip_special=False)
        assert text.endswith("<|im_end|>\n") and second.stop - second.start <= 60
        assert ("fly<|im_end|>" in text) == (i != 2)


def test_a_stream_waits_for_another_question(tiny):
    store = stored(tiny)
    drawn = [store.example(i) for i in (0, 0, 1, 1, 1, 2, 0)]
    made = list(mismatched_stream(iter(drawn), 128))
    assert [example.source[1] for example in made] == [0, 0, 1, 1, 1, 2]
    for example, other in zip(made, (1, 1, 2, 2, 2, 0)):
        wanted = store.example(other)
        answer = example.tokens[example.segments[1]][int(np.argmax(example.trained)) :]
        assert answer.tolist() == wanted.tokens[int(np.argmax(wanted.trained)) :].tolist()
    with pytest.raises(ValueError, match="1,000 rows of the stream ask the same"):
        list(mismatched_stream((store.example(0) for _ in range(2000)), 128))


# The stage


def logprob(model, tokens, trained) -> float:
    """Of the trained tokens, in float64."""
    tokens = torch.tensor(tokens, dtype=torch.int64)
    places = torch.arange(len(tokens), dtype=torch.int32)
    hidden = model(tokens, places, torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    logprobs = torch.log_softmax(model.logits(hidden), -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    return logprobs[torch.tensor(trained[1:])].sum().item()


def moved_model(tiny, seed: int):
    """With adapters that are not what they start from, and in training mode with dropout."""
    model = load_model(tiny.model)
    prepare_trainable(model, LoraOptions(lora_rank=3, lora_dropout=0.5), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.2, generator=generator)
    return model.train()


@pytest.mark.parametrize("seed", [4, 3], ids=["above 0", "held at 0"])
def test_the_divergence_is_the_mean_over_the_group_and_has_no_gradient(tiny, seed):
    model = moved_model(tiny, seed)
    both = MismatchedStore(stored(tiny), 128)
    examples = [both.example(i) for i in (3, 1, 8)]
    ours = stage()
    ours.prepare(model, [collate(examples[:2]), collate([]), collate(examples[2:])])
    assert model.training and not ours.kl.requires_grad
    found, _ = ours.loss(model.eval(), collate(examples))
    found.backward()
    touched = [parameter.grad.abs().max() for parameter in model.parameters() if parameter.requires_grad]
    assert min(touched) > 0

    start = load_model(tiny.model).double()
    model.double()

    def ratio(example, number: int) -> float:
        span = example.segments[number]
        arrays = example.tokens[span], example.trained[span]
        return logprob(model, *arrays) - logprob(start, *arrays)

    with torch.no_grad():
        mean = np.mean([ratio(example, 1) for example in examples])
        assert abs(mean) > 0.05 and (mean > 0) == (seed == 4)
        kl = max(mean, 0)
        expected = sum(
            1 - torch.tensor(0.1 * (ratio(e, 0) - kl) * (1 if e.tag else -1)).sigmoid().item()
            for e in examples
        )
    assert ours.kl.item() == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_bcos_baseline_is_the_mean_reward_of_all_answers_so_far(tiny):
    model, start, ours = moved_model(tiny, 4), load_model(tiny.model), stage("bco", beta=0.3)
    examples = [stored(tiny).example(i) for i in (3, 1, 8, 2, 5)]
    ours.prepare(model, [collate(examples[:2]), collate(examples[2:3])])
    ours.prepare(model, [collate(examples[3:])])
    with torch.no_grad():
        model.eval()
        rewards = [
            0.3 * (logprob(model, e.tokens, e.trained) - logprob(start, e.tokens, e.trained))
            for e in examples
        ]
        found, _ = ours.loss(model, collate(examples))
    total, number = ours.rewards.tolist()
    assert number == 5 and abs(total) > 0.05 and total == pytest.approx(sum(rewards), rel=1e-3)
    signs = [1 if example.tag else -1 for example in examples]
    margins = torch.tensor([sign * (reward - total / 5) for sign, reward in zip(signs, rewards)])
    assert found.item() == pytest.approx(-F.logsigmoid(margins).sum().item(), rel=1e-4)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_mean_logits_are_those_of_the_head_as_it_is_now(tiny, target):
    """That of a frozen head is worked out once; one that trains moves."""
    model, ours = load_model(tiny.model), stage("apo_zero_unpaired")
    prepare_trainable(
        model, LoraOptions(lora_rank=3, lora_target=(target,)), torch.Generator().manual_seed(1)
    )
    batch = collate([stored(tiny).example(i) for i in (0, 1, 5)])
    found = []
    for _ in range(2):
        with torch.no_grad():
            metrics = ours.loss(model, batch)[1]
            logits = model.logits(model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen))
        found.append(sum(metrics[f"logits/{kind}"][0].item() for kind in ("chosen", "rejected")))
        assert found[-1] == pytest.approx(logits[batch.label_rows].mean(1).sum().item(), rel=1e-4)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.data += 0.1
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired", "bco"])
def test_a_batch_without_rows_has_loss_zero_and_gradients_of_zero(tiny, loss):
    model = load_model(tiny.model).train()
    prepare_trainable(model, LoraOptions(lora_rank=3), torch.Generator().manual_seed(1))
    ours = stage(loss)
    ours.prepare(model, [collate([])])
    value, metrics = ours.loss(model, collate([]).rounded(32))
    value.backward()
    assert value == 0 and all(metric.abs().sum() == 0 for metric in metrics.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "keys",
    [
        {"kto_loss": "apo_zero_unpaired", "desirable_weight": 1.5, "pref_ftx": 0.1},
        {"kto_loss": "bco", "undesirable_weight": 0.5, "packing": True, "cutoff_len": 64},
        {"streaming": True, "max_steps": 4, "num_train_epochs": None},
        {"streaming": True, "packing": True, "max_steps": 4, "kto_beta": 0.5, "finetuning_type": "full"},
    ],
)
def test_every_loss_trains_stored_streamed_and_packed(tiny, keys):
    name = "-".join(map(str, keys.values()))
    assert kto(tiny, name, **keys) == 0
    losses = list(tiny.losses(name).values())
    assert np.isfinite(losses).all() and len(set(losses)) > 1


def test_a_stream_pairs_each_row_with_the_one_that_is_drawn_next(tiny):
    """In file order (a buffer of one row) the first update is that of the stored data."""
    keys = {"max_steps": 4, "num_train_epochs": None, "per_device_train_batch_size": 12, "pref_beta": 3.0}
    assert kto(tiny, "stored", **keys) == 0
    assert kto(tiny, "in order", **keys, streaming=True, buffer_size=1) == 0
    assert tiny.losses("in order") == pytest.approx(tiny.losses("stored"), rel=1e-3)


def test_bcos_mean_reward_survives_a_stop(tiny):
    keys = stage_keys(
        tiny, "kto", kto_loss="bco", pref_beta=0.5, num_train_epochs=3, per_device_train_batch_size=3
    )
    halves(tiny, "bco", 5, **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kto_chosen_weight": -1}, "kto_chosen_weight: -1.0 must be 0 or more"),
        ({"kto_chosen_weight": 0, "kto_rejected_weight": 0}, "nothing is learned"),
        ({"kto_loss": "dpo"}, "kto_loss"),
        ({"dataset": "pairs"}, "pairs of answers"),
        ({"dataset": "dialogues"}, "kto_tag"),
        ({"max_samples": 1}, "at least 2 questions"),
    ],
)
def test_what_cannot_be_is_refused(tiny, keys, words, capsys):
    assert kto(tiny, "refused", **keys) == 2
    assert words in capsys.readouterr().err
