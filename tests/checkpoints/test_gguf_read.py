"""GGUF files read against transformers, sentencepiece and the `gguf` package's own writer; the cache."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import data
import export
from checkpoints.gguf import read as gguf_read
from checkpoints.gguf import read_tokenizer
from checkpoints.gguf.blocks import PART_NAMES
from checkpoints.hub import ModelOptions, resolve_folder, resolve_model
from options.atomic import temporary_name

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "Hello world, it's 2024 and I'LL pay $1,234.56!",
    "  leading and   many    spaces\t\ttabs \n\n\n newlines \r\n end  ",
    "Les \u00e9l\u00e8ves \u00e9taient tr\u00e8s contents; na\u00efve cafe\u0301 co\u00f6perate stra\u00dfe",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002 "
    "\u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f1eb\U0001f1f7 flags \u2764\ufe0f",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 22, 333]}  # comment_with_underscores\n\tif x >= 10: pass",
    "\u2160\u00bd\u0663\u06f4 numerals \u2167 and x\u00b2 CamelCaseWords ALLCAPS don't DON'T we'Re",
    "table   1   22    333 \n   4   5    6",
    "",
    " ",
    "\u2581already there\u2581",
    "a",
]
BLOCK = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


# ---- writing GGUF files
# -----------------------------------------------------------------------------------------


def byte_level_vocabulary(pre_tokenizer, size=420, normalizer=None):
    """Train a byte-level BPE with the given splitting rule. -> (Tokenizer, tokens in id order, merges)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return tokenizer, sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def gpt2_split():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.fixture(scope="module")
def vocabulary():
    """A GPT-2 style vocabulary: keys and values of the tokenizer part of a GGUF file."""
    _, tokens, merges = byte_level_vocabulary(gpt2_split(), size=300)
    tokens = tokens + ["<s>", "</s>"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 2) + [3, 3],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
    }


def add_tokenizer(writer, keys):
    for key, value in keys.items():
        name = f"tokenizer.{'' if key.startswith('chat_template') else 'ggml.'}{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)


def metadata_of(config, architecture):
    """The numeric keys that llama.cpp's converter writes for a transformers config."""
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def swap_halves(weight, heads):
    """Hugging Face's row order of q and k -> llama.cpp's."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name):
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PART_NAMES[part]}.{kind}"


def write_gguf(path, model, architecture, vocabulary, *, kind=Kind.F32, extra=None, change=None):
    """Write a transformers model as llama.cpp's converter would. change: {gguf name: array or None (left
    out)}."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata_of(config, architecture) | (extra or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    add_tokenizer(writer, vocabulary)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    arrays = {}
    for name, tensor in model.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            key, array = gguf_name(name), tensor.detach().numpy()
            part = key.split(".")[-2]
            if architecture == "llama" and part in heads:
                array = swap_halves(array, heads[part])
            arrays[key] = np.ascontiguousarray(array)
    for key, array in (arrays | (change or {})).items():
        if array is not None and array.ndim > 1 and kind != Kind.F32:
            writer.add_tensor(key, gguf.quantize(array, kind), raw_dtype=kind)
        elif array is not None:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def tiny(family="Llama", **changes):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():  # transformers starts norms at 1 and biases at 0
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def logits(model, length=40):
    tokens = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **options
    ).eval()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ---- weights and config
# -----------------------------------------------------------------------------------------

FAMILIES = {
    "llama": ("llama", tiny),
    "llama, tied": ("llama", lambda: tiny(tie_word_embeddings=True)),
    "llama, one kv head, odd sizes": (
        "llama",
        lambda: tiny(
            num_attention_heads=3, num_key_value_heads=1, head_dim=22, hidden_size=51, vocab_size=309
        ),
    ),
    "llama, all biases": ("llama", lambda: tiny(attention_bias=True, mlp_bias=True)),
    "qwen2": ("qwen2", lambda: tiny("Qwen2")),
    "qwen2, tied": ("qwen2", lambda: tiny("Qwen2", tie_word_embeddings=True)),
    "qwen3": ("qwen3", lambda: tiny("Qwen3", head_dim=24)),
    "qwen3, biases": ("qwen3", lambda: tiny("Qwen3", attention_bias=True)),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_equal_those_of_the_model_that_was_written(case, tmp_path, vocabulary):
    architecture, make = FAMILIES[case]
    model = make()
    path = write_gguf(tmp_path / "m.gguf", model, architecture, vocabulary)
    folder = gguf_read.convert(path, tmp_path / "out")
    imported = load(folder)
    assert type(imported) is type(model)
    torch.testing.assert_close(logits(imported), logits(model), rtol=1e-6, atol=1e-6)
    assert imported.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_a_llama_with_a_sliding_window_becomes_a_mistral(tmp_path, vocabulary):
    model = tiny("Mistral", sliding_window=7)
    extra = {"llama.attention.sliding_window": 7}
    path = write_gguf(tmp_path / "m.gguf", model, "llama", vocabulary, extra=extra)
    imported = load(gguf_read.convert(path, tmp_path / "out"))
    assert isinstance(imported, transformers.MistralForCausalLM) and imported.config.sliding_window == 7
    torch.testing.assert_close(logits(imported), logits(model), rtol=1e-6, atol=1e-6)


def test_a_qwen2_with_a_sliding_window_keeps_it(tmp_path, vocabulary):
    model = tiny("Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=0)
    extra = {"qwen2.attention.sliding_window": 7}
    path = write_gguf(tmp_path / "m.gguf", model, "qwen2", vocabulary, extra=extra)
    imported = load(gguf_read.convert(path, tmp_path / "out"))
    torch.testing.assert_close(logits(imported), logits(model), rtol=1e-6, atol=1e-6)


def llama3_divisors(factor, low, high, original, theta, head_dim):
    """The rope_freqs tensor, written down from the Llama 3.1 rule by itself."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "linear, old key": ({"rope_type": "linear", "factor": 2.0}, {"llama.rope.scale_linear": 2.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.attn_factor": 1.0,
        },
    ),
    "llama3": ({"rope_type": "llama3", **LLAMA3}, {}),
    "llama3, unusual": (
        {
            "rope_type": "llama3",
            "factor": 5.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 16.0,
            "original_max_position_embeddings": 3000,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling(case, tmp_path, vocabulary):
    scaling, extra = SCALINGS[case]
    model = tiny(rope_parameters={"rope_theta": 50000.0, **scaling}, head_dim=64)
    change = {}
    if scaling["rope_type"] == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        change["rope_freqs.weight"] = llama3_divisors(*(scaling[name] for name in names), 50000.0, 64)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", vocabulary, extra=extra, change=change)
    folder = gguf_read.convert(path, tmp_path / "out")
    torch.testing.assert_close(logits(load(folder), 200), logits(model, 200), rtol=1e-4, atol=1e-4)
    if "unusual" not in case:  # there only the ratios are determined
        assert config_of(folder)["rope_scaling"] == scaling


def test_rope_divisors_of_one_are_no_scaling(tmp_path, vocabulary):
    change = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", vocabulary, change=change)
    assert config_of(gguf_read.convert(path, tmp_path / "out"))["rope_scaling"] is None


QUANTISED = [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_weight_type_gives_the_numbers_it_stands_for(kind, tmp_path, vocabulary):
    model = tiny()
    path = write_gguf(tmp_path / "m.gguf", model, "llama", vocabulary, kind=kind)
    imported = load(gguf_read.convert(path, tmp_path / "out")).state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor.numpy()
        if expected.ndim > 1:  # rows are quantised one by one, so the order of rows does not matter
            expected = gguf.dequantize(gguf.quantize(expected, kind), kind).astype(np.float32)
        assert np.array_equal(imported[name].numpy(), expected), name


def random_blocks(kind, rows, columns, generator):
    """Any bits are valid codes of a K-quant; only its fp16 scales have to be sane."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scales = generator.uniform(0.001, 0.01, (rows, columns // block, 2)).astype(np.float16).view(np.uint8)
    first = {Kind.Q2_K: size - 4, Kind.Q3_K: size - 2, Kind.Q6_K: size - 2}.get(kind, 0)
    count = 2 if kind in (Kind.Q3_K, Kind.Q6_K) else 4
    raw[:, :, first : first + count] = scales[:, :, :count]
    return raw.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda kind: kind.name
)
def test_k_quants_of_random_blocks(kind, tmp_path, vocabulary):
    model = tiny(hidden_size=256, num_hidden_layers=1)
    generator = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    write_gguf(path, model, "llama", vocabulary)
    blocks = {n: random_blocks(kind, rows, 256, generator) for n, rows in (("attn_q", 64), ("attn_v", 32))}
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for key, value in metadata_of(model.config, "llama").items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
    add_tokenizer(writer, vocabulary)
    for tensor in gguf.GGUFReader(path).tensors:
        part = tensor.name.split(".")[-2]
        if part in blocks:
            writer.add_tensor(tensor.name, blocks[part], raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = gguf_read.convert(tmp_path / "k.gguf", tmp_path / "out")
    weights = load(folder).state_dict()
    ours = {part: weights[f"model.layers.0.self_attn.{part[-1]}_proj.weight"].numpy() for part in blocks}
    assert np.array_equal(ours["attn_v"], gguf.dequantize(blocks["attn_v"], kind))
    assert np.array_equal(swap_halves(ours["attn_q"], 4), gguf.dequantize(blocks["attn_q"], kind))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="k.gguf", dtype=torch.float32
    )
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_rounded_as_torch_rounds(dtype, tmp_path, vocabulary):
    model = tiny()
    path = write_gguf(tmp_path / "m.gguf", model, "llama", vocabulary)
    assert exported(path, tmp_path / "out", infer_dtype=dtype) == 0
    imported = load(tmp_path / "out", dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(imported[name], tensor.to(getattr(torch, dtype))), name


def test_many_rows_are_read_in_pieces(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(gguf_read, "CHUNK_NUMBERS", 5 * 64)
    model = tiny()
    path = write_gguf(tmp_path / "m.gguf", model, "llama", vocabulary)
    imported = load(gguf_read.convert(path, tmp_path / "out"))
    torch.testing.assert_close(logits(imported), logits(model), rtol=1e-6, atol=1e-6)


def test_shards_and_their_index(tmp_path, vocabulary):
    model = tiny()
    path = write_gguf(tmp_path / "m.gguf", model, "llama", vocabulary)
    folder = gguf_read.convert(path, tmp_path / "out", shard_gigabytes=1e-4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert all((folder / file).stat().st_size < 1.1e5 for file in files)
    torch.testing.assert_close(logits(load(folder)), logits(model), rtol=1e-6, atol=1e-6)


# ---- tokenizers
# -------------------------------------------------------------------------------------------------


def read(keys, folder, pre=None):
    """Through the files, so that what is written is what is compared. -> transformers tokenizer."""
    metadata = {
        f"tokenizer.{'' if key.startswith('chat') else 'ggml.'}{key}": value for key, value in keys.items()
    }
    folder.mkdir(exist_ok=True)
    read_tokenizer.write_tokenizer(read_tokenizer.read_tokenizer(metadata, pre), 512, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def split(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def published(pre):
    """The splitting rule of a family as transformers and tokenizers have it, not as read_tokenizer.py has
    it."""
    if pre == "gpt-2":
        return gpt2_split()
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_split()])
    return split(GGUF_PRE_TOKENIZER_SPLITS[pre])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_ids_equal_the_original_tokenizer(pre, tmp_path):
    original, tokens, merges = byte_level_vocabulary(
        published(pre), size=700, normalizer=normalizers.NFC() if pre == "qwen2" else None
    )
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(merge) for merge in merges]}
    imported = read(keys, tmp_path)
    for text in TEXTS:
        ids = imported(text).input_ids
        assert ids == original.encode(text).ids, text
        decoded = imported.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded == (text if pre != "qwen2" else original.normalizer.normalize_str(text))


PIECES = {
    "deepseek-llm": ["Hello", ",", " world", "!?", " ", "123", " ", "\u4f60\u597d", "\n", "x", "  "],
    "deepseek-coder": [
        "Hello",
        ",",
        " world",
        "!?",
        " ",
        "1",
        "2",
        "3",
        " ",
        "\u4f60\u597d",
        "\n",
        "x",
        "  ",
    ],
    "deepseek-v3": ["Hello", ",", " world", "!?", " ", "123", " ", "\u4f60\u597d", "\n", "x", "  "],
    "default": ["Hello", ",", " world", "!?", " ", "123", " \u4f60\u597d", "\n", "x", "  "],
}


@pytest.mark.parametrize("pre", PIECES)
def test_where_the_other_families_split(pre):
    text = "Hello, world!? 123 \u4f60\u597d\nx  "
    rule = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r), "isolated") for r in read_tokenizer.PRE_TOKENIZERS[pre].regexes]
    )
    assert [piece for piece, _ in rule.pre_tokenize_str(text)] == PIECES[pre]


@pytest.mark.parametrize("pre", sorted(read_tokenizer.PRE_TOKENIZERS))
def test_no_splitting_rule_loses_text(pre, vocabulary, tmp_path):
    keys = vocabulary | {"pre": pre, "add_bos_token": False}
    imported = read(keys, tmp_path)
    for text in TEXTS:
        expected = normalizers.NFC().normalize_str(text) if "qwen" in pre or pre == "megrez" else text
        assert imported.decode(imported(text).input_ids, clean_up_tokenization_spaces=False) == expected


def train_sentencepiece(folder, prefix):
    """A byte-fallback BPE model by the sentencepiece library itself. prefix: a space in front of every
    text."""
    # the other texts hold characters that the model has never seen: they become bytes
    (folder / "text.txt").write_text(
        "\n".join([TEXTS[0], TEXTS[2], TEXTS[3], TEXTS[6]] * 4), encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        control_symbols=["<turn>"],
        minloglevel=2,
        num_threads=1,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def sentencepiece_keys(processor, **changes):
    def kind(i):
        if processor.is_unknown(i):
            return 2
        if processor.is_control(i):
            return 3
        if processor.is_byte(i):
            return 6
        return 4 if processor.id_to_piece(i) == "<tool>" else 1

    ids = range(processor.get_piece_size())
    return {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [float(processor.get_score(i)) for i in ids],
        "token_type": [kind(i) for i in ids],
        **changes,
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_sentencepiece(prefix, tmp_path):
    original = train_sentencepiece(tmp_path, prefix)
    imported = read(sentencepiece_keys(original, add_space_prefix=prefix), tmp_path / "out")
    assert (imported.bos_token, imported.eos_token, imported.unk_token) == ("<s>", "</s>", "<unk>")
    for text in TEXTS:
        ids = original.encode(text)
        assert imported(text, add_special_tokens=False).input_ids == ids, text
        assert imported(text).input_ids == [1, *ids]  # as llama.cpp does where the file does not say
        assert imported.decode(ids, clean_up_tokenization_spaces=False) == original.decode(ids)


def test_special_and_user_defined_tokens_are_matched_whole(tmp_path):
    original = train_sentencepiece(tmp_path, prefix=False)
    imported = read(sentencepiece_keys(original, add_space_prefix=False), tmp_path / "out")
    turn, tool, a, b, c = (original.piece_to_id(token) for token in ("<turn>", "<tool>", "a", "b", "c"))
    ids = imported("a<turn>b<tool>c", add_special_tokens=False).input_ids
    assert ids == [a, turn, b, tool, c]
    assert imported.decode(ids, skip_special_tokens=True) == "ab<tool>c"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_flags(bos, eos, vocabulary, tmp_path):
    imported = read(vocabulary | {"add_bos_token": bos, "add_eos_token": eos}, tmp_path)
    first, last = vocabulary["bos_token_id"], vocabulary["eos_token_id"]
    plain = imported("hi", add_special_tokens=False).input_ids
    assert imported("hi").input_ids == [first] * bos + plain + [last] * eos
    assert imported("hi", "hi").input_ids == ([first] * bos + plain + [last] * eos) * 2


def test_llama3_files_add_bos_and_take_whole_words(vocabulary, tmp_path):
    word = "unmergeable"  # a token that no merge makes
    keys = vocabulary | {"pre": "llama-bpe", "tokens": [*vocabulary["tokens"], word]}
    keys["token_type"] = [*vocabulary["token_type"], 1]
    imported = read(keys, tmp_path)
    assert imported(word).input_ids == [keys["bos_token_id"], len(keys["tokens"]) - 1]


def test_rows_that_pad_the_table_are_no_tokens(vocabulary, tmp_path):
    count = len(vocabulary["tokens"])
    keys = vocabulary | {"tokens": [*vocabulary["tokens"], f"[PAD{count}]", f"[PAD{count + 1}]"]}
    keys["token_type"] = [*vocabulary["token_type"], 5, 5]
    imported = read(keys, tmp_path)
    assert len(imported) == count
    assert len(imported(f"[PAD{count}]").input_ids) > 1


def test_chat_template_and_end_of_turn(vocabulary, tmp_path):
    keys = vocabulary | {"chat_template": BLOCK, "eot_token_id": 5, "padding_token_id": 7}
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", keys)
    folder = gguf_read.convert(path, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user]hi"
    assert tokenizer.pad_token_id == 7
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [vocabulary["eos_token_id"], 5]
    assert config_of(folder)["eos_token_id"] == vocabulary["eos_token_id"]


def test_several_chat_templates(vocabulary, tmp_path):
    imported = read(vocabulary | {"chat_template": BLOCK, "chat_template.tool_use": "tools"}, tmp_path)
    assert imported.chat_template == {"default": BLOCK, "tool_use": "tools"}


# ---- what is refused
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory, vocabulary):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny(), "llama", vocabulary)


def refuse(path, folder, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        gguf_read.convert(path, folder, **options)
    assert not list(folder.parent.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("place", "value"),
    [(8, 2**40), (8, 2**63), (16, 2**40), (24, 2**62)],  # tensors, tensors, keys, length of the first key
)
def test_counts_that_the_file_cannot_hold_are_refused_at_once(whole_file, tmp_path, place, value):
    content = bytearray(whole_file.read_bytes())
    content[place : place + 8] = value.to_bytes(8, "little")
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    refuse(path, tmp_path / "out", "cannot be read as GGUF .*cut short")


@pytest.mark.parametrize("element", [0, 8, 9])  # bytes, texts, lists
def test_a_list_that_the_file_cannot_hold_is_refused_at_once(tmp_path, element):
    path, key = tmp_path / "m.gguf", b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path.write_bytes(head + struct.pack("<IIQ", 9, element, 2**60) + bytes(64))
    refuse(path, tmp_path / "out", "cannot be read as GGUF .*cut short")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("llama.block_count", 2**31, "block_count is 2147483648, but there are [0-9]+ tensors"),
        ("llama.attention.head_count", 0, "head_count is 0, expected a whole number above 0"),
        ("llama.context_length", "long", "context_length is 'long', expected a whole number"),
    ],
)
def test_numbers_of_the_model_that_cannot_be_are_refused(tmp_path, vocabulary, key, value, match):
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", vocabulary, extra={key: value})
    refuse(path, tmp_path / "out", match)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 a zip file")
    refuse(path, tmp_path / "out", "not a GGUF file")
    path.write_bytes(b"")
    refuse(path, tmp_path / "out", "not a GGUF file")
    refuse(tmp_path / "absent.gguf", tmp_path / "out", "absent.gguf", FileNotFoundError)


@pytest.mark.parametrize("share", [0.00001, 0.001, 0.01, 0.03, 0.08, 0.2, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused_wherever_it_ends(share, whole_file, tmp_path):
    data = whole_file.read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(data[: max(4, int(len(data) * share))])
    refuse(path, tmp_path / "out", "cut short")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_touched(whole_file, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    refuse(whole_file, tmp_path, "not an empty folder", FileExistsError)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_what_a_killed_one_left_are_fine(whole_file, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    left = temporary_name(folder)
    left.mkdir()
    (left / "config.json").write_text("half")
    gguf_read.convert(whole_file, folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


NORM = np.ones(64, dtype=np.float32)
BAD_TENSORS = {
    "lacks .*blk.1.ffn_up.weight": {"blk.1.ffn_up.weight": None},
    "no tensor token_embd.weight": {"token_embd.weight": None},
    "unexpected .*blk.0.ffn_gate_inp.weight": {"blk.0.ffn_gate_inp.weight": NORM},
    r"blk.0.attn_norm.weight has shape \(63,\), expected \(64,\)": {"blk.0.attn_norm.weight": NORM[:63]},
    "lacks .*attn_output.bias": {"blk.0.attn_q.bias": NORM, "blk.0.attn_k.bias": NORM[:32]},
    "output_norm.weight holds NaN": {"output_norm.weight": NORM * np.nan},
    "does not follow Llama 3": {"rope_freqs.weight": np.array([1, 2, 1, 2, 1, 2, 3, 4], dtype=np.float32)},
    "expected .8,.": {"rope_freqs.weight": NORM},
}


@pytest.mark.parametrize("match", BAD_TENSORS)
def test_wrong_tensors_are_named(match, tmp_path, vocabulary):
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", vocabulary, change=BAD_TENSORS[match])
    refuse(path, tmp_path / "out", match)
    assert not (tmp_path / "out").exists()


BAD_KEYS = {
    "llama.expert_count is 8": {"llama.expert_count": 8},
    "llama.rope.dimension_count is 8, expected the head size 16": {"llama.rope.dimension_count": 8},
    "'longrope' is not one of none, linear, yarn": {"llama.rope.scaling.type": "longrope"},
    "lacks llama.rope.scaling.factor": {"llama.rope.scaling.type": "linear"},
    "yarn_log_multiplier: 0.1": {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.yarn_log_multiplier": 0.1,
    },
    "one of 3 parts": {"split.count": 3},
}


@pytest.mark.parametrize("match", BAD_KEYS)
def test_wrong_keys_are_named(match, tmp_path, vocabulary):
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", vocabulary, extra=BAD_KEYS[match])
    refuse(path, tmp_path / "out", match)


def test_an_unknown_architecture_is_named(tmp_path, vocabulary):
    path = write_gguf(tmp_path / "m.gguf", tiny(), "gemma2", vocabulary)
    refuse(path, tmp_path / "out", "'gemma2' cannot be read; llama, qwen2, qwen3 can")


BAD_VOCABULARIES = {
    "'klingon' is not known; known are .*smollm.*pre=NAME": {"pre": "klingon"},
    "the file has none; known are": {"pre": None},
    "'t5' cannot be read.*unigram": {"model": "t5"},
    "'bert' cannot be read": {"model": "bert"},
    "lacks tokenizer.ggml.merges": {"merges": None},
    "'q zz' makes no token": {"merges": ["q zz"]},
    "token_type: 1 entries for": {"token_type": [1]},
    "eos_token_id: 9999": {"eos_token_id": 9999},
    "add_eos_token is set, but": {"add_eos_token": True, "eos_token_id": None},
    "holds 'a' 2 times": {"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]},
}


@pytest.mark.parametrize("match", BAD_VOCABULARIES)
def test_wrong_vocabularies_are_named(match, vocabulary, tmp_path):
    keys = {key: value for key, value in (vocabulary | BAD_VOCABULARIES[match]).items() if value is not None}
    with pytest.raises(ValueError, match=match):
        read(keys, tmp_path)


def test_the_pre_tokenizer_can_be_given(vocabulary, tmp_path):
    keys = {key: value for key, value in vocabulary.items() if key != "pre"}
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", keys)
    assert gguf_read.convert(path, tmp_path / "out", pre="smollm") == tmp_path / "out"


def test_more_tokens_than_rows(tmp_path, vocabulary):
    path = write_gguf(tmp_path / "m.gguf", tiny(vocab_size=300), "llama", vocabulary)
    refuse(path, tmp_path / "out", "token_embd.weight has 300 rows for 302 tokens")


def test_numbers_too_large_for_float16(tmp_path, vocabulary, capsys):
    change = {"output_norm.weight": NORM * 70000}
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", vocabulary, change=change)
    assert exported(path, tmp_path / "out", infer_dtype="float16") == 2
    assert "norm.weight holds numbers too large for float16" in capsys.readouterr().err
    assert exported(path, tmp_path / "out", infer_dtype="bfloat16") == 0


# ---- model_name_or_path=x.gguf
# -----------------------------------------------------------------------------------


def exported(path, target, **keys):
    """export.py's exit status; the cache lies beside the target."""
    words = {"model_name_or_path": path, "export_dir": target, "cache_dir": target.parent / "cache"} | keys
    return export.main([f"{key}={value}" for key, value in words.items()])


def test_the_command(whole_file, tmp_path):
    command = [
        sys.executable,
        "export.py",
        f"model_name_or_path={whole_file}",
        f"cache_dir={tmp_path / 'cache'}",
    ]

    def run(*words):
        return subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT)

    done = run(f"export_dir={tmp_path / 'a'}", "infer_dtype=bfloat16")
    assert done.returncode == 0 and "LlamaForCausalLM" in done.stderr, done.stderr
    assert config_of(tmp_path / "a")["torch_dtype"] == "bfloat16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("keep")
    done = run(f"export_dir={tmp_path / 'mine'}")
    assert done.returncode == 2 and "is not empty" in done.stderr and "Traceback" not in done.stderr
    done = run(f"export_dir={tmp_path / 'b'}", "infer_dtype=int3")
    assert done.returncode == 2 and "bfloat16" in done.stderr and not (tmp_path / "b").exists()


def test_what_is_exported_is_what_the_file_says(whole_file, tmp_path):
    """Weights bit for bit and the tokenizer byte for byte, in float32 where no dtype is asked for."""
    folder = gguf_read.convert(whole_file, tmp_path / "converted")
    assert exported(whole_file, tmp_path / "out") == 0
    expected, found = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert expected.keys() == found.keys()
    assert all(
        found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]) for name in found
    )
    for path in folder.glob("*token*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert config_of(tmp_path / "out") == config_of(folder) | {"dtype": "float32"}
    generation = (folder / "generation_config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == generation


def test_a_file_is_converted_once_until_it_changes(vocabulary, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = write_gguf(tmp_path / "m.gguf", tiny(), "llama", vocabulary)
    first = resolve_model(ModelOptions(model_name_or_path=str(path)))
    assert first.parent == tmp_path / "home" / "anvil" and (first / "model.safetensors").is_file()
    told = capsys.readouterr().err
    assert f"converting {path} to {first}" in told
    for key in ("ref_model", "reward_model"):
        assert resolve_folder(key, str(path), "main", ModelOptions()) == first
    assert "converting" not in capsys.readouterr().err
    elsewhere = resolve_model(ModelOptions(model_name_or_path=str(path), cache_dir=str(tmp_path / "mine")))
    assert elsewhere.parent == tmp_path / "mine" and elsewhere.name == first.name
    write_gguf(path, tiny(intermediate_size=112), "llama", vocabulary)
    second = resolve_model(ModelOptions(model_name_or_path=str(path)))
    assert second != first and config_of(second)["intermediate_size"] == 112


def test_the_preview_reads_its_tokenizer_from_the_file(whole_file, tmp_path, capsys):
    words = {"model_name_or_path": whole_file, "cache_dir": tmp_path, "stage": "pt", "dataset": "c4_demo"}
    words |= {"dataset_dir": ROOT / "data", "max_samples": 2, "cutoff_len": 64}
    assert data.main(["preview", *(f"{key}={value}" for key, value in words.items())]) == 0
    assert "segment 0: data set c4_demo" in capsys.readouterr().out


def test_of_several_that_start_together_one_converts(whole_file, tmp_path):
    code = "import sys, pathlib; from checkpoints.gguf.read import cached_folder as f; "
    code += f"print(f(pathlib.Path({str(whole_file)!r}), {str(tmp_path)!r}))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
        for _ in range(3)
    ]
    results = [(*run.communicate(), run.returncode) for run in runs]
    assert [status for *_, status in results] == [0, 0, 0]
    assert len({out for out, *_ in results}) == 1
    assert sum("converting" in err for _, err, _ in results) == 1


def test_a_damaged_file_is_one_clear_line(whole_file, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes(whole_file.read_bytes()[:5000])
    assert exported(path, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"export.py: model_name_or_path: {path}: ") and "cut short" in message
    assert len(message.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert not [each for each in (tmp_path / "cache").iterdir() if each.is_dir()]
    assert exported(tmp_path / "absent.gguf", tmp_path / "out") == 2
    assert "no folder" in capsys.readouterr().err


REAL = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.skipif(not REAL.exists(), reason="the demonstration model is not there; `make test` fetches it")
def test_the_real_model_knows_paris():
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(REAL), load(REAL, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
