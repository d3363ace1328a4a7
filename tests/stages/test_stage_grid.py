"""Every stage with every tuning method through the command line, and what cannot be combined."""

import math
import re
import sys
import typing

import pytest
from stage_runs import (
    METHODS,
    PAIRED,
    all_stages,
    data_of,
    held_out,
    stage_keys,
    value_head,
    write_stage_data,
)
from tiny_runs import assert_same_weights, tiny_runs

import chat
import export
from stages import STAGES, WRITES
from training.options import TrainOptions


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("grid")) as made:
        write_stage_data(made)
        yield made


@pytest.mark.parametrize("stage", typing.get_args(typing.get_type_hints(TrainOptions)["stage"]))
def test_the_value_of_stage_is_the_file_that_defines_it(stage):
    defined = [name for name, value in vars(sys.modules[f"stages.{stage}"]).items() if value is STAGES[stage]]
    assert STAGES[stage].__module__ == f"stages.{stage}" and defined == [STAGES[stage].__name__]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", all_stages())
def test_a_stage_trains_logs_evaluates_and_saves(tiny, stage, method):
    name = f"{stage}-{method}"
    keys = stage_keys(tiny, stage, **METHODS[method], **held_out(stage))
    assert tiny.train(name, max_steps=2, do_train=True, do_eval=True, **keys) == 0
    kind, log = STAGES[stage], tiny.log(name)
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["current_steps"] for entry in steps] == [1, 2]
    for entry in steps:
        assert math.isfinite(entry["loss"]) and entry["grad_norm"] > 0
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float))
        if stage not in WRITES:  # these log what was written, and evaluate other texts
            assert entry.keys() >= set(kind.evaluation_names) - {"perplexity"}
    results = tiny.results(name)
    measured = [f"eval_{metric}" for metric in kind.evaluation_names]
    assert all(math.isfinite(results[metric]) for metric in measured)
    evaluated = next(entry for entry in log if measured[0] in entry)  # after step 2, like the one at the end
    assert {metric: evaluated[metric] for metric in measured} == {
        metric: results[metric] for metric in measured
    }
    folder = tiny.folder / name
    assert (folder / "adapter_model.safetensors").exists() == ("lora" in method)
    assert value_head(folder) == kind.has_value_head
    start = tiny.weights("model")
    if "lora" in method:
        assert any(tensor.any() for key, tensor in tiny.weights(name).items() if "lora_B" in key)
    else:
        weights = tiny.weights(name)
        changed = {key for key in start if not weights[key].equal(start[key])}
        assert changed
        if method == "freeze":
            assert all("layers.1." in key for key in changed)


@pytest.mark.parametrize("stage", all_stages())
def test_what_a_stage_trained_is_asked_and_merged_from_its_folder_alone(tiny, stage, tmp_path, capsys):
    run = tiny.folder / f"asked-{stage}"
    assert tiny.train(run.name, max_steps=1, **stage_keys(tiny, stage)) == 0
    config = run / "run_config.yaml"
    capsys.readouterr()
    asked = ["prompt=the hammer", "max_new_tokens=4", "template=chatml"]
    assert chat.main([f"model_name_or_path={tiny.model}", f"adapter_name_or_path={run}", *asked]) == 0
    assert chat.main([str(config), f"adapter_name_or_path={run}", *asked]) == 0, capsys.readouterr().err
    merged = tmp_path / "merged"
    words = [f"adapter_name_or_path={run}", f"export_dir={merged}"]
    assert export.main([str(config), *words]) == 0, capsys.readouterr().err
    assert chat.main([f"model_name_or_path={merged}", *asked]) == 0


@pytest.mark.parametrize("stage", all_stages())
def test_a_run_can_be_planned(tiny, stage, capsys):
    assert tiny.train(f"plan-{stage}", plan=True, **stage_keys(tiny, stage)) == 0
    said = capsys.readouterr().out
    assert "plan for a micro-batch of" in said and "tokens/s" in said
    assert not (tiny.folder / f"plan-{stage}").exists()


@pytest.mark.parametrize(("stage", "answers"), [("ppo", 1), ("grpo", 3)])
def test_a_plan_counts_the_texts_that_the_model_writes(tiny, stage, answers, capsys):
    tokens = []
    for longest in (6, 38):
        assert tiny.train("plan", plan=True, **stage_keys(tiny, stage, max_new_tokens=longest)) == 0
        said = capsys.readouterr().out
        tokens.append(int(re.search(r"micro-batch of ([0-9,]+) tokens", said)[1].replace(",", "")))
        assert "in which the model writes" in said
    assert tokens[1] - tokens[0] == 32 * 4 * answers  # 4 prompts in a micro-batch


def test_a_plan_counts_a_second_model_only_where_one_is_held(tiny, capsys):
    def parts(stage: str, **keys) -> list[str]:
        assert tiny.train("plan", plan=True, **stage_keys(tiny, stage, **keys)) == 0
        return re.findall(r"^  (reference|reward model) ", capsys.readouterr().out, re.MULTILINE)

    assert (
        parts("ppo") == parts("dpo", finetuning_type="full") == []
    )  # adapters are switched off; computed before
    assert parts("ppo", finetuning_type="full") == ["reference"]
    assert parts("grpo", finetuning_type="full") == []
    assert parts("grpo", ref_model=tiny.model, beta=0.1) == ["reference"]
    judged = {"reward_file": None, "reward_model": tiny.model, "reward_model_type": "full"}
    assert parts("ppo", **judged) == ["reward model"]


@pytest.mark.parametrize("stage", all_stages())
def test_a_seed_fixes_a_run(tiny, stage):
    keys = stage_keys(tiny, stage, max_steps=2)
    for name in ("first", "second"):
        assert tiny.train(f"{stage}-{name}", **keys) == 0
    assert_same_weights(tiny.weights(f"{stage}-first"), tiny.weights(f"{stage}-second"))
    assert tiny.train(f"{stage}-other", seed=1, **keys) == 0
    assert any(
        not tensor.equal(tiny.weights(f"{stage}-other")[key])
        for key, tensor in tiny.weights(f"{stage}-first").items()
    )


@pytest.mark.parametrize("stage", all_stages())
@pytest.mark.parametrize("method", ["full", "freeze"])
def test_quantised_weights_are_trained_by_adapters_alone(tiny, stage, method, capsys):
    keys = stage_keys(tiny, stage, **METHODS[method], quantization_bit=4)
    assert tiny.train(f"refused-{stage}", **keys) == 2
    assert "quantization_bit" in capsys.readouterr().err


@pytest.mark.parametrize("stage", all_stages("ppo", "grpo"))
def test_data_of_another_kind_is_refused_by_name(tiny, stage, capsys):
    wrong = "dialogues" if stage in (*PAIRED, "kto") else "pairs"
    assert tiny.train(f"wrong-{stage}", **stage_keys(tiny, stage, dataset=wrong)) == 2
    said = capsys.readouterr().err
    assert f"dataset '{wrong}'" in said and stage in said and data_of(stage) != wrong
