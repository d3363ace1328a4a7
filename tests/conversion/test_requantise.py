"""Merging into quantised bases: the kept part is the best of its rank, and what is written and printed is
what transformers, peft and bitsandbytes compute from it."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_model import row_of
from tiny_runs import tiny_runs
from vendor_checkpoints import write_pair

import chat
import export
import quant
from checkpoints.huggingface import load_model
from checkpoints.peft import load_adapter
from conversion import requantise
from conversion.quality import mean_loss, windows
from conversion.requantise import best_low_rank, fit_in_turns, fit_once
from quant.nf4 import NF4Format
from text.tokenizer import Tokenizer

NF4 = NF4Format()
RANK = 8  # of the trained adapter


def random(*shape, seed=0, decay=1.0):
    """A matrix whose singular values fall off."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    return u * decay ** torch.arange(u.shape[1]) @ v


def svd_part(matrix, rank):
    """The best approximation of this rank, and the norm of what it leaves: in fp64, by the definition."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank], s[rank:].square().sum().sqrt().item()


# One linear


@pytest.mark.parametrize("shape", [(1, 5), (17, 123), (123, 17), (30, 30)])
@pytest.mark.parametrize("rank", [1, 3, 200])
def test_the_kept_part_is_the_best_of_its_rank(shape, rank):
    matrix = random(*shape, decay=0.9)
    b, a = best_low_rank(matrix, rank)
    assert b.shape == (shape[0], min(rank, *shape)) and a.shape == (min(rank, *shape), shape[1])
    expected, _ = svd_part(matrix, rank)
    torch.testing.assert_close(b @ a, expected.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        b.square().sum(0), a.square().sum(1), atol=1e-6, rtol=1e-5
    )  # both share the scale


def test_a_matrix_of_zeros_has_nothing_to_keep():
    b, a = best_low_rank(torch.zeros(6, 9), 2)
    assert torch.equal(b @ a, torch.zeros(6, 9))


@pytest.mark.parametrize("shape", [(90, 140), (140, 90)])
@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_large_matrices_go_by_iteration_and_lose_next_to_nothing(shape, decay, monkeypatch):
    matrix = random(*shape, decay=decay)
    monkeypatch.setattr(requantise, "EXACT_SIDE", 64)
    b, a = best_low_rank(matrix, 8)
    _, least = svd_part(matrix, 8)
    assert least * (1 - 1e-6) <= torch.linalg.vector_norm(matrix - b @ a).item() <= least * 1.0005
    again, _ = best_low_rank(matrix, 8)
    assert torch.equal(b, again)


def test_the_error_of_one_fit_is_the_tail_of_the_singular_values():
    target = torch.randn(37, 65, generator=torch.Generator().manual_seed(1))
    for rank in (0, 1, 7):
        fit = fit_once(target, None, NF4, torch.float32, rank)
        rest = target.double() - fit.layer.dequantize().double()
        norm = target.double().norm().item()
        assert fit.naive_error == pytest.approx(rest.norm().item() / norm, rel=1e-6)
        assert fit.error == pytest.approx(svd_part(rest, rank)[1] / norm, rel=1e-5)
        assert (fit.b is None) == (rank == 0)


def loftq_by_definition(target, rank, rounds):
    """Algorithm 1 of LoftQ in fp64, with the smallest error of all rounds."""
    low, errors = torch.zeros_like(target, dtype=torch.float64), []
    for _ in range(rounds):
        codes = NF4.quantise((target.double() - low).float(), None, torch.float32).dequantize().double()
        low, left = svd_part(target.double() - codes, rank)
        errors.append(left / target.double().norm().item())
    return errors


def test_fitting_in_turns_follows_loftq_and_beats_one_fit():
    target = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    expected = loftq_by_definition(target, 8, 5)
    found = [fit_in_turns(target, None, NF4, torch.float32, 8, rounds).error for rounds in (1, 2, 5)]
    for rounds, error in zip((1, 2, 5), found):
        assert error == pytest.approx(min(expected[:rounds]), rel=1e-4)
    assert found[2] < found[1] < found[0] == fit_once(target, None, NF4, torch.float32, 8).error


def test_the_best_of_all_turns_is_taken():
    target = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    expected = loftq_by_definition(target, 8, 6)
    assert min(expected) < 0.98 * expected[-1]  # later turns are worse
    fit = fit_in_turns(target, None, NF4, torch.float32, 8, 6)
    assert fit.error == pytest.approx(min(expected), rel=1e-4)
    left = target - fit.layer.dequantize() - fit.b @ fit.a
    assert left.norm() / target.norm() == pytest.approx(fit.error, rel=1e-4)


def test_where_the_rank_suffices_the_base_keeps_its_codes():
    """An update of rank 4 on codes: keeping both loses nothing, and no other codes can do better."""
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    base = NF4.quantise(weight, None, torch.float32)
    update = 0.02 * random(40, 4, seed=4) @ random(4, 96, seed=5)
    fit = fit_in_turns(base.dequantize() + update, base, NF4, torch.float32, 4, 3)
    assert fit.keeps_codes and fit.layer is base and fit.error < 1e-6
    torch.testing.assert_close(fit.b @ fit.a, update, atol=1e-6, rtol=1e-4)
    assert not fit_in_turns(
        base.dequantize() + update, base, NF4Format(double=False), torch.float32, 4, 3
    ).keeps_codes


# Through the command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model in NF4, with an adapter trained on it."""
    folder = tmp_path_factory.mktemp("merge")
    with tiny_runs(folder) as runs:
        assert export.main(words(folder / "nf4", model_name_or_path=runs.model, quantization_bit=4)) == 0
        keys = {
            "model_name_or_path": folder / "nf4",
            "lora_rank": RANK,
            "num_train_epochs": 12,
            "learning_rate": 2e-2,
        }
        assert runs.train("run", **keys) == 0
        yield runs


def words(target: Path, **keys) -> list[str]:
    return [f"{key}={value}" for key, value in {"export_dir": target, **keys}.items()]


def merge(tiny, target: Path, **keys) -> int:
    keys = {"model_name_or_path": tiny.folder / "nf4", "adapter_name_or_path": tiny.folder / "run"} | keys
    return export.main(words(target, export_sample_text=tiny.folder / "text.txt", **keys))


def theirs(folder: Path, *adapters: Path):
    """The folder in transformers with bitsandbytes, an adapter on it by peft, everything in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False  # or it computes in bfloat16 whatever the model's dtype
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()


def sample(tiny, folder: Path):
    return windows(Tokenizer.from_folder(folder), tiny.folder / "text.txt", tokens=4096)


def their_loss(model, texts) -> float:
    total = 0.0
    with torch.no_grad():
        for tokens in texts:
            total += model(tokens[None], labels=tokens[None]).loss.item() * (len(tokens) - 1)
    return total / sum(len(tokens) - 1 for tokens in texts)


def printed_losses(capsys) -> list[float]:
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss on"))
    return [float(number) for number in re.findall(r" (\d+\.\d+)(?:,|$)", line)]


@pytest.mark.parametrize("way", ["requantise", "loftq"])
def test_printed_losses_are_those_of_peft_and_bitsandbytes(tiny, tmp_path, capsys, way):
    out = tmp_path / "out"
    assert merge(tiny, out, export_merge=way, export_merge_rank=4) == 0
    exact, naive, ours = printed_losses(capsys)
    texts = sample(tiny, out)
    assert exact == pytest.approx(
        their_loss(theirs(tiny.folder / "nf4", tiny.folder / "run"), texts), abs=2e-5
    )
    assert ours == pytest.approx(their_loss(theirs(out, out / "adapter"), texts), abs=2e-5)
    assert abs(ours - exact) < 0.7 * abs(naive - exact)
    assert merge(tiny, tmp_path / "naive", export_merge_rank=0, export_merge="requantise") == 0
    assert printed_losses(capsys) == [exact, naive]
    assert naive == pytest.approx(their_loss(theirs(tmp_path / "naive"), texts), abs=2e-5)
    assert not (tmp_path / "naive" / "adapter").exists()


def test_a_rank_like_the_adapters_loses_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert merge(tiny, out, export_merge="loftq", export_merge_rank=RANK) == 0
    assert "14 keep the base's codes" in capsys.readouterr().out
    before, after = load_file(tiny.folder / "nf4" / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    texts = sample(tiny, out)
    found = load_model(out)
    load_adapter(found, out / "adapter")
    kept = load_model(tiny.folder / "nf4")
    load_adapter(kept, tiny.folder / "run")
    assert mean_loss(found, texts) == pytest.approx(mean_loss(kept, texts), abs=1e-6)


FORMATS = {
    "nf4": {"quantization_bit": 4},
    "fp4": {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
    "int8": {"quantization_bit": 8},
    "eetq": {"quantization_bit": 8, "quantization_method": "eetq"},
    "hqq": {"quantization_bit": 3, "quantization_method": "hqq"},
}


@pytest.fixture(scope="module")
def wider(tiny):
    """EETQ takes sides of whole 64 only, and bitsandbytes' CPU build dequantises rows of 32 or 48 numbers
    wrongly."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny.make_model("wider", seed=3, **sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_export_loads_as_the_model_quantised_on_loading(wider, tmp_path, dtype, name):
    plain = tmp_path / "plain"
    assert export.main(words(plain, model_name_or_path=wider, infer_dtype=dtype)) == 0
    assert export.main(words(tmp_path / "out", model_name_or_path=plain, **FORMATS[name])) == 0
    format = quant.from_options(quant.QuantOptions(**FORMATS[name]))
    tokens, *rest = row_of([23])
    with torch.no_grad():
        ours, expected = load_model(tmp_path / "out", None), load_model(plain, None, quantization=format)
        assert ours.embed_tokens.weight.dtype == getattr(torch, dtype)
        assert torch.equal(ours.logits(ours(tokens, *rest)), expected.logits(expected(tokens, *rest)))
        if (name, dtype) in (("nf4", "float32"), ("fp4", "float32")):  # elsewhere bitsandbytes rounds more
            found = theirs(tmp_path / "out")(tokens[None]).logits[0]
            torch.testing.assert_close(found, ours.logits(ours(tokens, *rest)), atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype and config["quantization_config"]["quant_method"] == format.method


def test_int8_keeps_what_it_loses_too(tiny, tmp_path, capsys):
    keys = {"model_name_or_path": tiny.model, "quantization_bit": 8}
    assert merge(tiny, tmp_path / "out", export_merge="requantise", export_merge_rank=6, **keys) == 0
    alone, beside = re.search(
        r"error (\S+) quantised, (\S+) with the adapter", capsys.readouterr().out
    ).groups()
    assert float(beside) < 0.8 * float(alone) < 0.8 * 0.01


def test_a_base_that_can_only_be_read_needs_another_format_for_the_result(tiny, tmp_path, capsys):
    gptq, twin = write_pair(tiny, "gptq act-order")
    run = tiny.folder / "on-gptq"
    assert tiny.train("on-gptq", model_name_or_path=gptq, num_train_epochs=1) == 0
    base = {"model_name_or_path": gptq, "adapter_name_or_path": run}
    assert merge(tiny, tmp_path / "out", **base, export_merge="requantise") == 2
    assert (
        "gptq can only be read, not made from weights as they are; give quantization_bit"
        in capsys.readouterr().err
    )
    keys = {"quantization_bit": 4, "export_merge": "requantise", "export_merge_rank": 2}
    capsys.readouterr()
    assert merge(tiny, tmp_path / "out", **base, **keys) == 0
    losses = printed_losses(capsys)
    model = load_model(twin)
    load_adapter(model, run)
    assert losses[0] == pytest.approx(mean_loss(model, sample(tiny, twin)), abs=2e-5)
    assert load_model(tmp_path / "out").layers[0].mlp.up_proj.format.describe() == NF4.describe()


def test_an_adapter_trained_in_four_bits_on_a_16_bit_folder_is_named(tiny, tmp_path, capsys):
    assert tiny.train("in-codes", quantization_bit=4, max_steps=1) == 0
    keys = {"model_name_or_path": tiny.model, "adapter_name_or_path": tiny.folder / "in-codes"}
    assert export.main(words(tmp_path / "out", **keys)) == 0
    assert (
        "in-codes was trained on the base in 4 bits and is merged into its 16-bit weights"
        in capsys.readouterr().out
    )
    assert export.main(words(tmp_path / "out", **keys, quantization_bit=4)) == 0
    assert "was trained" not in capsys.readouterr().out


def test_dequantised_merges_add_the_update_to_the_values_of_the_codes(tiny, tmp_path):
    assert merge(tiny, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    merged, base = load_file(tmp_path / "out" / "model.safetensors"), load_model(tiny.folder / "nf4")
    adapter = load_file(tiny.folder / "run" / "adapter_model.safetensors")
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        if f"base_model.model.{module}.lora_A.weight" not in adapter:
            continue
        a, b = (adapter[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        values = base.get_submodule(module.removeprefix("model.")).dequantize().double()
        torch.testing.assert_close(tensor.double(), values + 2.0 * b @ a, atol=1e-6, rtol=1e-6)
    # the same base, quantised on the way
    keys = {"quantization_bit": 4, "export_merge": "dequantise", "model_name_or_path": tiny.model}
    assert merge(tiny, tmp_path / "again", **keys) == 0
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, merged[name]), name


def test_what_is_written_trains_on_and_chats(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert merge(tiny, out, export_merge="requantise", export_merge_rank=2) == 0
    keys = {"model_name_or_path": out, "adapter_name_or_path": out / "adapter", "max_steps": 2}
    assert tiny.train("goes-on", **keys) == 0
    trained = tiny.weights("goes-on")
    assert all(min(tensor.shape) == 2 for tensor in trained.values())
    capsys.readouterr()
    assert chat.main([f"model_name_or_path={out / 'adapter'}", "--prompt", "Who", "max_new_tokens=3"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() and "left out" not in said.err
    assert (
        chat.main([f"model_name_or_path={out}", "template=chatml", "--prompt", "Who", "max_new_tokens=3"])
        == 0
    )
    assert f"{out / 'adapter'} belongs to these codes and is left out" in capsys.readouterr().err


def test_loftq_start_from_16_bit(tiny, tmp_path, capsys):
    """Without an adapter: codes and a start for training that together are nearer to the weights than codes
    alone."""
    keys = {"model_name_or_path": tiny.model, "quantization_bit": 4, "export_merge": "loftq"}
    text = {"export_sample_text": tiny.folder / "text.txt", "report": "true"}
    assert export.main(words(tmp_path / "out", **keys, **text, export_merge_rank=6)) == 0
    alone, beside = re.search(
        r"error (\S+) quantised, (\S+) with the adapter", capsys.readouterr().out
    ).groups()
    model, exact = load_model(tmp_path / "out"), load_model(tiny.model)
    load_adapter(model, tmp_path / "out" / "adapter")
    lost = whole = 0.0
    for name, weight in exact.layers.named_parameters(prefix="layers"):
        if name.endswith("proj.weight"):
            layer = model.get_submodule(name.removesuffix(".weight"))
            lost += (weight - layer.merged_weight()).square().sum().item()
            whole += weight.square().sum().item()
    assert float(beside) == pytest.approx((lost / whole) ** 0.5, abs=1e-5)
    assert float(beside) < 0.75 * float(alone)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 12)


def test_bad_input_gives_one_clear_line_and_leaves_nothing(tiny, tmp_path, capsys):
    base, run = f"model_name_or_path={tiny.folder / 'nf4'}", f"adapter_name_or_path={tiny.folder / 'run'}"
    plain = f"model_name_or_path={tiny.model}"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    report = [f"export_sample_text={tiny.folder / 'text.txt'}", "report=true"]
    wide = tiny.make_model("wide", seed=2, intermediate_size=56)
    cases = {
        "not quantised": ([plain, run, "export_merge=loftq"], "needs a base that is quantised"),
        "way": ([base, run, "export_merge=merge"], "export_merge"),
        "rank": ([base, run, "export_merge=requantise", "export_merge_rank=-1"], "export_merge_rank: -1"),
        "rank of loftq": ([base, run, "export_merge=loftq", "export_merge_rank=0"], "nothing to fit"),
        "rank of 16 bit": (
            [base, run, "export_merge=dequantise", "export_merge_rank=4"],
            "nothing is lost in 16 bit",
        ),
        "rounds": ([base, run, "export_merge=loftq", "loftq_iter=0"], "loftq_iter: 0"),
        "twice": ([base, run, "export_merge=dequantise", "quantization_bit=4"], "drop quantization_bit"),
        "no text": ([base, run, f"export_sample_text={tmp_path / 'none.txt'}"], "none.txt cannot be read"),
        "empty": ([base, run, f"export_sample_text={empty}"], "holds 0 tokens"),
        "report": ([base, run, "report=true"], "give export_sample_text=FILE"),
        "parent": ([base, run, "report_parent=x"], "nothing is compared without report=true"),
        "no parent": ([plain, *report, f"report_parent={tmp_path}"], "config.json: file not found"),
        "other parent": (
            [plain, *report, f"report_parent={wide}"],
            "report_parent: the parent has other sizes",
        ),
        "packed parent": (
            [plain, *report, f"report_parent={tiny.folder / 'nf4'}"],
            "the parent is quantised too",
        ),
    }
    for name, (argv, message) in cases.items():
        assert (name, export.main([*argv, f"export_dir={tmp_path / 'out'}"])) == (name, 2)
        streams = capsys.readouterr()
        assert message in streams.err and streams.err.count("\n") == 1, (name, streams.err)
        assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"], name
