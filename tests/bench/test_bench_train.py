"""bench/train.py from its command line, on a CPU at tiny sizes, and the operations that it counts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).resolve().parents[2]


def test_all_systems_train_alike_in_every_row(tmp_path):
    """Equal lengths, full tuning with accumulation, padding and packing: the baselines get the same losses as
    Anvil."""
    command = [
        sys.executable,
        str(ROOT / "bench" / "train.py"),
        "smoke=true",
        "seconds=900",
        f"out={tmp_path}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "train_cpu.json").read_text())
    assert set(report["rows"]) == {"T1", "T2", "M2", "T6", "T4", "T4p"} and report["failed"] == []
    baselines = {"T2": {"anvil 16 bit", "hf default", "hf best"}, "M2": set()}
    for name, row in report["rows"].items():
        assert set(row["systems"]) == {"anvil"} | baselines.get(name, {"hf default", "hf best"}), name
        assert row["not_run"] == {}, name
        assert max(row["largest_loss_difference"].values(), default=0) < 1e-5, name
        losses = row["systems"]["anvil"]["losses"]
        assert len(losses) == 5 + row["turns"] * (row["steps_per_turn"] + 1)
        assert losses[-1] != losses[0]  # it trains
    assert report["rows"]["T4p"]["systems"]["hf best"]["setting"] == "no recompute, sdpa cudnn"


def test_models_in_4_bits_and_their_twins_are_the_same_numbers():
    """With adapters around the layers too, and without a copy of the codes or of what is not quantised."""
    from bench import four_bits
    from bench.train_systems import Setting, anvil_on, random_decoder, transformers_model

    setting = Setting("tiny of whole blocks", 4, torch.device("cpu"), in_4_bits=True)
    source = random_decoder(setting)
    anvil_on(setting, source)
    layer = source.layers[1].mlp.down_proj.base
    assert 4.1 < layer.bits_per_weight < 4.4 and four_bits.packed_bytes(source) < 2 * 41000 * 4.5 / 8
    twin, baseline = four_bits.dense_twin(source), transformers_model(setting, source)
    other = baseline.model.layers[1].mlp.down_proj
    x = torch.randn(3, 128, requires_grad=True)
    expected = torch.nn.functional.linear(x, layer.dequantize())
    torch.testing.assert_close(twin.layers[1].mlp.down_proj(x), expected)
    torch.testing.assert_close(other(x), expected)
    assert other.weight.data_ptr() == layer.codes.data_ptr()
    assert twin.embed_tokens.weight.data_ptr() == source.embed_tokens.weight.data_ptr()
    assert baseline.lm_head.weight.data_ptr() == source.lm_head.weight.data_ptr()


class Full:
    """A system that does not fit into memory."""

    note = "no recompute"

    def prepare(self, group):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")


def test_a_baseline_that_cannot_run_is_listed_and_its_next_recipe_taken():
    from bench.baselines import BEST
    from bench.train_rows import SMOKE_ROWS, build_all, make_groups
    from bench.train_systems import Setting, anvil_on, baseline_on, random_decoder

    setting, not_run = Setting("tiny", 4, torch.device("cpu")), {}
    source = random_decoder(setting)
    makers = {
        "anvil": [lambda: anvil_on(setting, source)],
        "hf best": [Full, lambda: baseline_on(setting, source, BEST[1])],
    }
    entries = build_all(makers, make_groups(SMOKE_ROWS[0], 2), setting.device, 0, not_run)
    assert list(entries) == ["anvil", "hf best"] and entries["hf best"].system.recipe.checkpointing
    assert not_run == {"hf best (no recompute)": "OutOfMemoryError: CUDA out of memory. Tried"}


def test_operations_of_a_step_are_those_of_the_formula():
    """Llama-2-7B at 2,048 tokens: 28.6 GF per token for LoRA, 41.5 in full (performance goals, section
    5.1)."""
    from bench.baselines import Document
    from bench.train_systems import Setting, flops_per_step

    document = Document(np.zeros(2048, np.int32), np.ones(2048, bool))
    config = Setting("Llama-2-7B", 16, torch.device("cpu")).config
    found = {rank: flops_per_step(config, rank, [[[document]]]) for rank in (0, 16)}
    adapters = 6 * 39.98e6 * 2048
    assert found[16] == pytest.approx(28.04e9 * 2048 + adapters, rel=0.01)
    assert found[0] == pytest.approx(41.3e9 * 2048, rel=0.01)


def test_a_mistaken_row_is_named():
    from bench.train import main

    with pytest.raises(SystemExit, match="rows=T9: known are .*T4p"):
        main(["smoke=true", "rows=T9"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    from bench.train import main

    with pytest.raises(SystemExit, match="no CUDA GPU"):
        main(["device=cuda"])
