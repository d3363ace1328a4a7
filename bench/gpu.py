"""make gpu: the kernels' tests on this GPU, then the benchmarks, one after the other, within a fixed time.

    python bench/gpu.py                     # under 9 minutes
    python bench/gpu.py quick=true          # under 4
    python bench/gpu.py parts=tests,kernels out=/some/folder
    python bench/gpu.py device=cpu          # what needs no GPU, at tiny sizes; the numbers mean nothing

Needs torch with CUDA, Triton and pytest; transformers and peft for the baselines; no network. What the answer
to everything else depends on comes first: kernels at the tiles of a GPU, then training, decoding, where their
time goes, single kernels, the other tests; and last, alone on the machine, the tests that measure time. Every
part has its seconds and says itself what it left out; one that takes much longer is ended. A failing part
does not stop the next. All that is printed also goes to gpu_log.txt beside the results, in the folder out
(bench/results). The goals and the parts are printed last; the exit status is 1 if any part failed.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import goals, measure  # noqa: E402
from bench.measure import commit, is_on, pick_device, read_options, table  # noqa: E402

DEFAULTS = {"device": "auto", "quick": "false", "parts": "", "out": ""}
GRACE_SECONDS = 15.0  # beyond a part's time, to finish what it has begun; together within the promise above
PROMISE = {False: 530.0, True: 230.0}  # seconds of all parts, whatever they do
CPU_PROMISE = 590.0
LEFT_OUT = "left out"
TEST_PROCESSES = min(10, os.cpu_count() or 1)  # most of the time of a test is the compilation of its kernels
ALONE = "tests/gpu/test_measure_gpu.py"  # what it measures, others would disturb


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float
    quick_seconds: float  # 0: not in a quick run
    tests: bool = False


PARTS = [
    Part("tests", 85, 35, tests=True),
    Part("train", 115, 60),
    Part("decode", 65, 25),
    Part("step_profile", 30, 0),
    Part("kernels", 70, 25),
    Part("other_tests", 35, 0, tests=True),
    Part("timing_tests", 15, 10, tests=True),
]


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    device, quick = pick_device(options["device"]), is_on(options["quick"])
    parts = [part for part in PARTS if not options["parts"] or part.name in options["parts"].split(",")]
    if not parts:
        raise SystemExit(f"parts={options['parts']}: known are {', '.join(part.name for part in PARTS)}")
    # a copy without .git is told its commit once, and so are the parts
    os.environ.setdefault("COMMIT", commit())
    if device.type == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # at tiny sizes threads only wait for each other
    folder = measure.results_folder(options["out"], "GPU" if device.type == "cuda" else None).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = "python bench/gpu.py " + " ".join(argv)
    with (folder / "gpu_log.txt").open("w", encoding="utf-8") as log:
        say(f"{command}, commit {os.environ['COMMIT']}, {time.strftime('%Y-%m-%d %H:%M:%S')}", log)
        began = time.time()
        rows = run_parts(parts, device, quick, folder, log)
        machine = measure.describe_machine(device, command)
        lines = goals.lines_of(goals.read_reports(folder, measure.machine_name(machine["gpu"]), since=began))
        report = {"goals": lines, "parts": rows}
        measure.save(measure.file_name("goals", quick, ""), machine, report, str(folder))
        say(f"\n{table(lines)}\n\n{table(rows)}", log)
    return int(any(row["status"] != "ok" and not row["status"].startswith(LEFT_OUT) for row in rows))


def run_parts(parts: list[Part], device, quick: bool, folder: Path, log: TextIO) -> list[dict[str, str]]:
    """One after the other -> name, status and seconds of each."""
    on_gpu, rows, begin = device.type == "cuda", [], time.monotonic()
    for part in parts:
        seconds = part.quick_seconds if quick else part.seconds
        if (part.tests and not on_gpu) or not seconds:
            reason = "quick run" if on_gpu else "needs a GPU; make test runs what of it a CPU can"
            rows.append({"part": part.name, "status": f"{LEFT_OUT}: {reason}", "seconds": "0"})
            continue
        start = time.monotonic()
        left = max(0.0, (PROMISE[quick] if on_gpu else CPU_PROMISE) - (start - begin))
        command = command_of(part, seconds if on_gpu else left, device, quick, folder)
        say(f"\n=== {part.name}: python {' '.join(command)}", log)
        status = run(command, min(seconds + GRACE_SECONDS, left) if on_gpu else left, log)
        rows.append({"part": part.name, "status": status, "seconds": f"{time.monotonic() - start:.0f}"})
    return rows


def command_of(part: Part, seconds: float, device, quick: bool, folder: Path) -> list[str]:
    """The words after `python`."""
    if part.tests:
        return test_command(part.name, seconds)
    words = [f"seconds={seconds:.0f}", f"out={folder}"]
    if device.type == "cpu":
        small = "smoke=true" if part.name in ("train", "decode") else "device=cpu"
        return [f"bench/{part.name}.py", small, *words]
    words += ["quick=true"] * (quick and part.name != "step_profile")
    words += ["repeats=2"] * (part.name == "decode")  # the slowest rival takes 8 s for each
    return [f"bench/{part.name}.py", f"device={device}", *words]


def test_command(part: str, seconds: float) -> list[str]:
    """pytest on the files of this part, several at a time but for those that measure time."""
    until = f"{time.time() + seconds:.0f}"
    command = ["-m", "pytest", "-q", "-rs", "-p", "bench.pytest_budget", "--until", until]
    if importlib.util.find_spec("xdist") is not None and part != "timing_tests":
        command += ["-n", str(TEST_PROCESSES)]
    return command + test_files(part)


def test_files(part: str) -> list[str]:
    first = ["tests/gpu/test_kernels_gpu.py", "tests/gpu/test_nf4_gpu.py"]
    if part == "tests":
        return first
    if part == "timing_tests":
        return [ALONE]
    others = [*ROOT.glob("tests/gpu/test_*.py"), *ROOT.glob("tests/**/test_triton_*.py")]
    names = [str(path.relative_to(ROOT)) for path in sorted(others)]
    return [name for name in names if name not in (*first, ALONE)]


def run(command: list[str], seconds: float | None, log: TextIO | None = None) -> str:
    """`ok`, or what went wrong. The process and all that it started are ended after the time."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, start_new_session=True, env=environment, **streams
    )
    reader = threading.Thread(target=lambda: [say(line.rstrip("\n"), log) for line in process.stdout])
    reader.start()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended after {seconds:.0f} s"
    finally:
        reader.join(GRACE_SECONDS)
    return "ok" if status == 0 else f"FAILED with exit status {status}"


def say(text: str, log: TextIO | None) -> None:
    """To the terminal and to the log, at once: whoever ends this loses nothing."""
    print(text, flush=True)
    if log is not None:
        print(text, file=log, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
