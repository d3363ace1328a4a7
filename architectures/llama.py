"""Llama, and what has its layout: Yi, SmolLM, TinyLlama, Vicuna ...  Touvron et al., arXiv 2302.13971."""

from collections.abc import Mapping
from typing import Any

from architectures.config import Family


def switches(hf: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(hf.get("mlp_bias", False))}


FAMILIES = {
    "LlamaForCausalLM": Family("llama", switches),
    "LLaMAForCausalLM": Family("llama", switches),  # first conversions of LLaMA 1
    "YiForCausalLM": Family("llama", switches),  # first release of Yi
}
