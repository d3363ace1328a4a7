"""bench/decode.py runs from its command line on a CPU at a tiny size; its bound is the formula."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import decode, decode_cases
from bench.measure import Ceilings, Session

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_all_systems_and_writes_what_it_printed(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "decode.py"), "smoke=true", "repeats=2", "cases=d1,d3-32"]
    done = subprocess.run([*command, f"out={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "decode_d1_d3-32_cpu.json").read_text())
    assert report["machine"]["gpu"] is None and "mean nothing" in report["machine"]["note"]
    assert [(row["case"], row["system"]) for row in report["rows"]] == [
        (case, system) for case in ("d1", "d3-32") for system in ("anvil", "eager", "static")
    ]
    for row in report["rows"]:
        assert row["equal_tokens"] == 1.0  # fp32: every system writes the same
        assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"] and row["share_of_bound"] > 0
        assert f"{row['tokens_per_second']:.1f}" in done.stdout
    assert max(report["logits_differ_by"].values()) < 1e-5
    assert not report["failed"] and not report["left_out"]


def test_decoding_in_4_bits_is_compared_with_bitsandbytes_and_with_itself_in_16(tmp_path):
    pytest.importorskip("bitsandbytes")
    assert decode.main(["smoke=true", "repeats=1", "cases=d2", f"out={tmp_path}"]) == 0
    report = json.loads((tmp_path / "decode_d2_cpu.json").read_text())
    rows = {row["system"]: row for row in report["rows"]}
    assert list(rows) == ["anvil", "eager", "16bit"] and not report["failed"] and not report["left_out"]
    assert rows["16bit"]["equal_tokens"] == 1.0  # fp32: the same numbers
    assert report["logits_differ_by"]["d2"] < 0.1  # bitsandbytes multiplies in bf16 on some processors


def test_quick_leaves_the_compiled_baseline_of_batches_out_and_says_so(tmp_path, capsys):
    words = "smoke=true", "repeats=1", "quick=true", "cases=d3-32", "systems=anvil,static", f"out={tmp_path}"
    assert decode.main(list(words)) == 0
    assert "d3-32 static (quick)" in capsys.readouterr().out


def test_what_it_does_not_know_ends_it():
    for words in (["smoke=true", "cases=d7"], ["smoke=true", "systems=vllm"], ["sytems=anvil"]):
        with pytest.raises(SystemExit, match="unknown"):
            decode.main(words)


def test_the_bound_counts_weights_cache_and_products():
    """At one sequence memory binds: 13.2 GB of a 7B per token (performance notes, decode bound), and the
    cache."""
    seven = torch.device("meta")
    model = decode_cases.Decoder(
        decode_cases.config_from_hf(decode_cases.COMMON | decode_cases.LLAMA_2_7B),
        dtype=torch.bfloat16,
        device=seven,
    )
    ceilings = Ceilings(0.0, 3000.0, 800.0, 700.0)
    seconds = decode_cases.least_seconds(model, (None, 1, 128, 256), ceilings)
    expected = 256 * (13.214e9 + 524288 * 255.5) / 3e12 + 2 * 6.476e9 * 128 / 8e14
    assert seconds == pytest.approx(expected, rel=2e-3)
    small = torch.device("cpu")
    packed = decode_cases.build(decode_cases.TINY | {"intermediate_size": 128}, torch.float32, small, True)
    dense = decode_cases.dense_twin(packed)
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # weights
    difference = decode_cases.least_seconds(dense, (None, 1, 0, 1), ceilings) - decode_cases.least_seconds(
        packed, (None, 1, 0, 1), ceilings
    )
    assert 8 * difference * 3e12 / linears == pytest.approx(
        32 - 4.2, abs=0.3
    )  # small layers: scales weigh more
    many = decode_cases.least_seconds(
        model, (None, 1000, 0, 1), ceilings
    )  # a thousand rows: arithmetic binds
    assert many == pytest.approx(2 * 6.607e9 * 1000 / 8e14, rel=2e-3)


def test_a_case_leaves_time_to_the_next_and_calls_what_compiles_nothing_briefly_first():
    """In `make gpu` the slow baseline of the first case would otherwise take the time of the second."""
    calls: list[tuple[str, int]] = []

    def system(name):
        return lambda prompts, new: calls.append((name, new)) or [[0] * new]

    systems = {name: system(name) for name in ("anvil", "eager")}
    session, case = Session(100), (decode_cases.TINY, 1, 9, 20)
    found = decode_cases.measure("d1", case, systems, 3, session)
    first = [("anvil", 20), ("eager", decode_cases.FIRST_TOKENS["eager"])]
    assert calls == first + 3 * [("anvil", 20), ("eager", 20)]
    assert [len(found["eager"][key]) for key in ("seconds", "tokens")] == [3, 1] and first[1][1] < 20
    one_turn = decode_cases.measure("d1", case, systems, 3, session, kept=200.0)
    assert len(one_turn["anvil"]["seconds"]) == 1
