"""Every accepted class name leads to the file of its line, and a new line is a few lines of switches."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import architectures
from architectures import find_family
from architectures.config import Family, from_hf_name, read
from conversion.gguf.write import architecture
from generation.cache import KVCache
from generation.layout import lay_out_for_decoding
from model import Decoder, initialize_weights
from options.errors import UserError

FOLDER = Path(architectures.__file__).parent
SIZES = {"vocab_size": 131, "hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
CALLED_OTHERWISE = {"YiForCausalLM": "llama"}  # Yi's own name for Llama


@pytest.mark.parametrize("name", architectures.FAMILIES)
def test_a_class_name_is_defined_in_the_file_that_it_begins_with(name):
    files = [path for path in FOLDER.glob("*.py") if f'"{name}": Family(' in path.read_text()]
    assert [path.stem for path in files] == [CALLED_OTHERWISE.get(name, files[0].stem)]
    assert name in CALLED_OTHERWISE or name.lower().startswith(files[0].stem)
    assert find_family({"architectures": ["Unknown", name]}) is architectures.FAMILIES[name]


def test_a_file_without_a_class_name_is_found_by_its_model_type():
    assert find_family({"model_type": "qwen2"}) is architectures.FAMILIES["Qwen2ForCausalLM"]
    with pytest.raises(ValueError, match="model_type 'gpt2' is not known"):
        find_family({"model_type": "gpt2"})
    with pytest.raises(UserError, match="architectures is 'LlamaForCausalLM', expected a list of names"):
        find_family({"architectures": "LlamaForCausalLM"})


def gemma_like(hf):
    """What a file for Gemma 1 would say: (1 + w) norms, embeddings times sqrt(E)."""
    return {"norm_offset": 1.0, "embedding_scale": math.sqrt(hf["hidden_size"])}


def gemma(**more):
    """The same numbers in transformers' model and in ours, fp64: (theirs, ours)."""
    torch.manual_seed(3)
    config = transformers.GemmaConfig(**SIZES, head_dim=14, hidden_act="gelu_pytorch_tanh", **more)
    theirs = transformers.GemmaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.1)
    hf = config.to_dict() | {"tie_word_embeddings": True}
    ours = Decoder(read(hf, Family("gemma", gemma_like)), dtype=torch.float64).eval()
    tensors = {from_hf_name(ours.config, name): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: value for name, value in tensors.items() if name is not None})
    return theirs, ours


def test_norms_of_one_plus_weight_and_scaled_embeddings_are_two_switches():
    """The bound is what transformers' norm, which goes through fp32, differs from fp64."""
    theirs, ours = gemma()
    tokens = torch.randint(131, (29,), generator=torch.Generator().manual_seed(1))
    row = torch.arange(29), torch.tensor([0, 29], dtype=torch.int32), 29
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        logits = ours.logits(ours(tokens, *row))
    torch.testing.assert_close(logits, expected, atol=2e-6 * expected.abs().max().item(), rtol=0)


def test_one_token_on_a_cpu_knows_the_two_switches():
    _, ours = gemma()
    ours = ours.float()
    tokens = torch.randint(131, (9,), generator=torch.Generator().manual_seed(1))
    borders = torch.tensor([0, 1], dtype=torch.int32)
    with torch.no_grad():
        whole = ours(tokens, torch.arange(9), torch.tensor([0, 9], dtype=torch.int32), 9)
        lay_out_for_decoding(ours)
        cache = KVCache(ours.config, 1, 9)
        for place, token in enumerate(tokens):
            hidden = ours(token[None], torch.tensor([place]), borders, 1, cache)
    torch.testing.assert_close(hidden[0], whole[-1], atol=1e-5 * whole.abs().max().item(), rtol=1e-5)


def test_the_two_switches_are_not_lost_in_gguf():
    with pytest.raises(ValueError, match="scaled embeddings"):
        architecture(replace(gemma()[1].config, activation="silu"))


def test_fresh_norms_multiply_by_one():
    for offset in (0.0, 1.0):
        model = Decoder(replace(gemma()[1].config, norm_offset=offset))
        initialize_weights(model, torch.Generator().manual_seed(0))
        assert torch.equal(model.norm.weight + offset, torch.ones(60))
