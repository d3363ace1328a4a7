"""Mistakes on the command line of the stages: each ends with one line that names the key and the way out."""

import json
import shutil
import zipfile

import pytest
import torch
from stage_runs import held_out, stage_keys, write_stage_data
from tiny_runs import make_rows, tiny_runs

REWARD = "def reward(completions, **others):\n    {}\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """With `sft` and `rm`, adapters on the model, and `top`, a reward adapter on top of `sft`."""
    with tiny_runs(tmp_path_factory.mktemp("mistakes")) as made:
        write_stage_data(made)
        on_sft = {"adapter_name_or_path": made.folder / "sft", "create_new_adapter": True}
        for name, stage, keys in (("sft", "sft", {}), ("rm", "rm", {}), ("top", "rm", on_sft)):
            assert made.train(name, max_steps=1, **stage_keys(made, stage, **keys)) == 0
        yield made


def refused(tiny, capsys, stage, status=2, **keys) -> str:
    capsys.readouterr()
    assert tiny.train("refused", **stage_keys(tiny, stage, max_steps=1, **keys)) == status
    return capsys.readouterr().err


def test_keys_of_another_stage_are_named(tiny, capsys):
    keys = stage_keys(tiny, "kto", max_steps=1, num_generations=4, simpo_gamma=1, pref_beta=0.2, ppo_epochs=4)
    assert tiny.train("idle", **keys) == 0
    said = capsys.readouterr().out
    assert (
        "note: stage kto does not use simpo_gamma, num_generations\n" in said
    )  # ppo_epochs=4 is the default
    assert tiny.train("margin", **stage_keys(tiny, "dpo", max_steps=1, simpo_gamma=1)) == 0
    assert "does not use simpo_gamma\n" in capsys.readouterr().out
    keys = stage_keys(
        tiny, "dpo", max_steps=1, simpo_gamma=1, pref_loss="simpo", pref_beta=2, dpo_label_smoothing=0.1
    )
    assert tiny.train("margin", overwrite_output_dir=True, **keys) == 0
    assert "note: stage" not in capsys.readouterr().out


def test_a_model_and_an_adapter_in_each_other_s_place(tiny, capsys):
    said = refused(tiny, capsys, "dpo", model_name_or_path=tiny.folder / "sft")
    assert f"model_name_or_path: {tiny.folder / 'sft'} is an adapter" in said
    said = refused(tiny, capsys, "dpo", adapter_name_or_path=tiny.model)
    assert f"adapter_name_or_path: {tiny.model} holds no adapter" in said
    said = refused(tiny, capsys, "ppo", reward_file=None, reward_model=tiny.model)
    assert f"reward_model: {tiny.model} is no adapter" in said and "reward_model_type=full" in said


@pytest.mark.parametrize("key", ["ref_model", "reward_model"])
def test_bits_and_folders_of_other_models_are_refused_before_the_model_is_read(tiny, capsys, key):
    keys = {"ref_model": tiny.model} if key == "ref_model" else {}
    keys |= {"reward_file": None, "reward_model": tiny.model, "reward_model_type": "full"}
    bits = f"{key}_quantization_bit"
    assert f"train.py: {bits}: 7; quantization_method" in refused(tiny, capsys, "ppo", **keys, **{bits: 7})
    said = refused(tiny, capsys, "ppo", **keys | {key: tiny.folder / "nowhere"})
    assert f"{key}: no folder {tiny.folder / 'nowhere'}" in said
    assert "beta" in refused(tiny, capsys, "grpo", ref_model=tiny.model)


def test_the_policy_s_kind_of_quantisation_asks_nothing_of_a_dense_reference(tiny):
    keys = {"ref_model": tiny.model, "quantization_bit": 4, "quantization_method": "hqq", "lora_rank": 4}
    assert tiny.train("mixed", **stage_keys(tiny, "dpo", max_steps=1, **keys)) == 0


def test_a_result_never_takes_the_place_of_what_the_run_is_made_from(tiny, capsys):
    judge = {"reward_file": None, "reward_model": tiny.folder / "rm"}
    keys = {
        "ref_model": ("dpo", {"ref_model": tiny.make_model("held to", seed=3)}),
        "reward_model": ("ppo", judge),
        "adapter_name_or_path": (
            "dpo",
            {"adapter_name_or_path": tiny.folder / "sft", "create_new_adapter": True},
        ),
    }
    for key, (stage, given) in keys.items():
        files = {path: path.read_bytes() for path in given[key].iterdir()}
        capsys.readouterr()
        given |= {"max_steps": 1, "overwrite_output_dir": True}
        assert tiny.train(given[key].name, **stage_keys(tiny, stage, **given)) == 2
        assert (
            f"output_dir: {given[key]} is also {key}, which the result would replace"
            in capsys.readouterr().err
        )
        assert {path: path.read_bytes() for path in given[key].iterdir()} == files
    shutil.copytree(tiny.folder / "rm", tiny.folder / "own")  # trained on in its own place
    own = {"adapter_name_or_path": tiny.folder / "own", "overwrite_output_dir": True, "max_steps": 1}
    assert tiny.train("own", **stage_keys(tiny, "rm", **own)) == 0


def test_adapters_of_another_base(tiny, capsys):
    deep, flat = (tiny.make_model(f"{count} layers", seed=3, num_hidden_layers=count) for count in (3, 1))
    said = refused(tiny, capsys, "dpo", model_name_or_path=deep, adapter_name_or_path=tiny.folder / "sft")
    assert "has no tensors of layers.2." in said and f"trained on {tiny.model}" in said
    judge = {"reward_file": None, "reward_model": tiny.folder / "rm"}
    assert "has no tensors of layers.2." in refused(tiny, capsys, "ppo", model_name_or_path=deep, **judge)
    said = refused(tiny, capsys, "ppo", model_name_or_path=flat, **judge)
    assert "adapts layers.1." in said and "which this model does not have" in said
    like = tiny.make_model("like", seed=3)
    keys = stage_keys(
        tiny, "dpo", max_steps=1, model_name_or_path=like, adapter_name_or_path=tiny.folder / "sft"
    )
    assert tiny.train("on like", **keys) == 0
    assert f"sft was trained on {tiny.model}, and lies on {like} here" in capsys.readouterr().out


def test_a_file_that_is_no_draw_cannot_be_replayed(tiny, capsys):
    files = {name: tiny.folder / name for name in ("text", "archive", "list")}
    files["text"].write_text("1, 2")
    with zipfile.ZipFile(files["archive"], "w") as archive:
        archive.writestr("a", "b")
    torch.save([1, 2], files["list"])
    files["older"] = tiny.folder / "older"  # as it was before a batch had per_label
    torch.save({"draws": 1, "drawn": {"kl_coef": 0.2, "batches": []}}, files["older"])
    for path in files.values():
        said = refused(tiny, capsys, "ppo", ppo_replay=path)
        assert f"ppo_replay: {path}" in said and "draws, which ppo_save_draws=true writes" in said


def test_a_reference_s_adapter_without_those_below_it(tiny, capsys):
    keys = {"ref_model": tiny.model, "ref_model_adapters": tiny.folder / "top"}
    said = refused(tiny, capsys, "dpo", **keys)
    assert "ref_model_adapters" in said and "name them in front of it" in said
    said = refused(tiny, capsys, "dpo", **keys | {"ref_model_adapters": tiny.model})
    assert f"train.py: ref_model_adapters: {tiny.model} holds no adapter" in said
    both = f"{tiny.folder / 'sft'},{tiny.folder / 'top'}"
    assert (
        tiny.train("held", **stage_keys(tiny, "dpo", max_steps=1, **keys | {"ref_model_adapters": both})) == 0
    )


def test_scores_of_a_random_value_head(tiny, capsys):
    keys = {"eval_dataset": "held_pairs", "dataset": None}
    for asked in ({"do_predict": True}, {"do_eval": True}):
        said = refused(tiny, capsys, "rm", **keys, **asked)
        assert "value_head.safetensors" in said and str(tiny.model) in said
        given = {"adapter_name_or_path": tiny.folder / "rm"}
        assert tiny.train("scored", **stage_keys(tiny, "rm", **keys, **asked, **given)) == 0


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_writing_greedily_is_for_predictions_alone(tiny, capsys, stage):
    assert "do_sample=true" in refused(tiny, capsys, stage, do_sample=False)
    asked = {"do_predict": True, "predict_with_generate": True, "do_sample": False, "reward_file": None}
    eval_dataset = held_out(stage)["eval_dataset"]
    assert tiny.train(f"{stage}-said", **stage_keys(tiny, stage, eval_dataset=eval_dataset, **asked)) == 0
    assert "reward" in refused(tiny, capsys, stage, eval_dataset=eval_dataset, do_eval=True, **asked)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit(3)", "(line 2): SystemExit: 3"),
        ("return dict.fromkeys(range(len(completions)), 1.0)", "expected a list of numbers (it is a dict)"),
        ("return '1' * len(completions)", "expected a list of numbers (it is a str)"),
    ],
)
def test_what_a_reward_file_does(tiny, capsys, body, said):
    path = tiny.folder / "wrong.py"
    path.write_text(REWARD.format(body))
    error = refused(tiny, capsys, "grpo", 1, reward_file=path)
    assert f"reward_file: {path}: reward" in error and said in error


def test_weights_and_names_of_reward_functions(tiny, capsys):
    assert "reward_weights" in refused(tiny, capsys, "grpo", reward_weights="inf")
    assert "letters is named twice" in refused(tiny, capsys, "grpo", reward_funcs="letters,letters")


def test_a_ranking_without_its_column(tiny, capsys):
    path = tiny.folder / "stages" / "odd.json"
    path.write_text('[{"instruction": "a"}]')
    info = path.with_name("dataset_info.json")
    before = info.read_text()
    columns = '{"prompt": "instruction", "response": "output"}'
    info.write_text(
        before[:-1] + f', "odd": {{"file_name": "odd.json", "ranking": true, "columns": {columns}}}}}'
    )
    said = refused(tiny, capsys, "dpo", dataset="odd")
    assert f"{path}:1 (row 0): column 'output' is missing; the row has instruction" in said


def test_a_draw_that_does_not_fit_on_the_disk(tiny):
    keys = stage_keys(tiny, "ppo", max_steps=1, ppo_save_draws=True)
    assert tiny.train("roomy", **keys) == 0  # this also fills the cache of tokens
    (draw,) = (tiny.folder / "roomy" / "draws").iterdir()
    assert draw.stat().st_size > (tiny.folder / "roomy" / "run_config.yaml").stat().st_size
    child = tiny.child("full", file_limit=draw.stat().st_size - 1, **keys)
    assert child.wait() == 1
    assert "ppo_save_draws: " in child.text() and "Traceback" not in child.text()
    assert not list((tiny.folder / "full" / "draws").iterdir())


@pytest.mark.parametrize("keys", [{}, {"streaming": True, "num_train_epochs": None, "buffer_size": 4}])
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_prompt_without_room_for_its_answer_is_left_out_before_the_first_step(tiny, capsys, stage, keys):
    rows = make_rows(9, seed=3)
    rows[4]["instruction"] = "sparks " * 150  # more than the model's 512 less max_new_tokens
    (tiny.folder / "stages" / "long.json").write_text(json.dumps(rows))
    keys = {"dataset": tiny.folder / "stages" / "long.json", "cutoff_len": 2048, "max_steps": 3, **keys}
    name = "-".join(["room", stage, *map(str, keys)])
    assert tiny.train(name, **stage_keys(tiny, stage, **keys)) == 0
    said = capsys.readouterr().out
    assert (
        "cutoff_len is 506 here: the model takes 512 tokens with the answer, and max_new_tokens is 6" in said
    )
    if "streaming" not in keys:
        line = next(line for line in said.splitlines() if "prompt longer than cutoff_len" in line)
        assert "long.json:1 (row 4), which has 909 tokens" in line and said.index(line) < said.index(
            "step 1/"
        )


@pytest.mark.parametrize("key", ["reward_model", "ref_model"])
def test_the_smallest_context_of_those_that_read_an_answer_counts(tiny, capsys, key):
    """Before the first step, and before the weights of a small one are missed."""
    small = tiny.make_model(f"small {key}", seed=2, max_position_embeddings=96)
    keys = {"reward_file": None, "reward_model_type": "full"} if key == "reward_model" else {"beta": 0.1}
    keys |= {key: small, "stage": "grpo", "cutoff_len": 2048, "max_steps": 1, "plan": True}
    assert tiny.train(f"context {key}", **stage_keys(tiny, **keys)) == 0
    found = f"the {key} {small} takes 96 tokens with the answer, and max_new_tokens is 6"
    assert f"cutoff_len is 90 here: {found}" in capsys.readouterr().out


def test_new_tokens_that_leave_no_room_for_a_prompt_are_refused(tiny, capsys):
    said = refused(tiny, capsys, "grpo", max_new_tokens=511)
    assert "max_new_tokens: no room for a prompt: the model takes 512 tokens with the answer" in said
