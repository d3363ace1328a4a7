"""config.json: every value is of its kind and in its range before it is used; the rope is read as
transformers reads it, in both spellings, and written for both."""

import json
import math

import pytest
import torch
import transformers

from architectures import config_from_hf
from architectures.config import FIELDS, scale_rope
from architectures.rope import FIELDS as ROPE_FIELDS
from checkpoints.huggingface import load_config, write_model_json
from options.errors import UserError

SIZES = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8, **SIZES}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


# Wrong values

WRONG = [
    *(("vocab_size", value) for value in ("99", 0, -1, None, True, 99.0, 2**40, [99], math.nan)),
    *(("hidden_size", value) for value in ("48", 0, -48, None, 10**30, {"size": 48}, math.inf)),
    *(("intermediate_size", value) for value in ("", 0, False, 80.5, 2**25)),
    *(("num_hidden_layers", value) for value in ("3", 0, -3, 10**9, 3.5, [1, 2, 3])),
    *(("num_attention_heads", value) for value in (0, "6", 5, -6, 2**20, True)),
    *(("num_key_value_heads", value) for value in (0, 4, 12, "2", -2, 2.0, True)),
    *(("head_dim", value) for value in (0, -8, 7, "8", 8.5, 10**9)),
    *(("max_position_embeddings", value) for value in (0, -1, "512", None, 512.5, math.inf, True, 10**15)),
    *(("rms_norm_eps", value) for value in ("1e-6", -1e-6, None, math.nan, math.inf, 7, True, [1e-6])),
    *(("initializer_range", value) for value in (-0.1, "0.02", math.nan, None)),
    *(("tie_word_embeddings", value) for value in ("false", "true", 0, 1, [True])),
    *(("attention_bias", value) for value in ("false", 1, {})),
    *(("hidden_act", value) for value in (None, 3, ["silu"], "swoosh")),
    *(("rope_theta", value) for value in (0, -1e4, "10000", math.nan, math.inf, 1, True, 10**400)),
    *(("partial_rotary_factor", value) for value in (0, 0.5, "1", -1)),
    *(("sliding_window", value) for value in (0, -4, "4096", 4.5, False)),
    *(("use_sliding_window", value) for value in ("false", 1)),
    *(("max_window_layers", value) for value in (-1, "28", None, 2.5)),
    *(
        ("layer_types", value)
        for value in ("full_attention", ["full_attention"], ["mamba"] * 3, [1, 2, 3], 3)
    ),
    *(("architectures", value) for value in ("Qwen3ForCausalLM", 3, [3], {}, False)),
    *(("dtype", value) for value in (16, ["float32"], False)),
    *(("quantization_config", value) for value in ("gptq", 4, [], False)),
    *(("rope_scaling", value) for value in ([2.0], "linear", 2.0, False, {"type": 3}, {"type": "spiral"})),
    *(
        ("rope_scaling", {"type": "linear", "factor": value})
        for value in ("4", 0, -2, math.nan, math.inf, True)
    ),
    *(("rope_scaling", {"type": kind}) for kind in ("linear", "dynamic", "llama3")),
    *(("rope_scaling", {**YARN, "original_max_position_embeddings": value}) for value in (0, -1, "512", 0.5)),
    *(
        ("rope_scaling", {**YARN, key: -1})
        for key in ("beta_fast", "beta_slow", "attention_factor", "mscale")
    ),
    ("rope_scaling", {**YARN, "truncate": "false"}),
    ("original_max_position_embeddings", "64"),
    ("rope_scaling", {**LLAMA3, "high_freq_factor": 1.0}),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": None, "high_freq_factor": 0.5}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "1e4"}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    ("rope_parameters", {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda part: repr(part)[:40])
def test_a_wrong_value_is_one_line_that_names_the_key(key, value):
    with pytest.raises(UserError, match=r"^config.json: ") as error:
        config_from_hf({**QWEN, key: value})
    text = str(error.value)
    words = {"rope_scaling": "RoPE|rope", "rope_parameters": "RoPE|rope|partial", "head_dim": "head"}
    assert any(word in text for word in words.get(key, key).split("|")), text
    assert "\n" not in text and len(text) < 250


def test_heads_that_do_not_divide_the_width_need_their_size():
    with pytest.raises(UserError, match="head_dim .* is 8.33333, expected an even number"):
        config_from_hf({**LLAMA, "hidden_size": 50})
    assert config_from_hf({**LLAMA, "hidden_size": 50, "head_dim": 8}).head_dim == 8


def test_values_at_the_border_and_nulls_that_files_have_are_read():
    nulls = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "dtype")
    nulls += ("sliding_window", "layer_types", "attention_bias", "tie_word_embeddings", "quantization_config")
    config = config_from_hf({**QWEN, **dict.fromkeys(nulls), "rms_norm_eps": 0})
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (6, 8, 10000.0)
    assert not config.tied_head and not config.qkv_bias
    assert config_from_hf({**QWEN, "num_hidden_layers": 1, "num_key_value_heads": 6}).num_layers == 1
    assert config_from_hf({**QWEN, "rope_theta": 5000000}).rope.theta == 5e6
    everything = {"hidden_size", "num_attention_heads", "head_dim", "rope_theta", "use_sliding_window"}
    assert everything <= FIELDS.keys() and {"factor", "beta_fast"} <= ROPE_FIELDS.keys()


def test_a_wrong_value_is_told_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": "false"}))
    with pytest.raises(
        UserError, match=r"config.json: tie_word_embeddings is 'false', expected true or false"
    ):
        load_config(tmp_path)


# The rope

ROPES = {
    "old, none": {"rope_theta": 500000.0},
    "old, nothing": {},
    "old, linear": {"rope_theta": 20000, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "old, dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "old, yarn": {"rope_scaling": {**YARN, "original_max_position_embeddings": 512}},
    "old, yarn without its length": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "old, llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}},
    "new, none": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "new, yarn": {
        "rope_parameters": {
            **YARN,
            "rope_theta": 1e6,
            "original_max_position_embeddings": 512,
            "beta_fast": 20.0,
        }
    },
    "a length beside it": {"original_max_position_embeddings": 64, "rope_scaling": dict(YARN)},
    "another length beside it": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128},
    },
    "both, which differ": {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}


def rope_of_their_model(folder):
    """What the model computes by; the configuration alone may not have its final lengths yet."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).config.rope_parameters


@pytest.mark.parametrize("case", ROPES)
def test_the_rope_is_read_as_by_transformers_and_written_in_both_spellings(case, tmp_path):
    (tmp_path / "given").mkdir()
    given = tmp_path / "given" / "config.json"
    given.write_text(json.dumps({**LLAMA, **ROPES[case]}))
    theirs = rope_of_their_model(given.parent)
    config = load_config(given.parent)
    assert config.rope.theta == theirs["rope_theta"]
    assert config.rope.kind == theirs["rope_type"].replace("default", "none")
    assert config.rope.factor == theirs.get("factor", 1.0)
    if "original_max_position_embeddings" in theirs:
        assert config.rope.original_positions == theirs["original_max_position_embeddings"]
    write_model_json(tmp_path, config.hf, torch.float32, None)
    written = json.loads((tmp_path / "config.json").read_text())
    for spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",), ()):  # without these keys
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in written.items() if k not in spelling})
        )
        found = rope_of_their_model(tmp_path)
        same = {key: value for key, value in found.items() if key not in ("type", "partial_rotary_factor")}
        theirs.pop("type", None)
        assert same == theirs, spelling
        assert load_config(tmp_path).rope == config.rope
        assert load_config(tmp_path).max_positions == config.max_positions


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({}, 512),
        ({"type": "linear", "factor": 4.0}, 2048),  # vicuna-7b-v1.5-16k
        ({"type": "dynamic", "factor": 2.5}, 1280),
        ({**YARN}, 2048),
        ({**YARN, "original_max_position_embeddings": 512}, 2048),  # Qwen's model cards
        ({**YARN, "original_max_position_embeddings": 128}, 512),  # the maximum is the stretched one already
        ({**LLAMA3, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_a_models_own_scaling_widens_its_context(rope, longest):
    config = config_from_hf({**LLAMA, "rope_scaling": rope or None})
    assert config.max_positions == longest
    if rope:  # asked for once more it stays; a longer training text stretches it further
        kind = config.rope.kind
        assert scale_rope(config, kind, None) is config and scale_rope(config, kind, longest) is config
        wider = scale_rope(config, kind, 2 * longest + 1)
        assert wider.rope.factor == 3 * config.rope.factor and wider.max_positions == 3 * longest
        assert wider.rope.original_positions == config.rope.original_positions
        assert config_from_hf(wider.hf) == wider
        other = "linear" if kind != "linear" else "yarn"
        with pytest.raises(UserError, match=f"rope_scaling: {other}, but the model is scaled by {kind}"):
            scale_rope(config, other, None)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaling_that_was_asked_for_comes_back_from_the_file(kind):
    config = scale_rope(config_from_hf(LLAMA), kind, 1500)
    assert config.rope.factor == 3.0 and config.max_positions == 1536
    assert config_from_hf(config.hf) == config
    assert scale_rope(config_from_hf(LLAMA), kind, None).max_positions == 1024  # inference: twice
