"""What `make gpu` does around its parts: their time, their failures, the tests' budget. Needs no GPU."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from bench import goals, gpu, step_profile

ROOT = Path(__file__).resolve().parents[2]


def test_a_part_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run(["-c", script], 0.5) == "ended after 0 s"
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()


def test_a_failing_part_does_not_stop_the_next_and_the_status_tells(tmp_path, monkeypatch, capfd):
    """What is printed stands in the log too; what a CPU cannot do is named; goals say why there is none."""
    parts = [gpu.Part("missing", 9, 9), gpu.Part("pytest_budget", 9, 9), gpu.Part("tests", 9, 9, tests=True)]
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.chdir(tmp_path)
    assert gpu.main(["device=cpu", "out=some/folder"]) == 1
    printed, log = capfd.readouterr().out, (tmp_path / "some/folder/gpu_log.txt").read_text()
    *_, missing, other, tests = log.splitlines()
    assert missing.split()[:2] == ["missing", "FAILED"] and other.split()[:2] == ["pytest_budget", "ok"]
    assert tests.startswith("tests") and "left out: needs a GPU; make test runs" in tests
    assert "can't open file" in log and all(line in printed for line in log.splitlines())
    report = json.loads((tmp_path / "some/folder/goals_cpu.json").read_text())
    assert {line["measured"] for line in report["goals"]} == {"not measured"}
    assert [part["part"] for part in report["parts"]] == ["missing", "pytest_budget", "tests"]


def test_tests_that_do_not_fit_into_the_time_are_named(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_one(): pass\ndef test_two(): assert False\n")

    def start(until):
        command = [sys.executable, "-m", "pytest", "-rs", "-p", "bench.pytest_budget", "--until", str(until)]
        command += ["-c", "/dev/null", "-p", "no:cacheprovider", str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    late, early = start(0), start(2**40)
    assert late.returncode == 0 and "2 skipped" in late.stdout and "left out for time" in late.stdout
    assert early.returncode == 1 and "1 failed, 1 passed" in early.stdout


def test_all_parts_together_keep_the_promise():
    """Under 9 minutes, quick under 4, even if each part uses up its grace; and it ends whatever one does."""
    assert sum(part.seconds + gpu.GRACE_SECONDS for part in gpu.PARTS) <= gpu.PROMISE[False] < 9 * 60
    quick = [part.quick_seconds + gpu.GRACE_SECONDS for part in gpu.PARTS if part.quick_seconds]
    assert sum(quick) <= gpu.PROMISE[True] < 4 * 60 and gpu.CPU_PROMISE < 10 * 60


def test_the_tests_of_all_kernels_are_run_once_those_of_a_gpus_tiles_first_and_those_of_time_last_and_alone():
    """A file of tests that moves is still found."""
    tests = [part.name for part in gpu.PARTS if part.tests]
    assert gpu.PARTS[0].name == tests[0] and gpu.PARTS[-1].name == tests[-1] == "timing_tests"
    files = [file for part in tests for file in gpu.test_files(part)]
    assert files[0] == "tests/gpu/test_kernels_gpu.py" and files[-1] == "tests/gpu/test_measure_gpu.py"
    every = [*ROOT.glob("tests/gpu/test_*.py"), *ROOT.rglob("tests/**/test_triton_*.py")]
    assert len(every) > 10 and sorted(files) == sorted(str(path.relative_to(ROOT)) for path in every)
    assert gpu.test_files("timing_tests") == files[-1:] and "-n" not in gpu.test_command("timing_tests", 9)


def test_parts_share_the_folder_and_each_is_told_its_time(tmp_path):
    cuda = types.SimpleNamespace(type="cuda", __str__=lambda self: "cuda:0")
    for part in gpu.PARTS:
        words = gpu.command_of(part, 17, cuda, False, tmp_path)
        if not part.tests:
            assert {f"out={tmp_path}", "seconds=17"} <= set(words) and (ROOT / words[0]).exists()
            on_cpu = gpu.command_of(part, 17, torch.device("cpu"), False, tmp_path)
            assert f"out={tmp_path}" in on_cpu and {"device=cpu", "smoke=true"} & set(on_cpu)


REPORTS = {
    "train": {
        "machine": {"gpu": "NVIDIA H200"},
        "ceilings": {"sustained_tflops": 700.0},
        "left_out": ["T4p (no time left of 9 s)", "T4 (no time left of 9 s)"],
        "failed": [],
        "rows": {
            "T1": {
                "systems": {
                    "anvil": {"tokens_per_second": 900.0, "model_tflops": 490.0, "peak_gib": 20.0},
                    "hf default": {"tokens_per_second": 400.0, "peak_gib": 30.0},
                },
                "not_run": {"hf best (no recompute)": "OutOfMemoryError: CUDA out of memory"},
            },
            "T8": {"systems": {"anvil": {"tokens_per_second": 1400.0, "peak_gib": None}}, "not_run": {}},
        },
    },
    "kernels": {
        "machine": {"gpu": "NVIDIA H200"},
        "left_out": [],
        "failed": [],
        "rows": [
            {"case": "attention", "sizes": "B4", "system": system, "pass": "forward", "share": share,
             "timing": {"seconds": seconds}}
            for system, share, seconds in (("anvil", 0.6, 1), ("anvil triton", 0.5, 1.2), ("cudnn", 0.6, 0.9))
        ] + [
            {"case": "dequantise_4bit", "sizes": f"9x8 nf4{double}", "system": system, "pass": "forward",
             "share": 0.7, "timing": {"seconds": seconds}}
            for double, theirs in (("", 1.2), (", double quantisation", 1.4))
            for system, seconds in (("anvil", 1), ("bitsandbytes", theirs))
        ],
    },
}  # fmt: skip


def test_every_goal_has_a_row_with_its_number_or_the_reason_why_there_is_none(tmp_path):
    for part, report in REPORTS.items():
        (tmp_path / f"{part}_h200.json").write_text(json.dumps(report))
    lines = goals.lines_of(goals.read_reports(tmp_path, "h200"))
    names = {line["goal"] for line in lines}
    wanted = "T1 T1b T1c T1d T1e T2 T2b T3 T4 T5 T6 T7 T8 T9 T10 M1 M2 M3 M4 M5 K1 K2 K3 K4 K5 K6 D1 D2 D3 D4"
    assert names == set(wanted.split())
    assert all(line["measured"] != "not measured" or line["remark"] for line in lines)
    by_what = {(line["goal"], line["what"]): line for line in lines}
    speed = by_what["T1", "LoRA 7B, 4 x 2048: speed over HF as documented"]
    assert (speed["measured"], speed["remark"]) == ("2.25", "reached")
    assert by_what["T1e", "share of the rate of products"]["measured"] == "0.7"
    assert "out of memory" in by_what["T1b", "over HF at its best"]["remark"]
    assert by_what["T4", "Alpaca's lengths: over HF padded"]["remark"] == "left out: T4 (no time left of 9 s)"
    auto = by_what["K1", "attention forward, auto: over cuDNN"]
    own = by_what["K1", "attention forward, own: over cuDNN"]
    assert (auto["measured"], own["measured"], own["remark"]) == ("0.9", "0.75", "missed")
    on = [by_what["T8", f"QLoRA 70B, 1 x 2048, {gpu}: tok/s"] for gpu in ("H100", "H200")]
    assert on[0]["remark"] == "a mark of H100; this is NVIDIA H200" and on[1]["remark"] == "reached"
    written = [by_what["K5", f"{double}over bitsandbytes"]["measured"] for double in ("", "double: ")]
    assert written == ["1.2", "1.4"]
    assert by_what["D1", "share of the bound"]["remark"] == "the part decode was not run"
    reports = goals.read_reports(tmp_path, "h200")
    reports["train"]["machine"] = {"gpu": None}
    verdicts = {line["remark"] for line in goals.lines_of(reports) if line["measured"] != "not measured"}
    assert verdicts == {"smoke test on a CPU: means nothing"}
    old = goals.lines_of(goals.read_reports(tmp_path, "h200", since=time.time() + 60))
    assert {line["measured"] for line in old} == {"not measured"}


def test_a_training_step_and_a_decoding_step_are_taken_apart_by_kernels(tmp_path, capsys):
    assert step_profile.main(["device=cpu", f"out={tmp_path}"]) == 0
    report, printed = json.loads((tmp_path / "step_profile_cpu.json").read_text()), capsys.readouterr().out
    assert list(report["steps"]) == ["T1", "T2", "D2"] and report["failed"] == report["left_out"] == []
    for name, step in report["steps"].items():
        assert 0 < step["host_ms"] <= step["outside_ms"] and f"{name}: {step['outside_ms']:.2f} ms" in printed
        times = [kernel["ms"] for kernel in step["kernels"]]
        assert times == sorted(times, reverse=True) and sum(times) == pytest.approx(step["in_kernels_ms"])
    assert any("mm" in kernel["name"] for kernel in report["steps"]["T1"]["kernels"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_make_gpu_says_so_and_fails():
    done = subprocess.run(["make", "--no-print-directory", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and not done.stdout
    assert "CUDA GPU" in done.stderr and "make test" in done.stderr


def test_no_script_here_has_the_name_of_a_module_of_python():
    """A script's own folder comes first on the import path: anyone's `import profile` would find ours."""
    assert not {path.stem for path in ROOT.glob("bench/*.py")} & set(sys.stdlib_module_names)
