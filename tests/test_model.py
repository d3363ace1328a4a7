"""The decoder equals transformers on tiny models of every family, rope kind and switch; packing changes
nothing."""

import dataclasses

import pytest
import torch
import transformers

import model as decoder_file
from architectures import config_from_hf
from architectures.config import scale_rope
from architectures.layers import ForwardContext
from checkpoints.huggingface import load_model, save_model
from generation.cache import KVCache
from model import Decoder

SIZES = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that a wrong switch shows
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
CASES = {
    "llama": ("Llama", {}),
    "llama-mha-wide-heads": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 18}),
    "llama-mqa-tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    ),
    "llama-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": (
        "Llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 20.0}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-upper-layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "qwen3-bias-window": (
        "Qwen3",
        {"head_dim": 12, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4}
        | {"max_window_layers": 2},
    ),
}


def oracle(case: str):
    """A tiny random transformers model of this case, biases and norms random too."""
    family, changes = CASES[case]
    config_class = getattr(transformers, family + "Config")
    torch.manual_seed(5)
    model = getattr(transformers, family + "ForCausalLM")(config_class(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.normal_(1.0, 0.3)
    return model.eval()


def row_of(lengths, vocab=131, seed=0):
    """A flat row of random tokens: tokens, positions, cu_seqlens, max_seqlen."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths]).int()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return tokens, positions, cu_seqlens, max(lengths)


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs = oracle(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_logits_equal_transformers_and_survive_saving(pair, tmp_path):
    theirs, ours, folder = pair
    tokens, *rest = row_of([37])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        logits = ours.logits(ours(tokens, *rest))
        torch.testing.assert_close(logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
        save_model(ours, tmp_path, source_folder=folder, shard_gigabytes=3e-5)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        torch.testing.assert_close(again(tokens[None]).logits[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_packed_row_equals_its_segments_with_every_gradient(pair):
    ours = load_model(pair[2], dtype=torch.float64)  # so that nothing but a leak could differ
    lengths = [5, 1, 23, 23, 9]
    tokens, positions, cu_seqlens, longest = row_of(lengths)
    weight = torch.randn(sum(lengths), 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for parameter in ours.parameters():
        parameter.requires_grad_(True)

    def gradients(run):
        ours.zero_grad()
        value = run()
        value.backward()
        return value.item(), {
            name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None
        }

    def separate():
        total = 0
        for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            alone = torch.tensor([0, stop - start], dtype=torch.int32)
            hidden = ours(tokens[start:stop], positions[start:stop], alone, stop - start)
            total = total + (hidden * weight[start:stop]).sum()
        return total

    packed_value, packed = gradients(lambda: (ours(tokens, positions, cu_seqlens, longest) * weight).sum())
    separate_value, alone = gradients(separate)
    assert packed_value == pytest.approx(separate_value, rel=1e-11)
    assert packed.keys() == alone.keys()
    for name, grad in packed.items():
        torch.testing.assert_close(grad, alone[name], atol=1e-11 * alone[name].abs().max().item(), rtol=1e-9)


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_decoding_with_a_cache_equals_the_whole_text(pair):
    """Ragged prompts prefilled together, then token by token; dynamic rope re-bases old keys only without a
    cache."""
    _, ours, _ = pair
    if ours.config.rope.kind == "dynamic":
        pytest.skip("keys in a cache keep the base they were made with, as in transformers")
    prompts, steps = [3, 11, 6], 7
    full = [row_of([n + steps], seed=n)[0] for n in prompts]
    cache = KVCache(ours.config, sequences=3, capacity=max(prompts) + steps)
    with torch.no_grad():
        tokens = torch.cat([text[:n] for text, n in zip(full, prompts)])
        _, positions, cu_seqlens, longest = row_of(prompts)
        hidden = ours(tokens, positions, cu_seqlens, longest, cache)
        got = [[hidden[cu_seqlens[i] : cu_seqlens[i + 1]]] for i in range(3)]
        for step in range(steps):
            tokens = torch.stack([text[n + step] for text, n in zip(full, prompts)])
            positions = torch.tensor(cache.lengths, dtype=torch.int32)
            hidden = ours(tokens, positions, torch.arange(4, dtype=torch.int32), 1, cache)
            for i in range(3):
                got[i].append(hidden[i : i + 1])
        for i, text in enumerate(full):
            n = len(text)
            alone = ours(text, torch.arange(n).int(), torch.tensor([0, n], dtype=torch.int32), n)
            torch.testing.assert_close(
                torch.cat(got[i]), alone, atol=1e-5 * alone.abs().max().item(), rtol=2e-5
            )


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_rope_scaling_option_loads_in_transformers_with_equal_logits(kind, tmp_path):
    theirs = oracle("llama")
    theirs.save_pretrained(tmp_path / "base")
    ours = load_model(
        tmp_path / "base", rope_scaling=kind, cutoff_len=150
    )  # 64 trained positions -> factor 3
    assert ours.config.rope.factor == 3.0
    save_model(ours, tmp_path / "scaled", source_folder=tmp_path / "base")
    scaled = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "scaled")
    tokens, *rest = row_of([149])
    with torch.no_grad():
        expected = scaled(tokens[None]).logits[0]
        logits = ours.logits(ours(tokens, *rest))
        unscaled = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
    assert (logits - unscaled).abs().max() > 0.1


def test_rope_scaling_leaves_texts_that_fit_alone():
    config = config_from_hf(oracle("llama").config.to_dict())
    assert scale_rope(config, "linear", cutoff_len=64) is config


class NoNorm(torch.nn.Identity):
    def of_sum(self, x, delta, dtype):
        return x, x


def test_neftune_noise_is_bounded_by_segment_length_and_off_in_eval():
    config = dataclasses.replace(
        config_from_hf(oracle("llama").config.to_dict()), num_layers=0, sliding_windows=()
    )
    model = Decoder(config)
    model.norm = NoNorm()
    model.runtime.embedding_noise = 5.0
    row = row_of([4, 36])
    clean = model.eval()(*row)
    noise = (model.train()(*row) - clean).abs()
    for part, length in ((noise[:4], 4), (noise[4:], 36)):
        bound = 5.0 / (length * 60) ** 0.5
        assert 0.9 * bound < part.max() <= bound * 1.0001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalML"]}, "nearest: LlamaForCausalLM"),
        ({"vocab_size": None}, "vocab_size missing"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"hidden_act": "swoosh"}, "hidden_act 'swoosh'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None, expected a whole number"),
        ({"head_dim": "8"}, "head_dim is '8', expected a whole number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "RoPE's factor is 'x', expected a number"),
        ({"rope_scaling": [2.0]}, r"rope_scaling is \[2.0\], expected an object"),
    ],
)
def test_a_config_that_does_not_fit_names_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**oracle("llama").config.to_dict(), **change})


class Doubled(torch.nn.Module):
    """A feed-forward kind of a test: x (T, E) -> 2 x."""

    def __init__(self, config, layer, **factory):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * x


def test_a_layer_takes_its_kinds_from_the_tables_as_the_config_names_them(monkeypatch):
    monkeypatch.setitem(decoder_file.FEED_FORWARD, "doubled", Doubled)
    plain = config_from_hf(oracle("llama").config.to_dict())
    model = Decoder(dataclasses.replace(plain, feed_forward_kinds=("mlp", "doubled", "mlp")))
    assert [type(block.mlp).__name__ for block in model.layers] == ["MLP", "Doubled", "MLP"]
    assert model.layers[1].mlp.layer == 1
    row, block = row_of([7]), model.layers[1]
    context = ForwardContext(row[2], 7, None, "auto", torch.float32)
    with torch.no_grad():
        x, delta = block(torch.randn(7, 60), None, *model.rotation(row[1], context, torch.float32), context)
        assert torch.equal(delta, 2 * block.post_attention_layernorm(x))
    with pytest.raises(KeyError, match="unheard"):
        Decoder(dataclasses.replace(plain, attention_kinds=("attention", "unheard", "attention")))
