"""Greedy decoding: Anvil beside transformers generate (and llama.cpp), same weights and prompts, in one run.

    python bench/decode.py                      # on the GPU, or the CPU where there is none (device=cuda|cpu)

On a GPU, shapes of known models with random weights (decode_cases.py says how they are measured):
    python bench/decode.py                      # D1, D2 and D3 of the goals; writes a file in bench/results
    python bench/decode.py quick=true           # fewer repeats, without the compiled baseline of the batches
    python bench/decode.py cases=d1 repeats=9 systems=anvil,static
    python bench/decode.py smoke=true           # tiny sizes on a CPU; the numbers mean nothing

On a CPU, a real model:
    python bench/decode.py device=cpu prompt=64 new=128 threads=2 repeats=7 batch=1 out=result.json
    python bench/decode.py device=cpu gguf=model.F16.gguf,model.Q8_0.gguf     (export.py writes them)
    python bench/decode.py device=cpu prompt=512 new=1              prefill: the time of reading the prompt
    python bench/decode.py device=cpu dtype=bfloat16 systems=anvil,anvil:int8,anvil:nf4,transformers:nf4
Every system has a process of its own; they take turns, A-B-A-B, so a noisy neighbour meets all of them.
transformers runs with its fastest plain settings (sdpa, cache). batch > 1: prompts of different lengths,
which transformers pads on the left. The time is that of the whole call: prompt and new tokens. A system that
cannot run here is listed as "not run". In fp32 all systems have to write the same tokens, or the run fails.
The bound: every weight is read once per step, in the bytes it is stored in, at the speed at which this run
reads a large tensor. After a colon: how the linears of the blocks are quantised, int8 (LLM.int8), eetq (int8,
weights only), nf4 or fp4 (double quantisation); transformers takes bitsandbytes for that.
"""

import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import decode_systems, turns  # noqa: E402
from bench.measure import commit, cpu_name, read_device_options  # noqa: E402

ON_GPU = {"cases": "", "systems": "", "repeats": "5", "dtype": ""}  # nothing: all of them, bf16
ON_GPU |= {"quick": "false", "seconds": "400", "out": ""}
ON_CPU = {"model": str(ROOT / "models/SmolLM2-135M-Instruct"), "systems": "anvil,transformers,llama.cpp"}
ON_CPU |= {"prompt": "64", "new": "128", "batch": "1", "repeats": "7", "threads": "2", "dtype": "float32"}
ON_CPU |= {"gguf": "", "out": str(ROOT / "bench/results/decode_cpu.json")}
WARMUP_RUNS = 1
SEED = 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["--worker"]:
        worker(argv[1], json.loads(argv[2]))
        return 0
    options, device = read_device_options(argv, ON_GPU, ON_CPU, __doc__)
    command = "python bench/decode.py " + " ".join(argv)
    if "cases" in options:
        from bench import decode_cases

        return decode_cases.run(options, device, command)
    return run_real_model(options, command)


# A real model on a CPU


def make_prompts(folder: str, length: int, batch: int) -> list[list[int]]:
    """Pieces of a text in the model's own tokens; in a batch of lengths from half to all of `length`."""
    from text.tokenizer import Tokenizer

    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ids = Tokenizer.from_folder(folder).encode(text)
    lengths = [length - i * length // (2 * batch) for i in range(batch)]
    generator = torch.Generator().manual_seed(SEED)
    starts = torch.randint(0, len(ids) - length, (batch,), generator=generator).tolist()
    return [ids[start : start + size] for start, size in zip(starts, lengths)]


QUANTISED = {  # name after the colon -> our options, arguments of transformers' BitsAndBytesConfig
    "int8": ({"quantization_bit": 8}, {"load_in_8bit": True}),
    "eetq": ({"quantization_bit": 8, "quantization_method": "eetq"}, None),
    "nf4": ({"quantization_bit": 4}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": (
        {"quantization_bit": 4, "quantization_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ),
}


def quantisation(name: str):
    """The format of this name, None for ''."""
    import quant

    return quant.from_options(quant.QuantOptions(**QUANTISED[name][0])) if name else None


def anvil(options: dict, quantised: str, _):
    from checkpoints.huggingface import load_model
    from generation.layout import lay_out_for_decoding

    dtype = getattr(torch, options["dtype"])
    model = load_model(options["model"], dtype=dtype, quantization=quantisation(quantised))
    lay_out_for_decoding(model)
    return decode_systems.anvil(model)


def transformers_generate(options: dict, quantised: str, _):
    import transformers

    settings = {"dtype": getattr(torch, options["dtype"]), "attn_implementation": "sdpa"}
    if quantised:
        chosen = QUANTISED[quantised][1]
        if "load_in_4bit" in chosen:
            chosen = chosen | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": settings["dtype"]}
        quantization = transformers.BitsAndBytesConfig(**chosen)
        settings |= {"quantization_config": quantization, "device_map": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], **settings).eval()
    return decode_systems.transformers_generate(model)


def llama_cpp(options: dict, _, file: str):
    (path,) = (name for name in options["gguf"].split(",") if Path(name).name == file)
    return decode_systems.llama_cpp(path, int(options["threads"]))


# (options, how it is quantised, name of its file) -> run, as in decode_systems.py
SYSTEMS = {"anvil": anvil, "transformers": transformers_generate, "llama.cpp": llama_cpp}


def why_not(system: str, options: dict) -> str | None:
    """Why this system cannot run here, or None."""
    kind, quantised = _parts(system)
    modules = [{"anvil": "torch", "transformers": "transformers", "llama.cpp": "llama_cpp"}[kind]]
    if quantised and kind == "transformers":
        if QUANTISED[quantised][1] is None:
            return f"bitsandbytes has no {quantised}"
        modules.append("bitsandbytes")
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if system == "llama.cpp":
        return "no gguf=FILE given"
    return None


def _parts(system: str) -> tuple[str, str]:
    """(kind, how it is quantised or '') of a system's name."""
    kind, _, quantised = system.split()[0].partition(":")
    if kind not in SYSTEMS or (quantised and (quantised not in QUANTISED or kind == "llama.cpp")):
        raise SystemExit(
            f"systems: {system}; known are {', '.join(SYSTEMS)}, after a colon {', '.join(QUANTISED)}"
        )
    return kind, quantised


def systems_of(options: dict) -> list[str]:
    """The systems asked for; llama.cpp once for each of its files."""
    files = [f"llama.cpp {Path(name).name}" for name in options["gguf"].split(",") if name]
    asked = options["systems"].split(",")
    return [name for system in asked for name in (files * (system == "llama.cpp") or [system])]


def worker(system: str, options: dict) -> None:
    """Takes prompts, answers {seconds, tokens}."""
    torch.set_num_threads(int(options["threads"]))
    kind, quantised = _parts(system)
    run = SYSTEMS[kind](options, quantised, system.partition(" ")[2])

    def timed(prompts) -> dict:
        start = time.perf_counter()
        tokens = run(prompts, int(options["new"]))
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    turns.serve(timed)


def read_rate(threads: int) -> float:
    """GB/s at which a tensor of 512 MB is summed: median of 9."""
    torch.set_num_threads(threads)
    tensor = torch.ones(128 * 2**20)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        tensor.sum()
        times.append(time.perf_counter() - start)
    return tensor.numel() * 4 / statistics.median(times) / 1e9


def weight_bytes(options: dict, quantised: str) -> int:
    """What one step reads: every weight once. A tied head reads the embedding whole; an untied embedding a
    few rows."""
    from checkpoints.huggingface import load_config
    from model import Decoder

    model = Decoder(load_config(options["model"]), device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if not model.config.tied_head:
        del sizes["embed_tokens.weight"]
    width = getattr(torch, options["dtype"]).itemsize
    bits = 8 * width
    if quantised:
        linear = model.layers[0].mlp.down_proj
        sample = torch.randn(linear.weight.shape)
        bits = quantisation(quantised).quantise(sample, None, torch.float32).bits_per_weight
    linears = [name for name in sizes if name.startswith("layers.") and name.endswith("proj.weight")]
    inside = sum(sizes[name] for name in linears)
    return round((sum(sizes.values()) - inside) * width + inside * bits / 8)


def measure(options: dict) -> tuple[dict, dict]:
    """Rates of every system that runs, and why the others do not."""
    systems = systems_of(options)
    not_run = {system: reason for system in systems if (reason := why_not(system, options))}
    prompts = make_prompts(options["model"], int(options["prompt"]), int(options["batch"]))
    workers = turns.start_workers(__file__, [system for system in systems if system not in not_run], options)
    answers = turns.take_turns(workers, [prompts] * (WARMUP_RUNS + int(options["repeats"])))
    count = int(options["new"]) * len(prompts)
    reference = next(iter(answers.values()))[0]["tokens"]
    result = {}
    for system, runs in answers.items():
        rates = [count / run["seconds"] for run in runs[WARMUP_RUNS:]]
        pairs = zip(sum(runs[-1]["tokens"], []), sum(reference, []))
        result[system] = {
            "tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "equal_tokens": sum(a == b for a, b in pairs) / count,
            "weight_gb_per_step": weight_bytes(options, _parts(system)[1]) / 1e9,
        }
    return result, not_run


def run_real_model(options: dict, command: str) -> int:
    """Measure, print, write. Gives the exit status: 1 if systems that compute the same write other tokens."""
    before = read_rate(int(options["threads"]))
    result, not_run = measure(options)
    import transformers

    report = {
        "command": command,
        "commit": commit(),
        "machine": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{key: int(options[key]) for key in ("threads", "prompt", "new", "batch", "repeats")},
        "dtype": options["dtype"],
        "read_gb_per_second": [before, read_rate(int(options["threads"]))],
        "weight_gb_per_step": weight_bytes(options, "") / 1e9,
        "systems": result,
        "not_run": not_run,
    }
    print_table(report)
    turns.write_report(report, options["out"])
    alike = [name for name in result if not name.startswith("llama.cpp") and not _parts(name)[1]]
    different = [name for name in alike if result[name]["equal_tokens"] < 1]
    if different and options["dtype"] == "float32":
        print(f"the tokens differ: {', '.join(different)}")
        return 1
    return 0


def print_table(report: dict) -> None:
    reading = statistics.mean(report["read_gb_per_second"])
    bound = reading / report["weight_gb_per_step"]  # steps per second
    first, last = report["read_gb_per_second"]
    print(
        f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, "
        f"prompt {report['prompt']}, {report['new']} new tokens, batch {report['batch']}, "
        f"{report['repeats']} runs each\n"
        f"reading a tensor: {first:.0f} GB/s before and {last:.0f} after; a step reads "
        f"{report['weight_gb_per_step']:.2f} GB, so at most {bound:.0f} steps/s"
    )
    print(f"{'system':32} {'tok/s':>8} {'min..max':>16} {'of bound':>9} {'equal tokens':>13}")
    for system, row in report["systems"].items():
        low, high = row["spread"]
        share = row["tokens_per_second"] / report["batch"] / reading * row["weight_gb_per_step"]
        rate, equal = row["tokens_per_second"], row["equal_tokens"]
        print(f"{system:32} {rate:8.1f} {low:7.1f}..{high:<7.1f} {share:9.0%} {equal:13.0%}")
    for system, reason in report["not_run"].items():
        print(f"{system:32} not run: {reason}")
    systems = report["systems"]
    for ours in (name for name in systems if name.startswith("anvil")):
        for baseline in (name for name in systems if name != ours):
            ratio = systems[ours]["tokens_per_second"] / systems[baseline]["tokens_per_second"]
            print(f"{ours} is {ratio:.2f} times as fast as {baseline}")
    if report["new"] == 1:
        rates = [
            f"{system} {row['tokens_per_second'] * report['prompt']:.0f}" for system, row in systems.items()
        ]
        print("tokens of the prompt per second: " + ", ".join(rates))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
