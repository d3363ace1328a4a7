"""PPO's advantages, returns, losses and controller are those of trl 0.7.11 (written out here in float64) and
of hand numbers; a draw is exact to resume, to replay and to evaluate beside."""

import math

import pytest
import torch
from tiny_runs import assert_same_weights, tiny_runs
from torch import Tensor

from checkpoints.huggingface import load_model
from checkpoints.safetensors_files import read_plain
from checkpoints.trainable import prepare_trainable
from checkpoints.value_head import ValueHead
from generation.generate import Completion
from generation.sampling import GenerateOptions
from lora import LoraOptions, lora_off
from parallel.world import World
from pipeline.batch import collate
from stages import ppo
from stages import stage as stage_module
from stages.ppo import PPO, KLController, PPOOptions, RunningMoments
from stages.reference import Reference
from stages.rewards import RewardSource
from stages.rollouts import Prompt, clipped_losses, completions_batch
from text.tokenizer import Tokenizer

ALONE = World(0, 1, 0, torch.device("cpu"))


def doubles(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Hand numbers


def test_rewards_advantages_and_returns_of_three_tokens_by_hand():
    rewards = ppo.token_rewards(doubles(0.5, -1.0, 2.0), score=3.0, kl_coef=0.1)
    assert rewards.tolist() == pytest.approx([-0.05, 0.1, 2.8])
    # delta: 2.8 - 0.4 = 2.4; 0.1 + 0.5 * 0.4 - 0.2 = 0.1; -0.05 + 0.5 * 0.2 - 1.0 = -0.95; gamma lambda =
    # 0.25
    advantages = ppo.gae(rewards, doubles(1.0, 0.2, 0.4), gamma=0.5, lam=0.5)
    assert advantages.tolist() == pytest.approx([-0.95 + 0.25 * 0.7, 0.1 + 0.25 * 2.4, 2.4])
    # gamma = lambda = 1: what is still to come, less the value
    assert ppo.gae(rewards, doubles(1.0, 0.2, 0.4), 1.0, 1.0).tolist() == pytest.approx([1.85, 2.7, 2.4])
    assert ppo.gae(doubles(7.0), doubles(2.5), 1.0, 0.95).tolist() == [4.5]


def test_the_clipped_losses_by_hand():
    ratio = doubles(1.5, 1.5, 0.5, 0.5, 1.1)
    losses = clipped_losses(ratio.log(), doubles(2.0, -2.0, 2.0, -2.0, 1.0), 0.2, 0.2)
    assert losses.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, -1.1])
    values = ppo.value_loss(doubles(2.0, 0.1, -1.0), doubles(1.0, 0.0, 0.0), doubles(3.0, 1.0, -1.0), 0.2)
    assert values.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 0.9**2, 0.5 * 0.8**2])


def test_the_kl_coefficient_moves_by_a_fifth_of_texts_to_horizon_at_most():
    controller = KLController(0.2, target=6.0, horizon=10000)
    controller.update(60.0, 100)
    assert controller.value == pytest.approx(0.2 * 1.002)
    controller.update(5.4, 100)
    assert controller.value == pytest.approx(0.2 * 1.002 * 0.999)
    controller.update(-3.0, 5000)
    assert controller.value == pytest.approx(0.2 * 1.002 * 0.999 * 0.9)


def test_whitening_divides_by_the_unbiased_deviation_and_may_keep_the_mean():
    values = doubles(1.0, 2.0, 6.0)
    mean, variance, count = ppo.mean_and_variance(values, ALONE)
    assert (mean, variance, count) == (3.0, 7.0, 3)
    assert ppo.whiten(values, mean, variance).tolist() == pytest.approx(
        [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]
    )
    assert ppo.whiten(values, mean, variance, keep_mean=True).mean().item() == pytest.approx(3.0)
    assert ppo.mean_and_variance(doubles(5.0), ALONE) == (5.0, 0.0, 1)


def test_running_moments_are_those_of_all_scores_so_far():
    scores = torch.randn(23, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 + 1
    moments = RunningMoments()
    for part in scores.split([1, 4, 18]):
        moments.update(*ppo.mean_and_variance(part, ALONE))
    assert moments.mean == pytest.approx(scores.mean().item())
    assert moments.deviation == pytest.approx(scores.std().item())
    assert RunningMoments().deviation == 1.0


# trl 0.7.11, PPOTrainer.compute_rewards, compute_advantages, loss: padded (n, longest), everything in float64


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def trl_advantages(scores, kl, values, mask, kl_coef, whiten_rewards, gamma, lam):
    rewards = -kl_coef * kl
    for row, score in enumerate(scores):
        rewards[row, mask[row].nonzero()[-1]] += score
    values, rewards = values * mask, rewards * mask
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    last, reversed_advantages = 0.0, []
    longest = rewards.shape[1]
    for t in reversed(range(longest)):
        after = values[:, t + 1] if t < longest - 1 else 0.0
        # trl whitens rewards beyond a text's end, too, and carries that back; what is no token has no reward
        # here
        delta = (rewards[:, t] + gamma * after - values[:, t]) * mask[:, t]
        last = delta + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1]).T
    return masked_whiten(advantages, mask), advantages + values


METRICS = (
    *(
        "reward",
        "kl",
        "kl_coef",
        "completions/mean_length",
        "completions/clipped_ratio",
        "policy_loss",
        "value_loss",
    ),
    *("values", "returns", "clip_ratio", "value_clip_ratio", "approx_kl", "skipped"),
)


def trl_loss(logprobs, old, values, old_values, advantages, returns, mask, options):
    clipped = torch.clamp(values, old_values - options.cliprange_value, old_values + options.cliprange_value)
    value = 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)
    ratio = torch.exp(logprobs - old)
    kept = torch.clamp(ratio, 1 - options.cliprange, 1 + options.cliprange)
    return masked_mean(torch.max(-advantages * ratio, -advantages * kept), mask) + options.vf_coef * value


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows = torch.nn.utils.rnn.pad_sequence([part.double() for part in parts], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(part)) for part in parts], batch_first=True)
    return rows, mask.double()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("ppo")) as made:
        (made.folder / "rewards.py").write_text(
            "def words(completions, **others):\n    return [len(text) % 7 - 3.0 for text in completions]\n"
        )
        yield made


def make_stage(tiny, **options) -> PPO:
    tokenizer = Tokenizer.from_folder(tiny.model)
    return PPO(
        PPOOptions(**options),
        GenerateOptions(max_new_tokens=7, temperature=0.7),
        RewardSource(),
        tokenizer=tokenizer,
        stop_ids=(),
        reference=Reference(),
        seed=1,
        world=ALONE,
        group_size=2,
        output_dir=tiny.folder,
    )


def make_model(tiny):
    model = load_model(tiny.model)
    prepare_trainable(model, LoraOptions(lora_rank=3), torch.Generator().manual_seed(1))
    model.v_head = ValueHead(model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return model.train()


def make_texts(lengths=(5, 1, 11, 3)) -> tuple[list[Prompt], list[Completion]]:
    generator = torch.Generator().manual_seed(4)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 700, (count,), generator=generator).tolist()

    prompts = [Prompt(ids(3 + number), "", None, (0, number)) for number in range(len(lengths))]
    return prompts, [Completion(ids(length), "stop", "") for length in lengths]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ppo_whiten_rewards": True},
        {"ppo_score_norm": True, "gamma": 0.9, "lam": 0.7},
        {"init_kl_coef": 0.0},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_a_draw_has_the_advantages_and_returns_of_trl(tiny, options):
    stage, generator = make_stage(tiny, **options), torch.Generator().manual_seed(5)
    prompts, completions = make_texts()
    counts = [len(completion.ids) for completion in completions]
    seen = []
    for _ in range(2):  # the second draw meets the coefficient and the moments of the first
        stage.kl_coef = coefficient = stage.controller.value
        noted = [
            {name: torch.randn(count, generator=generator) for name in ("logprobs", "values", "kl")}
            for count in counts
        ]
        noted[0]["kl"] += 3.0  # a mean sum of KL above 0, so the coefficient moves by less than it may
        stage.controller.target = 1.1 * sum(text["kl"].double().sum().item() for text in noted) / 4
        scores = torch.randn(4, generator=generator)
        seen.append(scores.double())
        flat = {name: torch.cat([text[name] for text in noted]) for name in noted[0]}
        found = stage._taught(flat, counts, scores) | {"score": ppo._at_the_ends(scores, counts)}
        expected = seen[-1]
        if options.get("ppo_score_norm"):
            everything = torch.cat(seen)
            expected = (expected - everything.mean()) / (everything.std() + torch.finfo(torch.float32).eps)
        kl, mask = padded([text["kl"] for text in noted])
        values, _ = padded([text["values"] for text in noted])
        whitens = bool(options.get("ppo_whiten_rewards"))
        advantages, returns = trl_advantages(
            expected,
            kl,
            values,
            mask,
            coefficient,
            whitens,
            options.get("gamma", 1.0),
            options.get("lam", 0.95),
        )
        for row in range(4):
            each = {name: values.split(counts)[row] for name, values in found.items()}
            for name, expected in (("advantages", advantages), ("returns", returns)):
                one = expected[row, : counts[row]].float()
                torch.testing.assert_close(each[name], one, rtol=1e-5, atol=1e-6, msg=name)
            assert each["score"].sum().item() == each["score"][-1].item() == pytest.approx(scores[row].item())
        assert (kl * mask).sum() > 0
        assert stage.controller.value == pytest.approx(
            coefficient * (1 + (1 / 1.1 - 1) * 4 / 10000), rel=1e-8, abs=0
        )


def known_batch(prompts, completions, spread: float = 0.3):
    """A batch, and how far its old numbers are to be from the model's own: enough to clip some of them."""
    generator = torch.Generator().manual_seed(6)
    batch = completions_batch(prompts, completions)
    for name in ("advantages", "returns", "kl", "score", "cut"):
        draws = [torch.randn(len(c.ids), generator=generator) for c in completions]
        batch.per_label[name] = torch.cat(draws)
    return batch, [spread * torch.randn(len(c.ids), generator=generator) for c in completions]


def whole_logprobs(model, batch) -> tuple[Tensor, Tensor]:
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)[batch.label_rows]
    logits = model.logits(hidden) / 0.7  # the temperature of make_stage
    logprobs = logits.log_softmax(-1).gather(1, batch.labels[batch.label_rows][:, None])[:, 0]
    return logprobs, model.v_head(hidden)


def test_the_loss_and_every_gradient_are_those_of_trl(tiny):
    stage, model = make_stage(tiny), make_model(tiny)
    prompts, completions = make_texts()
    batch, noise = known_batch(prompts, completions)
    counts = [len(completion.ids) for completion in completions]
    logprobs, values = whole_logprobs(model, batch)
    batch.per_label["logprobs"] = logprobs.detach() + torch.cat(noise)
    batch.per_label["values"] = values.detach() - torch.cat(noise)
    stage.draws = 1
    loss, metrics = stage.loss(model, batch.rounded(32))
    (loss / stage.weight(batch)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert metrics.keys() == set(METRICS)
    assert 0 < metrics["clip_ratio"][0] < metrics["clip_ratio"][1] == sum(counts)
    model.zero_grad()
    inputs = [logprobs, batch.per_label["logprobs"], values, batch.per_label["values"]]
    inputs += [batch.per_label["advantages"], batch.per_label["returns"]]
    tables = [padded(list(each.split(counts))) for each in inputs]
    expected = trl_loss(*(table for table, _ in tables), tables[0][1], stage.options)
    expected.backward()
    assert loss.item() / sum(counts) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert found.keys() >= {"v_head.summary.weight", "layers.0.self_attn.q_proj.lora_a"}


def test_what_is_noted_of_a_draw_is_of_the_sampling_temperature_and_of_the_state_before_each_token(tiny):
    stage, model = make_stage(tiny), make_model(tiny)
    prompts, completions = make_texts()
    batch = completions_batch(prompts, completions)
    with torch.no_grad():
        logprobs, values = whole_logprobs(model, batch)
        with lora_off(model):
            reference, _ = whole_logprobs(model, batch)
        noted = stage._note(model, stage.batch_of(prompts, completions))
    assert len(noted["values"]) == sum(len(completion.ids) for completion in completions)
    for name, expected in (("logprobs", logprobs), ("values", values), ("kl", logprobs - reference)):
        torch.testing.assert_close(noted[name], expected, rtol=1e-4, atol=1e-5, msg=name)


class ByLength(RewardSource):
    def measure(self, samples):
        return torch.tensor([[len(sample.completion_ids) ** 0.5 - 2] for sample in samples])


@pytest.fixture
def written(monkeypatch):
    """Every model writes what make_texts says; the seeds it would have sampled with, of each call."""
    seeds_of_calls = []

    def write(model, prompts, seeds, *_, **__):
        seeds_of_calls.append(tuple(seeds))
        return make_texts()[1]

    monkeypatch.setattr(stage_module, "roll_out", write)
    return seeds_of_calls


def batches_of_prompts(prompts):
    return [[prompt] for prompt in prompts]


def test_a_draw_pays_the_coefficient_of_its_time_and_its_state_goes_on(tiny, written):
    model, asked = make_model(tiny), batches_of_prompts(make_texts()[0])

    def new_stage():
        stage = make_stage(tiny, ppo_score_norm=True, horizon=20.0, init_kl_coef=0.5)
        stage.reward = ByLength()
        return stage

    def draw(stage):
        groups = list(stage.groups(model, asked, 0))
        assert [id(group[0]) for group in groups[2:]] == [
            id(group[0]) for group in groups[:2]
        ]  # 2 groups, 4 epochs
        assert stage.state()["drawn"] == []  # nothing is left to be made of them
        return [batch.per_label for group in groups[:2] for batch in group]

    stage, twin = new_stage(), new_stage()
    draw(stage)
    changed = stage.controller.value
    assert stage.kl_coef == 0.5 and abs(changed - 0.5) > 0.01
    draw(stage)
    assert stage.kl_coef == changed
    twin.restore(stage.state())
    assert (twin.draws, twin.kl_coef) == (2, changed)
    for mine, other in zip(draw(stage), draw(twin), strict=True):
        assert mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)
    assert stage.state()["moments"] == twin.state()["moments"] and stage.controller == twin.controller
    assert written[2] == written[3] and len({seed for seeds in written for seed in seeds}) == 12


def test_an_evaluation_measures_the_policys_distance_with_seeds_of_its_own(tiny, written):
    stage, model = make_stage(tiny), make_model(tiny)
    stage.reward = ByLength()
    prompts, completions = make_texts()
    found = []
    for stage.draws in (0, 3):
        with torch.no_grad():
            found.append(stage.evaluate(model, iter(batches_of_prompts(prompts)), ALONE))
    assert found[0] == found[1] and written[0] == written[1]
    with torch.no_grad():
        batch = completions_batch(prompts, completions)
        kl = whole_logprobs(model, batch)[0]
        with lora_off(model):
            kl -= whole_logprobs(model, batch)[0]
    assert abs(kl.sum()) > 0.1 and found[0]["kl"] == pytest.approx(kl.sum().item() / 4, rel=1e-4)
    lengths = [len(completion.ids) for completion in completions]
    assert found[0]["reward"] == pytest.approx(sum(n**0.5 - 2 for n in lengths) / 4)
    assert found[0]["completions/mean_length"] == sum(lengths) / 4
    next(stage.groups(model, batches_of_prompts(prompts), 0))
    assert not set(written[0]) & set(written[2])


def test_a_text_whose_mean_ratio_is_too_large_teaches_nothing_even_at_infinity(tiny):
    stage, model = make_stage(tiny), make_model(tiny)
    stage.draws = 1
    prompts, completions = make_texts()

    def gradients(logprobs_change: list[float], prompts, completions) -> tuple[float, dict, Tensor]:
        batch, _ = known_batch(*make_texts())
        changes = [torch.full((len(c.ids),), value) for c, value in zip(completions, logprobs_change)]
        known = {
            name: list(each.split([len(c.ids) for c in make_texts()[1]]))
            for name, each in batch.per_label.items()
        }
        batch = completions_batch(prompts, completions)
        batch.per_label |= {name: torch.cat(each[: len(prompts)]) for name, each in known.items()}
        logprobs, values = whole_logprobs(model, batch)
        batch.per_label["logprobs"] = (logprobs - torch.cat(changes)).detach()
        batch.per_label["values"] = values.detach()
        model.zero_grad()
        loss, metrics = stage.loss(model, batch)
        loss.backward()
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return loss.item(), named, metrics["skipped"]

    whole = gradients([0.1, 0.0, 0.2], prompts[:3], completions[:3])
    for large in (math.log(10.5), 1000.0):  # exp(1000) is infinite
        other = gradients([0.1, 0.0, 0.2, large], prompts, completions)
        assert other[0] == pytest.approx(whole[0], rel=1e-5)
        assert other[2].tolist() == [1, 4] and whole[2].tolist() == [0, 3]
        for name, gradient in whole[1].items():
            torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert gradients([0.1, 0.0, 0.2, math.log(9.5)], prompts, completions)[2].tolist() == [0, 4]


def test_a_batch_without_texts_has_loss_zero_and_gradients(tiny):
    stage, model = make_stage(tiny), make_model(tiny)
    names = ("logprobs", "values", "kl", "returns", "advantages", "score", "cut")
    batch = completions_batch([], [])
    batch.per_label |= {name: torch.zeros(0) for name in names}
    assert stage.weight(batch) == 0 and batch.tokens.equal(collate([]).tokens)
    loss, metrics = stage.loss(model, batch)
    loss.backward()
    assert loss.item() == 0 and all(value.isfinite().all() for value in metrics.values())
    assert model.v_head.summary.weight.grad.abs().sum() == 0


# Runs

KEYS = {
    "stage": "ppo",
    "max_new_tokens": 6,
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    "ppo_epochs": 2,
    "ppo_buffer_size": 2,
    "max_steps": 6,
    "learning_rate": 3e-3,
}


def keys_of(tiny, **keys) -> dict:
    return KEYS | {"reward_file": tiny.folder / "rewards.py"} | keys


def test_replaying_a_draw_makes_the_same_updates_whatever_is_rolled_out_now(tiny):
    assert tiny.train("saved", **keys_of(tiny, ppo_save_draws=True, max_steps=4)) == 0
    files = sorted(path.name for path in (tiny.folder / "saved" / "draws").iterdir())
    assert files == ["draw-1-rank-0.pt"]
    drawn = tiny.folder / "saved" / "draws" / files[0]
    texts = read_plain(drawn)["drawn"]
    assert {"logprobs", "values", "kl", "advantages", "returns"} <= texts[0]["per_label"].keys()
    other = keys_of(tiny, top_p=0.2, max_new_tokens=3, max_steps=4)
    assert tiny.train("replayed", ppo_replay=drawn, **other) == 0
    assert tiny.losses("saved") == tiny.losses("replayed")
    assert_same_weights(tiny.weights("saved"), tiny.weights("replayed"))
    assert tiny.train("rolled out anew", **other) == 0
    assert tiny.losses("saved") != tiny.losses("rolled out anew")


def test_evaluation_changes_no_bit_of_the_training(tiny):
    rows = {"eval_dataset": tiny.folder / "few.json", "per_device_eval_batch_size": 2}
    assert tiny.train("alone", **keys_of(tiny)) == 0
    evaluated = keys_of(tiny, evaluation_strategy="steps", eval_steps=1, do_train=True, do_eval=True, **rows)
    assert tiny.train("beside", **evaluated) == 0
    assert tiny.losses("alone") == tiny.losses("beside")
    assert_same_weights(tiny.weights("alone"), tiny.weights("beside"))
    log = [entry for entry in tiny.log("beside") if "eval_reward" in entry]
    assert len(log) == 6 and all({"eval_kl", "eval_completions/mean_length"} <= entry.keys() for entry in log)
    assert tiny.results("beside")["eval_reward"] == log[-1]["eval_reward"]
    # of a model that has learnt nothing the KL is 0, whatever the rollouts are
    still = keys_of(tiny, learning_rate=0.0, max_steps=1, do_train=True, do_eval=True, **rows)
    assert tiny.train("unlearnt", **still) == 0
    assert tiny.results("unlearnt")["eval_kl"] == pytest.approx(0, abs=1e-4)


def test_warming_up_the_value_head_trains_nothing_else(tiny):
    assert tiny.train("warm", **keys_of(tiny, ppo_value_warmup=1, max_steps=4)) == 0  # one draw
    assert not any(tensor.any() for name, tensor in tiny.weights("warm").items() if "lora_B" in name)
    entries = [entry for entry in tiny.log("warm") if "value_loss" in entry]
    assert entries[-2]["value_loss"] < entries[0]["value_loss"]
    assert tiny.train("warmed", **keys_of(tiny, ppo_value_warmup=1)) == 0  # and half of another
    assert any(tensor.any() for name, tensor in tiny.weights("warmed").items() if "lora_B" in name)


def test_ppo_raises_the_reward(tiny):
    (tiny.folder / "token.py").write_text(
        "def low(completions, completion_ids):\n    return [sum(i < 360 for i in ids) for ids in "
        "completion_ids]\n"
    )
    keys = keys_of(
        tiny,
        reward_file=tiny.folder / "token.py",
        max_steps=80,
        per_device_train_batch_size=19,
        ppo_buffer_size=1,
        ppo_epochs=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=8,
        init_kl_coef=0.01,
        finetuning_type="full",
    )
    assert tiny.train("learns", **keys) == 0
    rewards = [entry["reward"] for entry in tiny.log("learns") if "reward" in entry]
    assert rewards[0] < 3.6 and rewards[-1] > 5  # of 6


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        (
            "def f(completions):\n    return [float('nan') for _ in completions]\n",
            1,
            "expected a finite number",
        ),
        ("def f(completions):\n    return [1.0]\n", 1, "returned 1 numbers for"),
        (None, 2, "reward"),
    ],
    ids=["not a number", "wrong count", "no reward"],
)
def test_rewards_that_cannot_be_used_end_the_run_with_a_reason(tiny, capsys, source, status, said):
    file = tiny.folder / "bad.py"
    if source is not None:
        file.write_text(source)
    keys = keys_of(tiny, reward_file=None if source is None else file)
    assert tiny.train("bad", overwrite_output_dir=True, **keys) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ppo_epochs", 0, "ppo_epochs: 0 must be at least 1"),
        ("ppo_target", -1, "ppo_target: -1.0 must be above 0"),
        ("lam", 2, "lam: 2.0 is not between 0 and 1"),
        ("ppo_replay", "nothing.pt", "nothing.pt: file not found"),
        ("neftune_noise_alpha", 5, "noise would change the probabilities"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny, capsys, key, value, said):
    assert tiny.train("refused", overwrite_output_dir=True, **keys_of(tiny, **{key: value})) == 2
    assert said in capsys.readouterr().err
