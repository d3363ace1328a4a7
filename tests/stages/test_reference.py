"""The reference policy: which one it is, that it never moves, and log-probabilities computed once and
kept."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_runs import assert_same_weights, make_rows, start_ranks, tiny_runs
from transformers import AutoModelForCausalLM

from checkpoints.huggingface import load_model
from checkpoints.peft import prepare_adapters, save_adapter
from checkpoints.trainable import prepare_trainable
from data import default_cache_dir, load_datasets
from lora import LoraOptions, lora_layers
from options import config as configuration
from parallel.world import World
from pipeline.batch import collate
from stages import reference
from stages.reference import Reference, frozen_copy, precompute, start_policy, store_key, weights_key
from templates import get_template
from text.tokenizer import Tokenizer
from training import setup

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("reference")) as made:
        pairs = [
            {"instruction": mine["instruction"], "output": [mine["output"], other["output"] + " no"]}
            for mine, other in zip(make_rows(19), make_rows(19, seed=3))
        ]
        (made.folder / "pairs.json").write_text(json.dumps(pairs))
        (made.folder / "held.json").write_text(json.dumps(pairs[3:8]))
        entry = {"ranking": True}
        info = {name: entry | {"file_name": f"{name}.json"} for name in ("pairs", "held")}
        (made.folder / "dataset_info.json").write_text(json.dumps(info))
        yield made


def dpo(tiny, name: str, **keys) -> int:
    chosen = {
        "stage": "dpo",
        "dataset": "pairs",
        "dataset_dir": tiny.folder,
        "per_device_train_batch_size": 3,
    }
    return tiny.train(name, **(chosen | keys))


def store_of(tiny, name: str = "pairs", cutoff_len: int = 128):
    options = configuration.load(
        tiny.words("x", dataset=name, dataset_dir=tiny.folder, cutoff_len=cutoff_len, stage="dpo"),
        setup.SECTIONS,
        program="",
        description="",
    )[setup.DataOptions]
    tokenizer = Tokenizer.from_folder(tiny.model)
    return load_datasets(options, get_template("chatml", None, None), tokenizer, "dpo", seed=1).train


def prepared(tiny, **options):
    model = load_model(tiny.model)
    prepare_trainable(model, LoraOptions(**options), torch.Generator().manual_seed(1), torch.float32)
    return model.train()


def shake(model) -> None:
    """Something like training."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def by_hand(model, example) -> list[float]:
    """Log-probability of each segment's trained tokens in float64, one segment at a time."""
    model = frozen_copy(model).double()
    sums = []
    for span in example.segments:
        tokens = torch.tensor(example.tokens[span], dtype=torch.int64)
        places = torch.arange(len(tokens), dtype=torch.int32)
        hidden = model(tokens, places, torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
        logprobs = torch.log_softmax(model.logits(hidden), -1)[:-1].gather(1, tokens[1:, None])[:, 0]
        sums.append(logprobs[torch.tensor(example.trained[span][1:])].sum().item())
    return sums


@pytest.mark.parametrize(
    "options",
    [
        {"lora_rank": 3, "lora_dropout": 0.5},
        {"lora_rank": 3, "use_dora": True},
        {"lora_rank": 3, "lora_target": ("all", "lm_head")},
        {"lora_rank": 3, "additional_target": ("norm", "lm_head")},
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "num_layer_trainable": 1},
    ],
    ids=["lora", "dora", "adapted head", "modules in full", "full", "freeze"],
)
def test_the_reference_is_the_start_whatever_has_been_trained_since(tiny, options):
    model, store = prepared(tiny, **options), store_of(tiny)
    examples = [store.example(i) for i in range(4)]
    expected = torch.tensor([by_hand(load_model(tiny.model), example) for example in examples])
    kept = Reference(start_policy(model, live=True))
    shake(model)
    batch = collate(examples).rounded(32)
    found = kept.sums(model, batch)
    torch.testing.assert_close(found.view(2, -1).T, expected, rtol=1e-5, atol=1e-4)
    assert model.training and not found.requires_grad
    separate = torch.cat([kept.logprobs(model, collate([example])) for example in examples])
    assert sorted(separate.tolist()) == pytest.approx(sorted(kept.logprobs(model, batch).tolist()), abs=1e-4)


def test_a_reference_with_dropout_has_none(tiny):
    model, example = prepared(tiny, lora_rank=3, lora_dropout=0.5), store_of(tiny).example(2)
    shake(model)
    found = Reference(model).sums(None, collate([example]))
    assert model.training and found.tolist() == pytest.approx(by_hand(model, example), rel=1e-5)


def test_a_frozen_copy_shares_what_does_not_train(tiny):
    model = prepared(tiny, finetuning_type="freeze", num_layer_trainable=1)
    copied = dict(frozen_copy(model).named_parameters())
    for name, parameter in model.named_parameters():
        assert (copied[name] is parameter) == (not parameter.requires_grad), name
        assert not copied[name].requires_grad


def test_what_is_computed_ahead_is_what_is_computed_beside(tiny, tmp_path):
    model, store, single = prepared(tiny, lora_rank=3), store_of(tiny), store_of(tiny)
    shake(model)
    precompute(Reference(), model, {"train": store}, 4, tmp_path, ALONE)
    for i in (0, 7, 18):
        batch = collate([single.example(i)])
        assert store.example(i).reference == pytest.approx(Reference().sums(model, batch).tolist(), abs=1e-4)
    carried = collate([store.example(i) for i in (5, 2)])
    expected = [store.example(i).reference[half] for half in (0, 1) for i in (5, 2)]
    assert carried.per_segment["reference"].tolist() == expected
    assert Reference().sums(None, carried) is carried.per_segment["reference"]
    assert Reference(ahead=True).sums(None, collate([])).shape == (0,)
    calls = []  # without it a rank without rows calls the model: the others may need its shares
    model.register_forward_hook(lambda *inputs: calls.append(inputs))
    assert Reference().sums(model, collate([])).shape == (0,) and len(calls) == 1


def test_the_weight_of_tails_enters_the_sums_and_the_key(tiny, tmp_path):
    model, store, plain = prepared(tiny, lora_rank=3), store_of(tiny), store_of(tiny)
    precompute(Reference(), model, {"train": plain}, 4, tmp_path, ALONE)
    precompute(Reference(ld_alpha=0.0), model, {"train": store}, 4, tmp_path, ALONE)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    example = store.example(0)
    counts = [int(example.trained[span].sum()) for span in example.segments]
    longer = counts.index(max(counts))
    assert store.reference[0, 1 - longer] == plain.reference[0, 1 - longer]
    assert store.reference[0, longer] > plain.reference[0, longer]  # the tail is left out


def test_the_key_changes_with_weights_and_tokens_and_nothing_else(tiny):
    model, other = prepared(tiny, lora_rank=3), prepared(tiny, lora_rank=5, lora_target=("q_proj",))
    shake(other)
    start = load_model(tiny.model)
    assert weights_key(model, False) == weights_key(other, False) == weights_key(start, False)
    assert weights_key(model, True) != weights_key(other, True)
    start.layers[1].mlp.down_proj.weight.data[3, 2] += 1e-6
    assert weights_key(model, False) != weights_key(start, False)
    model.runtime.compute_dtype = torch.bfloat16
    assert weights_key(model, False) != weights_key(other, False)
    store = store_of(tiny)
    assert store_key(store) == store_key(store_of(tiny))
    assert store_key(store) != store_key(store_of(tiny, cutoff_len=40))
    assert store_key(store) != store_key(store.select(np.array([*range(5), 6, 5, *range(7, 19)])))
    part = (masked := store_of(tiny)).parts[0]
    part.trained = part.trained.copy()
    part.trained[np.flatnonzero(part.trained)[-1]] = False
    assert store_key(store) != store_key(masked)
    part = (split_elsewhere := store_of(tiny)).parts[0]
    part.splits = part.splits.copy()
    part.splits[4] += 1
    assert store_key(store) != store_key(split_elsewhere)


def cached(tiny) -> list:
    return sorted((default_cache_dir() / "reference").glob("*.safetensors"))


def test_a_second_run_reads_the_cache_and_has_the_same_losses(tiny, capsys):
    keys = {"eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 4}
    assert dpo(tiny, "once", **keys) == 0
    first = capsys.readouterr().out
    assert first.count("computed in") == 2 and "adapters off" in first
    assert dpo(tiny, "twice", **keys, lora_rank=8) == 0
    second = capsys.readouterr().out
    assert second.count("read from") == 2 and "computed in" not in second
    assert tiny.losses("once") == tiny.losses("twice")
    assert tiny.losses("once", "eval_loss") == tiny.losses("twice", "eval_loss")
    assert dpo(tiny, "beside", **keys, precompute_ref_log_probs=False) == 0
    assert "log-probabilities of" not in capsys.readouterr().out
    for step, loss in tiny.losses("beside").items():
        assert tiny.losses("once")[step] == pytest.approx(loss, abs=2e-4)


def test_packing_takes_the_same_numbers(tiny):
    keys = {"learning_rate": 0.0, "num_train_epochs": 1, "packing": True, "cutoff_len": 256}
    assert dpo(tiny, "packed", **keys) == 0
    assert dpo(tiny, "packed-beside", **keys, precompute_ref_log_probs=False) == 0
    for step, loss in tiny.losses("packed").items():
        assert loss == pytest.approx(tiny.losses("packed-beside")[step], abs=1e-5)
        assert loss == pytest.approx(0.693147, abs=1e-5)  # policy = reference


def test_a_file_that_is_damaged_or_of_something_else_is_made_again(tiny, capsys):
    assert dpo(tiny, "whole", num_train_epochs=1) == 0
    files = cached(tiny)
    good = [path.read_bytes() for path in files]
    for path in files:
        path.write_bytes(path.read_bytes()[:-3])
    assert dpo(tiny, "damaged", num_train_epochs=1) == 0
    assert "is damaged" in capsys.readouterr().out
    assert tiny.losses("whole") == tiny.losses("damaged")
    assert dpo(tiny, "other", num_train_epochs=1, cutoff_len=64) == 0
    newest = max(cached(tiny), key=lambda path: path.stat().st_mtime_ns)
    repaired = next(path for path, text in zip(files, good) if path.stat().st_size == len(text))
    shutil.copy(newest, repaired)
    capsys.readouterr()
    assert dpo(tiny, "foreign", num_train_epochs=1) == 0
    assert "of another model or other data" in capsys.readouterr().out
    assert tiny.losses("whole") == tiny.losses("foreign")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resuming_keeps_the_reference_of_the_start(tiny, kind):
    keys = {"finetuning_type": kind, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-2}
    for ahead in (None, False):
        name = f"{kind}-{ahead}"
        assert dpo(tiny, f"{name}-whole", **keys, precompute_ref_log_probs=ahead) == 0
        shutil.copytree(
            tiny.folder / f"{name}-whole" / "checkpoint-5", tiny.folder / f"{name}-parts" / "checkpoint-5"
        )
        log = (tiny.folder / f"{name}-whole" / "trainer_log.jsonl").read_text()
        (tiny.folder / f"{name}-parts" / "trainer_log.jsonl").write_text(log)
        for path in cached(tiny):
            path.unlink()
        assert dpo(tiny, f"{name}-parts", **keys, precompute_ref_log_probs=ahead) == 0
        assert_same_weights(tiny.weights(f"{name}-whole"), tiny.weights(f"{name}-parts"))


def test_another_reference_model_with_adapters_and_few_bits(tiny, capsys):
    other = tiny.make_model("other", seed=4)
    assert tiny.train("adapter", model_name_or_path=other, num_train_epochs=1) == 0
    keys = {"ref_model": other, "num_train_epochs": 1, "learning_rate": 0.0}
    store = store_of(tiny)
    expected = torch.tensor([by_hand(load_model(other), store.example(i)) for i in range(19)])
    reward = {}
    for name, more in {
        "plain": {},
        "beside": {"precompute_ref_log_probs": False},
        "adapted": {"ref_model_adapters": tiny.folder / "adapter"},
        "8 bit": {"ref_model_quantization_bit": 8},
    }.items():
        assert dpo(tiny, f"ref {name}", **keys, **more, per_device_train_batch_size=19) == 0
        logged = tiny.log(f"ref {name}")[-1]
        reward[name] = [
            logged[f"logps/{half}"] - logged[f"rewards/{half}"] / 0.1 for half in ("chosen", "rejected")
        ]
    assert reward["plain"] == pytest.approx(expected.mean(0).tolist(), abs=1e-3)
    assert reward["beside"] == pytest.approx(reward["plain"], abs=1e-3)
    assert abs(reward["adapted"][0] - reward["plain"][0]) > 1
    assert 1e-3 < abs(reward["8 bit"][0] - reward["plain"][0]) < 1


def test_few_updates_compute_the_reference_beside_the_training(tiny, capsys):
    few = {"num_train_epochs": None, "learning_rate": 0.0}
    for steps, ahead, computed in ((2, None, False), (7, None, True), (2, True, True), (7, False, False)):
        keys = few | {"max_steps": steps, "precompute_ref_log_probs": ahead, "finetuning_type": "freeze"}
        keys |= {"num_layer_trainable": 1, "overwrite_cache": True}
        assert dpo(tiny, f"few-{steps}-{ahead}", **keys) == 0
        said = capsys.readouterr().out
        assert ("computed in" in said, "a frozen copy" in said) == (computed, not computed)
        assert tiny.log(f"few-{steps}-{ahead}")[-1]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ref_model_adapters": "somewhere"}, "belongs to ref_model"),
        ({"ref_model": "nowhere"}, "ref_model: no folder nowhere"),
        (
            {"precompute_ref_log_probs": True, "streaming": True, "max_steps": 2},
            "not known before the training",
        ),
        ({"stage": "sft", "ref_model": "nowhere", "dataset": None}, "only dpo, kto, ppo and grpo"),
    ],
)
def test_what_cannot_be_is_refused(tiny, keys, words, capsys):
    assert dpo(tiny, "refused", **keys) == 2
    assert words in capsys.readouterr().err


def test_an_adapter_is_no_reference_model(tiny, capsys):
    assert dpo(tiny, "first", num_train_epochs=1) == 0
    assert dpo(tiny, "second", ref_model=tiny.folder / "first") == 2
    assert "ref_model_adapters=" in capsys.readouterr().err


def test_a_reference_with_another_tokenizer_is_refused(tiny, capsys):
    other = tiny.make_model("stranger", seed=4)
    path = other / "tokenizer.json"
    changed = json.loads(path.read_text())
    vocabulary = changed["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    path.write_text(json.dumps(changed))
    assert dpo(tiny, "stranger-run", ref_model=other) == 2
    assert "has another tokenizer" in capsys.readouterr().err


def test_two_ranks_share_the_work_and_have_the_numbers_of_one(tiny):
    assert dpo(tiny, "one", num_train_epochs=1, per_device_train_batch_size=2) == 0
    expected = [reference.safe_open(path, "pt").get_tensor("logprobs") for path in cached(tiny)]
    for path in cached(tiny):
        path.unlink()
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": tiny.folder, "num_train_epochs": 1}
    words = tiny.words("two", **keys, per_device_train_batch_size=1)
    children = start_ranks(words, tiny.folder / "two.txt")
    assert [child.wait(120) for child in children] == [0, 0], children[0].text() + children[1].text()
    (made,) = cached(tiny)
    assert any(torch.equal(reference.safe_open(made, "pt").get_tensor("logprobs"), one) for one in expected)
    for step, loss in tiny.losses("one").items():
        assert tiny.losses("two")[step] == pytest.approx(loss, abs=1e-5)


def test_adapters_off_needs_no_second_model(tiny):
    model = prepared(tiny, lora_rank=3)
    assert start_policy(model, live=True) is None and lora_layers(model)


@pytest.mark.parametrize("live", [True, False], ids=["live", "ahead"])
@pytest.mark.parametrize("full", [(), ("norm", "lm_head"), ("embed_tokens",)], ids=str)
def test_the_reference_of_a_continued_adapter_is_the_base_whatever_trains_beside_it(
    tiny, tmp_path, live, full
):
    """As in peft's disable_adapter, which LLaMA-Factory takes: modules_to_save are off too."""
    model = prepared(tiny, lora_rank=3, additional_target=full)
    shake(model)
    save_adapter(model, tmp_path / "first", str(tiny.model))
    store = store_of(tiny)
    batch = collate([store.example(i) for i in range(4)]).rounded(32)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.model), tmp_path / "first")
    example = store.example(1)
    span, expected = example.segments[0], load_model(tiny.model)
    with theirs.disable_adapter(), torch.no_grad():
        logits = theirs(torch.tensor(example.tokens[span], dtype=torch.int64)[None]).logits[0]
    tokens, places = torch.tensor(example.tokens[span], dtype=torch.int64), torch.arange(span.stop)
    row = tokens, places.int(), torch.tensor([0, span.stop], dtype=torch.int32), span.stop
    torch.testing.assert_close(expected.logits(expected(*row)), logits, rtol=1e-4, atol=1e-4)

    model = load_model(tiny.model)
    own = prepare_adapters(model, [tmp_path / "first"], LoraOptions(lora_rank=3))
    assert sorted(own) == sorted(f"{name}.weight" for name in full)
    base = Reference(expected.requires_grad_(False)).sums(None, batch)
    assert (Reference(model).sums(None, batch) - base).abs().max() > 0.1
    kept = Reference(start_policy(model, live, own))
    if live:
        shake(model)
    torch.testing.assert_close(kept.sums(model, batch), base, rtol=1e-5, atol=1e-4)
    if not live:  # a key of the cache: the same base has the same numbers
        weights = weights_key(kept.policy or model, adapters=kept.policy is not None)
        assert weights == weights_key(load_model(tiny.model), adapters=True)


def test_dpo_goes_on_with_an_adapter_that_trained_more_than_linears(tiny, capsys):
    keys = {"num_train_epochs": 1, "learning_rate": 1e-2}
    assert dpo(tiny, "more", additional_target="norm", **keys) == 0
    logs = []
    for ahead in (True, False):
        given = {"adapter_name_or_path": tiny.folder / "more", "precompute_ref_log_probs": ahead}
        assert dpo(tiny, f"on-{ahead}", **given, **keys) == 0
        said = capsys.readouterr().out
        assert "reference: the model with its adapters off and its own norm.weight, so without what" in said
        logs.append(tiny.losses(f"on-{ahead}"))
    assert logs[0][1] == pytest.approx(logs[1][1], abs=1e-5)
    # at the start the adapter is not its own reference: the margins are not 0
    assert abs(logs[0][1] - math.log(2)) > 1e-3
