"""Write a model as one GGUF file, tensor by tensor: what llama.cpp and its relatives run.

The sizes of all tensors are known beforehand, so header and metadata come first and every tensor goes to its
place as it arrives: memory holds one tensor and one chunk of it, whatever the order of the stream. Weights
are encoded once, from what the stream gives (export.py: base + adapters, or a dequantised base, in fp32);
vectors stay fp32.

Which type a matrix gets: the one asked for; the head, and the embedding it is tied to, Q8_0 beside 4-bit
weights, since its error goes straight into the logits (llama.cpp takes Q6_K or Q8_0); rows that do not fit
into whole blocks the next one of Q4_K -> Q5_0 -> F16, as llama.cpp. `Layout.count_kinds` says how many of
each.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names, metadata and the order of q/k rows:
llama.cpp's convert_hf_to_gguf.py. Numbers: checkpoints/gguf/blocks.py, which also reads.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from torch import Tensor

from architectures.config import ModelConfig
from architectures.rope import Rope, inverse_frequencies
from checkpoints.gguf.blocks import BLOCKS, DIVISORS, encode_rows, gguf_name, row_bytes
from conversion.gguf.write_tokenizer import vocabulary_metadata
from options.errors import UserError, located, refuse
from options.progress import Bar
from text.render import ChatTemplate
from text.tokenizer import Tokenizer

# key export_gguf_type -> general.file_type, which programs show to people
FILE_TYPES = {kind: gguf.LlamaFileType[f"MOSTLY_{kind}"] for kind in ("F16", "BF16", "Q8_0", "Q4_0")}
FILE_TYPES["F32"] = gguf.LlamaFileType.ALL_F32
FILE_TYPES["Q4_K"] = gguf.LlamaFileType.MOSTLY_Q4_K_S  # Q4_K alone is what llama.cpp calls Q4_K_S
NARROWER_BLOCKS = {"Q4_K": "Q5_0", "Q5_0": "F16", "Q4_0": "F16", "Q8_0": "F16"}


Shapes = Mapping[str, tuple[int, ...]]  # of every tensor by its Hugging Face name; the head only if untied


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str  # as GGUF spells it
    shape: tuple[int, ...]
    kind: str  # a key of BLOCKS
    offset: int  # bytes behind the start of the data

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * row_bytes(self.shape[-1], self.kind)


@dataclass(frozen=True)
class Layout:
    """All of a file but the numbers."""

    config: ModelConfig
    entries: dict[str, Entry]  # by Hugging Face name
    metadata: dict[str, object]
    notices: list[str]  # for the user: what the file cannot say

    @property
    def data_bytes(self) -> int:
        """Of all tensors; metadata and tokenizer come on top."""
        return max(entry.offset + entry.size_bytes for entry in self.entries.values())

    def count_kinds(self) -> str:
        """`180 Q5_0, 30 Q4_K, 1 Q8_0`: matrices of each type."""
        counts = Counter(entry.kind for entry in self.entries.values() if len(entry.shape) > 1)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def lay_out(
    config: ModelConfig,
    shapes: Shapes,
    kind: str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    name: str,
) -> Layout:
    """kind: a key of FILE_TYPES. template: what the model was tuned with; None = the tokenizer's own. name:
    what programs show. Raises UserError for what GGUF cannot express."""
    metadata, notices = model_metadata(config)
    metadata |= {"general.name": name, "general.file_type": int(FILE_TYPES[kind])}
    metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    text, words = tokenizer.chat_template, ()
    text = text.get("default") if isinstance(text, dict) else text
    if template is not None:
        text, words = template.to_jinja(), template.stop_words(tokenizer.eos_token)
    _, ends = tokenizer.ends(words)
    vocabulary, more = vocabulary_metadata(tokenizer, config.vocab_size, text, ends)
    return Layout(config, _entries(config, shapes, kind), metadata | vocabulary, notices + more)


def _entries(config: ModelConfig, shapes: Shapes, kind: str) -> dict[str, Entry]:
    head = "lm_head.weight" if "lm_head.weight" in shapes else "model.embed_tokens.weight"
    if config.rope.kind == "llama3":
        shapes = {DIVISORS: (config.head_dim // 2,)} | dict(shapes)
    entries, offset = {}, 0
    for hf_name, shape in shapes.items():
        chosen = "F32"
        if len(shape) > 1:
            chosen = "Q8_0" if hf_name == head and kind.startswith("Q4") else kind
            while shape[-1] % BLOCKS[chosen][0]:
                chosen = NARROWER_BLOCKS[chosen]
        entries[hf_name] = entry = Entry(gguf_name(hf_name), shape, chosen, offset)
        offset += gguf.GGUFWriter.ggml_pad(entry.size_bytes, gguf.GGUF_DEFAULT_ALIGNMENT)
    return entries


# Metadata


def architecture(config: ModelConfig) -> str:
    """The GGUF architecture with these switches. Raises UserError if none has them."""
    with located("export_gguf_type"):
        used = f"GGUF's dense architectures use silu, the model {config.activation}"
        refuse(config.activation != "silu", used)
        scaled = config.norm_offset or config.embedding_scale != 1.0
        refuse(scaled, "norms of 1 + weight and scaled embeddings are not written yet")
        mixed = len(set(config.sliding_windows)) > 1
        refuse(mixed, "GGUF cannot tell layers with and without a sliding window apart")
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.qkv_bias and not config.out_bias else "llama"


def model_metadata(config: ModelConfig) -> tuple[dict, list[str]]:
    """-> ({GGUF key: value}, what the user should know). Raises UserError for what GGUF cannot express."""
    arch = architecture(config)
    rope, notices = _rope_metadata(config.rope)
    # the dynamic kind cannot be said: only the texts that it leaves alone
    longest = config.rope.original_positions if config.rope.kind == "dynamic" else config.max_positions
    keys = {"vocab_size": config.vocab_size, "context_length": longest}
    keys |= {"embedding_length": config.hidden_size, "block_count": config.num_layers}
    keys |= {"feed_forward_length": config.intermediate_size, "attention.head_count": config.num_heads}
    keys["attention.head_count_kv"] = config.num_kv_heads
    keys |= {f"attention.{part}_length": config.head_dim for part in ("key", "value")}
    keys["attention.layer_norm_rms_epsilon"] = config.norm_eps
    keys |= {"rope.dimension_count": config.head_dim} | rope
    window = config.sliding_windows[0] if config.sliding_windows else None
    if window and window < longest:
        keys["attention.sliding_window"] = window
        written = f"the sliding window of {window} tokens is written"
        notices.append(f"{written}; llama.cpp ignores it, so longer texts differ there")
    if arch == "qwen3" and config.qkv_bias:
        notices.append("llama.cpp loads no qwen3 files with biases, which this model has; this project does")
    return {f"{arch}.{key}": value for key, value in keys.items()}, notices


def _rope_metadata(rope: Rope) -> tuple[dict, list[str]]:
    keys: dict = {"rope.freq_base": float(rope.theta)}
    if rope.kind == "dynamic":
        changed = f"rope type dynamic changes texts beyond {rope.original_positions} tokens"
        return keys, [f"{changed}; GGUF has no such type, so the file is exact up to that length"]
    if rope.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
        keys["rope.scaling.original_context_length"] = rope.original_positions
    notices = []
    if rope.kind == "yarn":
        refuse(not rope.truncate, "export_gguf_type: yarn with truncate: false cannot be said in GGUF")
        for name, value, usual in (("fast", rope.beta_fast, 32.0), ("slow", rope.beta_slow, 1.0)):
            if value != usual:
                keys[f"rope.scaling.yarn_beta_{name}"] = value
                switch = f"--yarn-beta-{name} {value:g}"
                notices.append(f"llama.cpp takes {usual:g} unless it is started with {switch}")
        # llama.cpp multiplies by 0.1 ln(factor) + 1 itself (arXiv 2309.00071, eq. 22)
        own = rope.attention_factor / (0.1 * np.log(rope.factor) + 1.0)
        if abs(own - 1) > 1e-6:
            keys["rope.scaling.attn_factor"] = float(own)
    return keys, notices


def rope_divisors(config: ModelConfig) -> Tensor:
    """(D/2,) fp32: what Llama 3's rule divides every frequency by; GGUF keeps the numbers, not the rule."""
    plain = inverse_frequencies(Rope(theta=config.rope.theta), config.head_dim)
    return plain / inverse_frequencies(config.rope, config.head_dim)


# The file


def write(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write the file. tensors: (Hugging Face name, dense tensor), each of the model's once, in any order.

    Raises UserError naming the tensor that its type cannot hold.
    """
    data_start = _write_head(path, layout)
    missing, size = dict(layout.entries), layout.data_bytes
    divisors = [(DIVISORS, rope_divisors(layout.config))] if DIVISORS in missing else []
    with open(path, "r+b") as file, Bar(total=size, unit="B", unit_scale=True, desc="weights") as progress:
        file.truncate(data_start + gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT))
        for hf_name, tensor in itertools.chain(divisors, tensors):
            entry = missing.pop(hf_name)
            file.seek(data_start + entry.offset)
            progress.update(_write_tensor(file, entry, in_file_order(layout.config, hf_name, tensor)))
    assert not missing, missing


def _write_head(path: Path, layout: Layout) -> int:
    """Header, metadata, names and places of the tensors. -> where the tensors' data begins."""
    writer = gguf.GGUFWriter(path, architecture(layout.config))
    unsigned = {gguf.GGUFValueType.INT32: gguf.GGUFValueType.UINT32}  # counts and ids
    for key, value in layout.metadata.items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, unsigned.get(kind, kind))
    for entry in layout.entries.values():
        kind = gguf.GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.size_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return gguf.GGUFWriter.ggml_pad(path.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT)


def _write_tensor(file: BinaryIO, entry: Entry, tensor: Tensor) -> int:
    """-> bytes written."""
    assert tuple(tensor.shape) == entry.shape
    try:
        pieces = encode_rows(tensor.reshape(-1, tensor.shape[-1]), entry.kind)
        return sum(file.write(piece.numpy()) for piece in pieces)
    except UserError as error:
        raise UserError(f"{entry.name} holds {error}; it cannot be written as {entry.kind}") from error


def in_file_order(config: ModelConfig, hf_name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k as the architecture wants them: llama keeps the two rows of a rotary pair together.

    (head, half, pair) -> (head, pair, half); weights (H D, E) and biases (H D,) alike.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(hf_name.split(".")[-2])
    if heads is None or architecture(config) != "llama":
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
