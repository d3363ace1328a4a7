"""A GGUF file as a Hugging Face folder that every program here loads: model_name_or_path=model.gguf.

    folder = cached_folder(Path("model.gguf"), cache_dir=None)   # converted by the first who asks for it
    folder = convert("model.gguf", "models/my-model")            # complete or absent

Reads the architectures llama (Mistral is stored as llama), qwen2 and qwen3, with every weight type that the
`gguf` package can turn back into numbers (F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, K- and I-quants), and the
tokenizer (read_tokenizer.py). A quantised weight becomes the float32 number it stands for: exact, but what
quantising lost stays lost. Only one shard of the weights is held.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the order of q/k rows and the rope_freqs
tensor: llama.cpp's convert_hf_to_gguf.py.
"""

import hashlib
import math
import os
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch

from architectures import config_from_hf
from architectures.config import to_hf_name
from architectures.rope import in_both_spellings
from checkpoints.gguf.blocks import DIVISORS, gguf_name
from checkpoints.gguf.read_tokenizer import need, read_tokenizer, write_tokenizer
from checkpoints.safetensors_files import write_json, write_shards
from model import Decoder
from options.atomic import atomic_folder, locked
from options.errors import UserError, located, refuse
from options.progress import Bar

# GGUF architecture -> (model_type, class) of config.json
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
CHUNK_NUMBERS = 1 << 20  # turned back at a time; 4 MiB of float32 stays in the processor's cache
HEAD_BYTES = 1 << 20  # of a file that tell it from another of the same size and time


def cached_folder(gguf_file: Path, cache_dir: str | None) -> Path:
    """The folder of this file in the cache ($XDG_CACHE_HOME/anvil, else ~/.cache/anvil): converted once while
    others who ask wait. Another size, time or beginning of the file, or other code here: another folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anvil"
    cache = Path(cache_dir).expanduser() if cache_dir else home
    status = gguf_file.stat()
    key = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with open(gguf_file, "rb") as file:
        key.update(file.read(HEAD_BYTES))
    for code in sorted(Path(__file__).parent.glob("*.py")):
        key.update(code.read_bytes())
    folder = cache / f"{gguf_file.stem}-{key.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with locked(folder):
        return folder if folder.is_dir() else convert(gguf_file, folder)


def convert(gguf_file, folder, shard_gigabytes=1.0, pre=None):
    """Write `folder` from `gguf_file`; returns its Path. pre: the pre-tokenizer, where the file names none.

    Raises UserError when the file is no GGUF, is cut short, or holds what cannot be expressed here;
    FileNotFoundError when it is absent; FileExistsError when `folder` is there and not empty.
    """
    gguf_file, folder = Path(gguf_file), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; name another one or remove it")
    with located(str(gguf_file)):
        reader, metadata = open_gguf(gguf_file)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = read_config(metadata, tensors) | {"torch_dtype": "float32"}
        class_name, expected = config["architectures"][0], model_tensors(config)
        check_tensors(tensors, expected, class_name)
        tokenizer = read_tokenizer(metadata, pre)
        rows, count = config["vocab_size"], len(tokenizer.tokens)
        refuse(count > rows, f"token_embd.weight has {rows} rows for {count} tokens")
        kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors).most_common()
        weights = f"{len(tensors)} tensors ({', '.join(f'{count} {kind}' for kind, count in kinds)})"
        said = f"converting {gguf_file} to {folder}: {class_name}, {count} tokens, {weights}"
        print(said, file=sys.stderr)
        ids = {f"{name}_token_id": tokenizer.ids[name] for name in ("bos", "eos", "pad")}
        ids = {key: value for key, value in ids.items() if value is not None}
        with atomic_folder(folder) as temporary:
            write_tokenizer(tokenizer, config["max_position_embeddings"], temporary)
            write_json(temporary / "config.json", in_both_spellings(config | ids))
            if len(tokenizer.end_ids) > 1:
                ids["eos_token_id"] = tokenizer.end_ids  # generation may end at any of them
            write_json(temporary / "generation_config.json", ids)
            progress = Bar(expected.items(), "weights", unit="tensor")
            weights = ((name, read_tensor(tensors[own], config)) for own, (name, _) in progress)
            write_shards(temporary, weights, shard_gigabytes)
    return folder


class _Reader(gguf.GGUFReader):
    """gguf's, which ends where the file does: counts and lengths are whatever the file says they are."""

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"byte {end:,} is asked for")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path):
    """-> (gguf.GGUFReader, {metadata key: Python value}). Raises UserError for a file that is not whole."""
    with open(path, "rb") as file:
        magic = file.read(4)
    refuse(magic != b"GGUF", f"not a GGUF file: it starts with {magic!r}, not with b'GGUF'")
    try:
        reader = _Reader(path)
        metadata = {key: _plain(field.contents()) for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, ArithmeticError) as error:  # the reader's, of damaged files
        cut = f"it has {path.stat().st_size} bytes: cut short? Fetch it again"
        raise UserError(f"cannot be read as GGUF ({error}); {cut}") from error
    other, parts = reader.byte_order != "I", metadata.get("split.count", 1)
    refuse(other, "written for a machine of the other byte order; use the usual file")
    refuse(parts > 1, f"one of {parts} parts; join them first: llama-gguf-split --merge")
    return reader, metadata


def _plain(value):
    """float32 metadata widened by the reader -> the decimal that was meant: 9.9999997e-06 -> 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_config(metadata, tensors):
    """-> the dict of config.json, without token ids and dtype. Raises UserError naming the key at fault."""
    architecture = need(metadata, "general.architecture")
    known = ", ".join(ARCHITECTURES)
    fault = f"general.architecture: '{architecture}' cannot be read; {known} can"
    refuse(architecture not in ARCHITECTURES, fault)
    model_type, class_name = ARCHITECTURES[architecture]

    def get(key, default=None):
        return metadata.get(f"{architecture}.{key}", default)

    def own(key):
        return need(metadata, f"{architecture}.{key}")

    for key in ("expert_count", "attention.sliding_window_pattern"):
        found = f"{architecture}.{key} is {get(key)}"
        refuse(get(key), f"{found}; only dense models whose layers are alike can be read")
    if "token_embd.weight" not in tensors:
        raise UserError("the file has no tensor token_embd.weight: a vocabulary-only or an adapter file?")
    names = ("attention.head_count", "embedding_length", "block_count", "context_length")
    heads, hidden, blocks, _ = counts = [own(key) for key in names]
    unlike = f"{architecture}: layers of different sizes cannot be written as a {class_name}"
    for name, count in zip(names, counts):
        refuse(isinstance(count, list), unlike)
        wrong = not isinstance(count, int) or count < 1
        refuse(wrong, f"{architecture}.{name} is {count!r}, expected a whole number above 0")
    found = f"{architecture}.block_count is {blocks}, but there are {len(tensors)} tensors"
    refuse(blocks > len(tensors), f"{found}; the file is damaged")
    head_dim = get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = get(key, head_dim)
        refuse(found != head_dim, f"{architecture}.{key} is {found}, expected the head size {head_dim}")
    rows = _shape(tensors["token_embd.weight"])[0]  # of the table, padding included
    config = {"architectures": [class_name], "model_type": model_type, "vocab_size": rows}
    config |= {"hidden_size": hidden, "intermediate_size": own("feed_forward_length")}
    config |= {"num_hidden_layers": own("block_count"), "num_attention_heads": heads, "head_dim": head_dim}
    config |= {"num_key_value_heads": get("attention.head_count_kv", heads), "hidden_act": "silu"}
    config |= {"max_position_embeddings": own("context_length"), "rope_theta": get("rope.freq_base", 10000.0)}
    config["rope_scaling"] = read_rope_scaling(metadata, architecture, tensors, head_dim)
    trained = get("rope.scaling.original_context_length")
    if trained and (config["rope_scaling"] or {}).get("rope_type") == "linear":
        config["max_position_embeddings"] = trained  # which config.json stretches by the factor
    config["rms_norm_eps"] = own("attention.layer_norm_rms_epsilon")
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    # of no use to a trained model; transformers' own defaults
    config |= {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    refuse(any(isinstance(value, list) for key, value in config.items() if key != "architectures"), unlike)
    return _sliding_window(config, get("attention.sliding_window"), architecture)


def _sliding_window(config, window, architecture):
    """Add the sliding window, and drop the switches that the family does not have."""
    if architecture == "llama" and window:  # a llama with a window is what transformers calls Mistral
        if config["attention_bias"] or config["mlp_bias"]:
            raise UserError("llama.attention.sliding_window is set and there are biases; no family has both")
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    elif window:
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    if config["model_type"] != "llama":
        del config["mlp_bias"]
    if config["model_type"] in ("mistral", "qwen2"):  # Mistral has no biases, Qwen2 always those of q, k, v
        del config["attention_bias"]
    return config


def read_rope_scaling(metadata, architecture, tensors, head_dim):
    """-> rope_scaling of config.json (None, linear, yarn or llama3)."""
    prefix = f"{architecture}.rope.scaling."
    kind = metadata.get(prefix + "type", "none")
    if DIVISORS in tensors:
        if kind not in ("none", "llama3"):
            raise UserError(f"{prefix}type is '{kind}' and there is a rope_freqs tensor; expected only one")
        return _llama3_scaling(tensors[DIVISORS], metadata, architecture, head_dim)
    legacy = metadata.get(f"{architecture}.rope.scale_linear")
    if legacy is not None:
        return {"rope_type": "linear", "factor": legacy} if legacy != 1 else None
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": need(metadata, prefix + "factor")}
    refuse(kind != "yarn", f"{prefix}type: '{kind}' is not one of none, linear, yarn")
    scaling = {"rope_type": "yarn", "factor": need(metadata, prefix + "factor")}
    scaling["original_max_position_embeddings"] = need(metadata, prefix + "original_context_length")
    known = {prefix + name for name in ("type", "factor", "original_context_length", "finetuned")}
    for key in (key for key in metadata if key.startswith(prefix) and key not in known):
        name = key.removeprefix(prefix).removeprefix("yarn_")
        if name in ("beta_fast", "beta_slow"):
            scaling[name] = metadata[key]
        elif metadata[key] != 1.0:  # the neutral value of attn_factor and ext_factor
            raise UserError(f"{key}: {metadata[key]} has no counterpart in a config.json; expected 1.0")
    return scaling


def _llama3_scaling(tensor, metadata, architecture, head_dim):
    """The divisor of every rotary frequency -> the four numbers of rope_type llama3 that give these divisors.

    With w the wavelength of a frequency in tokens, f the factor, o the original context, l and h the low and
    high factor, a divisor is 1 when w < o/h, f when w > o/l, else 1 / ((1-s)/f + s), s = (o/w - l) / (h - l).
    Only o/l and o/h matter, so l is taken as 1 and the others are read off the line s(1/w). Meta's models
    have o = 8192, l = 1, h = 4, which is tried first.
    """
    divisors = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    wrong = divisors.shape != (head_dim // 2,)
    refuse(wrong, f"rope_freqs.weight has shape {divisors.shape}, expected ({head_dim // 2},)")
    factor = float(str(np.float32(divisors.max())))
    if factor == 1.0 and divisors.min() == 1.0:
        return None
    theta = metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    inverse_wavelength = theta ** (-2 * np.arange(head_dim // 2) / head_dim) / (2 * math.pi)
    guesses = [(8192, 4.0)]
    between = (divisors > 1) & (divisors < factor)
    if between.sum() >= 2:
        s = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(inverse_wavelength[between], s, 1)
        high = 1 - 1 / offset
        guesses.append((round(slope * (high - 1)), round(high, 4)))
    for original, high in guesses:
        s = (original * inverse_wavelength - 1) / (high - 1)
        expected = 1 / ((1 - s.clip(0, 1)) / factor + s.clip(0, 1))
        if np.allclose(expected, divisors, rtol=1e-4):
            borders = {"low_freq_factor": 1.0, "high_freq_factor": high}
            start = {"rope_type": "llama3", "original_max_position_embeddings": original}
            return start | {"factor": factor} | borders
    raise UserError("rope_freqs.weight does not follow Llama 3's rule, so no config.json can express it")


def model_tensors(config):
    """-> {GGUF name: (Hugging Face name, shape)} of every weight that a model of this config.json has."""
    switches = config_from_hf(config)
    parameters = Decoder(switches, device="meta").named_parameters()
    shapes = {to_hf_name(switches, name): tuple(parameter.shape) for name, parameter in parameters}
    return {gguf_name(name): (name, shape) for name, shape in shapes.items()}


def check_tensors(tensors, expected, class_name):
    """Every expected tensor is there in its shape, and no other. Raises UserError with what is wrong."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected and name != DIVISORS]  # those: rope_scaling
    for word, some in (("lacks", missing), ("holds unexpected", extra)):
        listed = ", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "")
        refuse(some, f"the file {word} {class_name} tensors: {listed}")
    for name, (_, shape) in expected.items():
        found = _shape(tensors[name])
        refuse(found != shape, f"{name} has shape {found}, expected {shape} from the file's metadata")


def read_tensor(tensor, config):
    """One tensor as float32 in Hugging Face's shape and order of rows, turned back a few rows at a time."""
    data, shape = tensor.data, _shape(tensor)
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    heads = permuted.get(tensor.name.split(".")[-2])
    if heads and config["model_type"] in ("llama", "mistral"):
        # In llama files the two rows of a rotary pair are neighbours: (head, pair, half). Hugging Face keeps
        # the halves of a head apart: (head, half, pair). No quantised block spans rows: rows move as bytes.
        data = data.reshape(heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    rows = data if data.ndim > 1 else data[None]
    numbers = np.empty((len(rows), shape[-1]), dtype=np.float32)
    step = max(1, CHUNK_NUMBERS // shape[-1])
    for start in range(0, len(rows), step):
        try:
            values = gguf.dequantize(rows[start : start + step], tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(f"{tensor.name}: weights of type {kind} cannot be read") from error
        refuse(not np.isfinite(values).all(), f"{tensor.name} holds NaN or infinity: the file is damaged")
        numbers[start : start + step] = values
    return torch.from_numpy(numbers.reshape(shape))


def _shape(tensor):
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts the fastest dimension first
