"""What models there are: config.json -> switches of one decoder, weight names both ways, and kinds of layers.

`config_from_hf(config.json) -> ModelConfig` below finds the family by `architectures: [Qwen3ForCausalLM]`;
model.py builds the decoder from the switches alone. Names inside are Hugging Face's for Llama without the
leading "model.".

    config.py    ModelConfig; what is read from config.json alike; weight names; the user's rope_scaling
    rope.py      rotary embedding: switches, reading, angles
    layers.py    Linear, RMSNorm, MLP, ForwardContext     find.py     modules by the end of their names
    llama.py     Llama, Yi and all that is called so
    mistral.py   Mistral
    qwen.py      Qwen 2, 2.5, 3

To add a line of models: copy llama.py; its `switches` gives the fields of ModelConfig that differ (config.py
lists them: norm_offset=1.0 for norms times 1 + weight, embedding_scale=sqrt(E), qk_norm, biases, windows),
its FAMILIES the class names; add it to LINES and to the list above. Only a new switch needs model.py. A new
kind of layer: a file here, and a name in model.py's tables.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from architectures import llama, mistral, qwen
from architectures.config import Family, ModelConfig, read
from options.errors import UserError, refuse

LINES = (llama, mistral, qwen)
FAMILIES: dict[str, Family] = {name: family for line in LINES for name, family in line.FAMILIES.items()}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Switches of the model that this config.json describes. UserError names the key that does not fit."""
    return read(hf, find_family(hf))


def find_family(hf: Mapping[str, Any]) -> Family:
    """By a name in `architectures`; files without any by their model_type."""
    names = [] if hf.get("architectures") is None else hf["architectures"]
    wrong = not isinstance(names, list) or not all(isinstance(name, str) for name in names)
    refuse(wrong, f"config.json: architectures is {names!r}, expected a list of names")
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    for family in () if names else FAMILIES.values():
        if family.model_type == hf.get("model_type"):
            return family
    found = ", ".join(names) or f"model_type {hf.get('model_type')!r}"
    near = difflib.get_close_matches(names[0] if names else "", FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise UserError(f"config.json: architecture {found} is not known{hint}; known are {', '.join(FAMILIES)}")
