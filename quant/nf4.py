"""NF4 and FP4: blocks of 64 weights as 4-bit codes and one scale.  Dettmers et al., arXiv 2305.14314.

w = table[code] * absmax[block], blocks along the flattened weight, two codes a byte with the first weight in
the high four bits. Double quantisation (sec. 3): the scales, less their mean, in 8 bits of a dynamic table
(arXiv 2110.02861, sec. 2.2) with one fp32 scale per 256, 4.127 bits a weight instead of 4.5. Codes, scales
and values are bit-equal to those of bitsandbytes' CPU build, whose checkpoint layout is read and written.

On a CPU both ways go by lookup, in chunks that stay in its cache: a byte of codes is a row of a table of
pairs of values; and a scaled weight's place among 131,072 equal cells of [-1, 1] gives its code, except in
and beside the 15 cells that a decision threshold falls into, where the thresholds themselves decide.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels.byte_linear import Bytes
from kernels.linear import Part
from kernels.nf4 import Codes
from options import json_reader
from options.errors import NOT_FINITE, UserError, refuse
from options.json_fields import NUMBER, Field, check
from quant.linear import Format, QuantLinear, Rows, name_of, refuse_others, take

BLOCK = 64  # weights to a scale
NESTED_BLOCK = 256  # scales to a scale of scales
NF4_LEVELS = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
TABLES = {
    "nf4": tuple(map(float, NF4_LEVELS.split())),
    "fp4": tuple(sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}
# For decoding on a CPU a level is a byte, round(level * factor + shift), with the factor and shift of the
# least error over the 16 levels: 0.25 % (nf4) and 0.23 % (fp4) of their root mean square; rounding weights to
# bf16 makes 0.17 %.
BYTE_LEVELS = {"nf4": (124.068, 0.16), "fp4": (120.0, 0.0)}
BYTE_ZERO = 127
STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
STATE = "weight.quant_state.bitsandbytes__"
CHUNK, CHUNK_GPU = 1 << 18, 1 << 23  # weights at a time: on a CPU a chunk and its scratch stay in its cache
CELLS, UNSURE = 1 << 17, 64
SMALLEST = 1e-38  # bitsandbytes divides by no scale below it


@dataclass(frozen=True)
class NF4Format(Format):
    """table: nf4 or fp4.  double: scales in 8 bits."""

    method: ClassVar[str] = "bitsandbytes"
    marker: ClassVar[str] = "weight.absmax"
    skip_key: ClassVar[str] = "llm_int8_skip_modules"
    table: str = "nf4"
    double: bool = True

    def quantise(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> "NF4Linear":
        codes, absmax = quantise_4bit(weight, self.table)
        scales = quantise_scales(absmax) if self.double else Scales(absmax)
        return NF4Linear(self, tuple(weight.shape), codes, scales, bias, dtype)

    def quantise_part(self, weight: Tensor, dtype: torch.dtype, rows: Rows) -> dict[str, Tensor]:
        # whole blocks, which may be one more than the rank's bytes of codes; all scales have one mean
        codes, blocks = (rows.of(size) for size in _sizes(weight.shape))
        first = min(codes.start * 2 // BLOCK, blocks.start)
        last = max(-(-codes.stop * 2 // BLOCK), blocks.stop)
        made, absmax = quantise_4bit(rows.read(weight.view(-1)[first * BLOCK : last * BLOCK]), self.table)
        skipped = first * BLOCK // 2
        parts = {"codes": made[codes.start - skipped : codes.stop - skipped]}
        parts["absmax"] = absmax[blocks.start - first : blocks.stop - first]
        if self.double:
            scales = quantise_scales(rows.joined(parts["absmax"], _sizes(weight.shape)[1]))
            whole = {"absmax": scales.absmax, "nested_absmax": scales.nested, "offset": scales.offset.view(1)}
            parts |= {name: tensor[rows.of(len(tensor))] for name, tensor in whole.items()}
        return parts

    def read(self, tensors, shape, bias, dtype) -> "NF4Linear":
        return read_layer(self, tensors, shape, bias, dtype)

    def config(self) -> dict:
        bits = {"quant_method": self.method, "load_in_4bit": True, "load_in_8bit": False}
        kind = {"bnb_4bit_quant_type": self.table, "bnb_4bit_use_double_quant": self.double}
        return bits | kind | {"bnb_4bit_quant_storage": "uint8"}

    def config_for(self, dtype: torch.dtype, *linears: list[str]) -> dict:
        return super().config_for(dtype, *linears) | {"bnb_4bit_compute_dtype": name_of(dtype)}

    def describe(self) -> str:
        return f"{self.table}{', double quantisation' if self.double else ''}"


def _sizes(shape: tuple[int, int]) -> tuple[int, int]:
    """(bytes of codes, blocks) of a weight."""
    count = math.prod(shape)
    return (count + 1) // 2, -(-count // BLOCK)


def from_config(settings: dict) -> NF4Format:
    """The format of a checkpoint's quantization_config. Raises UserError starting with the key."""
    table = settings.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    if not isinstance(table, str) or table not in TABLES:
        raise UserError(f"bnb_4bit_quant_type {table!r} is not one of nf4, fp4")
    return NF4Format(table, bool(settings.get("bnb_4bit_use_double_quant")))


class Scales(NamedTuple):
    """Scales of blocks, in fp32 or in 8 bits: absmax[i] = map[codes[i]] * nested[i // 256] + offset."""

    absmax: Tensor  # (blocks,) fp32, or the codes, uint8
    nested: Tensor | None = None  # (ceil(blocks / 256),) fp32
    offset: Tensor | None = None  # () fp32, the mean of all scales
    map: bytes | None = None  # 256 fp32


class NF4Linear(QuantLinear):
    """A linear layer in 4 bits.

    codes          (ceil(out * in / 2),) uint8
    absmax         (blocks,) fp32, or uint8 with double quantisation; blocks = ceil(out * in / 64)
    nested_absmax  (ceil(blocks / 256),) fp32, None without double quantisation
    offset         () fp32, None without
    nested_map     the 256 fp32 that 8-bit scales point into, as bytes; layers with the same one share it
    """

    def __init__(self, format: NF4Format, shape: tuple[int, int], codes: Tensor, scales: Scales, bias, dtype):
        buffers = {"absmax": scales.absmax, "nested_absmax": scales.nested, "offset": scales.offset}
        super().__init__(format, shape, bias, dtype, codes=codes, **buffers)
        self.nested_map = scales.map

    def scales(self) -> Tensor:
        """(blocks,) fp32."""
        return dense_scales(Scales(self.absmax, self.nested_absmax, self.offset, self.nested_map))

    def for_kernels(self) -> Codes:
        """What the kernels take of this layer."""
        table = table_tensor(self.format.table, self.codes.device)
        if self.nested_map is None:
            return Codes(self.codes, self.absmax, table)
        numbers = map_tensor(self.nested_map, self.codes.device)
        return Codes(self.codes, self.absmax, table, self.nested_absmax, numbers, self.offset)

    def from_codes(self, x: Tensor, parts: list[Part]) -> list[Tensor] | None:
        known = [part._replace(weight=part.weight.for_kernels()) for part in parts]
        return kernels.small_batch_4bit(x, known)

    def fill(self, out: Tensor) -> None:
        if kernels.dequantise_4bit(self.for_kernels(), out):
            return
        if out.is_contiguous():
            dequantise_by_pairs(self.codes, self.scales(), self.format.table, out.view(-1))
        else:
            out.copy_(self.dequantize(out.dtype))

    def bytes_for_decoding(self, dtype: torch.dtype) -> Bytes | None:
        if dtype is not torch.bfloat16 or self.in_features % BLOCK:
            return None
        factor, shift = BYTE_LEVELS[self.format.table]
        levels = (table_tensor(self.format.table, self.codes.device) * factor + shift).round_() + BYTE_ZERO
        pairs = torch.cartesian_prod(levels, levels).to(torch.uint8).view(torch.int16).flatten()  # (256,)
        codes = pairs[self.codes.int()].view(torch.uint8).view(self.out_features, self.in_features)
        scales = self.scales().view(self.out_features, -1) / factor
        return Bytes(codes.T, BYTE_ZERO + shift, scales.T)

    def tensors(self) -> dict[str, Tensor]:
        table = table_tensor(self.format.table, self.codes.device)
        state = {"quant_type": self.format.table, "blocksize": BLOCK, "dtype": name_of(self.dtype)}
        state["shape"] = [self.out_features, self.in_features]
        parts = {"weight": self.codes[:, None], "weight.absmax": self.absmax}
        parts["weight.quant_map"] = table.clone()
        if self.nested_map is not None:
            parts["weight.nested_absmax"] = self.nested_absmax
            parts["weight.nested_quant_map"] = map_tensor(self.nested_map, self.codes.device).clone()
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
            state["nested_offset"] = self.offset.item()
        packed = json.dumps(state).encode("utf-8")
        parts[f"{STATE}{self.format.table}"] = torch.tensor(list(packed), dtype=torch.uint8, device="cpu")
        return parts


# Quantising


def quantise_4bit(weight: Tensor, table: str) -> tuple[Tensor, Tensor]:
    """weight -> codes (ceil(numel / 2),) uint8, the entry of the table nearest to each weight, and absmax
    (blocks,) fp32. Raises UserError if a weight is not finite."""
    flat, count, device = weight.reshape(-1), weight.numel(), weight.device
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=device)
    for start, end in _chunks(count, device):
        whole = (end - start) % BLOCK == 0
        blocks = flat[start:end].float().view(-1, BLOCK if whole else end - start)
        scales = blocks.abs().amax(1, keepdim=True)
        refuse(not torch.isfinite(scales).all(), f"the weight {NOT_FINITE}")
        if not whole:  # there bitsandbytes divides, which may round differently
            scales.clamp_(min=SMALLEST)
            nearest = _nearest(torch.nn.functional.pad(blocks / scales, (0, blocks.numel() % 2)), table)
        else:
            scaled = blocks * (1.0 / scales.clamp(min=SMALLEST))
            nearest = _nearest_by_lookup(scaled, table) if device.type == "cpu" else _nearest(scaled, table)
        absmax[start // BLOCK : -(-end // BLOCK)] = scales.view(-1)
        pairs = nearest.view(-1).view(torch.int16)  # the first weight of two is the low byte
        codes[start // 2 : (end + 1) // 2] = (pairs << 4) | (pairs >> 8)
    return codes, absmax


def _chunks(count: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of whole blocks, and last of the block that is not whole."""
    size, whole = CHUNK if device.type == "cpu" else CHUNK_GPU, count - count % BLOCK
    for start in range(0, whole, size):
        yield start, min(start + size, whole)
    if whole < count:
        yield whole, count


def _nearest(scaled: Tensor, table: str) -> Tensor:
    """scaled fp32 -> codes uint8; half-way between two levels the lower one."""
    thresholds, order = _thresholds(table, scaled.device)
    return order[torch.bucketize(scaled.clamp(-1, 1), thresholds, out_int32=True)]


def _nearest_by_lookup(scaled: Tensor, table: str) -> Tensor:
    """The same of contiguous scaled (n, 64) -> (n * 64,)."""
    cells = torch.add(torch.tensor(CELLS / 2, device="cpu"), scaled, alpha=CELLS // 2).to(torch.int32)
    codes = _cell_codes(table).index_select(0, cells.view(-1))
    eights = codes.view(torch.int64)  # an unsure code among eight is found faster than one by one
    unsure = (eights & (UNSURE * 0x0101010101010101)).nonzero().view(-1)
    if len(unsure):
        eights[unsure] = _nearest(scaled.view(-1, 8)[unsure], table).view(torch.int64).view(-1)
    return codes


@lru_cache
def _thresholds(table: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Means of neighbouring levels (15,) fp32, and the codes of the levels as they rise (16,) uint8."""
    levels, order = table_tensor(table, device).sort(stable=True)
    return (levels[:-1] + levels[1:]) / 2, order.to(torch.uint8)


@lru_cache
def _cell_codes(table: str) -> Tensor:
    """The code of each cell (CELLS + 1,) uint8; UNSURE where a threshold falls into it or a neighbour of it:
    a cell is found with a rounding that depends on the processor."""
    thresholds, order = _thresholds(table, torch.device("cpu"))
    split = (thresholds * (CELLS / 2) + CELLS / 2).to(torch.int32)
    codes = order[torch.bucketize(torch.arange(CELLS + 1, dtype=torch.int32, device="cpu"), split)]
    codes[split[:, None] + torch.arange(-1, 2, device="cpu")] = UNSURE
    return codes


def quantise_scales(absmax: Tensor) -> Scales:
    """absmax (blocks,) fp32 -> in 8 bits. The lookup is that of bitsandbytes' CPU build: of 65,536 places in
    -1..1 each has the entry of the dynamic table that is nearest to it."""
    offset = absmax.mean()
    rest = absmax - offset
    blocks = torch.nn.functional.pad(rest, (0, -len(rest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / nested)[:, None]).clamp_(-1, 1)
    places = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(torch.int32).clamp_(0, 65535)
    places[nested == 0] = 0  # no scale, 0 * inf above: code 0
    codes = _place_codes(absmax.device).index_select(0, places.view(-1))[: len(rest)]
    return Scales(codes, nested, offset, dynamic_map())


@lru_cache
def _place_codes(device: torch.device) -> Tensor:
    table = map_tensor(dynamic_map(), device)
    places = torch.arange(65536, device=device).float() / 65535.0 * 2.0 - 1.0
    return torch.bucketize(places, (table[:-1] + table[1:]) / 2).to(torch.uint8)


@lru_cache
def dynamic_map() -> bytes:
    """The 256 numbers of the signed dynamic 8-bit type: seven decades below 1, with 1, 2, 4, ... 64 numbers
    each in the middle of equal parts of 0.1..1 and their negatives; 0 and 1."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1):
            numbers += (sign * 10 ** (decade - 6) * middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32, device="cpu").numpy().tobytes()


# Back to numbers


def dense_scales(scales: Scales) -> Tensor:
    """(blocks,) fp32."""
    if scales.map is None:
        return scales.absmax
    values = map_tensor(scales.map, scales.absmax.device).index_select(0, scales.absmax.int())
    whole = len(values) - len(values) % NESTED_BLOCK
    values[:whole].view(-1, NESTED_BLOCK).mul_(scales.nested[: whole // NESTED_BLOCK, None])
    values[whole:].mul_(scales.nested[whole // NESTED_BLOCK :])  # one number, or none
    return values.add_(scales.offset)


def dequantise_by_pairs(codes: Tensor, absmax: Tensor, table: str, out: Tensor) -> None:
    """out (N,) = table[codes] * absmax in fp32, rounded to its dtype; codes (ceil(N / 2),), absmax (blocks,).

    What serves where no kernel does, on a CPU above all (kernels/nf4.dequantise_reference is its plain form).
    """
    pairs, device = _pairs(table, codes.device), codes.device
    size = min(CHUNK if device.type == "cpu" else CHUNK_GPU, 2 * len(codes)) // 2
    scratch = torch.empty(size, dtype=torch.float64, device=device)
    places = torch.empty(size, dtype=torch.int32, device=device)
    for start, end in _chunks(len(out), device):
        count = (end - start + 1) // 2
        index = places[:count].copy_(codes[start // 2 : (end + 1) // 2])
        values = torch.index_select(pairs, 0, index, out=scratch[:count]).view(torch.float32)[: end - start]
        scales = absmax[start // BLOCK : -(-end // BLOCK), None]
        values = values.view(len(scales), -1).mul_(scales)
        out[start:end].view_as(values).copy_(values)


@lru_cache
def table_tensor(table: str, device: torch.device) -> Tensor:
    """(16,) fp32."""
    return torch.tensor(TABLES[table], dtype=torch.float32, device=device)


@lru_cache
def map_tensor(numbers: bytes, device: torch.device) -> Tensor:
    """(256,) fp32, one for all layers with these numbers on this device."""
    return torch.frombuffer(bytearray(numbers), dtype=torch.float32).to(device)


@lru_cache
def _pairs(table: str, device: torch.device) -> Tensor:
    """The two values of each byte of codes (256,), side by side as if one fp64: one lookup for both."""
    levels = table_tensor(table, device)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1).view(torch.float64).view(-1)


# Checkpoints


def read_layer(format: NF4Format, tensors, shape, bias, dtype) -> NF4Linear:
    """Format.read for bitsandbytes' files, whose tensors decide the table and double quantisation."""
    size, blocks = _sizes(shape)
    states = [name for name in tensors if name.startswith(STATE)]
    if len(states) != 1 or states[0].removeprefix(STATE) not in TABLES:
        found = ", ".join(states) or "none"
        raise UserError(f"{STATE}nf4 or ...fp4: found {found}, expected one; the checkpoint is incomplete")
    state, table = _read_state(states[0], tensors[states[0]], shape), states[0].removeprefix(STATE)
    refuse("weight" not in tensors, "weight is missing; the checkpoint is incomplete, fetch it again")
    codes = _read_codes(tensors["weight"], size)
    found = take(tensors, "weight.quant_map", (16,), torch.float32)
    if not torch.allclose(found, table_tensor(table, found.device), rtol=0, atol=1e-6):
        raise UserError(f"weight.quant_map holds other levels than those of {table}")
    double = "weight.absmax" in tensors and tensors["weight.absmax"].dtype is torch.uint8
    absmax = take(tensors, "weight.absmax", (blocks,), torch.uint8 if double else torch.float32)
    known, scales = ["weight", states[0], "weight.quant_map", "weight.absmax"], Scales(absmax)
    if double:
        nested = take(tensors, "weight.nested_absmax", (-(-blocks // NESTED_BLOCK),), torch.float32)
        numbers = take(tensors, "weight.nested_quant_map", (256,), torch.float32)
        if "nested_offset" not in state:
            raise UserError(f"{states[0]}: nested_offset is missing, which scales in 8 bits need")
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
        scales = Scales(absmax, nested, offset, numbers.numpy().tobytes())
        known += ["weight.nested_absmax", "weight.nested_quant_map"]
    refuse_others(tensors, known)
    return NF4Linear(replace(format, table=table, double=double), shape, codes, scales, bias, dtype)


def _read_codes(weight: Tensor, size: int) -> Tensor:
    """The codes (size,) uint8, whatever dtype they are stored in (bnb_4bit_quant_storage)."""
    found = f"{name_of(weight.dtype)} {tuple(weight.shape)}"
    wanted = f"{size} bytes of codes, two weights each"
    refuse(weight.dtype not in STORAGE, f"weight is {found}, expected {wanted}")
    codes = weight.reshape(-1).view(torch.uint8)
    if len(codes) != size:
        raise UserError(f"weight is {found}: {len(codes)} bytes; config.json asks for {wanted}")
    return codes


def _read_state(name: str, packed: Tensor, shape: tuple[int, int]) -> dict:
    """The settings that bitsandbytes stores as JSON in a tensor of bytes."""
    if packed.dtype is not torch.uint8 or packed.dim() != 1:
        raise UserError(f"{name} is {packed.dtype} {tuple(packed.shape)}, expected the bytes of JSON")
    damaged = "the file is damaged, fetch it again"
    state = json_reader.parse(packed.numpy().tobytes(), name, way_out=damaged)
    expected = {"quant_type": name.removeprefix(STATE), "blocksize": BLOCK, "shape": list(shape)}
    if "nested_blocksize" in state:
        expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for key, value in expected.items():
        if state.get(key) != value:
            raise UserError(f"{name}: {key} is {state.get(key)!r}; only {value!r} fits here")
    if "nested_blocksize" in state:
        check({"nested_offset": state.get("nested_offset")}, {"nested_offset": Field(NUMBER)}, f"{name}: ")
    return state
