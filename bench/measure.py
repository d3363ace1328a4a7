"""What the benchmarks share: options, the machine, the timer, the ceilings of this run, tables, result files.

    timer = Timer(torch.device("cuda"))
    with timer.stream():
        timing = timer.time([lambda: torch.mm(a, b)])          # Timing: median seconds of one call, spread
        ceilings = take_ceilings(timer)                    # what this machine can do at all, in this run

A benchmark of a GPU runs the same code on a CPU at tiny sizes: that is its smoke test; its numbers mean
nothing.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kernels.launch import ceil_divide, jit, run, tl, unavailable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
GRAPH_SECONDS = (
    1e-3  # a graph holds as many calls as fill this, so that starting it and the last write-backs vanish
)
MOST_CALLS = 64  # in one graph


# Options


def read_options(argv: Sequence[str], defaults: dict[str, str], usage: str) -> dict[str, str]:
    """key=value words over the defaults; ends the program for an unknown key, and for --help with the
    usage."""
    if "--help" in argv or "-h" in argv:
        print(usage)
        raise SystemExit(0)
    given = dict(word.split("=", 1) if "=" in word else (word, "") for word in argv)
    unknown = given.keys() - defaults.keys()
    if unknown:
        known = ", ".join(f"{key}={value}" for key, value in defaults.items())
        raise SystemExit(
            f"unknown option {', '.join(sorted(unknown))}; known are (with their defaults) {known}"
        )
    return defaults | given


def is_on(text: str) -> bool:
    """Of an option: true or 1 is yes; false, 0 and nothing are no."""
    if text.lower() not in ("true", "1", "false", "0", ""):
        raise SystemExit(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU. A benchmark of kernels goes to the CPU only when it is told to: its numbers there mean
    nothing."""
    if name == "auto":
        name = "cuda"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here; device=cpu makes a smoke test at tiny sizes")
    device = torch.device(name)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def read_device_options(
    argv: Sequence[str], on_gpu: dict[str, str], on_cpu: dict[str, str], usage: str
) -> tuple[dict[str, str], torch.device]:
    """The options of a benchmark that does different work on a GPU and on a CPU, and the device.

    on_gpu, on_cpu: option -> default; those of the other device are refused. smoke=true takes the GPU's
    options on the CPU, at tiny sizes.
    """
    words = dict(word.split("=", 1) for word in argv if "=" in word)
    common = {"device": "auto", "smoke": "false"}
    smoke, name = is_on(words.get("smoke", "false")), words.get("device", "auto")
    if name == "auto" and (smoke or not torch.cuda.is_available()):
        name = "cpu"
    if smoke and name != "cpu":
        raise SystemExit("smoke=true runs at tiny sizes on the CPU; leave device away")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA GPU here; device=cpu measures a real model, smoke=true makes a smoke test"
        )
    more = on_cpu if name == "cpu" and not smoke else on_gpu
    options = read_options(argv, common | more, usage)
    return options, pick_device(name)


# The machine


def describe_machine(device: torch.device, command: str) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers: GPU, driver, versions, commit, command."""
    found: dict[str, Any] = {"command": command, "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    found |= {name: version(name) for name in ("torch", "triton", "transformers", "peft")}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cudnn": torch.backends.cudnn.version(),
            "driver": _nvidia_smi("driver_version", device),
            "power_limit": _nvidia_smi("power.limit", device),
        }
    else:
        found |= {
            "gpu": None,
            "cpu": platform.machine(),
            "note": "smoke test on a CPU: these numbers mean nothing",
        }
    return found


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(tree: Path = ROOT) -> str:
    """The commit measured: git's answer, else COMMIT in the environment (a copy without .git), else
    `unknown`."""
    try:
        command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True)
        answer = done.stdout.strip() if done.returncode == 0 else ""
    except FileNotFoundError:
        answer = ""
    return answer or os.environ.get("COMMIT") or "unknown"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi(field: str, device: torch.device) -> str:
    command = ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


# Time


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median of the samples; low and high are their 10th and 90th percentiles."""

    seconds: float
    low: float
    high: float
    samples: int
    how: (
        str  # graph: replays of a CUDA graph; events: as the host starts the calls; host: by the host's clock
    )

    @property
    def text(self) -> str:
        """Milliseconds with the larger deviation from the median, as `0.512 ms +-3%`."""
        spread = max(self.high / self.seconds - 1, 1 - self.low / self.seconds)
        return f"{self.seconds * 1e3:.3f} ms +-{spread:.0%}"


class Timer:
    """Measures calls on one device. All work to be measured is prepared inside `stream()`.

    graph=True captures the calls once and replays them, so the host's launches do not count; give several
    calls on different tensors when one set would fit into the cache. graph=False times calls as the host
    starts them.
    """

    def __init__(self, device: torch.device, seconds: float = 0.2, most_samples: int = 50):
        self.device, self.seconds, self.most_samples = device, seconds, most_samples
        self.on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 2**20
        # read before each sample, four times the cache's size: what then lies in it is clean, so that nobody
        # pays for writing it back
        self._flush = torch.ones(self.cache_bytes, device=device) if self.on_gpu else None

    def stream(self):
        """Context: a stream of its own, since the default one cannot be captured, nor what it ran be
        differentiated."""
        return torch.cuda.stream(self._stream) if self.on_gpu else nullcontext()

    def sets(self, bytes_per_call: float) -> int:
        """How many sets of tensors to rotate so that no call finds its inputs in the cache."""
        return min(8, max(2, math.ceil(4 * self.cache_bytes / max(bytes_per_call, 1)))) if self.on_gpu else 2

    def time(self, calls: Sequence[Callable[[], Any]], graph: bool = True) -> Timing:
        for _ in range(3):  # compilation, handles, cuDNN's plans, autotuning of baselines
            for call in calls:
                call()
        if not self.on_gpu:
            return self._host(calls)
        rounds, sample, how = list(calls), lambda: [call() for call in calls], "events"
        if graph:
            once = self._sample(sample) / len(calls)
            count = min(MOST_CALLS, max(len(calls), math.ceil(GRAPH_SECONDS / max(once, 1e-6))))
            repeated = [calls[i % len(calls)] for i in range(count)]
            try:
                rounds, sample, how = repeated, self._capture(repeated), "graph"
            except RuntimeError as error:
                rounds, how = list(calls), "events"
                print(f"not captured, timed as the host starts it: {str(error).splitlines()[0]}", flush=True)
        first = self._sample(sample)
        samples = [first] + [self._sample(sample) for _ in range(self._count(first))]
        return self._summary(samples[1:], len(rounds), how)

    def _count(self, first: float) -> int:
        return min(self.most_samples, max(5, int(self.seconds / max(first, 1e-6))))

    def _sample(self, call) -> float:
        """Seconds between two events around the call. The flush before it also lets the host get ahead."""
        self._flush.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _capture(self, rounds) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for call in rounds:
                call()
        graph.replay()
        torch.cuda.synchronize(self.device)
        return graph.replay

    def _host(self, calls) -> Timing:
        def sample() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - start

        first = sample()
        return self._summary([sample() for _ in range(self._count(first))], len(calls), "host")

    def _summary(self, samples: list[float], calls: int, how: str) -> Timing:
        samples = [value / calls for value in samples]
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return Timing(statistics.median(samples), tenths[0], tenths[-1], len(samples), how)


# What the machine can do at all


@dataclass(frozen=True)
class Ceilings:
    """Taken in this run. copy counts bytes read plus bytes written; burst and sustained are bf16 products."""

    copy_gb_per_second: float
    read_gb_per_second: float
    burst_tflops: float
    sustained_tflops: float

    @property
    def text(self) -> str:
        return (
            f"ceilings of this run: copy {self.copy_gb_per_second:.0f} GB/s, read "
            f"{self.read_gb_per_second:.0f} GB/s, "
            f"products {self.burst_tflops:.0f} TF in a burst, {self.sustained_tflops:.0f} TF sustained"
        )


# (T, in, out) of one block of Llama-2-7B at 8,192 tokens, and its head: the products of T1
REAL_PRODUCTS = (
    [(8192, 4096, 4096)] * 4 + [(8192, 4096, 11008)] * 2 + [(8192, 11008, 4096), (8192, 4096, 32000)]
)


def take_ceilings(timer: Timer, sustained_seconds: float = 2.0) -> Ceilings:
    """Copy and read bandwidth over 1 GiB, the burst rate of a large product, the sustained rate of real
    shapes."""
    device, on_gpu = timer.device, timer.on_gpu
    dtype = torch.bfloat16 if on_gpu else torch.float32
    count = 2**28 if on_gpu else 2**20  # fp32 values
    copy = 8 * count / timer.time([_copier(count, device)]).seconds
    read = 4 * count / min(timer.time([reader]).seconds for reader in _readers(count, device))
    size = 8192 if on_gpu else 128
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    burst = 2 * size**3 / timer.time([lambda: a @ b]).low
    return Ceilings(copy / 1e9, read / 1e9, burst / 1e12, sustained_rate(timer, sustained_seconds) / 1e12)


def _copier(count: int, device: torch.device) -> Callable[[], Any]:
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sustained_rate(timer: Timer, seconds: float) -> float:
    """FLOP/s of the products of T1 one after another, once the GPU is as warm as this many seconds make
    it."""
    shapes = REAL_PRODUCTS if timer.on_gpu else [(64, 64, 64)]
    dtype = torch.bfloat16 if timer.on_gpu else torch.float32
    tensors = {}
    for shape in shapes:
        tokens, inputs, outputs = shape
        x = torch.randn(tokens, inputs, device=timer.device).to(dtype)
        tensors[shape] = x, torch.randn(outputs, inputs, device=timer.device).to(dtype)
    work = sum(2 * math.prod(shape) for shape in shapes)

    def all_products() -> None:
        for shape in shapes:
            x, weight = tensors[shape]
            torch.mm(x, weight.T)

    all_products()
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(rates) < 2:
        rates.append(4 * work / _elapsed(timer.device, lambda: [all_products() for _ in range(4)]))
    return statistics.median(rates[len(rates) // 2 :])  # the later half: warm


def _elapsed(device: torch.device, call) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _readers(count: int, device: torch.device) -> list[Callable[[], Any]]:
    """Ways to read a tensor once; the fastest of them is the ceiling."""
    values = torch.randn(count, device=device)
    ways = [torch.sum, torch.max] + ([_read_with_triton] if unavailable(device) is None else [])
    return [lambda way=way: way(values) for way in ways]


@jit
def _read_kernel(x, partial, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        total += tl.load(x + first + step * BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(total))


def _read_with_triton(x: torch.Tensor) -> torch.Tensor:
    block, steps = 2048, 8
    programs = ceil_divide(x.numel(), block * steps)
    partial = torch.empty(programs, device=x.device)
    run(_read_kernel, (programs,), x, partial, BLOCK=block, STEPS=steps, num_warps=8)
    return partial


# What fits into the time, and what failed


class Session:
    """One run of a benchmark: its rows, what was left out and why, what failed. The exit status follows from
    it."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def allows(self, name: str, needs_seconds: float) -> bool:
        """Whether there is time for it; if not, it is noted as left out."""
        if self.left >= needs_seconds:
            return True
        self.left_out.append(f"{name} (no time left of {self.seconds:.0f} s)")
        return False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose failure is printed and noted, and does not stop the next."""
        try:
            yield
        except Exception as error:  # whatever a baseline or a kernel raises, the other rows are still wanted
            traceback.print_exc()
            self.failed.append(
                f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )

    def finish(self) -> int:
        """Print what is missing; the exit status: 1 if a part failed."""
        if self.left_out:
            print(f"left out: {', '.join(self.left_out)}")
        for failure in self.failed:
            print(f"FAILED {failure}")
        return 1 if self.failed else 0


# Tables and files


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of texts under their keys; numbers to the right. A row may leave keys out."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    widths = {key: max(len(key), *(len(row.get(key, "")) for row in rows)) for key in columns}

    def line(cells: dict[str, str]) -> str:
        texts = []
        for place, key in enumerate(columns):
            cell = cells.get(key, "")
            texts.append(cell.ljust(widths[key]) if place < 2 else cell.rjust(widths[key]))
        return "  ".join(texts).rstrip()

    return "\n".join([line({key: key for key in columns}), *(line(row) for row in rows)])


def file_name(what: str, quick: bool, only: str) -> str:
    """A quick run and a run of some parts get names of their own, so they never replace or mix with a whole
    one."""
    return "_".join([what, *["quick"] * quick, *(part.replace(" ", "-") for part in only.split(",") if part)])


def machine_name(gpu: str | None) -> str:
    """Of a machine with this GPU, as it stands in the names of files."""
    return (gpu or "cpu").lower().removeprefix("nvidia ").replace(" ", "_")


def results_folder(folder: str, gpu: str | None) -> Path:
    """The folder asked for; else bench/results for a GPU, a temporary one for a CPU."""
    return Path(folder or (RESULTS if gpu else Path(tempfile.gettempdir()) / "anvil-bench"))


def save(what: str, machine: dict[str, Any], report: dict[str, Any], folder: str) -> Path:
    """Write <what>_<gpu>.json: one machine, one run. folder "": bench/results for a GPU, a temporary one for
    a CPU."""
    path = results_folder(folder, machine.get("gpu")) / f"{what}_{machine_name(machine.get('gpu'))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, **report}, indent=1, default=_plain)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


def _plain(value):
    """Dataclasses as dictionaries, everything else as its text."""
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)
