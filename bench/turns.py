"""What the comparisons on a CPU share: systems in processes of their own that take turns, and our model.

    workers = start_workers(__file__, ["anvil", "peft"], options, adapter)     # each: worker(system, ...)
    answers = take_turns(workers, requests)                              # system -> one answer a request
    speeds(tokens, seconds)

A script starts itself once more for each system (`--worker SYSTEM OPTIONS ...`), so the peak memory of each
is its own; a worker answers every request, a line of JSON, with a line of JSON (serve). A-B-A-B: whatever
else the machine does meets all systems alike.
"""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

LEARNING_RATE = 1e-4  # of all systems
WARMUP_STEPS = 2  # of a training; not counted
READY = "ready"


# The parent


def start_workers(
    script: str, systems: Iterable[str], options: dict, *more: str
) -> dict[str, subprocess.Popen]:
    """A process for each system, ready for its first request. Ends the program when one does not come so
    far."""
    environment = os.environ | {"OMP_NUM_THREADS": options["threads"], "HF_HUB_OFFLINE": "1"}
    workers = {}
    for system in systems:
        command = [sys.executable, script, "--worker", system, json.dumps(options), *more]
        workers[system] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        while (line := workers[system].stdout.readline()).strip() != READY:  # libraries may print too
            if not line:
                raise SystemExit(f"{system}: the worker ended before it was ready")
    return workers


def take_turns(
    workers: dict[str, subprocess.Popen], requests: Iterable[Any], title: str = ""
) -> dict[str, list[dict]]:
    """system -> its answer to each request; shows them as they come, and ends the workers."""
    answers: dict[str, list[dict]] = {system: [] for system in workers}
    for request in requests:
        for system, process in workers.items():
            process.stdin.write(json.dumps(request) + "\n")
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{system}: the worker ended early; see its output above")
            answers[system].append(json.loads(line))
            numbers = {
                name: value for name, value in answers[system][-1].items() if not isinstance(value, list)
            }
            print(title, system, numbers, file=sys.stderr, flush=True)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return answers


def speeds(tokens: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    rates = [count / spent for count, spent in zip(tokens, seconds)]
    return {
        "tokens_per_second": sum(tokens) / sum(seconds),
        "median_tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
    }


def matmul_rates(threads: int, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of 2048^3: torch.mm, and the product that kernels/linear.py takes."""
    from kernels.linear import matmul_transposed

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)

    def rate(product) -> float:
        product()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        return 2 * 2048**3 / statistics.median(times) / 1e9

    return {"torch.mm": rate(lambda: torch.mm(a, b)), "kernels": rate(lambda: matmul_transposed(a, b))}


def write_report(report: dict, path: str) -> None:
    """path: nowhere if empty."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


# A worker


def serve(step: Callable[[Any], dict[str, Any]]) -> None:
    """Answer every request on stdin with step(request) and the peak memory so far."""
    print(READY, flush=True)
    for line in sys.stdin:
        print(json.dumps(step(json.loads(line)) | {"peak_gb": peak_gb()}), flush=True)


def peak_gb() -> float:
    """Of this process. getrusage begins at the memory of the process that started it; Linux's status does
    not."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def encoder(folder: str) -> Callable[[str, str], Any]:
    """A function (question, answer) -> the dialogue as ids and flags (templates.Encoded)."""
    from templates import get_template
    from text.render import Message, encode_dialogue
    from text.tokenizer import Tokenizer

    tokenizer, template = Tokenizer.from_folder(folder), get_template("chatml", None)

    def encode(question: str, answer: str):
        messages = [Message("user", question), Message("assistant", answer)]
        return encode_dialogue(tokenizer, template.render(messages, tokenizer.bos_token, tokenizer.eos_token))

    return encode


# Our model, and what follows a backward pass: gradients clipped to norm 1, AdamW


def our_model(folder: str, adapter: str, dtype: torch.dtype):
    """With the adapter of that folder, or all weights trainable if it is empty."""
    import lora
    from checkpoints.huggingface import load_model
    from checkpoints.peft import load_adapter
    from training import memory

    memory.keep_freed()  # as train.py does
    model = load_model(folder, dtype=dtype)
    if adapter:
        load_adapter(model, adapter)
        assert len(lora.lora_layers(model)) == 7 * model.config.num_layers
    return model.train()


def our_update(model) -> Callable[[], None]:
    from training.optimizers import clip_gradients, make_optimizer
    from training.options import OptimOptions

    optimizer = make_optimizer(model, OptimOptions(learning_rate=LEARNING_RATE))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def update() -> None:
        clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update
