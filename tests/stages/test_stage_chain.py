"""Stages one after another: which adapters are merged, which trains on, what the reference is, which head is
found."""

import json

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import all_stages, held_out, stage_keys, write_stage_data
from tiny_runs import assert_same_weights, tiny_runs

import chat
import export


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """With `sft`, an adapter on the model, and `second`, one on top of it."""
    with tiny_runs(tmp_path_factory.mktemp("chain")) as made:
        write_stage_data(made)
        assert made.train("sft", **stage_keys(made, "sft", learning_rate=3e-2)) == 0
        on_top = {"adapter_name_or_path": made.folder / "sft", "create_new_adapter": True}
        assert made.train("second", **stage_keys(made, "sft", lora_rank=4, seed=3, **on_top)) == 0
        yield made


@pytest.fixture(scope="module")
def merged(tiny):
    """The model with `sft` in its weights."""
    words = [f"model_name_or_path={tiny.model}", f"adapter_name_or_path={tiny.folder / 'sft'}"]
    assert export.main([*words, f"export_dir={tiny.folder / 'merged'}"]) == 0
    return tiny.folder / "merged"


def both(tiny) -> str:
    return f"{tiny.folder / 'sft'},{tiny.folder / 'second'}"


@pytest.mark.parametrize("stage", all_stages())
def test_all_but_the_last_adapter_are_merged_and_the_last_trains_on(tiny, merged, stage):
    keys = stage_keys(tiny, stage, max_steps=3)
    assert tiny.train(f"{stage}-chained", adapter_name_or_path=both(tiny), **keys) == 0
    last = {"model_name_or_path": merged, "adapter_name_or_path": tiny.folder / "second"}
    assert tiny.train(f"{stage}-direct", **keys, **last) == 0
    assert_same_weights(tiny.weights(f"{stage}-chained"), tiny.weights(f"{stage}-direct"), tolerance=1e-5)
    assert tiny.weights(f"{stage}-chained").keys() == tiny.weights("second").keys()
    assert any(
        not tensor.equal(tiny.weights("second")[name])
        for name, tensor in tiny.weights(f"{stage}-chained").items()
    )


@pytest.mark.parametrize("stage", all_stages())
def test_a_new_adapter_starts_on_the_merge_of_all(tiny, merged, stage):
    keys = stage_keys(tiny, stage, max_steps=2, create_new_adapter=True, lora_rank=2)
    assert tiny.train(f"{stage}-new", adapter_name_or_path=both(tiny), **keys) == 0
    words = [f"model_name_or_path={merged}", f"adapter_name_or_path={tiny.folder / 'second'}"]
    everything = tiny.folder / f"{stage}-everything"
    assert export.main([*words, f"export_dir={everything}"]) == 0
    keys |= {"create_new_adapter": False, "model_name_or_path": everything}
    assert tiny.train(f"{stage}-on-merge", **keys) == 0
    assert_same_weights(tiny.weights(f"{stage}-new"), tiny.weights(f"{stage}-on-merge"), tolerance=1e-5)


@pytest.mark.parametrize("stage", all_stages("pt", "sft", "rm", "orpo", "ppo", "grpo"))
def test_the_reference_lacks_the_adapter_that_trains_and_has_those_that_are_merged(tiny, stage, capsys):
    """Rewards are beta (policy - reference): before the first update those of a new adapter are 0."""
    keys = stage_keys(tiny, stage, max_steps=1, adapter_name_or_path=tiny.folder / "sft")
    assert tiny.train(f"{stage}-anew", create_new_adapter=True, **keys) == 0
    (first,) = tiny.log(f"{stage}-anew")
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    capsys.readouterr()
    assert tiny.train(f"{stage}-on", **keys) == 0
    (on,) = tiny.log(f"{stage}-on")
    assert abs(on["rewards/chosen"]) > 1e-3
    assert (
        "create_new_adapter=true" in capsys.readouterr().out
    )  # says what the reference is, and the other choice


def test_an_adapter_without_those_it_was_trained_on_is_refused_with_the_way_out(tiny, merged, capsys):
    keys = stage_keys(tiny, "dpo", max_steps=1)
    assert tiny.train("bare", adapter_name_or_path=tiny.folder / "second", **keys) == 2
    assert f"adapter_name_or_path={both(tiny)}" in capsys.readouterr().err
    keys |= {"model_name_or_path": merged, "adapter_name_or_path": tiny.folder / "second"}
    assert tiny.train("on-merged", **keys) == 0


def test_a_reward_model_goes_on_with_its_value_head(tiny):
    keys = stage_keys(tiny, "rm", adapter_name_or_path=tiny.folder / "sft")
    assert tiny.train("rm", **keys) == 0
    keys |= {"adapter_name_or_path": tiny.folder / "rm", "learning_rate": 0, "max_steps": 1}
    assert tiny.train("rm-again", **keys) == 0
    heads = [load_file(tiny.folder / name / "value_head.safetensors") for name in ("rm", "rm-again")]
    assert_same_weights(*heads)


@pytest.mark.parametrize("new", [False, True], ids=["the adapter trains on", "a new adapter"])
def test_from_sft_over_a_reward_model_to_ppo_and_chat(tiny, new, capsys):
    """The reward of the first draw is what the reward model says of these texts."""
    start = {"adapter_name_or_path": tiny.folder / "sft", "create_new_adapter": new}
    name = "new" if new else "on"
    assert tiny.train(f"{name}-rm", **stage_keys(tiny, "rm", **start)) == 0
    keys = stage_keys(tiny, "ppo", reward_file=None, reward_model=tiny.folder / f"{name}-rm", max_steps=3)
    assert tiny.train(f"{name}-ppo", **keys, **start, **held_out("ppo")) == 0
    asked = ["prompt=the hammer", "max_new_tokens=4", "template=chatml", f"model_name_or_path={tiny.model}"]
    chain = f"{tiny.folder / 'sft'},{tiny.folder / f'{name}-ppo'}" if new else tiny.folder / f"{name}-ppo"
    capsys.readouterr()
    assert chat.main([*asked, f"adapter_name_or_path={chain}"]) == 0, capsys.readouterr().err


def test_chat_with_two_adapters_says_what_their_merge_says(tiny, merged, capsys):
    asked = ["prompt=the hammer sings", "max_new_tokens=12", "template=chatml", "do_sample=false"]
    answers = []
    for model, adapters in ((tiny.model, both(tiny)), (merged, tiny.folder / "second"), (tiny.model, None)):
        words = [f"model_name_or_path={model}"] + ([f"adapter_name_or_path={adapters}"] if adapters else [])
        assert chat.main([*words, *asked]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_merging_two_adapters_gives_the_sum_of_their_updates(tiny, tmp_path):
    words = [
        f"model_name_or_path={tiny.model}",
        f"adapter_name_or_path={both(tiny)}",
        f"export_dir={tmp_path / 'out'}",
    ]
    assert export.main(words) == 0
    found, expected = load_file(tmp_path / "out/model.safetensors"), tiny.weights("model")
    for name in ("sft", "second"):
        adapter, config = (
            tiny.weights(name),
            json.loads((tiny.folder / name / "adapter_config.json").read_text()),
        )
        scale = config["lora_alpha"] / config["r"]
        for key, tensor in adapter.items():
            if key.endswith("lora_A.weight"):
                weight = key.removeprefix("base_model.model.").replace("lora_A.", "")
                update = adapter[key.replace("lora_A", "lora_B")].double() @ tensor.double()
                expected[weight] = expected[weight].double() + scale * update
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=1e-6)
