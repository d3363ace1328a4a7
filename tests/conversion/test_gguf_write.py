"""GGUF export against the gguf package's numbers, transformers' GGUF reader, our own and llama.cpp
itself."""

import ctypes
import json
import subprocess
import sys
import weakref
from importlib import util
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from test_export import add_adapter
from tiny_runs import fork
from tiny_tokenizers import make_tokenizer
from tokenizers import Regex, models, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import export
from checkpoints.gguf import blocks, read
from checkpoints.gguf.read_tokenizer import PRE_TOKENIZERS, splitter
from checkpoints.huggingface import load_config
from conversion.gguf import write, write_tokenizer
from options.atomic import temporary_name
from tests.checkpoints.test_gguf_read import tiny
from text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = {
    "vocab_size": 731,
    "bos_token_id": None,
    "eos_token_id": None,
}  # the tokenizers have ids of their own
LLAMA_CPP = pytest.mark.skipif(
    util.find_spec("llama_cpp") is None,
    reason="llama.cpp is not there; `pip install llama-cpp-python` builds it (cmake, a C++ compiler)",
)


def make_model(
    folder: Path, family: str = "Llama", kind: str = "chatml", **changes
) -> transformers.PreTrainedModel:
    model = tiny(family, **(VOCABULARY | changes))
    model.save_pretrained(folder)
    make_tokenizer(folder, kind)
    return model


def run(model: Path, target: Path, kind: str, **keys) -> int:
    words = {"model_name_or_path": model, "export_dir": target, "export_gguf_type": kind} | keys
    return export.main([f"{key}={value}" for key, value in words.items()])


def exported(model: Path, target: Path, kind: str, **keys) -> Path:
    assert run(model, target, kind, **keys) == 0
    return target / f"model-{kind}.gguf"


def logits(model, length=40):
    tokens = torch.randint(0, 700, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits[0]


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **options
    ).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return make_model(folder), folder


# Numbers


def hard_rows() -> torch.Tensor:
    """(13, 512): normal numbers of several sizes, zeros, one sign, ties of the largest, outliers, tiny
    numbers."""
    rows = (
        torch.randn(13, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 13)[:, None]
    )
    rows[1] = 0
    rows[2] = rows[2].abs()
    rows[3] = -rows[3].abs()
    rows[4] = torch.tensor([1.0, -1.0]).repeat(256)
    rows[5, ::37] = 500
    rows[6] *= 1e-6
    rows[7] = 1.5
    rows[8, 40:90] = 0
    return rows


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"])
def test_blocks_equal_those_of_the_gguf_package(kind):
    expected = gguf.quantize(hard_rows().numpy(), Kind[kind]).view(np.uint8).reshape(13, -1)
    assert np.array_equal(blocks.encode(hard_rows(), kind).numpy(), expected)


def q4_k(rows: torch.Tensor) -> np.ndarray:
    codes = blocks.encode(rows, "Q4_K")
    assert codes.shape == (len(rows), rows.shape[1] // 256 * 144)
    return gguf.dequantize(codes.numpy(), Kind.Q4_K)


def test_q4_k_errs_by_less_than_three_quarters_of_q4_0():
    rows = torch.randn(40, 1024, generator=torch.Generator().manual_seed(5))
    rows += torch.linspace(-1, 1, 40)[:, None]  # Q4_K's minimum pays where numbers are not around 0
    rows *= torch.logspace(-1, 1, 1024)  # each group of its own size: in a wrong place it would be far off
    simple = gguf.dequantize(gguf.quantize(rows.numpy(), Kind.Q4_0), Kind.Q4_0)
    errors = [np.square(found - rows.numpy()).sum(1) for found in (q4_k(rows), simple)]
    assert (errors[0] < 0.75 * errors[1]).all()


def test_q4_k_keeps_zeros_and_never_leaves_the_range_of_a_group():
    rows = hard_rows()
    found = q4_k(rows)
    assert (found[1] == 0).all() and np.isfinite(found).all()
    groups = rows.view(-1, 32)
    extent = groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)
    # half a step of 15, and as much again for the 6 bits that scale and minimum have in the block's own units
    block = extent.view(-1, 8).amax(1).repeat_interleave(8)
    error = (torch.from_numpy(found).view(-1, 32) - groups).abs().amax(1)
    normal = block > 1e-3  # an fp16 scale cannot hold the tiny ones
    assert (error <= extent / 15 + block / 63)[normal].all()


@pytest.mark.parametrize("offset", [1.0, -1.0, 100.0, -3e4])
def test_q4_k_of_close_numbers_far_from_zero(offset):
    """All codes of a group are the same, and no line goes through them."""
    rows = offset * (1 + 1e-3 * torch.randn(4, 256, generator=torch.Generator().manual_seed(0)))
    assert np.abs(q4_k(rows) - rows.numpy()).max() <= 8e-3 * abs(offset)


@LLAMA_CPP
def test_q4_k_is_as_exact_as_llama_cpps_own():
    import llama_cpp

    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    blocks, source = np.zeros((64, 4 * 144), np.uint8), np.ascontiguousarray(rows.numpy())
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (source, blocks))
    ctypes.CDLL(str(library)).quantize_row_q4_K_ref(*pointers, ctypes.c_int64(source.size))
    theirs = np.square(gguf.dequantize(blocks, Kind.Q4_K) - source).sum()
    assert np.square(q4_k(rows) - source).sum() < 1.005 * theirs


@pytest.mark.parametrize("kind", blocks.BLOCKS)
def test_what_a_block_cannot_hold_is_refused(kind):
    for value, match in (
        (torch.nan, "NaN or infinity"),
        (torch.inf, "NaN or infinity"),
        (3e38, "too large for"),
    ):
        rows = hard_rows()
        rows[3, 70] = value
        if value == 3e38 and kind in ("F32", "BF16"):
            assert blocks.encode(rows, kind).shape[0] == 13
            continue
        with pytest.raises(ValueError, match=match):
            blocks.encode(rows, kind)


# Models

FAMILIES = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, odd": (
        "Llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 22, "hidden_size": 51},
    ),
    "llama, all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window, tied": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3, biases": ("Qwen3", {"attention_bias": True}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_the_import_gives_every_number_back(case, tmp_path):
    family, changes = FAMILIES[case]
    model = make_model(tmp_path / "model", family, **changes)
    path = exported(tmp_path / "model", tmp_path / "out", "F32")
    back = load(read.convert(path, tmp_path / "back"))
    expected, found = model.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(back), logits(model))
    assert back.config.max_position_embeddings == 512 and back.config.tie_word_embeddings == ("tied" in case)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(case, tmp_path):
    family, changes = FAMILIES[case]
    model = make_model(tmp_path / "model", family, **(changes | {"head_dim": 128 if case == "qwen3" else 16}))
    path = exported(
        tmp_path / "model", tmp_path / "out", "F32"
    )  # of the head size their config has by default
    theirs = load(path.parent, gguf_file=path.name, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_matrices_are_encoded_row_by_row_and_vectors_stay_exact(kind, llama, tmp_path):
    model, folder = llama
    back = load(read.convert(exported(folder, tmp_path / "out", kind), tmp_path / "back")).state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor.numpy()
        if expected.ndim > 1:
            own = Kind["Q8_0" if name == "lm_head.weight" and kind == "Q4_0" else kind]
            expected = gguf.dequantize(gguf.quantize(expected, own), own)
        assert np.array_equal(back[name].numpy(), expected), name


def test_numbers_that_fp16_holds_survive_f16_exactly(llama, tmp_path):
    model, folder = llama
    (tmp_path / "half").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((folder / name).read_bytes())
    half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, tmp_path / "half" / "model.safetensors")
    path = exported(tmp_path / "half", tmp_path / "out", "F16")
    back = load_file(read.convert(path, tmp_path / "back") / "model.safetensors")
    assert back.keys() == half.keys() and all(torch.equal(back[name].half(), half[name]) for name in half)


def kinds_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("tied", [True, False])
def test_rows_get_the_finest_type_that_fits_them(tied, tmp_path):
    make_model(
        tmp_path / "model", hidden_size=96, intermediate_size=256, head_dim=14, tie_word_embeddings=tied
    )
    found = kinds_of(exported(tmp_path / "model", tmp_path / "out", "Q4_K"))
    assert found["blk.1.ffn_down.weight"] == "Q4_K"  # rows of 256
    assert found["blk.1.ffn_up.weight"] == "Q5_0"  # rows of 96
    assert found["blk.1.attn_output.weight"] == "F16"  # rows of 56
    assert found["output_norm.weight"] == "F32"
    head = {"token_embd.weight": "Q8_0"} if tied else {"token_embd.weight": "Q5_0", "output.weight": "Q8_0"}
    assert {
        name: kind for name, kind in found.items() if name in ("token_embd.weight", "output.weight")
    } == head


ORIGINAL = {"original_max_position_embeddings": 128}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn, other betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        **ORIGINAL,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling(case, tmp_path, capsys):
    parameters = {"rope_theta": 50000.0, **SCALINGS[case]}
    model = make_model(tmp_path / "model", head_dim=64, rope_parameters=parameters)
    path = exported(tmp_path / "model", tmp_path / "out", "F32")
    assert ("--yarn-beta-slow 2" in capsys.readouterr().out) == (
        "betas" in case
    )  # llama.cpp does not read the key
    back = load(read.convert(path, tmp_path / "back"))
    torch.testing.assert_close(logits(back, 200), logits(model, 200), rtol=1e-4, atol=1e-4)
    rope = dict(back.config.rope_parameters)
    assert {key: rope[key] for key in SCALINGS[case]} == SCALINGS[case]
    longest = load_config(tmp_path / "model").max_positions  # 512 tokens, stretched by linear
    written = gguf.GGUFReader(path).fields["llama.context_length"].contents()
    assert written == load_config(tmp_path / "back").max_positions == longest
    assert longest == (2048 if case == "linear" else 512)


def test_a_dynamic_rope_is_exact_up_to_the_trained_length_and_the_user_is_told(tmp_path, capsys):
    model = make_model(
        tmp_path / "model", rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    )
    path = exported(tmp_path / "model", tmp_path / "out", "F32")
    assert "rope type dynamic changes texts beyond 512 tokens" in capsys.readouterr().out
    back = load(read.convert(path, tmp_path / "back"))
    assert torch.equal(logits(back, 300), logits(model, 300))


def assert_as_the_dense_export(model: Path, folder: Path, **keys) -> None:
    """The numbers of the GGUF file are those of the same export to safetensors."""
    path = exported(model, folder / "out", "F32", **keys)
    assert run(model, folder / "dense", "none", infer_dtype="float32", **keys) == 0
    expected = load_file(folder / "dense" / "model.safetensors")
    found = load_file(read.convert(path, folder / "back") / "model.safetensors")
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=["dora", "unties"]
)
def test_adapters_are_merged_on_the_way(options, tmp_path):
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    add_adapter(model, tmp_path / "adapter", **options)
    assert_as_the_dense_export(tmp_path / "model", tmp_path, adapter_name_or_path=tmp_path / "adapter")


def test_a_quantised_base_is_dequantised_on_the_way(llama, tmp_path):
    _, folder = llama
    assert run(folder, tmp_path / "nf4", "none", quantization_bit=4) == 0
    assert_as_the_dense_export(tmp_path / "nf4", tmp_path)


def test_the_order_of_the_files_does_not_matter(llama, tmp_path):
    _, folder = llama
    assert run(folder, tmp_path / "shards", "none", export_size=5e-5) == 0
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    for i, shard in enumerate(shards):  # the last shard is read first
        shard.rename(tmp_path / "shards" / f"part-{len(shards) - i}.safetensors")
    renamed = {shard.name: f"part-{len(shards) - i}.safetensors" for i, shard in enumerate(shards)}
    index["weight_map"] = {name: renamed[shard] for name, shard in index["weight_map"].items()}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    one, other = (
        exported(folder, tmp_path / "a", "Q8_0"),
        exported(tmp_path / "shards", tmp_path / "b", "Q8_0"),
    )
    tensors = [{t.name: t.data for t in gguf.GGUFReader(path).tensors} for path in (one, other)]
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert tensors[0].keys() == tensors[1].keys()


def test_one_tensor_is_held_at_a_time(llama, tmp_path):
    model, folder = llama
    config, tokenizer = load_config(folder), Tokenizer.from_folder(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = write.lay_out(config, shapes, "Q4_K", tokenizer, None, "name")
    alive, most = 0, 0

    def ended():
        nonlocal alive
        alive -= 1

    def stream():
        nonlocal alive, most
        for name, shape in shapes.items():
            tensor = torch.randn(shape)
            weakref.finalize(tensor, ended)
            alive += 1
            most = max(most, alive)
            yield name, tensor

    write.write(tmp_path / "m.gguf", layout, stream())
    assert alive <= 1 and most <= 2  # the next one is made while the loop still names the last
    assert len(kinds_of(tmp_path / "m.gguf")) == len(shapes)


# Tokenizers


@pytest.mark.parametrize("kind", ["chatml", "llama3", "llama2"])
def test_the_tokenizer_comes_back(kind, tmp_path, capsys):
    make_model(tmp_path / "model", kind=kind)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    make_tokenizer(tmp_path / "model", kind, template)
    path = exported(tmp_path / "model", tmp_path / "out", "F16")
    back = transformers.AutoTokenizer.from_pretrained(read.convert(path, tmp_path / "back"))
    before = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [write_tokenizer.PROBE, f"{before.eos_token}a {before.eos_token} b<think>c", "", " ", "a  b"]
    # scores and rule stand for the merges exactly; only the NFC of the one is lost, and the user is told
    assert ("GGUF cannot describe all" in capsys.readouterr().out) == (kind == "chatml")
    if kind == "chatml":
        texts = [text.replace("e\u0301", "e").replace("a\u0301", "a") for text in texts]
    for text in texts:
        assert back(text).input_ids == before(text).input_ids, text
    assert (back.bos_token, back.eos_token, back.chat_template) == (
        before.bos_token,
        before.eos_token,
        template,
    )
    assert len(back) == len(before)  # rows that only pad the table are no tokens


def test_a_named_template_and_its_end_of_turn_are_written(llama, tmp_path):
    _, folder = llama
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    make_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "special_tokens_map.json").unlink()
    path = exported(tmp_path / "model", tmp_path / "out", "F16", template="qwen")
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    _, metadata = read.open_gguf(path)
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.token_id("<|im_end|>")
    assert metadata["tokenizer.ggml.eot_token_id"] == tokenizer.token_id("<|endoftext|>")
    assert "<|im_start|>" in metadata["tokenizer.chat_template"]


def rule_of(pre_tokenizer, folder: Path, whole_words: bool, normal_form_c: bool) -> str:
    """The name that is found for a byte-level tokenizer with this rule."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, [], ignore_merges=whole_words))
    backend.normalizer = tokenizers.normalizers.NFC() if normal_form_c else None
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    metadata, notices = write_tokenizer.vocabulary_metadata(Tokenizer.from_folder(folder), 256, None)
    assert not notices
    return metadata["tokenizer.ggml.pre"]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_known_splitting_rule_is_found_again(name, tmp_path):
    rule = PRE_TOKENIZERS[name]
    found = PRE_TOKENIZERS[rule_of(splitter(rule), tmp_path, rule.whole_words, rule.normal_form_c)]
    assert (found.regexes, found.whole_words) == (rule.regexes, rule.whole_words)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_published_rules_are_found(name, tmp_path):
    """As transformers and the published files spell them."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        rule = gpt2
    elif name == "smollm":
        rule = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    else:
        cut = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
        rule = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    assert rule_of(rule, tmp_path, name in ("llama-bpe", "tekken"), name == "qwen2") == name


# llama.cpp


def engine(path: Path, **options):
    import llama_cpp

    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    exact |= {"yarn_attn_factor": -1.0}  # the file's
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, verbose=False, logits_all=True, **exact, **options
    )


@LLAMA_CPP
@pytest.mark.parametrize(
    "case",
    ["llama, tied", "llama, all biases", "qwen2", "qwen3", "linear", "yarn", "yarn, attention", "llama3"],
)
def test_llama_cpp_computes_the_same_logits(case, tmp_path):
    family, changes = FAMILIES.get(case, ("Llama", {}))
    scalings = SCALINGS | {"yarn, attention": SCALINGS["yarn"] | {"attention_factor": 1.3}}
    if case in scalings:
        changes = {"rope_parameters": {"rope_theta": 50000.0, **scalings[case]}, "head_dim": 64}
    model = make_model(tmp_path / "model", family, **changes)
    expected = logits(model, 200)
    found = engine(exported(tmp_path / "model", tmp_path / "out", "F32"), n_batch=256)
    tokens = torch.randint(0, 700, (1, 200), generator=torch.Generator().manual_seed(1))[0].tolist()
    found.eval(tokens)
    torch.testing.assert_close(torch.from_numpy(found.scores[:200]), expected, rtol=1e-3, atol=2e-3)


@LLAMA_CPP
@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(kind, tmp_path):
    make_model(tmp_path / "model", kind=kind)
    found = engine(exported(tmp_path / "model", tmp_path / "out", "Q8_0"))
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    for text in (write_tokenizer.PROBE, f"a{tokenizer.eos_token}", "What is the capital of France?"):
        assert found.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(
            text, add_special=True
        )


REAL = ROOT / "models" / "SmolLM2-135M-Instruct"


@LLAMA_CPP
@pytest.mark.skipif(not REAL.exists(), reason="the demonstration model is not there; `make test` fetches it")
def test_llama_cpp_answers_from_the_real_model(tmp_path):
    import llama_cpp

    found = llama_cpp.Llama(
        str(exported(REAL, tmp_path / "out", "F16")), n_ctx=256, n_threads=2, verbose=False
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    answer = found.create_chat_completion(chat, max_tokens=20, temperature=0)["choices"][0]
    assert (
        answer["message"]["content"] == "The capital of France is Paris."
        and answer["finish_reason"] == "stop"
    )


# The command


def test_what_a_killed_export_left_is_written_over(llama, tmp_path):
    unfinished = temporary_name(tmp_path / "out" / "model-F16.gguf")
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half" * 1_000_000)
    path = exported(llama[1], tmp_path / "out", "F16")
    names = sorted(entry.name for entry in (tmp_path / "out").iterdir())
    assert names == ["export_info.json", "model-F16.gguf"]
    read.convert(path, tmp_path / "back")


def test_several_types_stand_side_by_side_in_one_folder(llama, tmp_path):
    _, folder = llama
    words = [f"model_name_or_path={folder}", f"export_dir={tmp_path / 'out'}", "export_gguf_type=Q4_K"]
    done = subprocess.run([sys.executable, str(ROOT / "export.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0 and "model-Q4_K.gguf" in done.stdout, done.stderr
    exported(folder, tmp_path / "out", "F16")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["export_info.json", "model-F16.gguf", "model-Q4_K.gguf"]


def test_a_full_disk_leaves_nothing(llama, tmp_path):
    words = [f"model_name_or_path={llama[1]}", f"export_dir={tmp_path / 'out'}", "export_gguf_type=F32"]
    # files may not grow beyond this: the write fails as on a full disk
    child = fork(export.main, (words,), tmp_path / "printed", {}, file_limit=60_000)
    assert child.wait() == 1 and "could not be written" in child.text() and "Traceback" not in child.text()
    assert [path.name for path in tmp_path.iterdir()] == ["printed"]


def test_bad_input_gives_one_clear_line_and_leaves_nothing(llama, tmp_path, capsys):
    _, folder = llama
    make_model(tmp_path / "gelu", hidden_act="gelu")
    make_model(tmp_path / "mixed", "Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    model = make_model(tmp_path / "broken")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 70000
    model.save_pretrained(tmp_path / "large")
    make_tokenizer(tmp_path / "large", "chatml")
    for name, kind, change in (("words", "WordLevel", {}), ("split", "BPE", {"pattern": {"Regex": "[ae]"}})):
        make_model(tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        pipeline = json.loads(path.read_text())
        if kind == "WordLevel":
            pipeline["model"] = {"type": kind, "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
        pipeline["pre_tokenizer"]["pretokenizers"][0] |= change
        path.write_text(json.dumps(pipeline))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    cases = [
        ({"model": folder, "kind": "Q3_K"}, "export_gguf_type"),
        ({"model": folder, "kind": "F16", "target": tmp_path / "full"}, "not empty and no earlier export"),
        (
            {"model": folder, "kind": "F16", "quantization_bit": 4},
            "quantization_bit: export_gguf_type=F16 has codes",
        ),
        ({"model": folder, "kind": "F16", "export_merge": "loftq"}, "codes of its own"),
        (
            {"model": folder, "kind": "F16", "report": "true", "export_sample_text": ROOT / "README.md"},
            "export.py makes one of the file",
        ),
        ({"model": tmp_path / "gelu", "kind": "F16"}, "use silu, the model gelu"),
        ({"model": tmp_path / "mixed", "kind": "F16"}, "layers with and without a sliding window"),
        ({"model": tmp_path / "broken", "kind": "Q4_0"}, "mlp.up_proj.weight holds NaN or infinity"),
        ({"model": tmp_path / "large", "kind": "F16"}, "blk.1.ffn_up.weight holds numbers up to 70000"),
        ({"model": tmp_path / "words", "kind": "F16"}, "the model is WordLevel, not BPE"),
        ({"model": tmp_path / "split", "kind": "F16"}, "by none of the known rules"),
    ]
    for keys, message in cases:
        keys = {"target": tmp_path / "out"} | keys
        assert run(**keys) == 2, keys
        error = capsys.readouterr().err.replace("\n", " ")
        assert message in error and "Traceback" not in error, (keys, error)
        assert not (tmp_path / "out").exists(), keys
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
