"""quality.py against transformers' losses, KL by the definition in fp64, and bytes that are counted by
hand."""

import copy
import json
import math
import re

import pytest
import torch
import transformers
from test_model import oracle, row_of
from tiny_runs import make_rows, tiny_runs
from tiny_tokenizers import make_tokenizer

import export
from checkpoints.huggingface import load_model
from checkpoints.peft import load_adapter
from conversion import quality
from quant.nf4 import NF4Format
from text.tokenizer import Tokenizer

CASE = "llama-biases"
NF4 = NF4Format(double=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    oracle(CASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """A model, and the same in four bits."""
    return load_model(folder), load_model(folder, quantization=NF4)


@pytest.fixture(scope="module")
def texts():
    return list(row_of([17, 2, 29])[0].split([17, 2, 29]))


def all_logits(model, tokens):
    """(T, V) fp64, in one piece."""
    with torch.no_grad():
        return model.logits(model(tokens, *row_of([len(tokens)])[1:])).double()


def loss_of(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum").item()


def test_loss_and_perplexity_equal_transformers(pair, texts, monkeypatch):
    total = 0.0
    with torch.no_grad():
        for tokens in texts:
            total += oracle(CASE)(tokens[None], labels=tokens[None]).loss.item() * (len(tokens) - 1)
    expected = total / sum(len(tokens) - 1 for tokens in texts)
    assert quality.mean_loss(pair[0], texts) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(quality, "CHUNK_NUMBERS", 4 * 131)  # a head in many pieces gives the same
    assert quality.mean_loss(pair[0], texts) == pytest.approx(expected, rel=1e-6)
    assert quality.perplexity(pair[0], texts) == pytest.approx(math.exp(expected), rel=1e-6)


def test_the_difference_of_two_models_is_that_of_the_definition(pair, texts):
    parent, child = pair
    divergence = parent_loss = child_loss = 0.0
    for tokens in texts:
        log_p, log_q = (all_logits(model, tokens).log_softmax(-1) for model in pair)
        divergence += torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        parent_loss, child_loss = parent_loss + loss_of(log_p, tokens), child_loss + loss_of(log_q, tokens)
    predicted = 48 - 3
    found = quality.compare(parent, child, texts)
    assert found.kl == pytest.approx(divergence / 48, rel=1e-4) and found.kl > 1e-4
    assert found.parent_loss == pytest.approx(parent_loss / predicted, rel=1e-6)
    assert found.child_loss == pytest.approx(child_loss / predicted, rel=1e-6)
    assert found.perplexity_change == pytest.approx(
        math.exp((child_loss - parent_loss) / predicted) - 1, abs=1e-6
    )
    same = quality.compare(parent, parent, texts)
    assert same.kl == 0 and same.perplexity_change == 0


def test_a_report_measures_every_block_alone_and_leaves_the_parent_as_it_was(pair, texts):
    parent, child = pair
    before = [id(block) for block in parent.layers]
    report = quality.measure(parent, child, texts, stored_bytes=1000)
    assert [id(block) for block in parent.layers] == before
    assert report.difference == quality.compare(parent, child, texts)
    assert report.tokens == 48 and report.block_tokens == 17
    assert report.model_bits == 8000 / sum(p.numel() for p in parent.parameters())
    lost = whole = 0.0
    for number, block in enumerate(report.blocks):
        mixed = copy.deepcopy(parent)
        mixed.layers[number] = child.layers[number]
        assert block.difference == quality.compare(parent, mixed, texts[:1])
        assert len(block.linears) == 7
        for linear in block.linears:
            weight = parent.get_submodule(linear.name).weight.double()
            layer = child.get_submodule(linear.name)
            rest = weight - layer.dequantize().double()
            assert linear.error == pytest.approx((rest.norm() / weight.norm()).item(), rel=1e-5)
            blocks = math.ceil(weight.numel() / 64)
            assert (
                linear.storage_bytes == math.ceil(weight.numel() / 2) + 4 * blocks
            )  # codes, and a scale each
            lost, whole = lost + rest.square().sum().item(), whole + weight.square().sum().item()
    assert quality.total_error(report.linears) == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert report.difference.kl > max(block.difference.kl for block in report.blocks) / 2
    lines = list(report.lines())
    assert len(lines) == 2 + len(report.blocks) + 2 and "down_proj" in lines[1]
    assert json.loads(json.dumps(report.as_dict()))["blocks"][0]["linears"].keys() == {
        linear.name for linear in report.blocks[0].linears
    }


def test_another_models_parent_is_refused(pair, tmp_path, texts):
    torch.manual_seed(0)
    other = oracle(CASE).config
    other.num_hidden_layers = 1
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="report_parent: the parent has other sizes"):
        quality.measure(load_model(tmp_path), pair[1], texts, 1)


# Text


def test_a_text_becomes_rows_of_tokens(tmp_path):
    tokenizer = Tokenizer.from_folder(make_tokenizer(tmp_path, "llama3"))
    text = "The hammer sings upon an anvil. " * 9
    (tmp_path / "text.txt").write_text(text)
    ids = tokenizer.encode(text, add_special=True)
    assert ids[0] == tokenizer.token_id("<|begin_of_text|>")
    found = quality.windows(tokenizer, tmp_path / "text.txt", length=16)
    assert torch.cat(found).tolist() == ids and len(ids) % 16 > 1
    assert {len(row) for row in found[:-1]} == {16}
    assert [len(row) for row in quality.windows(tokenizer, tmp_path / "text.txt", 16, tokens=33)] == [16, 16]
    assert [len(row) for row in quality.windows(tokenizer, tmp_path / "text.txt", 16, tokens=32 + 3)] == [
        16,
        16,
        3,
    ]
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, fault in (("none.txt", "cannot be read"), ("bytes.txt", "cannot be read as UTF-8")):
        with pytest.raises(ValueError, match=f"export_sample_text: .*{name} {fault}"):
            quality.windows(tokenizer, tmp_path / name)


# Through the command line


@pytest.mark.parametrize("way", ["plain", "adapter", "calibrated"])
def test_the_report_is_of_the_files_that_were_written(tmp_path, capsys, way):
    with tiny_runs(tmp_path) as tiny:
        keys = {"model_name_or_path": tiny.model, "quantization_bit": 4, "report": "true"}
        keys |= {"export_dir": tmp_path / "out", "export_sample_text": tiny.folder / "text.txt"}
        if way == "adapter":
            keys |= {"export_merge": "loftq", "export_merge_rank": 3, "report_parent": tiny.model}
        if way == "calibrated":
            texts = [
                {"text": " ".join(row["output"] for row in make_rows(40, seed=seed))} for seed in range(8)
            ]
            (tiny.folder / "documents.json").write_text(json.dumps(texts))
            keys |= {
                "quantization_bit": None,
                "export_quantization_bit": 4,
                "export_quantization_nsamples": 8,
            }
            keys |= {
                "export_quantization_dataset": tiny.folder / "documents.json",
                "export_quantization_maxlen": 40,
            }
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
            keys |= {"model_name_or_path": tiny.make_model("wider", seed=2, **sizes)}
            keys |= {"export_quantization_group_size": 32}
        assert export.main([f"{key}={value}" for key, value in keys.items() if value is not None]) == 0
        parent, child = load_model(keys["model_name_or_path"]), load_model(tmp_path / "out")
        tokenizer = Tokenizer.from_folder(tmp_path / "out")
        texts = quality.windows(tokenizer, tiny.folder / "text.txt")
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == (2 if way == "adapter" else 1)
    if way == "adapter":
        load_adapter(child, tmp_path / "out" / "adapter")
    expected = quality.measure(parent, child, texts, sum(path.stat().st_size for path in files))
    found = json.loads((tmp_path / "out" / "quality.json").read_text())["report"]
    assert found == json.loads(json.dumps(expected.as_dict()))
    printed = capsys.readouterr().out
    assert all(line in printed for line in expected.lines())
    bits = float(re.search(r"total: (\S+) bits", printed)[1])
    expected = {"plain": 4.2, "adapter": 4.2 + 32 * 3 * (24 + 24) / 24**2, "calibrated": 4 + 20 / 32}
    assert bits == pytest.approx(expected[way], rel=0.2)
