"""Every kernel on this GPU: error against fp64, time, GB/s or TF, share of this run's ceilings, baselines.

    python bench/kernels.py                         # under 130 s
    python bench/kernels.py quick=true              # under 50 s
    python bench/kernels.py only=rms_norm,rope seconds=30 out=/some/folder
    python bench/kernels.py device=cpu              # smoke test at tiny sizes; the numbers mean nothing
    python bench/kernels.py list=true               # which file of kernels/ each case measures

Times are replays of a CUDA graph over several sets of random tensors, so neither the host's launches nor the
cache flatters anyone; systems that wait for the GPU inside are timed as the host starts them (column `how`).
Share is the time that the least possible work would take at the ceilings of this run, over the time taken.
Error is the largest of the outputs and gradients against fp64; more than twice the plain reference's is a
failure. A baseline that cannot run is listed with its reason. Results: bench/results/kernels_<gpu>.json.
"""

import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.kernel_cases import Case, System, Work, all_cases, sizes_for  # noqa: E402
from bench.measure import (  # noqa: E402
    Ceilings,
    Session,
    Timer,
    Timing,
    describe_machine,
    file_name,
    is_on,
    pick_device,
    read_options,
    save,
    table,
    take_ceilings,
)
from tests.kernel_checks import evaluate, relative_error  # noqa: E402

DEFAULTS = {"device": "auto", "quick": "false", "seconds": "", "only": "", "out": "", "list": "false"}
SECONDS = {False: 130.0, True: 50.0}
NEEDED = {False: 2.0, True: 12.0}  # seconds that one system takes at most; True: it compiles


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    if is_on(options["list"]):
        for case in all_cases(sizes_for(torch.device("cpu"))):
            print(",".join(case.files) or "-", case.name)
        return 0
    device, quick = pick_device(options["device"]), is_on(options["quick"])
    session = Session(float(options["seconds"] or SECONDS[quick]))
    timer = Timer(device, seconds=0.005 if device.type == "cpu" else 0.1 if quick else 0.2)
    machine = describe_machine(device, "python bench/kernels.py " + " ".join(argv))
    with timer.stream():
        ceilings = take_ceilings(timer, 0.2 if device.type == "cpu" else 1.0 if quick else 2.0)
        print(ceilings.text, flush=True)
        cases = [case for case in all_cases(sizes_for(device)) if wanted(case, options["only"], quick)]
        if not cases:
            raise SystemExit(f"only={options['only']}: no case has such a name; list=true lists them")
        for slow in (False, True):
            for case in cases:
                measure_case(case, slow, timer, ceilings, session)
    session.rows.sort(key=lambda row: row["place"])
    print_report(session, ceilings, machine)
    report = {
        "ceilings": ceilings,
        "rows": session.rows,
        "left_out": session.left_out,
        "failed": session.failed,
    }
    save(file_name("kernels", quick, options["only"]), machine, report, options["out"])
    return session.finish()


def wanted(case: Case, only: str, quick: bool) -> bool:
    if only:
        return case.name in only.split(",")
    return case.quick or not quick


def measure_case(case: Case, slow: bool, timer: Timer, ceilings: Ceilings, session: Session) -> None:
    """All systems of this case that compile (slow) or do not, each pass one row."""
    for place, (name, system) in enumerate(case.systems.items()):
        if system.slow != slow or not session.allows(f"{case.name} {case.sizes}: {name}", NEEDED[slow]):
            continue
        rows: list[dict[str, Any]] = []
        label = {"case": case.name, "sizes": case.sizes, "system": name}
        if not (timer.on_gpu or system.cpu):
            rows = [{"pass": "", "not_run": "no CPU version"}]
        elif name.startswith("anvil"):
            with session.part(f"{case.name} {case.sizes}: {name}"):
                rows = measure_system(case, system, timer, ceilings)
                check(case, system, session, rows)
        else:
            try:
                rows = measure_system(case, system, timer, ceilings)
            except Exception as error:  # a baseline may raise what it likes; its row then says so
                text = str(error).splitlines()[0] if str(error) else ""
                rows = [{"pass": "", "not_run": f"{type(error).__name__}: {text}"}]
        session.rows += [{"place": (case_place(session, case), place), **label, **row} for row in rows]
        gc.collect()
        if timer.on_gpu:
            torch.cuda.empty_cache()


def case_place(session: Session, case: Case) -> int:
    """The rows of a case stand together, in the order in which the cases came."""
    for row in session.rows:
        if (row["case"], row["sizes"]) == (case.name, case.sizes):
            return row["place"][0]
    return len(session.rows)


def measure_system(case: Case, system: System, timer: Timer, ceilings: Ceilings) -> list[dict[str, Any]]:
    """One row per pass: time, rate, share of the floor, and the memory that a call takes beside its
    inputs."""
    first = case.passes.get("forward") or case.passes["both"]
    sets = [prepare(case, system, seed) for seed in range(timer.sets(first.bytes or 2**30))]
    rows = []
    for name, work in case.passes.items():
        calls = [call_of(name, *one, case.trained) for one in sets]
        timing = timer.time(calls, graph=system.graph)
        rows.append(describe(name, work, timing, ceilings) | {"workspace_mib": workspace(calls[0], timer)})
    return rows


def prepare(case: Case, system: System, seed: int):
    """(function of no arguments, inputs): the leaves among the inputs ask for a gradient."""
    inputs = case.inputs(seed, False)
    for place in case.trained:
        inputs[place].requires_grad_(True)
    keywords = system.setup(*inputs)
    return lambda: system.function(*inputs, **keywords), inputs


def call_of(name: str, function, inputs: list, trained: tuple[int, ...]):
    """What is timed for this pass. Forward: with the graph being built, as in training."""
    if name == "forward":
        return function
    leaves = [inputs[place] for place in trained]
    if name == "both":
        return lambda: differentiate(function(), leaves)
    outputs = function()
    outputs = (outputs,) if torch.is_tensor(outputs) else tuple(outputs)
    gradients = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True)


def differentiate(output: torch.Tensor, leaves: list[torch.Tensor]):
    if output.requires_grad:
        return torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    return output


def workspace(call, timer: Timer) -> float | None:
    """MiB that one call takes at its peak beside what was there, its results included."""
    if not timer.on_gpu:
        call()
        return None
    before = torch.cuda.memory_allocated(timer.device)
    torch.cuda.reset_peak_memory_stats(timer.device)
    call()
    return (torch.cuda.max_memory_allocated(timer.device) - before) / 2**20


def describe(name: str, work: Work, timing: Timing, ceilings: Ceilings) -> dict[str, Any]:
    bandwidth = 1e9 * (ceilings.copy_gb_per_second if work.limit == "copy" else ceilings.read_gb_per_second)
    by_bytes, by_products = work.bytes / bandwidth, work.operations / (1e12 * ceilings.burst_tflops)
    if by_bytes >= by_products:
        rate = f"{work.bytes / timing.seconds / 1e9:.0f} GB/s"
    else:
        rate = f"{work.operations / timing.seconds / 1e12:.0f} TF"
    return {
        "pass": name,
        "timing": timing,
        "rate": rate,
        "share": max(by_bytes, by_products) / timing.seconds,
    }


def check(case: Case, system: System, session: Session, rows: list[dict[str, Any]]) -> None:
    """The error rule of the kernels' tests, at a small size; the largest error goes into the rows."""
    if case.reference is None:
        return
    inputs = case.inputs(99, True)
    dtype = inputs[0].dtype
    exact = evaluate(case.reference, inputs, torch.float64, case.trained)
    plain = evaluate(case.reference, inputs, dtype, case.trained)
    keywords = system.setup(*inputs)
    found = evaluate(lambda *x: system.function(*x, **keywords), inputs, dtype, case.trained)
    errors = [relative_error(one, truth) for one, truth in zip(found, exact, strict=True)]
    allowed = [2 * relative_error(one, truth) + 1e-6 for one, truth in zip(plain, exact, strict=True)]
    for row in rows:
        row["error"], row["reference_error"] = max(errors), max(allowed) / 2
    if not all(error <= limit for error, limit in zip(errors, allowed)):  # NaN fails too
        session.failed.append(f"{case.name} {case.sizes}: errors {errors}, allowed {allowed}")


def print_report(session: Session, ceilings: Ceilings, machine: dict) -> None:
    own = {key_of(row): row["timing"].seconds for row in session.rows if row["system"] == "anvil"}
    lines, before = [], None
    for row in session.rows:
        head = (row["case"], row["sizes"])
        line = {
            "case": row["case"] if head != before else "",
            "sizes": row["sizes"] if head != before else "",
        }
        line |= {"system": row["system"], "pass": row["pass"]}
        before = head
        if "not_run" in row:
            lines.append(line | {"time": "not run", "remark": row["not_run"][:60]})
            continue
        timing = row["timing"]
        line |= {"time": timing.text, "rate": row["rate"], "share": f"{row['share']:.0%}", "how": timing.how}
        if key_of(row) in own and row["system"] != "anvil":
            line["anvil is"] = f"{timing.seconds / own[key_of(row)]:.2f}x"
        if "error" in row:
            line["error"] = f"{row['error']:.1e} / {row['reference_error']:.1e}"
        if row["workspace_mib"] is not None:
            line["MiB"] = f"{row['workspace_mib']:.0f}"
        lines.append(line)
    where = machine.get("gpu") or "CPU, smoke test"
    print(f"\n{where}, torch {machine['torch']}, triton {machine['triton']}, ", end="")
    print(
        f"commit {machine['commit']}\n{ceilings.text}\nerror: anvil's against fp64 / the plain reference's\n"
    )
    print(table(lines))


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["case"], row["sizes"], row["pass"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
