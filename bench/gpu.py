"""make gpu: the kernels' tests on this GPU, then the benchmarks, one after the other, within a fixed time.

    python bench/gpu.py                     # under 9 minutes
    python bench/gpu.py quick=true          # under 4
    python bench/gpu.py parts=tests,kernels out=/some/folder
    python bench/gpu.py device=cpu          # the benchmarks' smoke test

Needs torch with CUDA, Triton and pytest; transformers and peft for the baselines; no network. Every part
has its seconds and says itself what it left out for time; one that takes much longer is ended. A failing part
does not stop the next. The table of parts is printed last, and the exit status is 1 if any part failed.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.measure import commit, is_on, pick_device, read_options, table  # noqa: E402

DEFAULTS = {"device": "auto", "quick": "false", "parts": "", "out": ""}
GRACE_SECONDS = 20.0  # beyond a part's time, to finish what it has begun; together within the promise above
TEST_PROCESSES = 6  # most of the time of a test is the compilation of its kernels


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float
    quick_seconds: float


# 8:50 and 3:50 at the very most, if every part uses up its grace
PARTS = [Part("tests", 80, 30), Part("kernels", 110, 30), Part("train", 160, 70), Part("decode", 100, 25)]


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    device, quick = pick_device(options["device"]), is_on(options["quick"])
    parts = [part for part in PARTS if not options["parts"] or part.name in options["parts"].split(",")]
    if not parts:
        raise SystemExit(f"parts={options['parts']}: known are {', '.join(part.name for part in PARTS)}")
    # a copy without .git is told its commit once, and so are the parts
    os.environ.setdefault("COMMIT", commit())
    rows, failed = [], False
    for part in parts:
        seconds = part.quick_seconds if quick else part.seconds
        if device.type == "cpu" and part.name == "tests":
            continue  # make test runs them there
        on_cpu = ["device=cpu"] if part.name == "kernels" else ["smoke=true"]
        words = [f"device={device}"] if device.type == "cuda" else on_cpu
        words += ["quick=true"] * quick + [f"seconds={seconds:.0f}", f"out={options['out']}"]
        command = test_command(seconds) if part.name == "tests" else [f"bench/{part.name}.py", *words]
        print(f"\n=== {part.name}: python {' '.join(command)}", flush=True)
        start = time.monotonic()
        status = run(command, seconds + GRACE_SECONDS if device.type == "cuda" else None)
        failed |= status != "ok"
        rows.append({"part": part.name, "status": status, "seconds": f"{time.monotonic() - start:.0f}"})
    print(f"\n{table(rows)}", flush=True)
    return 1 if failed else 0


def test_command(seconds: float) -> list[str]:
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_triton_*.py"))
    until = f"{time.time() + seconds:.0f}"
    command = ["-m", "pytest", "-q", "-rs", "-p", "bench.pytest_budget", "--until", until]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(TEST_PROCESSES)]
    return [*command, *files, "tests/gpu"]


def run(command: list[str], seconds: float | None) -> str:
    """`ok`, or what went wrong. The process and all that it started are ended after the time."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended after {seconds:.0f} s"
    return "ok" if status == 0 else f"FAILED with exit status {status}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
