"""What `make gpu` does around its parts: their time, their failures, the tests' budget. Needs no GPU."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu

ROOT = Path(__file__).resolve().parents[2]


def test_a_part_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run(["-c", script], 0.5) == "ended after 0 s"
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()


def test_a_failing_part_does_not_stop_the_next_and_the_status_tells():
    script = (
        "import sys; sys.path.insert(0, '.'); from bench import gpu\n"
        "gpu.PARTS[:] = [gpu.Part('missing', 9, 9), gpu.Part('pytest_budget', 9, 9)]\n"
        "sys.exit(gpu.main(['device=cpu']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    *_, missing, other = done.stdout.splitlines()
    assert missing.split()[:2] == ["missing", "FAILED"] and other.split()[:2] == ["pytest_budget", "ok"]


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
    """Under 9 minutes, quick under 4, even if each part uses up its grace."""
    assert sum(part.seconds + gpu.GRACE_SECONDS for part in gpu.PARTS) < 9 * 60
    assert sum(part.quick_seconds + gpu.GRACE_SECONDS for part in gpu.PARTS) < 4 * 60


def test_the_tests_of_all_kernels_are_run():
    """A file of tests that moves is still found."""
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_triton_*.py")}
    assert len(files) > 5 and files | {"tests/gpu"} <= set(gpu.test_command(9))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_make_gpu_says_so_and_fails():
    done = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "CUDA GPU" in done.stderr and "make test" in done.stderr
