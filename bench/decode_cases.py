"""bench/decode.py on a GPU, and its smoke test: random weights, for both sides the same ones in memory.

Cases: d1 = Llama-2-7B's shape, one sequence, prompt 128, 256 new tokens; d2 = the same in NF4 with double
quantisation; d3-32 and d3-128 = Llama-3-8B's shape, that many sequences, prompt 128, 128 new. Weights are
random, bf16. Systems: anvil; eager = transformers generate with its defaults (sdpa; d2: with bitsandbytes'
layers around the same codes); static = the same with a static cache, which it compiles (reduce-overhead; not
in d2); 16bit = for d2, anvil with the same numbers in bf16. The time is that of the whole call, prompt
included; compilation and capture fall into the calls before the timed ones. Systems take turns, A-B-C-A-B-C.
The bound: every weight and every filled slot of the cache is read once per step at the rate at which this run
reads, and products run at the rate at which this run multiplies.
"""

import importlib.util
import statistics
import time

import torch

from architectures import config_from_hf
from bench import measure as measuring
from bench.decode_systems import anvil, transformers_generate
from bench.four_bits import dense_twin, plain_tensors, random_decoder, take_linears
from bench.measure import Session, Timer, is_on, table
from generation.generate import new_cache
from generation.layout import lay_out_for_decoding
from model import Decoder, initialize_weights
from quant.linear import QuantLinear

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 301, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
COMMON = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip

# name: (shape, sequences, tokens of the prompt, new tokens)
CASES = {
    "d1": (LLAMA_2_7B, 1, 128, 256),
    "d2": (LLAMA_2_7B, 1, 128, 256),
    "d3-32": (LLAMA_3_8B, 32, 128, 128),
    "d3-128": (LLAMA_3_8B, 128, 128, 128),
}
IN_4_BITS = ("d2",)
# bitsandbytes' product on a CPU is wrong where a row is no whole number of blocks
TINY_CASES = {"d1": (TINY, 1, 9, 20), "d2": (TINY | {"intermediate_size": 128}, 1, 9, 20)}
TINY_CASES |= {"d3-32": (TINY, 3, 9, 12), "d3-128": (TINY, 5, 9, 12)}
# a system's first call and one turn, at 7B, guessed
NEEDS_SECONDS = {"anvil": 8, "eager": 12, "static": 70, "16bit": 6}
FIRST_TOKENS = {"eager": 8}  # of its first call: what compiles and captures nothing is warm after a few
# relative, after the prompt: bf16 through 32 layers; 1.4 if they had nothing in common
LOGITS_MAY_DIFFER = 0.15


def build(shape: dict, dtype: torch.dtype, device: torch.device, in_4_bits: bool) -> Decoder:
    """A model of this shape with random weights, made on the device."""
    if in_4_bits:
        return random_decoder(config_from_hf(COMMON | shape), dtype, device)
    model = Decoder(config_from_hf(COMMON | shape), dtype=dtype, device="meta").to_empty(device=device).eval()
    model.requires_grad_(False)
    initialize_weights(model, torch.Generator(device).manual_seed(0))
    lay_out_for_decoding(model)
    return model


def build_baseline(shape: dict, model: Decoder, in_4_bits: bool):
    """transformers' model around the very same tensors; None where it, or bitsandbytes if needed, is not
    installed."""
    needed = ["transformers"] + ["bitsandbytes"] * in_4_bits
    if any(importlib.util.find_spec(package) is None for package in needed):
        return None
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**(COMMON | shape))
    weight = model.embed_tokens.weight
    with torch.device("meta"):
        baseline = transformers.LlamaForCausalLM._from_config(
            config, dtype=weight.dtype, attn_implementation="sdpa"
        )
    tensors = {
        name if name == "lm_head.weight" else f"model.{name}": t for name, t in model.state_dict().items()
    }
    if in_4_bits:
        take_linears(baseline, model, weight.dtype)
        kept = plain_tensors(model)
        tensors = {name: tensor for name, tensor in tensors.items() if name.removeprefix("model.") in kept}
    baseline.load_state_dict(tensors, assign=True, strict=not in_4_bits)
    # its angles are no parameters, so on the meta device they got no values
    baseline.model.rotary_emb = type(baseline.model.rotary_emb)(config=config).to(weight.device)
    assert not any(tensor.is_meta for tensor in baseline.parameters())
    return baseline.eval()


def anvil_kept(model: Decoder, sequences: int, capacity: int):
    return anvil(model, new_cache(model, sequences, capacity))


def anvil_in_16_bits(model: Decoder, sequences: int, capacity: int):
    twin = dense_twin(model)
    lay_out_for_decoding(twin)
    return anvil_kept(twin, sequences, capacity)


SYSTEMS = {  # (our model, the baseline's, sequences, tokens of each) -> run
    "anvil": lambda model, _, *sizes: anvil_kept(model, *sizes),
    "eager": lambda _, baseline, *sizes: transformers_generate(baseline),
    "16bit": lambda model, _, *sizes: anvil_in_16_bits(model, *sizes),
    "static": lambda _, baseline, *sizes: transformers_generate(baseline, cache_implementation="static"),
}


def least_seconds(model: Decoder, case: tuple, ceilings) -> float:
    """What the whole call takes at least: the steps at the bound of memory or arithmetic, and the prompt's
    products."""
    shape, sequences, prompt, new = case
    config, weight = model.config, model.head_weight()
    numbers = sum(p.numel() for name, p in model.named_parameters() if name != "embed_tokens.weight")
    packed = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    weight_bytes = numbers * weight.itemsize + sum(layer.storage_bytes for layer in packed)
    numbers += sum(layer.in_features * layer.out_features for layer in packed)
    slot = (
        2 * config.num_layers * config.num_kv_heads * config.head_dim * weight.itemsize
    )  # bytes of one token's keys
    read, burst = ceilings.read_gb_per_second * 1e9, ceilings.burst_tflops * 1e12
    total = 2 * (numbers - weight.numel()) * sequences * prompt / burst
    for context in range(prompt, prompt + new):
        step_bytes = weight_bytes + sequences * context * slot
        total += max(step_bytes / read, 2 * numbers * sequences / burst)
    return total


def logits_difference(model: Decoder, baseline, prompt: list[int]) -> float:
    """Relative difference of the logits after one prompt."""
    device = model.embed_tokens.weight.device
    ids, size = torch.tensor(prompt, device=device), len(prompt)
    with torch.inference_mode():
        borders = torch.tensor([0, size], dtype=torch.int32, device=device)
        ours = model.logits(model(ids, torch.arange(size, device=device), borders, size)[-1:]).double()
        theirs = baseline(ids[None]).logits[0, -1:].double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def measure(name: str, case: tuple, systems: dict, repeats: int, session: Session, kept: float = 0.0) -> dict:
    """Seconds and tokens of every system's calls; the first call of each is not timed. Fewer turns if time is
    out, of which `kept` seconds belong to the cases that follow.

    Every run() ends with its tokens on the host, so the host's clock is right.
    """
    _, sequences, prompt, new = case
    vocabulary = case[0]["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, vocabulary, (sequences, prompt), generator=generator).tolist()
    seconds, tokens = {system: [] for system in systems}, {}
    for turn in range(1 + repeats):
        if turn > 1 and session.left - kept < sum(times[-1] for times in seconds.values()):
            print(f"{name}: {turn - 1} turns of {repeats}, for time")
            break
        for system, run in systems.items():
            count = new if turn else min(new, FIRST_TOKENS.get(system, new))
            start = time.perf_counter()
            tokens[system] = run(prompts, count)
            seconds[system].append(time.perf_counter() - start)
            if turn == 0:
                print(f"{name}, {system}: first call {seconds[system][0]:.1f} s", flush=True)
    return {
        system: {"first": found[0], "seconds": found[1:], "tokens": tokens[system]}
        for system, found in seconds.items()
    }


def row_of(name: str, case: tuple, system: str, found: dict, reference: list, least: float) -> dict:
    _, sequences, _, new = case
    count = sequences * new
    pairs = [pair for ours, theirs in zip(found["tokens"], reference) for pair in zip(ours, theirs)]
    median = statistics.median(found["seconds"])
    return {
        "case": name,
        "system": system,
        "tokens_per_second": count / median,
        "slowest": count / max(found["seconds"]),
        "fastest": count / min(found["seconds"]),
        "first_call_seconds": found["first"],
        "share_of_bound": least / median,
        "equal_tokens": sum(a == b for a, b in pairs) / count,
    }


def run_case(
    name: str,
    case: tuple,
    model: Decoder,
    baseline,
    systems: list[str],
    session: Session,
    options: dict,
    ceilings,
    kept: float,
) -> None:
    _, sequences, prompt, new = case
    device = model.embed_tokens.weight.device
    chosen, needed = {}, 0
    for system in systems:
        if system == ("static" if name in IN_4_BITS else "16bit"):
            continue
        if system in ("eager", "static") and baseline is None:
            packages = "transformers or bitsandbytes" if name in IN_4_BITS else "transformers"
            session.left_out.append(f"{name} {system} ({packages} is not installed)")
        elif is_on(options["quick"]) and system == "static" and sequences > 1:
            session.left_out.append(f"{name} {system} (quick)")
        elif device.type == "cpu" or session.allows(f"{name} {system}", needed + NEEDS_SECONDS[system]):
            needed += NEEDS_SECONDS[system]
            chosen[system] = SYSTEMS[system](model, baseline, sequences, prompt + new)
    if not chosen:
        return
    found = measure(name, case, chosen, int(options["repeats"]), session, kept)
    least = least_seconds(model, case, ceilings)
    reference = next(iter(found.values()))["tokens"]
    session.rows += [row_of(name, case, system, result, reference, least) for system, result in found.items()]


def check(name: str, model: Decoder, baseline, prompt_length: int, report: dict) -> None:
    difference = logits_difference(model, baseline, list(range(2, 2 + prompt_length)))
    report[name] = difference
    print(f"{name}: logits after a prompt differ from transformers' by {difference:.1e} of their size")
    if difference > LOGITS_MAY_DIFFER:
        raise ValueError(f"the logits differ by {difference:.1e}; the systems do not compute the same")


def print_rows(rows: list[dict]) -> None:
    ours = {row["case"]: row["tokens_per_second"] for row in rows if row["system"] == "anvil"}
    print(table([
        {
            "case": row["case"],
            "system": row["system"],
            "tokens/s": f"{row['tokens_per_second']:.1f}",
            "slowest..fastest": f"{row['slowest']:.1f}..{row['fastest']:.1f}",
            "of the bound": f"{row['share_of_bound']:.1%}",
            "anvil is": f"{ours[row['case']] / row['tokens_per_second']:.2f}x" if row["case"] in ours else "",
            "equal tokens": f"{row['equal_tokens']:.0%}",
        }
        for row in rows
    ]))  # fmt: skip


def run(options: dict[str, str], device: torch.device, command: str) -> int:
    """Measure the cases asked for, print and save them. Gives the exit status."""
    on_gpu, quick = device.type == "cuda", is_on(options["quick"])
    cases = CASES if on_gpu else TINY_CASES
    names = options["cases"].split(",") if options["cases"] else list(cases)
    systems = options["systems"].split(",") if options["systems"] else list(SYSTEMS)
    if unknown := sorted((set(names) - cases.keys()) | (set(systems) - SYSTEMS.keys())):
        raise SystemExit(f"unknown: {', '.join(unknown)}; cases: {', '.join(cases)}; {', '.join(SYSTEMS)}")
    if quick:
        options["repeats"] = str(min(3, int(options["repeats"])))
    dtype = getattr(torch, options["dtype"] or ("bfloat16" if on_gpu else "float32"))
    session, timer = Session(float(options["seconds"])), Timer(device)
    machine = measuring.describe_machine(device, command)
    with timer.stream():
        ceilings = measuring.take_ceilings(timer, sustained_seconds=0.5)
    print(ceilings.text, flush=True)
    differences: dict[str, float] = {}
    model = baseline = built = None
    for place, name in enumerate(names):
        kept = session.left / 2 if place + 1 < len(names) else 0.0
        with session.part(name):
            in_4_bits = name in IN_4_BITS
            if (cases[name][0], in_4_bits) != built:
                model = baseline = None  # the last shape's memory is needed
                model = build(cases[name][0], dtype, device, in_4_bits)
                baseline = build_baseline(cases[name][0], model, in_4_bits)
                built = cases[name][0], in_4_bits
                if baseline is not None:
                    check(name, model, baseline, cases[name][2], differences)
            run_case(name, cases[name], model, baseline, systems, session, options, ceilings, kept)
    print_rows(session.rows)
    report = {"dtype": str(dtype).removeprefix("torch."), "repeats": int(options["repeats"])}
    report |= {"ceilings": ceilings, "logits_differ_by": differences, "rows": session.rows}
    report |= {"left_out": session.left_out, "failed": session.failed}
    partial = f"{options['cases']},{options['systems']}"
    measuring.save(measuring.file_name("decode", quick, partial), machine, report, options["out"])
    return session.finish()
