"""bench/kernels.py from its command line, on a CPU at tiny sizes: the paths that a GPU run takes, without a
GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def start(*words):
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), *words]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)


def test_every_case_is_measured_and_as_exact_as_its_reference(tmp_path):
    before = sorted((ROOT / "bench" / "results").iterdir())
    done = start("device=cpu", "seconds=900", f"out={tmp_path}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "FAILED" not in done.stdout
    report = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert sorted((ROOT / "bench" / "results").iterdir()) == before  # numbers of a CPU are not results
    assert report["machine"]["gpu"] is None and report["failed"] == [] and report["left_out"] == []
    assert report["ceilings"]["copy_gb_per_second"] > 0 and report["ceilings"]["sustained_tflops"] > 0
    listed = {line.split(" ", 1)[1] for line in start("list=true").stdout.splitlines()}
    own = [row for row in report["rows"] if row["system"] == "anvil"]
    assert {row["case"] for row in own} == listed
    for row in own:
        assert row["timing"]["low"] <= row["timing"]["seconds"] <= row["timing"]["high"]
        assert "error" in row or row["case"] == "adamw"
    baselines = [row for row in report["rows"] if row["system"] != "anvil"]
    allowed = {"no CPU version"}
    if importlib.util.find_spec("bitsandbytes") is None:
        allowed.add("ModuleNotFoundError: No module named 'bitsandbytes'")
    assert {row["not_run"] for row in baselines if "not_run" in row} <= allowed
    assert {"eager", "compile", "cudnn", "flash"} <= {
        row["system"] for row in baselines if "not_run" not in row
    }


def test_every_file_with_kernels_is_measured():
    """A new kernel cannot stay outside of the benchmark."""
    with_kernels = {
        path.stem for path in ROOT.glob("kernels/*.py") if "@jit" in path.read_text(encoding="utf-8")
    }
    measured = {
        name for line in start("list=true").stdout.splitlines() for name in line.split()[0].split(",")
    }
    assert with_kernels - {"launch"} <= measured
    assert measured - {"-"} <= {path.stem for path in ROOT.glob("kernels/*.py")}


def test_a_wrong_kernel_fails_the_run_and_the_other_cases_still_run(tmp_path):
    """In a process where rotation has lost its sign."""
    script = (
        "import sys; sys.path.insert(0, '.'); import dataclasses, torch; from bench import kernel_cases, "
        "kernels as b\n"
        "sizes = kernel_cases.sizes_for(torch.device('cpu')); good = kernel_cases.rope(sizes)\n"
        "wrong = kernel_cases.System(lambda q, k, cos, sin: (q * 1.1, k))\n"
        "cases = [dataclasses.replace(good, systems={'anvil': wrong}), kernel_cases.gated_mlp(sizes)]\n"
        "timer, session = b.Timer(torch.device('cpu'), 0.001), b.Session(60)\n"
        "ceilings = b.Ceilings(1, 1, 1, 1)\n"
        "for case in cases: b.measure_case(case, False, timer, ceilings, session)\n"
        "assert any(row['case'] == 'gated_mlp' for row in session.rows)\n"
        "sys.exit(session.finish())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FAILED rope" in done.stdout and "allowed" in done.stdout


def test_what_does_not_fit_into_the_time_is_named(tmp_path):
    done = start("device=cpu", "only=rope", "seconds=0", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "(no time left of " in done.stdout and ": anvil" in done.stdout
    assert json.loads((tmp_path / "kernels_rope_cpu.json").read_text())["rows"] == []


@pytest.mark.parametrize("word, problem", [("sped=1", "unknown option sped"), ("only=x", "list=true")])
def test_a_mistaken_option_is_named(word, problem):
    done = start("device=cpu", word)
    assert done.returncode == 1 and problem in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = start()
    assert done.returncode == 1 and "no CUDA GPU" in done.stderr and "device=cpu" in done.stderr
