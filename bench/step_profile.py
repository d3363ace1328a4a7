"""Where the time of a training step and of a decoding step goes: kernels by time, under torch.profiler.

    python bench/step_profile.py                     # T1, T2 and D2 of the goals on a GPU; about 30 s
    python bench/step_profile.py steps=T1 out=/some/folder
    python bench/step_profile.py device=cpu          # smoke test at tiny sizes; the numbers mean nothing

One step of each, warm, random weights. `outside`: the step without the profiler, by the host's clock from its
start to the GPU's end; `host`: until the host had started it all; `in kernels`: the sum over the kernels. Is
`host` as long as `outside`, the host is what the step waits for. A decoding step is the mean of several
replays. Results: bench/results/step_profile_<gpu>.json, or the folder out=FOLDER.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from bench import decode_cases, train_rows  # noqa: E402
from bench.measure import (  # noqa: E402
    Session,
    describe_machine,
    file_name,
    pick_device,
    read_options,
    save,
    synchronize,
    table,
)
from bench.train_systems import Setting, anvil_on, random_decoder  # noqa: E402
from generation.generate import Decoding, new_cache  # noqa: E402
from generation.sampling import GenerateOptions  # noqa: E402

DEFAULTS = {"device": "auto", "steps": "T1,T2,D2", "seconds": "60", "out": ""}
NEEDED = 10.0  # seconds that one step needs, its model made
WARM_UP, REPLAYS = 4, 8
MOST_LINES = 25  # kernels that are printed; the file has all


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    device = pick_device(options["device"])
    session = Session(float(options["seconds"]))
    names = options["steps"].split(",")
    if unknown := [name for name in names if name not in STEPS]:
        raise SystemExit(f"steps={','.join(unknown)}: known are {', '.join(STEPS)}")
    found: dict[str, Any] = {}
    for name in names:
        if device.type == "cuda" and not session.allows(name, NEEDED):
            continue
        with session.part(name):
            step, repeats = STEPS[name](device)
            found[name] = measure(step, repeats, device)
            print_step(name, found[name])
            del step
        train_rows.release(device)
    machine = describe_machine(device, "python bench/step_profile.py " + " ".join(argv))
    report = {"steps": found, "left_out": session.left_out, "failed": session.failed}
    chosen = "" if options["steps"] == DEFAULTS["steps"] else options["steps"]
    save(file_name("step_profile", False, chosen), machine, report, options["out"])
    return session.finish()


def training(name: str, device: torch.device) -> tuple[Callable[[], Any], int]:
    """A warm step of this row of bench/train.py."""
    rows = train_rows.ROWS if device.type == "cuda" else train_rows.SMOKE_ROWS
    row = next(row for row in rows if row.name == name)
    setting = Setting(row.model, row.rank, device, row.in_4_bits, row.policy)
    system = anvil_on(setting, random_decoder(setting))
    group = system.prepare(train_rows.make_groups(row, 1)[0])
    for _ in range(WARM_UP):
        system.step(group)
    return lambda: system.step(group), 1


def decoding(name: str, device: torch.device) -> tuple[Callable[[], Any], int]:
    """A step of this case of bench/decode.py, after those that compile and capture."""
    name = name.lower()
    cases = decode_cases.CASES if device.type == "cuda" else decode_cases.TINY_CASES
    shape, sequences, prompt, new = cases[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = decode_cases.build(shape, dtype, device, name in decode_cases.IN_4_BITS)
    options = GenerateOptions(do_sample=False, max_new_tokens=new)
    cache = new_cache(model, sequences, prompt + new)
    texts = Decoding(model, [list(range(2, 2 + prompt))] * sequences, options, stop_ids=(), cache=cache)
    for _ in range(WARM_UP):
        texts.step()
    return texts.step, min(REPLAYS, (new - WARM_UP) // 4)


STEPS = {"T1": lambda device: training("T1", device), "T2": lambda device: training("T2", device)}
STEPS["D2"] = lambda device: decoding("D2", device)


def measure(step: Callable[[], Any], repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one of `repeats` steps, and its kernels: name, milliseconds, starts, largest first."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    host = time.perf_counter() - start
    synchronize(device)
    outside = time.perf_counter() - start
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
        synchronize(device)
    kernels = kernels_of(profiler, device, repeats)
    return {
        "outside_ms": 1e3 * outside / repeats,
        "host_ms": 1e3 * host / repeats,
        "in_kernels_ms": sum(kernel["ms"] for kernel in kernels),
        "starts": sum(kernel["starts"] for kernel in kernels),
        "kernels": kernels,
    }


def kernels_of(profiler: profile, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """On a GPU what ran there; on a CPU torch's operations, each without those it called."""
    found = []
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu == (device.type == "cuda") and micros > 0:
            found.append({"name": event.key, "ms": micros / 1e3 / repeats, "starts": event.count / repeats})
    return sorted(found, key=lambda kernel: -kernel["ms"])


def print_step(name: str, found: dict[str, Any]) -> None:
    print(
        f"\n{name}: {found['outside_ms']:.2f} ms outside, {found['host_ms']:.2f} ms host, "
        f"{found['in_kernels_ms']:.2f} ms in {found['starts']:.0f} kernels"
    )
    whole = max(found["in_kernels_ms"], 1e-9)
    lines = [
        {
            "kernel": kernel["name"][:70],
            "": "",
            "ms": f"{kernel['ms']:.3f}",
            "share": f"{kernel['ms'] / whole:.1%}",
            "starts": f"{kernel['starts']:.0f}",
        }
        for kernel in found["kernels"][:MOST_LINES]
    ]
    print(table(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
