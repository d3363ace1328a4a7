"""gptq_calibration.py and export_quantization_*: which text is taken, what each linear is solved for, what is
written."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_runs import WORDS, tiny_runs

import chat
import export
from architectures.layers import ForwardContext
from checkpoints.huggingface import load_config, load_model, save_model
from conversion.gptq_calibration import STAGES, CalibrationOptions, _Text, read_windows
from model import Block
from pipeline.sources import HubAccess
from quant.gptq import GPTQLinear
from quant.gptq_solver import GPTQOptions, Hessian, solve
from text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LINEARS = [f"{part}.{name}" for part, names in STAGES for name in names]


def text_of(words: int, seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("calibrate")) as made:
        made.model = made.make_model("wide", seed=2, **SIZES)
        rows = [{"text": text_of(60 if i % 2 else 5, seed=i)} for i in range(30)]
        (made.folder / "documents.json").write_text(json.dumps(rows))
        yield made


def run(tiny, name: str, **keys) -> tuple[int, Path]:
    target = tiny.folder / name
    chosen = {
        "model_name_or_path": tiny.model,
        "export_dir": target,
        "export_quantization_bit": 4,
        "export_quantization_dataset": tiny.folder / "documents.json",
        "export_quantization_nsamples": 20,
        "export_quantization_maxlen": 40,
        "export_quantization_group_size": 32,
    } | keys
    return export.main([f"{key}={value}" for key, value in chosen.items() if value is not None]), target


def windows_of(tiny, **keys) -> torch.Tensor:
    options = {
        "export_quantization_bit": 4,
        "export_quantization_dataset": str(tiny.folder / "documents.json"),
        "export_quantization_nsamples": 20,
        "export_quantization_maxlen": 40,
    } | {f"export_quantization_{key}": value for key, value in keys.items()}
    return read_windows(CalibrationOptions(**options), Tokenizer.from_folder(tiny.model), HubAccess())


# Text


def test_windows_are_of_documents_that_are_longer(tiny):
    tokenizer = Tokenizer.from_folder(tiny.model)
    rows = json.loads((tiny.folder / "documents.json").read_text())
    encoded = [tokenizer.encode(row["text"]) for row in rows]
    long = [ids for ids in encoded if len(ids) > 40]
    assert 5 < len(long) < len(encoded)
    windows = windows_of(tiny, nsamples=2 * len(long))
    assert windows.shape == (2 * len(long), 40) and windows.dtype is torch.int64

    def owners(window):
        return [
            i for i, ids in enumerate(long) if any(ids[s : s + 40] == window for s in range(len(ids) - 39))
        ]

    found = [owners(window) for window in windows.tolist()]
    assert all(len(one) == 1 for one in found)
    assert {one[0] for one in found[: len(long)]} == set(range(len(long)))  # each once before any twice
    assert torch.equal(windows, windows_of(tiny, nsamples=2 * len(long)))
    starts = {
        next(s for s in range(999) if long[owner][s : s + 40] == window)
        for (owner,), window in zip(found, windows.tolist())
    }
    assert len(starts) > 3


def test_short_lines_of_a_text_file_are_joined(tiny):
    lines = [text_of(6, seed=i) for i in range(40)]
    path = tiny.folder / "lines.txt"
    path.write_text("\n".join(lines) + "\n")
    tokenizer = Tokenizer.from_folder(tiny.model)
    whole = tokenizer.encode("\n".join(lines))
    for window in windows_of(tiny, dataset=str(path), nsamples=3, maxlen=50).tolist():
        assert tokenizer.decode(window[1:-1]) in tokenizer.decode(whole)


def test_conversations_give_the_text_of_all_turns(tiny):
    turns = [{"from": "human", "value": text_of(30, 1)}, {"from": "gpt", "value": text_of(30, 2)}]
    path = tiny.folder / "chats.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    tokenizer = Tokenizer.from_folder(tiny.model)
    whole = tokenizer.decode(tokenizer.encode("\n".join(turn["value"] for turn in turns)))
    for window in windows_of(tiny, dataset=str(path), nsamples=4, maxlen=50).tolist():
        assert tokenizer.decode(window[1:-1]) in whole


def test_a_name_of_dataset_info(tiny):
    (tiny.folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "documents.json"}}))
    options = CalibrationOptions(4, "mine", 5, 40, dataset_dir=str(tiny.folder))
    found = read_windows(options, Tokenizer.from_folder(tiny.model), HubAccess())
    assert torch.equal(found, windows_of(tiny, nsamples=5))


def test_of_a_long_document_only_a_part_is_held_and_few_of_many(tiny, monkeypatch):
    path = tiny.folder / "book.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(4000, seed)}) + "\n" for seed in range(5)))
    encoded = []
    tokenizer = Tokenizer.from_folder(tiny.model)
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(len(text)) or [0] * len(text))
    options = CalibrationOptions(4, str(path), 1, 10)
    read_windows(options, tokenizer, HubAccess())
    assert encoded == [640]


# The model


def hybrid(dense, quantised, layer: int, stage: int):
    """The dense model with all linears before this stage as the quantised model has them."""
    model = copy.deepcopy(dense)
    for number, block in enumerate(model.layers):
        for k, (part, names) in enumerate(STAGES):
            if (number, k) < (layer, stage):
                for name in names:
                    layer_there = quantised.get_submodule(f"layers.{number}.{part}.{name}")
                    block.get_submodule(part).get_submodule(name).weight.data.copy_(layer_there.dequantize())
    return model


def inputs_of(model, name: str, windows: torch.Tensor) -> torch.Tensor:
    """What the linear gets in the whole model, every window by itself."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    length = windows.shape[1]
    with torch.no_grad():
        for window in windows:
            model(window, torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length)
    handle.remove()
    return torch.cat(seen)


def attention_received(model, layer: int, x: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """For every token the sum over heads and queries of a_ij^2, from scores written out in float64."""
    count, length = windows.shape
    attention = model.layers[layer].self_attn
    positions, borders = torch.arange(length), torch.tensor([0, length], dtype=torch.int32)
    row = ForwardContext(borders, length, None, "auto", torch.float32)
    cos, sin = model.rotation(positions, row, torch.float32)
    received = []
    with torch.no_grad():
        for part in x.split(length):
            q, k, _ = attention.project(part, cos, sin, row)
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * attention.scale
            never = torch.full((length, length), -torch.inf, dtype=torch.float64)
            scores += never.triu(1)
            if attention.window:
                scores += never.tril(-attention.window)
            received.append(scores.softmax(-1).square().sum((0, 1)))
    return torch.cat(received).float()


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"],
}


@pytest.mark.parametrize(
    "keys, changes",
    [
        ({}, {}),
        ({"bit": 3, "group_size": -1, "sym": False, "damp_percent": 0.02}, {"attention_bias": True}),
        ({"bit": 2, "group_size": 48, "desc_act": True}, QWEN3 | SLIDING),
    ],
    ids=["4 bits", "3 bits, biases", "2 bits, act-order, q and k norms, a sliding window"],
)
def test_every_linear_is_solved_for_what_it_gets_once_those_before_are_quantised(tiny, keys, changes):
    """Against the whole model run window by window with hooks, and solve on what they saw."""
    name = f"solved-{len(keys)}"
    folder = tiny.make_model(f"{name}-base", seed=3, **SIZES, **changes)
    status, target = run(
        tiny,
        name,
        model_name_or_path=folder,
        **{f"export_quantization_{key}": value for key, value in keys.items()},
    )
    assert status == 0
    dense, quantised = load_model(folder), load_model(target)
    assert (
        (dense.layers[1].self_attn.window == 5) == dense.config.qk_norm == ("use_sliding_window" in changes)
    )
    windows = windows_of(tiny)
    options = GPTQOptions(
        bits=keys.get("bit", 4),
        group_size=keys.get("group_size", 32),
        symmetric=keys.get("sym", True),
        act_order=keys.get("desc_act", False),
        damping=keys.get("damp_percent", 0.1),
    )
    same = []
    for layer in range(2):
        for stage, (part, names) in enumerate(STAGES):
            model = hybrid(dense, quantised, layer, stage)
            for one in names:
                place = f"layers.{layer}.{part}.{one}"
                hessian = Hessian(model.get_submodule(place).in_features)
                x = inputs_of(model, place, windows)
                if one in ("k_proj", "v_proj"):
                    x = x * attention_received(model, layer, x, windows).sqrt()[:, None]
                hessian.add(x)
                expected = solve(dense.get_submodule(place).weight, hessian, options)
                found = quantised.get_submodule(place)
                codes, zeros = found.integers()
                same.append((codes == expected.codes).double().mean().item())
                if options.act_order:
                    assert torch.equal(found.group_of, expected.group_of)
                assert zeros.shape == expected.zeros.shape
    assert min(same) > 0.97 and sum(same) / len(same) > 0.995, same


def test_the_text_goes_through_the_blocks_own_forward(tiny, tmp_path, monkeypatch):
    """With the block edited (half of the MLP's update) every linear still gets what it gets in the model."""
    forward = Block.forward

    def half(self, *row):
        x, delta = forward(self, *row)
        return x, 0.5 * delta

    monkeypatch.setattr(Block, "forward", half)
    model, windows = load_model(tiny.model), torch.randint(0, 99, (3, 20))
    text = _Text(model.config, windows, tmp_path / "activations", torch.float32, "cpu")
    with torch.no_grad():
        text.embed(model.embed_tokens.weight.detach())
        for layer, block in enumerate(model.layers):
            for stage, (part, names) in enumerate(STAGES):
                expected = inputs_of(model, f"layers.{layer}.{part}.{names[0]}", windows)
                found = torch.cat([x.clone() for x in text.inputs(block, stage)])
                if names[0] == "k_proj":
                    expected = expected * attention_received(model, layer, expected, windows).sqrt()[:, None]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            text.leave(block)


def test_better_than_rounding_on_other_text(tiny, capsys):
    status, target = run(tiny, "better", export_quantization_bit=3)
    told = capsys.readouterr().out
    assert status == 0 and "GPTQ 3 bits, group 32" in told and "of what the linears put out is lost" in told
    record = json.loads((target / "export_info.json").read_text())["calibration"]
    assert record["output_error"] < 0.6 * record["output_error_of_rounding"]
    dense, found = load_model(tiny.model), load_model(target)
    rounded = copy.deepcopy(dense)
    for name, module in rounded.layers.named_modules():
        if name.split(".", 1)[-1] in LINEARS:
            groups = module.weight.data.unflatten(1, (-1, 32))
            scale = 2 * groups.abs().amax(-1, keepdim=True) / 7
            groups.copy_((groups / scale).round().clamp(-4, 3) * scale)
    other = torch.tensor(Tokenizer.from_folder(tiny.model).encode(text_of(300, seed=99)))[:400]
    place = torch.arange(len(other)), torch.tensor([0, len(other)], dtype=torch.int32), len(other)
    with torch.no_grad():
        expected, mine, theirs = (model.logits(model(other, *place)) for model in (dense, found, rounded))
    assert (mine - expected).square().mean() < 0.7 * (theirs - expected).square().mean()


# Files


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_written_is_what_transformers_asks_of_a_gptq_checkpoint(tiny, bits):
    status, target = run(tiny, f"layout-{bits}", export_quantization_bit=bits, infer_dtype="float16")
    assert status == 0
    settings = transformers.AutoConfig.from_pretrained(target)
    assert settings.dtype is torch.float16
    chosen = transformers.GPTQConfig.from_dict(settings.quantization_config)
    assert (chosen.bits, chosen.group_size, chosen.sym, chosen.desc_act) == (bits, 32, True, False)
    assert chosen.quant_method == "gptq"
    tensors, dense = load_file(target / "model.safetensors"), load_file(tiny.model / "model.safetensors")
    config = load_config(tiny.model)
    assert not list(target.glob("*working*")) and not list(tiny.folder.glob(".tmp-*"))
    for layer in range(2):
        for name in LINEARS:
            full = f"model.layers.{layer}.{name}"
            outputs, inputs = dense.pop(f"{full}.weight").shape
            parts = {part: tensors.pop(f"{full}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
            found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
            assert found == {
                "qweight": (torch.int32, (inputs * bits // 32, outputs)),
                "qzeros": (torch.int32, (inputs // 32, outputs * bits // 32)),
                "scales": (torch.float16, (inputs // 32, outputs)),
                "g_idx": (torch.int32, (inputs,)),
            }
            assert parts["g_idx"].tolist() == [i // 32 for i in range(inputs)]
    assert tensors.keys() == dense.keys()  # embedding, norms and head, in the dtype asked for
    for name, tensor in tensors.items():
        assert torch.equal(tensor, dense[name].half()), name
    assert config.num_layers == 2


def test_values_by_the_formula_in_numpy(tiny):
    """w = s (q - (z + 1)), 4 bits: eight codes a word along the inputs, eight zeros a word along the
    outputs."""
    status, target = run(tiny, "formula", export_quantization_sym=False, export_quantization_desc_act=True)
    assert status == 0
    tensors = {name: tensor.numpy() for name, tensor in load_file(target / "model.safetensors").items()}
    quantised, full = load_model(target), "layers.1.mlp.down_proj"
    parts = [tensors[f"model.{full}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    words, zero_words, scales, groups = parts
    shifts = np.arange(0, 32, 4)
    codes = ((words[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, words.shape[1])  # (in, out)
    zeros = ((zero_words[:, :, None] >> shifts) & 15).reshape(len(zero_words), -1) + 1  # (groups, out)
    values = scales.astype(np.float32)[groups] * (codes - zeros[groups])
    assert set(groups.tolist()) == {0, 1, 2} and groups.tolist() != sorted(groups.tolist())
    assert zeros.max() < 16  # no reader has to wrap one around
    np.testing.assert_array_equal(values.T, quantised.get_submodule(full).dequantize().numpy())
    weight = load_file(tiny.model / "model.safetensors")[f"model.{full}.weight"].numpy()
    assert np.abs(values.T - weight).mean() < 0.1 * np.abs(weight).mean()


def test_adapters_are_merged_first_and_shards_hold_all(tiny):
    assert tiny.train("adapter", model_name_or_path=tiny.model, max_steps=2, learning_rate=0.1) == 0
    keys = {"adapter_name_or_path": tiny.folder / "adapter"}
    status, merged = run(tiny, "merged", export_quantization_bit=None, **keys)
    assert status == 0
    _, at_once = run(tiny, "at-once", export_size=5e-5, **keys)
    _, later = run(tiny, "later", model_name_or_path=merged)
    shards = sorted(at_once.glob("model-*.safetensors"))
    assert len(shards) > 2
    found, expected = {}, load_file(later / "model.safetensors")
    for shard in shards:
        found |= load_file(shard)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    base = load_file(run(tiny, "without")[1] / "model.safetensors")
    assert any(not torch.equal(found[name], base[name]) for name in found if name.endswith("qweight"))


def test_a_quantised_base_is_dequantised_and_its_result_chats(tiny):
    status, eight = run(tiny, "eight", export_quantization_bit=8)
    assert status == 0
    status, again = run(tiny, "again", model_name_or_path=eight, export_quantization_bit=4)
    assert status == 0
    settings = json.loads((again / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == 4
    direct = load_model(run(tiny, "direct")[1])
    place = "layers.0.self_attn.q_proj"
    codes, expected = (m.get_submodule(place).integers()[0] for m in (load_model(again), direct))
    assert (codes == expected).double().mean() > 0.8
    words = [f"model_name_or_path={again}", "template=chatml", "max_new_tokens=2", "--prompt", "hammer"]
    assert chat.main(words) == 0
    model = load_model(again)
    assert all(isinstance(model.get_submodule(f"layers.1.{name}"), GPTQLinear) for name in LINEARS)


def test_bad_options_and_text_are_refused_before_anything_is_written(tiny, capsys):
    short = tiny.folder / "short.json"
    short.write_text(json.dumps([{"text": "short"}, {"text": "an anvil"}]))
    (tiny.folder / "odd.json").write_text(json.dumps([{"words": "no column is known"}]))
    (tiny.folder / "bad.json").write_text('[{"text": 3}]')
    narrow = tiny.make_model("narrow", seed=1)
    cases = {
        "dataset=none": "export_quantization_dataset: missing",
        "dataset=nowhere.json": "export_quantization_dataset: 'nowhere.json' is",
        f"dataset={short}": "is longer than export_quantization_maxlen=40 tokens (the longest",
        f"dataset={tiny.folder / 'odd.json'}": "has the columns words",
        f"dataset={tiny.folder / 'bad.json'}": "bad.json:1",
        "bit=5": "export_quantization_bit",
        "nsamples=0": "export_quantization_nsamples: 0",
        "maxlen=1": "export_quantization_maxlen: 1",
        "maxlen=513": "export_quantization_maxlen: 513 tokens; the model is for texts of 512",
        "group_size=0": "export_quantization_group_size: 0",
        "damp_percent=1.5": "export_quantization_damp_percent: 1.5",
    }
    (tiny.folder / "long.json").write_text(json.dumps([{"text": text_of(900, 5)}]))
    for word, message in cases.items():
        key, _, value = word.partition("=")
        more = {"export_quantization_dataset": tiny.folder / "long.json"} if "maxlen" in key else {}
        status, target = run(tiny, "refused", **more, **{f"export_quantization_{key}": value})
        streams = capsys.readouterr()
        assert status == 2 and message in streams.err and "Traceback" not in streams.err, (word, streams.err)
        assert not target.exists()
    for more in ({"quantization_bit": 4}, {"export_merge": "loftq", "quantization_bit": 4}):
        status, target = run(tiny, "refused", **more)
        told = capsys.readouterr().err
        assert (
            status == 2
            and "export_quantization_bit: GPTQ rounds the merged" in told
            and list(more)[0] in told
        )
    status, target = run(tiny, "refused", export_gguf_type="Q8_0")
    assert status == 2 and "drop export_gguf_type" in capsys.readouterr().err and not target.exists()
    status, target = run(tiny, "refused", model_name_or_path=narrow)
    assert status == 2 and "packs multiples of 32" in capsys.readouterr().err and not target.exists()


def test_numbers_that_break_are_named_with_their_linear(tiny, capsys):
    broken = tiny.make_model("broken", seed=1, **SIZES)
    path = broken / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, path)
    status, target = run(tiny, "named", model_name_or_path=broken)
    error = capsys.readouterr().err
    assert status == 2 and "tensor model.layers.1.mlp.up_proj.weight holds NaN" in error
    assert not target.exists() and not list(tiny.folder.glob(".named*"))


PEAKS = """
import resource, sys, export
for words in sys.argv[1:]:
    assert export.main(words.split()) == 0
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_layers(tiny):
    """40 layers after 4 in one process hardly raise its peak."""
    commands = []
    for layers in (4, 40):
        sizes = SIZES | {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": layers}
        folder = tiny.make_model(f"deep-{layers}", seed=1, **sizes)
        save_model(
            load_model(folder), folder, None, shard_gigabytes=1e-3
        )  # of a file all pages that were read count
        commands.append(
            f"model_name_or_path={folder} export_dir={tiny.folder / f'deep-out-{layers}'} export_size=0.001 "
            f"export_quantization_bit=4 export_quantization_dataset={tiny.folder / 'documents.json'} "
            "export_quantization_nsamples=2 export_quantization_maxlen=20"
        )
    done = subprocess.run([sys.executable, "-c", PEAKS, *commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = (int(line.split()[1]) * 1024 for line in done.stdout.splitlines() if line.startswith("peak"))
    dense = (
        4
        * 36
        * sum(parameter.numel() for parameter in load_model(tiny.folder / "deep-4").layers[1].parameters())
    )
    assert dense > 3e7
    assert many - few < 0.3 * dense, (few, many, dense)
