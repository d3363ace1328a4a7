"""Every accepted class name leads to the file of its line, and a new line is a few lines of switches."""

from pathlib import Path

import pytest

import architectures
from architectures import find_family

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
