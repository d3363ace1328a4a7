"""Mistral: Llama with one sliding window for every layer.  Jiang et al., arXiv 2310.06825."""

from collections.abc import Mapping
from typing import Any

from architectures.config import Family


def switches(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_windows": (hf.get("sliding_window"),) * hf["num_hidden_layers"]}


DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
FAMILIES = {"MistralForCausalLM": Family("mistral", switches, DEFAULTS)}
