"""From a Hugging Face config.json to the switches of one decoder, and weight names both ways. Knows no torch.

A family is one entry of FAMILIES: where each switch stands in its config.json, or its constant. The decoder
(model.py) reads switches only; a family's name never decides anything there. To add a family: add an entry,
and a switch if the family needs one that does not exist yet.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ROPE_KINDS = ("none", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: angle = position * inverse_frequency, changed by `kind` as model.py says."""

    theta: float = 10000.0
    kind: str = "none"  # one of ROPE_KINDS
    factor: float = 1.0
    original_positions: int = 0  # tokens the model was trained on; the reference length of every scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn, rotations
    beta_slow: float = 1.0  # yarn, rotations
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the borders of the ramp to whole dimensions


@dataclass(frozen=True)
class ModelConfig:
    """Every switch of the decoder. Sizes in the letters of model.py's legend."""

    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    norm_eps: float
    max_positions: int  # tokens
    rope: Rope
    activation: str = "silu"  # a key of kernels.gated_mlp.ACTIVATIONS
    qkv_bias: bool = False
    out_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k before the rotation
    sliding_windows: tuple[int | None, ...] = ()  # tokens per layer, None = all; length num_layers
    tied_head: bool = False
    initializer_range: float = 0.02  # standard deviation of fresh weights
    hf: Mapping[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # the config.json it came from


@dataclass(frozen=True)
class Family:
    """How one architecture's config.json maps to switches: a key's name, a constant, or a function of the
    file."""

    model_type: str
    qkv_bias: str | bool = False
    out_bias: str | bool = False
    mlp_bias: str | bool = False
    qk_norm: bool = False
    windows: Callable[[Mapping[str, Any], int], tuple[int | None, ...]] = lambda hf, layers: (None,) * layers
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the family's files may leave out


def _window_everywhere(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    return (hf.get("sliding_window"),) * layers


def _window_above(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Qwen: `layer_types` decides if the file has it, else layers from `max_window_layers` on slide."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}

_LLAMA = Family(
    "llama", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias", defaults=_COMMON
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "LLaMAForCausalLM": _LLAMA,  # first conversions of LLaMA 1
    "YiForCausalLM": _LLAMA,  # first release of Yi
    "MistralForCausalLM": Family(
        "mistral",
        windows=_window_everywhere,
        defaults=_COMMON
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        qkv_bias=True,
        windows=_window_above,
        defaults=_COMMON | {"max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=True,
        windows=_window_above,
        defaults=_COMMON | {"head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATIONS |= {"gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Switches of the model that this config.json describes. Raises ValueError naming the key that does not
    fit."""
    family = _find_family(hf)
    hf = {**family.defaults, **hf}
    missing = [key for key in _SIZES if not isinstance(hf.get(key), int)]
    if missing:
        raise ValueError(
            f"config.json: {', '.join(missing)} missing or not a whole number; is the file complete?"
        )
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if hf["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: hidden_act {hf['hidden_act']!r} is not one of {', '.join(_ACTIVATIONS)}"
        )
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads

    def switch(where: str | bool) -> bool:
        return bool(hf.get(where, False)) if isinstance(where, str) else where

    windows = family.windows(hf, layers)
    if len(windows) != layers:
        raise ValueError(
            f"config.json: layer_types has {len(windows)} entries for num_hidden_layers {layers}"
        )
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=hf["rms_norm_eps"],
        max_positions=hf["max_position_embeddings"],
        rope=_rope_from_hf(hf),
        activation=_ACTIVATIONS[hf["hidden_act"]],
        qkv_bias=switch(family.qkv_bias),
        out_bias=switch(family.out_bias),
        mlp_bias=switch(family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_windows=windows,
        tied_head=bool(hf["tie_word_embeddings"]),
        initializer_range=hf["initializer_range"],
        hf=hf,
    )


def scale_rope(config: ModelConfig, kind: str, cutoff_len: int | None) -> ModelConfig:
    """The same model with RoPE scaling asked for by the user (option `rope_scaling`).

    As LLaMA-Factory: for training (cutoff_len given, tokens) the factor is ceil(cutoff_len / trained length),
    nothing happens while the text fits; without cutoff_len (inference) it is 2. The new maximum is written
    back to `hf`.
    """
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope_scaling: {kind!r} is not one of {', '.join(ROPE_KINDS)}")
    original = config.rope.original_positions or config.max_positions
    factor = 2.0 if cutoff_len is None else float(math.ceil(cutoff_len / original))
    if kind == "none" or factor <= 1.0:
        return config
    entry: dict[str, Any] = {"rope_type": kind, "factor": factor, "rope_theta": config.rope.theta}
    if kind != "linear":
        entry["original_max_position_embeddings"] = original
    if kind == "llama3":
        entry |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    # the dynamic kind starts from the original length, so there the maximum stays
    maximum = original if kind == "dynamic" else int(original * factor)
    hf = {key: value for key, value in config.hf.items() if key != "rope_scaling"}
    hf |= {"rope_parameters": entry, "rope_theta": config.rope.theta, "max_position_embeddings": maximum}
    return replace(config, rope=_rope_from_hf(hf), max_positions=maximum, hf=hf)


def _find_family(hf: Mapping[str, Any]) -> Family:
    names = hf.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    if not names:
        for family in FAMILIES.values():
            if family.model_type == hf.get("model_type"):
                return family
    found = ", ".join(names) or f"model_type {hf.get('model_type')!r}"
    near = difflib.get_close_matches(names[0] if names else "", FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise ValueError(f"config.json: architecture {found} is not known{hint}; known are {', '.join(FAMILIES)}")


def _rope_from_hf(hf: Mapping[str, Any]) -> Rope:
    """Read `rope_parameters` (newer files) or `rope_theta` with `rope_scaling` (older ones)."""
    entry = dict(hf.get("rope_scaling") or {})
    entry |= hf.get("rope_parameters") or {}
    theta = float(entry.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = entry.get("rope_type") or entry.get("type") or "default"
    kind = "none" if kind == "default" else kind
    if kind not in ROPE_KINDS:
        raise ValueError(f"config.json: rope type {kind!r} is not one of {', '.join(ROPE_KINDS)}")
    if entry.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not in this version")
    maximum = hf["max_position_embeddings"]
    original = entry.get("original_max_position_embeddings") or maximum
    if kind == "dynamic":
        original = maximum  # as transformers: the dynamic kind grows from the model's own maximum
    factor = float(entry.get("factor") or (maximum / original))
    attention = entry.get("attention_factor")
    if kind == "yarn" and attention is None:
        attention = _yarn_attention(factor, entry.get("mscale"), entry.get("mscale_all_dim"))
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        original_positions=original,
        low_freq_factor=float(entry.get("low_freq_factor", 1.0)),
        high_freq_factor=float(entry.get("high_freq_factor", 4.0)),
        beta_fast=float(entry.get("beta_fast") or 32),
        beta_slow=float(entry.get("beta_slow") or 1),
        attention_factor=float(attention or 1.0),
        truncate=bool(entry.get("truncate", True)),
    )


def _yarn_attention(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Peng et al., arXiv 2309.00071, eq. 22: 0.1 ln(factor) + 1; a ratio of two where a file gives both
    weights."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


# Weight names. Inside, a name is Hugging Face's Llama name without the leading "model."; the head keeps its
# own.


def to_hf_name(config: ModelConfig, name: str) -> str:
    """`layers.3.mlp.up_proj.weight` -> `model.layers.3.mlp.up_proj.weight`."""
    return name if name.startswith("lm_head.") else "model." + name


def from_hf_name(config: ModelConfig, name: str) -> str | None:
    """Our name of a file's tensor, or None if the tensor is of no use (a rule below says why)."""
    if name.endswith("rotary_emb.inv_freq"):
        return None  # old files store the frequencies; config.json gives them
    if name == "lm_head.weight" and config.tied_head:
        return None  # a tied head is the embedding; some files store it twice
    return name.removeprefix("model.")
