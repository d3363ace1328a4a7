"""GPTQ of a whole model on calibration text, block by block, in bounded memory (export_quantization_* of
export.py).

    windows = read_windows(options, tokenizer, HubAccess())     # (nsamples, maxlen)
    calibration = Calibration(options, config, windows)
    calibration.write(target, dense, shard_gigabytes=5.0)       # dense: (Hugging Face name, tensor)

Windows of text run through the model once, one block after the other. Within a block the linears are taken in
the order in which it computes: q; k and v; o; gate and up; down. Each is solved (quant/gptq_solver.py) for
the inputs that it gets when all before it are quantised already, as the finished model will compute ("true
sequential"). For k and v tokens count by how much attention they get (_Text._received). Held at a time: one
block, one Hessian and its factor; the text's activations lie in a memory-mapped file. Embedding, norms and
head stay as they are.
"""

import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from architectures.config import ModelConfig, to_hf_name
from architectures.layers import ForwardContext
from checkpoints.safetensors_files import stream_tensors, write_shards
from kernels.linear import LinearLayer, Part, matmul_transposed
from lora import replace_module
from model import Attention, Block, Decoder
from options.errors import UserError, located, refuse
from options.option import COMMON, RESUMABLE, option
from options.progress import Bar
from pipeline.formats import Dropped, check_stage, to_conversation, to_document
from pipeline.sources import DatasetInfo, HubAccess, find_dataset, list_files, open_hub, read_rows
from quant.gptq import GPTQFormat, GPTQLinear
from quant.gptq_solver import GPTQOptions, Hessian, Integers, solve
from text.tokenizer import Tokenizer

ROWS_READ = 200_000  # of a data set, at most: the windows are drawn from these
SEED = 0  # of the windows: the same command gives the same model
TOKENS_AT_ONCE = 2048  # a batch of windows: enough for full speed, small beside a block
PACKED_IN = 32  # GPTQ's file holds codes and zeros in 32-bit words, along inputs and along outputs


@dataclass(frozen=True)
class CalibrationOptions:
    export_quantization_bit: Literal[8, 4, 3, 2] | None = option(
        None, "quantise the exported model by GPTQ to this many bits", COMMON
    )
    export_quantization_dataset: str | None = option(
        None, "text to calibrate it on: a name in dataset_info.json, or a file", COMMON
    )
    export_quantization_nsamples: int = option(128, "windows of calibration text")
    export_quantization_maxlen: int = option(1024, "tokens of each, from documents that are longer")
    export_quantization_group_size: int = option(128, "inputs that share a scale; -1 = all of a row")
    export_quantization_damp_percent: float = option(0.1, "share of its mean added to the Hessian's diagonal")
    export_quantization_desc_act: bool = option(False, "act-order: columns by activations (better, slower)")
    export_quantization_sym: bool = option(True, "grids around zero; false = with zero points")
    dataset_dir: str = option("data", "folder of dataset_info.json", RESUMABLE, also="data_dir")

    def __post_init__(self):
        if self.export_quantization_bit is None:
            return
        missing = "export_quantization_dataset: missing; name text to calibrate on, for example"
        refuse(not self.export_quantization_dataset, f"{missing} export_quantization_dataset=c4_demo.jsonl")
        group, damping = self.export_quantization_group_size, self.export_quantization_damp_percent
        checks = {
            "nsamples": (self.export_quantization_nsamples >= 1, "at least 1"),
            "maxlen": (self.export_quantization_maxlen >= 2, "at least 2"),
            "group_size": (group == -1 or group >= 1, "a number above 0, or -1: whole rows"),
            "damp_percent": (0 < damping < 1, "a share between 0 and 1"),
        }
        for name, (right, expected) in checks.items():
            key = f"export_quantization_{name}"
            refuse(not right, f"{key}: {getattr(self, key)}; expected {expected}")

    @property
    def solver(self) -> GPTQOptions:
        bits, group_size = self.export_quantization_bit, self.export_quantization_group_size
        symmetric, act_order = self.export_quantization_sym, self.export_quantization_desc_act
        return GPTQOptions(bits, group_size, symmetric, act_order, self.export_quantization_damp_percent)


# Text


def read_windows(options: CalibrationOptions, tokenizer: Tokenizer, hub: HubAccess) -> Tensor:
    """(nsamples, maxlen) int64: random windows of documents that are longer. Raises UserError naming the key.

    Every long document gives one before any gives a second.
    """
    count, length = options.export_quantization_nsamples, options.export_quantization_maxlen
    name = options.export_quantization_dataset
    chosen = random.Random(SEED)
    try:
        info = find_dataset(name, options.dataset_dir)
        check_stage(info, "sft")
        documents = _some_documents(info, hub, 4 * count, length, chosen)
    except UserError as error:
        raise UserError(f"export_quantization_dataset: {str(error).removeprefix('dataset: ')}") from error
    long: list[list[int]] = []
    longest = 0
    for ids in map(tokenizer.encode, documents):
        longest = max(longest, len(ids))
        long += [ids] if len(ids) > length else []
        if len(long) == count:
            break
    limit = f"export_quantization_maxlen={length} tokens (the longest looked at has {longest})"
    fault = f"no document of {name} is longer than {limit}; lower it, or take longer documents"
    refuse(not long, f"export_quantization_dataset: {fault}")
    windows = []
    for number in range(count):
        ids = long[number] if number < len(long) else chosen.choice(long)
        start = chosen.randrange(len(ids) - length + 1)
        windows.append(ids[start : start + length])
    return torch.tensor(windows)


def _some_documents(info: DatasetInfo, hub: HubAccess, count: int, length: int, chosen) -> list[str]:
    """At most `count` documents drawn evenly from the first ROWS_READ rows, in random order (chosen:
    random.Random); of very long ones a part. Only those that can have more than `length` tokens, a token
    being at least one byte; if there are none, the longest."""
    kept, seen, longest = [], 0, ""
    most = 64 * length  # characters: a book is not held as a whole
    for text in _documents(info, hub, 8 * length):
        if len(text) > most:
            start = chosen.randrange(len(text) - most + 1)
            text = text[start : start + most]
        longest = max(longest, text, key=len)
        if len(text.encode()) <= length:
            continue
        seen += 1
        if len(kept) < count:
            kept.append(text)
        elif (place := chosen.randrange(seen)) < count:  # algorithm R: every one is as likely
            kept[place] = text
    chosen.shuffle(kept)
    return kept or [longest]


def _documents(info: DatasetInfo, hub: HubAccess, joined: int) -> Iterator[str]:
    """The text of each row; of conversations all turns; lines of .txt files joined up to so many letters."""
    opened = open_hub(info, hub, streaming=True) if info.kind != "file" else None
    lines = info.kind == "file" and all(file.suffix.lower() == ".txt" for file in list_files(info))
    pending = ""
    for number, place, row in read_rows(info, opened):
        if number == ROWS_READ:
            break
        try:
            with located(place):
                text = _text_of(row, info)
        except Dropped:
            continue
        if not lines:
            yield text
        elif len(pending := pending + text + "\n") >= joined:
            yield pending
            pending = ""
    if pending:
        yield pending


def _text_of(row: dict, info: DatasetInfo) -> str:
    document = info.columns.keys() == {"prompt"} or ("text" in row and "instruction" not in row)
    if info.formatting == "alpaca" and document:
        return to_document(row, info)
    return "\n".join(turn.content for turn in to_conversation(row, info).turns)


# The model


class Calibration:
    """windows: (N, L) token ids. Raises UserError where the model's sizes cannot be packed.

    error: mean over linears of the squared error of a layer's output over its squared size, on the text;
    rounded_error: if each weight had been rounded to the nearest point of the grid.
    """

    def __init__(self, options: CalibrationOptions, config: ModelConfig, windows: Tensor, device="cpu"):
        self.options, self.config, self.windows, self.device = options, config, windows, device
        grid = options.solver
        self.format = GPTQFormat(grid.bits, grid.group_size, grid.act_order, grid.symmetric)
        self.solved, self.error, self.rounded_error = 0, 0.0, 0.0
        length, most = windows.shape[1], config.max_positions
        fault = f"export_quantization_maxlen: {length} tokens; the model is for texts of {most}"
        refuse(length > most, fault)
        block = Block(config, 0, device="meta")
        self.block_names = [name for name, _ in block.named_parameters()]
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        unknown = linears ^ {f"{part}.{name}" for part, names in STAGES for name in names}
        fault = f"GPTQ knows other linears of a block than this model has ({', '.join(sorted(unknown))})"
        refuse(unknown, f"export_quantization_bit: {fault}")
        for name, module in block.named_modules():
            sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
            if any(size % PACKED_IN for size in sizes):
                found = f"{name} has {sizes[0]} inputs and {sizes[1]} outputs"
                fault = f"GPTQ packs multiples of {PACKED_IN}, so this model cannot be exported in it"
                raise UserError(f"export_quantization_bit: {found}; {fault}")

    def told(self) -> str:
        """For the user, at the end."""
        lost = f"{self.format.describe()}: {100 * self.error:.3g}% of what the linears put out is lost"
        rounded = f"{100 * self.rounded_error:.3g}% if each weight were rounded alone"
        return f"{lost}, {rounded} (squares, calibration text)"

    def record(self) -> dict:
        """How the integers were found, for whoever asks later."""
        text = {"dataset": self.options.export_quantization_dataset, "windows": list(self.windows.shape)}
        found = {"output_error": self.error, "output_error_of_rounding": self.rounded_error}
        return text | {"damp_percent": self.options.export_quantization_damp_percent} | found

    def working_bytes(self, dtype: torch.dtype) -> int:
        """Disk space that `tensors` takes for activations while it runs."""
        numbers = self.config.hidden_size + sum(_inner_sizes(self.config).values())  # a token's
        return self.windows.numel() * numbers * _compute_dtype(dtype).itemsize

    def write(self, folder: Path, dense: Iterable[tuple[str, Tensor]], shard_gigabytes: float) -> None:
        """The quantised tensors as safetensors files of a folder; dense as in `tensors`."""
        working = folder / "working"
        write_shards(folder, self.tensors(dense, working), shard_gigabytes)
        shutil.rmtree(working)

    @torch.no_grad()
    def tensors(self, dense: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
        """dense: (Hugging Face name, tensor) of the whole model, in any order; gone over once, first of all.

        folder: for working files, which stay there. Raises UserError naming the layer whose numbers are bad.
        """
        numbers = sum(parameter.numel() for parameter in Block(self.config, 0, device="meta").parameters())
        write_shards(folder / "dense", dense, 4e-9 * numbers)  # holds a shard at a time: the size of a block
        weights = {name: tensor for _, name, tensor in stream_tensors(folder / "dense")}  # on disk until read
        layers = range(self.config.num_layers)
        inside = {self._hf_name(layer, name) for layer in layers for name in self.block_names}
        yield from ((name, tensor) for name, tensor in weights.items() if name not in inside)
        embedding = weights[to_hf_name(self.config, "embed_tokens.weight")]
        dtype = _compute_dtype(embedding.dtype)
        text = _Text(self.config, self.windows, folder / "activations", dtype, self.device)
        text.embed(embedding)
        linears, title = sum(len(names) for _, names in STAGES), f"GPTQ, {self.format.bits} bits"
        with Bar(total=len(layers) * linears, desc=title, unit=" linears", smoothing=0) as progress:
            for layer in layers:
                yield from self._block(layer, weights, text, progress)

    def _block(self, layer: int, weights: dict[str, Tensor], text: "_Text", progress) -> Iterator[tuple]:
        """The quantised tensors of one block, as `tensors`; the text moves on to the next one."""
        block = Block(self.config, layer, dtype=text.dtype, device="meta")
        values = {name: weights[self._hf_name(layer, name)] for name in self.block_names}
        moved = {name: value.to(text.device, text.dtype, copy=True) for name, value in values.items()}
        block.load_state_dict(moved, assign=True)
        weight_names = {f"{part}.{name}.weight" for part, names in STAGES for name in names}
        for name, value in values.items():
            if name not in weight_names:
                yield self._hf_name(layer, name), value
        for stage, (part, names) in enumerate(STAGES):
            linears = [block.get_submodule(f"{part}.{name}") for name in names]
            hessian = Hessian(linears[0].in_features, text.device)
            # one product with the inverse for all: rows of a weight do not know each other
            stacked = torch.cat([values[f"{part}.{name}.weight"].to(text.device) for name in names])
            place = self._hf_name(layer, f"{part}.{names[0]}.weight").removesuffix(f"{names[0]}.weight")
            with located(f"export_quantization_bit: {place}{'/'.join(names)}"):
                for x in text.inputs(block, stage):
                    hessian.add(x)
                integers = solve(stacked, hessian, self.options.solver)
            size, self.solved = max(integers.size, torch.finfo(torch.float32).tiny), self.solved + 1
            self.error += (integers.error / size - self.error) / self.solved
            self.rounded_error += (integers.rounded_error / size - self.rounded_error) / self.solved
            packed = self._packed(integers, [linear.out_features for linear in linears], text.dtype)
            for name, linear, one in zip(names, linears, packed):
                one.dequantize(out=linear.weight)
                for suffix, tensor in one.tensors().items():
                    yield self._hf_name(layer, f"{part}.{name}.{suffix}"), tensor
            progress.update(len(names))
        if layer + 1 < self.config.num_layers:
            text.leave(block)

    def _packed(self, integers: Integers, sizes: list[int], dtype: torch.dtype) -> list[GPTQLinear]:
        """The layers of linears that were solved together."""
        tensors = (integers.codes, integers.scales, integers.zeros)
        layers = []
        for part in zip(*(tensor.cpu().split(sizes) for tensor in tensors)):
            group_of = integers.group_of.cpu().clone()  # of its own: tensors of a file may not share memory
            layers.append(GPTQLinear.from_integers(self.format, *part, group_of, None, dtype).to(self.device))
        return layers

    def _hf_name(self, layer: int, name: str) -> str:
        return to_hf_name(self.config, f"layers.{layer}.{name}")


STAGES = (  # the block's linears in the order in which it computes; those of a line have one Hessian
    ("self_attn", ("q_proj",)),
    ("self_attn", ("k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
_KV = 1  # its linears get what q_proj gets
LAST = {"self_attn": "o_proj", "mlp": "down_proj"}  # of each half of a block


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the activations: bf16 for bf16 models, else fp32, since fp16 may overflow."""
    return dtype if dtype is torch.bfloat16 else torch.float32


def _inner_sizes(config: ModelConfig) -> dict[str, int]:
    """Numbers of what the last linear of each half of a block gets."""
    return {"self_attn": config.num_heads * config.head_dim, "mlp": config.intermediate_size}


class _Reached(Exception):
    """The computation has come to the linear whose input is wanted."""


class _Caught(LinearLayer):
    """In a linear's place: gives away what the linear would get."""

    def part(self) -> Part:
        return Part(None, layer=self)

    def forward(self, x: Tensor) -> Tensor:
        raise _Reached(x)


class _Stored(nn.Module):
    """In the place of attention or MLP: its last linear alone, of an input that is known already."""

    def __init__(self, linear: nn.Module, x: Tensor):
        super().__init__()
        self.linear, self.x = linear, x

    def forward(self, *row) -> Tensor:
        return self.linear(self.x)


class _Text:
    """The windows on their way through the blocks. Block.forward computes, whatever it is; what changes are
    the modules in it that have been passed (_Stored), and the one that the text goes up to (_Caught).

    stream (tokens, E): the residual stream before the block. inner: what the last linear of attention and of
    the MLP gets, once its stage has been reached. All lie in files.
    """

    def __init__(self, config: ModelConfig, windows: Tensor, folder: Path, dtype: torch.dtype, device: str):
        self.config, self.windows, self.dtype, self.device = config, windows, dtype, device
        self.skeleton = Decoder(config, device="meta")
        self.skeleton.runtime.compute_dtype = dtype
        folder.mkdir()
        tokens, sizes = windows.numel(), _inner_sizes(config)
        self.stream = _mapped(folder / "stream", tokens, config.hidden_size, dtype)
        self.inner = {half: _mapped(folder / half, tokens, size, dtype) for half, size in sizes.items()}

    def embed(self, embedding: Tensor) -> None:
        self.skeleton.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
        for rows, _ in self._batches():
            self.stream[rows] = self.skeleton.embed(self.windows.view(-1)[rows])

    def inputs(self, block: Block, stage: int) -> Iterator[Tensor]:
        """(T, in) batches of what the linears of a stage get when those before it are as they stand."""
        half, names = STAGES[stage]
        goal = f"{half}.{'q_proj' if stage == _KV else names[0]}"
        for rows, count in self._batches():
            x = self._run(block, rows, count, goal, *(["self_attn"] if half == "mlp" else []))
            if stage == _KV:
                x = x * self._received(block.self_attn, x, count).sqrt()[:, None].to(x.dtype)
            if names[0] == LAST[half]:
                self.inner[half][rows] = x.cpu()
            yield x

    def _received(self, attention: Attention, x: Tensor, count: int) -> Tensor:
        """(T,) fp32: how much of each token's value goes on: attention to it squared, over heads and queries.

        An error d of the value of token j is a_ij d in the output at i, so this is its weight among the
        tokens. Without it the first token, which many heads attend to most while they are at rest, counts as
        one among hundreds, and GPTQ puts the error where no other token shows it: there.
        """
        q, k, _ = attention.project(x, *self._place(count))  # (T, H, D), (T, K, D)
        length, group = self.windows.shape[1], q.shape[1] // k.shape[1]
        place = torch.arange(length, device=x.device)
        hidden = (place[:, None] < place) | (place[:, None] - place >= (attention.window or length))
        received = torch.zeros(count, length, device=x.device)
        for window, (queries, keys) in enumerate(zip(q.split(length), k.split(length))):
            for head in range(q.shape[1]):  # (L, L) at a time
                scores = matmul_transposed(queries[:, head], keys[:, head // group].contiguous()).float()
                shares = (scores * attention.scale).masked_fill_(hidden, -torch.inf).softmax(-1)
                received[window] += shares.square_().sum(0)
        return received.view(-1)

    def leave(self, block: Block) -> None:
        """The stream behind the block."""
        for rows, count in self._batches():
            self.stream[rows] = self._run(block, rows, count, None, *LAST).cpu()

    def _run(self, block: Block, rows: slice, count: int, goal: str | None, *passed: str) -> Tensor:
        """A batch through the block, the halves that were passed from their stored inputs: (T, E) behind it,
        or what the linear called `goal` gets."""
        places: dict[str, nn.Module] = {goal: _Caught()} if goal else {}
        for half in passed:
            known = self.inner[half][rows].to(self.device)
            places[half] = _Stored(block.get_submodule(f"{half}.{LAST[half]}"), known)
        before = {name: block.get_submodule(name) for name in places}
        for name, module in places.items():
            replace_module(block, name, module)
        try:
            x, delta = block(self.stream[rows].to(self.device), None, *self._place(count))
            return x + delta
        except _Reached as reached:
            return reached.args[0]
        finally:
            for name, module in before.items():
                replace_module(block, name, module)

    def _batches(self) -> Iterator[tuple[slice, int]]:
        """(rows of the files, windows) of each batch."""
        windows, length = self.windows.shape
        step = max(1, TOKENS_AT_ONCE // length)
        for first in range(0, windows, step):
            last = min(first + step, windows)
            yield slice(first * length, last * length), last - first

    def _place(self, count: int) -> tuple[Tensor, Tensor, ForwardContext]:
        """cos, sin and row for windows one behind the other."""
        length, device = self.windows.shape[1], self.device
        borders = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)
        row = ForwardContext(borders, length, None, self.skeleton.runtime.flash_attn, self.dtype)
        cos, sin = self.skeleton.rotation(torch.arange(length, device=device).repeat(count), row, self.dtype)
        return cos, sin, row


def _mapped(path: Path, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=rows * columns, dtype=dtype).view(rows, columns)
