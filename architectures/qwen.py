"""Qwen 2 (biases of q, k and v; arXiv 2407.10671) and 3 (norms of q and k; arXiv 2505.09388)."""

from collections.abc import Mapping
from typing import Any

from architectures.config import Family
from options.errors import refuse


def sliding_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """`layer_types` decides if the file has it, else layers from `max_window_layers` on slide."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        layers = range(hf["num_hidden_layers"])
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in layers]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    refuse(
        unknown, f"config.json: layer_types names {', '.join(unknown)}; full_ and sliding_attention are known"
    )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_windows": sliding_windows(hf)}


def qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True, "sliding_windows": sliding_windows(hf)}


DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096}
FAMILIES = {
    "Qwen2ForCausalLM": Family("qwen2", qwen2, DEFAULTS),
    "Qwen3ForCausalLM": Family("qwen3", qwen3, DEFAULTS | {"head_dim": 128}),
}
