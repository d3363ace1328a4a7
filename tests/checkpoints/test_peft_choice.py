"""What an adapter_config.json chooses, by name, end, layer or pattern: as peft chooses and scales it."""

import json

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from test_peft_parity import assert_close, bases, logits_of, their_adapter, their_model

from checkpoints.huggingface import load_model
from checkpoints.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, _by_pattern, is_target, load_adapter
from lora import lora_layers
from options.errors import UserError

assert bases  # a fixture
PARTS = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
LINEARS = [f"model.layers.{layer}.{part}" for layer in (0, 1, 2, 10, 11) for part in PARTS] + ["lm_head"]
CHOICES = {
    "ends": {"target_modules": ["q_proj", "down_proj"]},
    "no end, a part of a word": {"target_modules": ["proj", "k_proj"]},
    "a whole name": {"target_modules": ["model.layers.1.mlp.up_proj", "lm_head"]},
    "a middle is not an end": {"target_modules": ["layers.1.mlp", "mlp.up_proj"]},
    "regex": {"target_modules": r"model\.layers\.1\.(mlp|self_attn)\.[a-z]+_proj"},
    "regex that fits no whole name": {"target_modules": r"layers\.1\.mlp\.up_proj"},
    "regex with a flag": {"target_modules": r"(?i).*Q_PROJ"},
    "excluded ends": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
    "excluded regex": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    "excluded regex that fits no whole name": {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [1, 11]},
    "layer 0": {"target_modules": ["v_proj"], "layers_to_transform": 0},
    "no layer": {"target_modules": ["v_proj"], "layers_to_transform": []},
    "layers of a pattern": {
        "target_modules": ["v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layers of patterns": {
        "target_modules": ["v_proj"],
        "layers_to_transform": [0, 10],
        "layers_pattern": ["blocks", "model.layers"],
    },
    "layers of another pattern": {
        "target_modules": ["v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "h",
    },
    "a whole name whatever the layers": {
        "target_modules": ["model.layers.2.mlp.up_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "saved whole": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp", "lm_head"]},
    "saved whole by a middle": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1"]},
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_linears_that_peft_chooses(case):
    theirs = peft.LoraConfig(task_type="CAUSAL_LM", **CHOICES[case])
    expected = {name for name in LINEARS if check_target_module_exists(theirs, name)}
    assert {name for name in LINEARS if is_target(CHOICES[case], name)} == expected


PATTERNS = ["q_proj", "proj", r"layers\.1\..*", r"^layers\.0\.self_attn\.q_proj", r"^model\.layers\.0\..*"]
PATTERNS += [
    r"layers.1.mlp.up_proj",
    r".*q_proj$",
    "self_attn",
    r"(q|v)_proj",
    "lm_head",
    r"\d+.mlp.down_proj",
]
PATTERNS += ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_value_that_peft_gives_a_linear(pattern):
    for name in LINEARS:
        expected = {pattern: 100}.get(get_pattern_key([pattern], name), 16)
        settings = {"lora_alpha": 16, "alpha_pattern": {pattern: 100}}
        assert _by_pattern(settings, "alpha_pattern", "lora_alpha", name) == expected, name


def test_the_first_pattern_that_fits_counts():
    patterns = {"v_proj": 1, "q_proj": 2, "layers.1.self_attn.q_proj": 3}
    settings = {"r": 4, "rank_pattern": patterns}
    found = [_by_pattern(settings, "rank_pattern", "r", name) for name in LINEARS[7:10]]
    assert found == [patterns.get(get_pattern_key(patterns, name), 4) for name in LINEARS[7:10]] == [2, 4, 1]


def saved(base, folder, changes=None, **settings):
    """A peft adapter of random weights, its configuration edited afterwards."""
    their_adapter(base, target_modules=["q_proj", "up_proj"], **settings).save_pretrained(folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | (changes or {})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


EDITS = {
    "alpha 0": {"lora_alpha": 0},
    "alpha 0.0 of some": {"alpha_pattern": {"q_proj": 0.0}},
    "alpha below 0": {"lora_alpha": -4.5},
    "anchored at layers": {"alpha_pattern": {r"^layers\.0\.self_attn\.q_proj": 100}},
    "layers left out": {"layers_to_transform": [0, 2]},
    "modules left out": {"target_modules": ["q_proj"]},
    "modules excluded": {"exclude_modules": ["layers.1.mlp.up_proj"]},
    "names of nothing": {"target_modules": ["q_proj", "up_proj", "query_key_value"]},
    "names of nothing to save": {"modules_to_save": ["classifier", "score"]},
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_configuration_means_what_it_means_to_peft(case, bases, tmp_path, capsys):
    base = bases("llama-biases")
    saved(base, tmp_path, EDITS[case])
    ours = load_model(base)
    load_adapter(ours, tmp_path)
    assert_close(
        logits_of(ours), logits_of(peft.PeftModel.from_pretrained(their_model(base), tmp_path).eval())
    )
    left_out = "does not choose" in capsys.readouterr().err
    assert left_out == ("left out" in case or "excluded" in case)


def test_what_is_saved_whole_may_be_half_a_block(bases, tmp_path):
    base = bases("llama-biases")
    saved(base, tmp_path, modules_to_save=["layers.1.mlp"])
    ours = load_model(base)
    load_adapter(ours, tmp_path)
    assert_close(
        logits_of(ours), logits_of(peft.PeftModel.from_pretrained(their_model(base), tmp_path).eval())
    )
    whole = [name for name, p in ours.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert len(whole) == 6 and all(name.startswith("layers.1.mlp.") for name in whole)
    assert "layers.1.mlp.up_proj" not in lora_layers(ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r is 0, expected a whole number from 1"),
        ({"r": 4.0}, "r is 4.0, expected a whole number"),
        ({"rank_pattern": {"q_proj": 0.0}}, "of .*q_proj r is 0.0, expected a whole number"),
        ({"rank_pattern": {"q_proj": True}}, "of .*q_proj r is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"alpha_pattern": {"q_proj": None}}, "of .*q_proj lora_alpha is None"),
        ({"rank_pattern": 0}, "rank_pattern is 0, expected an object"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no pattern"),
        ({"alpha_pattern": {"x{99999999999}": 4}}, "alpha_pattern: 'x.*' is no pattern"),
        ({"alpha_pattern": {"no_such": float("nan")}}, "nan"),
        ({"layers_to_transform": [0], "layers_pattern": "["}, r"layers_pattern: '\[' is no pattern"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1', expected a number from 0 to 1"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"layers_to_transform": [True]}, "layers_to_transform is"),
        ({"layers_to_transform": [0.0]}, "layers_to_transform is"),
        ({"use_dora": "false"}, "use_dora is 'false', expected true or false"),
        ({"use_rslora": 0}, "use_rslora is 0, expected true or false"),
        ({"target_modules": 3}, "target_modules is 3, expected text or a list of names"),
        (
            {"target_modules": ["q_proj", "up_proj", "v_proj"]},
            "has no tensors of .*v_proj and 2 more linears",
        ),
        ({"target_modules": ["v_proj"]}, "has no tensors of"),
        ({"target_modules": r".*(q_proj"}, "target_modules: .* is no pattern"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1', expected"),
        ({"layers_to_transform": [7]}, "does not choose"),
        ({"modules_to_save": "norm"}, "modules_to_save is 'norm', expected a list of names"),
    ],
)
def test_numbers_and_names_of_another_kind_are_refused(changes, message, bases, tmp_path):
    base = bases("llama-biases")
    saved(base, tmp_path, changes)
    with pytest.raises(UserError, match=message):
        load_adapter(load_model(base), tmp_path)


def test_tensors_that_are_no_numbers_are_refused(bases, tmp_path):
    base = bases("llama-biases")
    saved(base, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match=f"tensor {name} holds NaN"):
        load_adapter(load_model(base), tmp_path)
