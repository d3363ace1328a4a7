"""What a training run will take, before any weight is read: peak memory by part, and a bound on tokens/s.

    python train.py configs/qlora.yaml plan=true

The model stands without its numbers (device "meta"), with adapters and quantised layers of the right sizes,
so every count is made on the modules that a run would train. Memory is that of the fullest moment: loading,
the loss, or the backward pass of one block. The bound on speed counts products, at the rate of this machine:

    forward 2N, gradient of the activations 2N, of trained weights 2N; attention 2 H D S and 5 H D S per layer

FLOPs per token, with N weights of the linears, S the mean segment length as attention sees it (sum len^2 /
sum len); only trained tokens reach the head, blocks below the lowest trained one have no gradient, recomputed
blocks run twice. Quantised weights are written and read once more in each pass, at the speed of memory.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import kernels
import quant
from architectures.config import ModelConfig, from_hf_name
from checkpoints.hub import tensor_sizes
from checkpoints.huggingface import checkpoint_dtype, load_config
from checkpoints.peft import ADAPTER_WEIGHTS, read_adapter_config
from checkpoints.safetensors_files import INDEX, opened, read_json, weight_files
from generation.generate import FIRST_ROOM
from kernels import recompute
from lora import LoraOptions, lora_layers, replace_module
from model import Decoder
from options.errors import UserError, located
from parallel.options import ParallelOptions
from quant.linear import Format, QuantLinear, quantised_linears
from training import memory

GIB = 2**30
SAMPLE_ROWS = 64  # of a weight, quantised to see how many bits a number takes; every format goes by rows
RATE_SECONDS = 0.5  # how long products and copies are timed


class Unread(QuantLinear):
    """The place of a quantised linear whose numbers are not read: its size, and nothing else."""

    def __init__(self, format: Format, shape: tuple[int, int], size_bytes: float, dtype: torch.dtype):
        codes = torch.empty(round(size_bytes), dtype=torch.uint8, device="meta")
        super().__init__(format, shape, None, dtype, codes=codes)

    def fill(self, out: Tensor) -> None:
        """Nothing is written: there are no numbers."""


def skeleton(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: Format | None,
    token: str | None = None,
) -> Decoder:
    """The decoder that checkpoints.huggingface.load_model would give for this folder, on the meta device.
    token: of the hub, which is asked for the sizes of codes that are not here."""
    model = Decoder(config, dtype=dtype, device="meta")
    settings, sizes, unknown = config.hf.get("quantization_config"), None, ""
    if settings:
        quantization = quant.from_config(settings)
        if any(folder.glob("*.safetensors")):
            sizes = _sizes_in_files(folder)
        else:
            try:
                sizes = tensor_sizes(folder, token)
            except UserError as error:  # some formats have codes of one size whatever the numbers are
                unknown = f" ({error})"
        if sizes is not None:
            sizes = {from_hf_name(config, name): size for name, size in sizes.items()}
    elif quantization is None:
        return model
    bytes_per_number = functools.cache(functools.partial(_bytes_per_number, quantization))
    for name, module in [each for each in model.named_modules() if isinstance(each[1], nn.Linear)]:
        shape = (module.out_features, module.in_features)
        if sizes is not None and f"{name}.{quantization.marker}" in sizes:
            size = sum(each for key, each in sizes.items() if key and key.startswith(f"{name}."))
            size -= sizes.get(f"{name}.bias", 0)
        elif sizes is None and name.startswith("layers."):
            with located(f"plan: {folder}: its weights are not here, and a plan fetches none{unknown}"):
                size = shape[0] * shape[1] * bytes_per_number(shape[1])
        else:
            continue
        packed = Unread(quantization, shape, size, dtype)
        packed.bias = module.bias
        replace_module(model, name, packed)
    return model


def without_weights(model: Decoder, adapters: list[Path], options: LoraOptions) -> tuple[list, LoraOptions]:
    """The adapter to lay on the skeleton, if its numbers are here, and options of what trains on top. What
    is merged leaves no trace in a size; of an adapter on a hub a plan has fetched the configuration."""
    trained = adapters[-1:] if options.finetuning_type == "lora" and not options.create_new_adapter else []
    if len(adapters) > len(trained) and quantised_linears(model):
        return adapters, options  # which prepare_adapters refuses
    if not trained or (trained[0] / ADAPTER_WEIGHTS).is_file():
        return trained, options
    config = read_adapter_config(adapters[-1])
    targets = config.get("target_modules")
    targets = [name.removeprefix("model.") for name in targets] if isinstance(targets, list) else ["all"]
    whole = tuple(config.get("modules_to_save") or ())
    sizes = {"lora_rank": config.get("r", 8), "use_dora": bool(config.get("use_dora"))}
    return [], replace(options, **sizes, lora_target=tuple(targets), additional_target=whole)


def _bytes_per_number(quantization: Format, inputs: int) -> float:
    weight = torch.randn(SAMPLE_ROWS, inputs, generator=torch.Generator().manual_seed(0))
    return quantization.quantise(weight, None, torch.float32).bits_per_weight / 8


def _sizes_in_files(folder: Path) -> dict[str, int]:
    """Bytes of every tensor by its name there."""
    sizes = {}
    for path in weight_files(Path(folder)):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                piece = file.get_slice(name)
                kind = piece.get_dtype().partition("_")[0]  # F16, I32, BOOL
                bits = int("".join(filter(str.isdigit, kind)) or 8)
                sizes[name] = int(np.prod(piece.get_shape(), dtype=np.int64)) * bits // 8
    return sizes


# Memory


def predict_peak(
    model: Decoder,
    chosen: recompute.Plan,
    need: memory.Need,
    file_bytes,
    device,
    beside=None,
    *,
    writing=(),
    spread: memory.Spread | None = None,
    accumulates=False,
) -> dict[str, float]:
    """-> bytes by part at the fullest moment of a run. model: the skeleton, prepared as for training; chosen,
    need: of memory.plan and memory.need; file_bytes: of the largest file of weights; beside: bytes of other
    models that are held (reference, reward); writing: what comes to these between updates, by part, for each
    time in which texts are written or scored; spread: then all of it is of each rank, on its device;
    accumulates: gradients stay from one micro-batch to the next, else they come as the activations go."""
    spread = spread or memory.Spread()
    parts = {} if device.type == "cuda" else {"process": float(resident_bytes())}
    trained, fixed = resident(model, spread)
    parts["weights"] = 0.0 if spread.away else fixed
    parts["adapters" if lora_layers(model) else "trained weights"] = 0.0 if spread.away else trained
    loading = dict(parts)
    if spread.shard > 1:
        loading["block being read"] = max(memory.bytes_of(spread.held(block)) for block in model.layers)
    if device.type != "cuda":  # the pages of the mapped file that have been read count until it is closed
        loading["file being read"] = file_bytes
    parts |= beside or {}
    opening = {"gradients": need.gradients * accumulates, "gathered weights": need.opening}
    between = [parts | {"optimizer": need.optimizer} | each for each in (opening, *writing)]
    stay = accumulates or device.type != "cuda"  # a process does not give back what was theirs
    parts["gradients"] = need.gradients if stay else 0.0
    parts["optimizer"] = need.optimizer
    if spread.ranks == 1:
        parts["gradients"] = max(parts["gradients"], need.first)
    parts["gathered weights"] = need.gathered
    several = spread.ranks > 1  # the message of a block's gradients goes when its activations have gone
    parts["gradients being summed"] = max(need.first, need.summed - need.everything) if several else 0.0
    below = model.config.num_layers - need.blocks  # blocks without a backward pass keep nothing
    counts = max(0, chosen.full - below), min(chosen.selective, need.blocks)
    parts["activations"] = need.activations(*counts, offload=chosen.offload is not None)
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    largest = max((module.in_features * module.out_features for module in packed), default=0)
    parts["buffers"] = float(largest * model.compute_dtype.itemsize)
    block = need.block - parts["buffers"]  # there it is counted too
    name = "head" if need.head > block else "one block's backward"
    parts[name] = max(need.head, block, need.message)  # before it begins its weights are there twice
    left = need.gathered - need.message - need.kept * (not accumulates)
    ending = parts | {"gradients": need.gradients, "activations": 0.0, name: block}
    ending |= {"gathered weights": left, "gradients being summed": need.summed}
    still = left if accumulates and need.kept else 0.0
    closing = ending | {"gathered weights": still, "gradients being summed": need.closing, name: 0.0}
    return max(parts, ending, closing, loading, *between, key=lambda moment: sum(moment.values()))


def cache_bytes(config: ModelConfig, texts: int, prompt: int, new: int, size: int) -> float:
    """Keys and values of so many texts that are written together, of at most prompt + new tokens, with
    numbers of `size` bytes; where the cache has to grow, the old and the new one."""
    capacity = held = prompt + min(new, FIRST_ROOM)
    while capacity < prompt + new - 1:  # the last token is never fed
        held = capacity + capacity + capacity // 2
        capacity += capacity // 2
    return 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * size * texts * held


def largest_file(folder: Path, model: Decoder) -> float:
    """Bytes of the largest file of weights; of those that are not here, as if all were of one size. model:
    the skeleton, which knows the size of codes."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    if sizes:
        return float(max(sizes))
    config, index = load_config(folder), folder / INDEX
    files = len(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else 1
    if not config.hf.get("quantization_config"):
        model = Decoder(config, dtype=checkpoint_dtype(config), device="meta")
    return weight_bytes(model) / max(files, 1)


def weight_bytes(model: Decoder, spread: memory.Spread | None = None) -> float:
    """Of all parameters and quantised layers, on each rank."""
    return sum(resident(model, spread or memory.Spread()))


def resident(model: Decoder, spread: memory.Spread) -> tuple[float, float]:
    """Bytes that a rank holds between steps of what trains, and of what does not: parameters and codes."""
    tensors = [*model.parameters(), *model.buffers()]
    trained = spread.share(tensor for tensor in tensors if tensor.requires_grad)
    return trained, spread.share(tensor for tensor in tensors if not tensor.requires_grad)


def largest_that_fits(fits: Callable[[int], bool], most: int = 2**24) -> int:
    """The most tokens of a micro-batch for which `fits` is true, in steps of one part in 64; 0 for none."""
    low, high = 0, 64
    while high < most and fits(high):
        low, high = high, 2 * high
    step = max(1, low // 64)
    while high - low > step:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe(options: ParallelOptions, ranks: int) -> str:
    """'on each of 4 ranks (fsdp of 2, tp_size=2)'."""
    sizes = dict(zip(("ddp of ", "fsdp of "), options.engine(ranks)))
    sizes |= {"tp_size=": options.tp_size, "cp_size=": options.cp_size}
    words = [f"{word}{size}" for word, size in sizes.items() if size > 1]
    words += ["fsdp_offload"] * options.fsdp_offload
    return f"on each of {ranks} ranks ({', '.join(words)})"


def suggestion(most: int, tokens: int, rows: int, segments: int = 1, new: int = 0) -> str:
    """What to set, where so many tokens of a micro-batch fit, which has these tokens and rows now. segments:
    of a row; new: tokens of each that the model writes, of which cutoff_len knows nothing."""
    longest = -(-tokens // rows)
    if most < longest:
        return f"  at most {most:,} tokens fit: lower cutoff_len, or set more ranks, fsdp, or fewer bits"
    length = most // (rows * segments) - new
    sizes = f"per_device_train_batch_size={most // longest} as the rows are, or cutoff_len={length}"
    return f"  at most {most:,} tokens fit: {sizes} at {rows} rows"


def resident_bytes() -> int:
    """Memory of this process now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Speed


@dataclass(frozen=True)
class Bound:
    """Seconds that a token takes at least, by part, and the rates of this machine that say so."""

    seconds: dict[str, float]
    flops_per_token: float
    rate: float  # FLOP/s of a product in the compute dtype
    bandwidth: float  # bytes/s of a copy, read and written

    @property
    def tokens_per_second(self) -> float:
        return 1 / sum(self.seconds.values())


def bound_speed(
    model: Decoder, chosen: recompute.Plan, lengths: np.ndarray, trained_share: float, tokens: int, device
) -> Bound:
    """lengths (segments,) of the data in tokens; trained_share: of the tokens that reach the head; tokens: of
    a micro-batch, which is how often quantised weights are made dense."""
    compute = model.compute_dtype
    work = count_flops(model, chosen, mean_context(lengths), trained_share)
    rate, bandwidth = measure_products(compute, device), measure_copies(device)
    seconds = {kind: flops / rate for kind, flops in work.items()}
    passes = 3 if chosen.full else 2  # forward, backward, and forward again
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    moved = sum(m.storage_bytes + 2 * m.in_features * m.out_features * compute.itemsize for m in packed)
    if moved:
        seconds["quantised weights"] = passes * moved / bandwidth / tokens
    return Bound(seconds, sum(work.values()), rate, bandwidth)


def mean_context(lengths: np.ndarray) -> float:
    """Tokens of its own segment that a token meets on average, all counted: sum len^2 / sum len."""
    lengths = lengths.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def count_flops(model: Decoder, chosen: recompute.Plan, context: float, trained_share: float) -> dict:
    """FLOPs per token by part; see the file's head."""
    config, adapted, first = model.config, lora_layers(model), memory.first_trained(model)
    work = {"linears": 0.0, "attention": 0.0, "adapters": 0.0, "head": 0.0, "recomputed": 0.0}
    head = config.vocab_size * config.hidden_size * trained_share
    work["head"] = head * (6 if model.head_weight().requires_grad else 4)
    per_attention = config.num_heads * config.head_dim * context
    for number, block in enumerate(model.layers):
        dense = [module for module in block.modules() if isinstance(module, nn.Linear | QuantLinear)]
        linears = sum(module.in_features * module.out_features for module in dense)
        own = [p for name, p in block.named_parameters() if not name.endswith(("lora_a", "lora_b"))]
        trained = sum(p.numel() for p in own if p.requires_grad and p.dim() == 2)
        backward = number >= first
        work["linears"] += 2 * linears + 2 * trained + (2 * linears if backward else 0)
        work["attention"] += per_attention * (7 if backward else 2)
        if number < chosen.full and backward:
            work["recomputed"] += 2 * linears + 2 * per_attention
    work["adapters"] = 6.0 * sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in adapted.values())
    return {kind: flops for kind, flops in work.items() if flops}


def measure_products(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large product of random numbers on this device; the fastest of several."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: kernels.linear(a, b), device)


def measure_copies(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy that fits in no cache."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source), device)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call within RATE_SECONDS."""
    times, end = [], time.perf_counter() + RATE_SECONDS
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    with torch.inference_mode():
        call()
        while not times or time.perf_counter() < end:
            wait()
            start = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - start)
    return min(times)


# The answer


def report(peak: dict[str, float], bound: Bound, free: float, tokens: int, device: torch.device) -> str:
    """What the user reads: a line for each part."""
    lines = [f"plan for a micro-batch of {tokens:,} tokens", "", f"{'peak memory':<26}     GiB"]
    lines += [f"  {part:<24}{size / GIB:8.2f}" for part, size in peak.items() if size > 0]
    whole, available = sum(peak.values()), free + peak.get("process", 0.0)
    verdict = "" if whole <= available else ": TOO MUCH; lower per_device_train_batch_size or cutoff_len"
    lines.append(f"  {'together':<24}{whole / GIB:8.2f} of {available / GIB:.2f}{verdict}")
    if device.type == "cuda":
        lines.append("  (what torch allocates; the CUDA context of about half a GiB comes to it)")
    lines += ["", f"{'time per token at least':<26}      us"]
    lines += [f"  {part:<24}{1e6 * seconds:8.2f}" for part, seconds in bound.seconds.items()]
    rates = f"products at {bound.rate / 1e9:,.0f} GFLOP/s, copies at {bound.bandwidth / 1e9:,.0f} GB/s"
    speed = f"{bound.tokens_per_second:,.0f} tokens/s"
    lines.append(f"  at most {speed}: {bound.flops_per_token / 1e9:.3f} GFLOP each, {rates} (measured now)")
    return "\n".join(lines)
