"""ModelConfig, the switches of one decoder; what every family reads from config.json alike; weight names.

The decoder (model.py) reads switches only; no family decides anything there by its name. A family is a file
of this folder, which says where its config.json differs from what is read here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from architectures.rope import ROPE_KINDS, Rope, rope_from_hf
from options.errors import UserError, refuse


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
    norm_offset: float = 0.0  # RMSNorm multiplies by offset + weight
    embedding_scale: float = 1.0  # multiplies the embeddings, rounded to the activations' dtype
    attention_kinds: tuple[str, ...] = ()  # keys of model.ATTENTION per layer; () = "attention" in every one
    feed_forward_kinds: tuple[str, ...] = ()  # keys of model.FEED_FORWARD per layer; () = "mlp" in every one
    sliding_windows: tuple[int | None, ...] = ()  # tokens per layer, None = all; length num_layers
    tied_head: bool = False
    initializer_range: float = 0.02  # standard deviation of fresh weights
    hf: Mapping[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # the config.json it came from

    def kinds(self, layer: int) -> tuple[str, str]:
        """What attention and what feed-forward this layer has."""
        attention = self.attention_kinds[layer] if self.attention_kinds else "attention"
        return attention, self.feed_forward_kinds[layer] if self.feed_forward_kinds else "mlp"


@dataclass(frozen=True)
class Family:
    """How the config.json of one class of models becomes switches.

    switches   config.json, with defaults -> the fields of ModelConfig that `read` would not give
    defaults   what the family's files may leave out, beside COMMON
    """

    model_type: str
    switches: Callable[[Mapping[str, Any]], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)


COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NUMBERS = ("rms_norm_eps", "max_position_embeddings", "initializer_range")
PERHAPS = ("num_key_value_heads", "head_dim", "rope_theta")  # null stands for what follows from the others


def read(hf: Mapping[str, Any], family: Family) -> ModelConfig:
    """Switches of the model that this config.json describes. UserError names the key that does not fit."""
    hf = {**COMMON, **family.defaults, **hf}
    missing = [key for key in SIZES if not isinstance(hf.get(key), int)]
    if missing:
        listed = ", ".join(missing)
        raise UserError(f"config.json: {listed} missing or not a whole number; is the file complete?")
    for key in (*NUMBERS, *PERHAPS):
        wrong = not isinstance(hf.get(key), int | float) and (key in NUMBERS or hf.get(key) is not None)
        refuse(wrong, f"config.json: {key} is {hf.get(key)!r}, expected a number")
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        found = f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        raise UserError(f"config.json: {found}")
    if str(hf["hidden_act"]) not in ACTIVATIONS:
        raise UserError(
            f"config.json: hidden_act {hf['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    switches = {"sliding_windows": (None,) * layers} | family.switches(hf)
    windows = len(switches["sliding_windows"])
    if windows != layers:
        raise UserError(f"config.json: layer_types has {windows} entries for num_hidden_layers {layers}")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        norm_eps=hf["rms_norm_eps"],
        max_positions=hf["max_position_embeddings"],
        rope=rope_from_hf(hf),
        activation=ACTIVATIONS[hf["hidden_act"]],
        tied_head=bool(hf["tie_word_embeddings"]),
        initializer_range=hf["initializer_range"],
        hf=hf,
        **switches,
    )


def scale_rope(config: ModelConfig, kind: str, cutoff_len: int | None) -> ModelConfig:
    """The same model with RoPE scaling asked for by the user (option `rope_scaling`).

    As LLaMA-Factory: for training (cutoff_len given, tokens) the factor is ceil(cutoff_len / trained length),
    nothing happens while the text fits; without cutoff_len (inference) it is 2. The new maximum is written
    back to `hf`.
    """
    if kind not in ROPE_KINDS:
        raise UserError(f"rope_scaling: {kind!r} is not one of {', '.join(ROPE_KINDS)}")
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
    return replace(config, rope=rope_from_hf(hf), max_positions=maximum, hf=hf)


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
