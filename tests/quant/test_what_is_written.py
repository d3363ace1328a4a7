"""config.json of a quantised model says which linears are in codes and which are not, as its files do."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from test_model import row_of
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from checkpoints.huggingface import load_model, model_tensors, save_model
from lora import replace_module
from quant.aqlm import AQLMFormat, AQLMLinear
from quant.awq import AWQFormat, AWQLinear
from quant.eetq import EETQFormat
from quant.gptq import GPTQFormat, GPTQLinear
from quant.hqq import HQQFormat
from quant.int8 import Int8Format
from quant.nf4 import NF4Format

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 131, "num_hidden_layers": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def dense(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=request.param, initializer_range=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def made(name, weight):
    """A layer of each format; those that can only be read, of random codes."""
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(outputs + inputs)
    codes, scales = (
        torch.randint(16, weight.shape, generator=generator),
        torch.rand(outputs, inputs // 32) * 0.01,
    )
    if name == "gptq":
        return GPTQLinear.from_integers(GPTQFormat(4, 32), codes, scales)
    if name == "awq":
        plain = GPTQLinear.from_integers(GPTQFormat(4, 32), codes, scales)
        return AWQLinear(AWQFormat(4, 32), plain.codes, plain.zeros, plain.scales, None, None, torch.float32)
    if name == "aqlm":
        found = {"codes": torch.randint(-128, 128, (outputs, inputs // 8, 1)).to(torch.int8)}
        found |= {"codebooks": torch.randn(1, 256, 1, 8) * 0.02, "scales": torch.rand(outputs, 1, 1, 1)}
        return AQLMLinear(AQLMFormat(1, 8), (outputs, inputs), None, torch.float32, **found)
    formats = {"int8": Int8Format(), "eetq": EETQFormat(), "nf4": NF4Format(), "hqq": HQQFormat(4, 32)}
    return formats[name].quantise(weight, None, torch.float32)


def mixed(dense, name, left):
    """The model with every linear of its blocks in codes but those whose name ends in one of `left`."""
    model = load_model(dense)
    for place, module in list(model.layers.named_modules()):
        if isinstance(module, nn.Linear) and not f"layers.{place}".endswith(left):
            replace_module(model, f"layers.{place}", made(name, module.weight.detach()))
    return model


FEW, SOME_LAYERS = ("down_proj", "o_proj"), ("down_proj", "layers.1.self_attn.o_proj")
LISTS = {
    "int8": "llm_int8_skip_modules",
    "nf4": "llm_int8_skip_modules",
    "eetq": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "hqq": "skip_modules",
    "aqlm": "linear_weights_not_to_quantize",
}


@pytest.mark.parametrize("left", [("nothing",), FEW, SOME_LAYERS], ids=["all", "few", "some layers"])
@pytest.mark.parametrize("name", [*LISTS, "gptq"])
def test_the_file_says_what_it_left_as_numbers(dense, name, left, tmp_path):
    model, (tokens, *row) = mixed(dense, name, left), row_of([11])
    save_model(model, tmp_path, dense)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    again = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens, *row), model(tokens, *row))
    linears = [place for place, module in load_model(dense).named_modules() if isinstance(module, nn.Linear)]
    marker = model.layers[0].self_attn.q_proj.format.marker
    coded = {f"model.{place}" for place in linears if f"model.{place}.{marker}" in written}
    if name == "gptq":
        picked = settings.get("modules_in_block_to_quantize", [["proj"]])[0]
        assert ("modules_in_block_to_quantize" in settings) == (left != ("nothing",))
        blocks = {f"model.{place}" for place in linears if place != "lm_head"}
        assert {place for place in blocks if place.endswith(tuple(picked))} == coded
        return
    patterns = settings[LISTS[name]]
    if name == "hqq":  # transformers compares the last two parts of a name
        assert "lm_head" in patterns
        assert ("mlp.down_proj" in patterns) == (left != ("nothing",))
        assert ("self_attn.o_proj" in patterns) == (left == FEW)
        assert ("model.layers.1.self_attn.o_proj" in patterns) == (left == SOME_LAYERS)
        return
    converted = should_convert_module
    hf_names = ["lm_head" if place == "lm_head" else f"model.{place}" for place in linears]
    assert {place for place in hf_names if converted(place, patterns)} == coded
    assert not converted("lm_head", patterns)  # a tied head is a linear there


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("left", [FEW, SOME_LAYERS], ids=["few", "some layers"])
def test_transformers_reads_a_model_that_is_half_in_codes(dense, name, left, tmp_path):
    model, (tokens, *row) = mixed(dense, name, left), row_of([11])
    save_model(model, tmp_path, dense)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected, found = theirs(tokens[None]).logits[0], model.logits(model(tokens, *row))
    assert (found - expected).norm() < (
        0.02 if name == "int8" else 1e-4
    ) * expected.norm()  # activations in int8
    assert {name for name, _ in model_tensors(model) if name.endswith("down_proj.weight")}
