"""The benchmarks of quantised quality and of the planner run at tiny sizes and report what they say they
do."""

import json

import pytest
from tiny_runs import ROOT, tiny_runs

from bench import plan as bench_plan
from bench import quality as bench_quality


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("quality")) as made:
        yield made


def test_the_quality_of_formats_is_written_with_bits_and_perplexity(tiny, capsys):
    model = tiny.make_model("wide", seed=4, hidden_size=128, intermediate_size=256, head_dim=32)
    out = tiny.folder / "results"
    words = [f"model={model}", f"text={ROOT / 'data/wiki_demo.txt'}", "tokens=300", "window=100", "only=nf4"]
    assert bench_quality.main([*words, f"out={out}"]) == 0
    rows = {row["format"]: row for row in json.loads((out / "quality_cpu.json").read_text())["rows"]}
    assert rows.keys() == {"fp32", "nf4, double", "nf4"}
    assert 4.12 < rows["nf4, double"]["bits"] < 4.5 == rows["nf4"]["bits"]
    assert rows["nf4"]["KL"] > 0 and rows["nf4"]["perplexity"] == pytest.approx(
        rows["fp32"]["perplexity"] * (1 + rows["nf4"]["change"])
    )
    assert "nf4, double" in capsys.readouterr().out


def test_a_plan_is_held_against_its_run(tiny, capsys):
    out = tiny.folder / "results"
    words = [f"model={tiny.model}", f"dataset_dir={ROOT / 'data'}", "dataset=tiny_alpaca", "only=lora, 1 row"]
    assert bench_plan.main([*words, "steps=1", f"out={out}"]) == 0
    (row,) = json.loads((out / "plan_cpu.json").read_text())["rows"]
    assert row["measured GiB"] > 0 and row["predicted / measured"] == pytest.approx(
        row["predicted GiB"] / row["measured GiB"]
    )
