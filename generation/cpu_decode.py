"""One token of one sequence through the decoder on a CPU, as a straight line of few operations.

At one token, a layer's matrices take 0.4 ms to read (135M model, fp32) and the modules' some forty small
operations as long as half of that. Here a layer is some twenty, over vectors instead of rows of one: the
products as embedding bags (kernels/linear.py), whose shares are summed together with the residual stream; one
rotation for q, k and v side by side (v turns by the angle 0) and one copy of k and v into the cache.
Quantised weights are read as bytes where the format has such a table (kernels/byte_linear.py), else they are
expanded once. With bytes everything but attention is in fp32: their sums are, and so no step rounds. An
adapter beside a quantised base is two small products more. Values are those of model.Decoder up to the order
of sums, and to the rounding that fp32 leaves out. It serves models whose switches it knows (KNOWN), and only
after a probe against the first block's own forward, which somebody may have changed (agrees).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from architectures.config import ModelConfig
from architectures.layers import ForwardContext
from generation.cache import KVCache
from kernels.byte_linear import ByteTable
from kernels.gated_mlp import ACTIVATIONS
from kernels.launch import say_once
from model import Decoder

# switches that are computed here, or that do not concern a block
KNOWN = {"hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"}
KNOWN |= {"norm_eps", "norm_offset", "activation", "qkv_bias", "out_bias", "mlp_bias", "sliding_windows"}
KNOWN |= {"vocab_size", "max_positions", "rope", "embedding_scale", "tied_head", "initializer_range", "hf"}
PROBE = 4  # tokens


class Adapter(NamedTuple):
    """The update beside a frozen product: x + up (down x)."""

    down: Tensor  # (R, in)
    up: Tensor  # (out, R), with the scale in it

    def add_to(self, result: Tensor, x: Tensor) -> Tensor:
        return result.addmv_(self.up, self.down.mv(x.to(self.down.dtype)))


class Product(NamedTuple):
    """One matrix as matvec_by_rows reads it."""

    table: Tensor  # (in, out)
    bias: Tensor | None  # (out,)
    rows: Tensor  # 0..in-1
    starts: Tensor  # where each thread's share of the rows begins
    adapter: Adapter | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (in,) -> (out,) in x's dtype."""
        return _finished(self, self._shares(x).sum(0), x).to(x.dtype)

    def added(self, x: Tensor, update: Tensor, ones: Tensor) -> Tensor:
        """x + product(update), (out,); ones (threads,) in the table's dtype."""
        if x.dtype is not self.table.dtype:
            return x + self(update)
        return _finished(self, torch.addmv(x, self._shares(update).mT, ones), update)

    def _shares(self, x: Tensor) -> Tensor:
        """(threads, out): what every thread's rows give; the product is their sum."""
        weights = x.to(self.table.dtype)
        return torch.embedding_bag(self.table, self.rows, self.starts, mode=0, per_sample_weights=weights)[0]


class ByteProduct(NamedTuple):
    """One matrix, or several with one input, in bytes; fp32 in and out."""

    table: ByteTable
    bias: Tensor | None  # (out,) fp32
    adapter: Adapter | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        return _finished(self, self.table(x), x)

    def added(self, x: Tensor, update: Tensor, ones: Tensor) -> Tensor:
        return self(update).add_(x)


def _finished(product: Product | ByteProduct, result: Tensor, x: Tensor) -> Tensor:
    if product.adapter is not None:
        result = product.adapter.add_to(result, x)
    return result if product.bias is None else result.add_(product.bias)


class Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Product | ByteProduct
    o: Product | ByteProduct
    mlp_norm: Tensor
    gate_up: Product | ByteProduct
    down: Product | ByteProduct
    window: int | None  # tokens


class OneRow:
    """The blocks of a decoder that was laid out for decoding (layout.py).

    dtype: of the model's activations. places: (module, name, layer that stood there): an adapter put around
    one since then must not be left out. adapters: those that were copied: if one changes or is switched off,
    the modules serve.
    """

    def __init__(self, layers: list[Layer], places, adapters, config: ModelConfig, dtype: torch.dtype):
        self.layers = layers
        self._places = [(module._modules, name, layer) for module, name, layer in places]
        self._adapters = [(layer, layer.lora_a._version, layer.lora_b._version) for layer in adapters]
        self.eps, self.size = config.norm_eps, config.head_dim
        self.queries, self.keys = config.num_heads, config.num_kv_heads
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.dtype = dtype
        parts = [part for layer in layers for part in layer]
        self.wide = any(isinstance(part, ByteProduct) for part in parts)  # whether the stream is fp32
        dense = [part for part in parts if isinstance(part, Product)]
        self.ones = torch.ones(dense[0].starts.shape[0], dtype=dense[0].table.dtype) if dense else None

    def serves(self, x: Tensor) -> bool:
        """Whether x (T, E) is one row in the model's dtype, and the decoder has the layers of the start."""
        if x.shape[0] > 1 or x.dtype is not self.dtype or torch.is_grad_enabled():
            return False
        for layer, a, b in self._adapters:
            if layer.lora_a._version != a or layer.lora_b._version != b or layer.off:
                return False
        return all(modules[name] is layer for modules, name, layer in self._places)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, storage: Tensor, filled: int) -> Tensor:
        """x (1, E), cos and sin (1, D/2), storage (layers, 2, 1, K, capacity, D) -> (1, E) before the norm.

        `filled` slots of storage are filled; the new keys and values go to the next one.
        """
        x = x[0]
        if self.wide:
            x, cos, sin = x.float(), cos.float(), sin.float()
        tables = self._tables(cos, sin)
        for layer, memory in zip(self.layers, storage.select(2, 0).unbind(0)):
            heads = layer.qkv(self._norm(x, layer.attention_norm)).view(-1, self.size)
            attended = self._attend(heads, tables, memory, filled, layer.window)
            x = layer.o.added(x, attended, self.ones)
            gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2)
            x = layer.down.added(x, self.activation(gate).mul_(up), self.ones)
        return x[None].to(self.dtype)

    def _tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (-sin, sin) for every head of q and k, 1 and 0 for those of v: (H + 2K, D) each."""
        turned, kept = (self.queries + self.keys, self.size), (self.keys, self.size)
        cosines = torch.cat((cos, cos), dim=1).expand(turned)
        sines = torch.cat((-sin, sin), dim=1).expand(turned)
        return torch.cat((cosines, cos.new_ones(kept))), torch.cat((sines, cos.new_zeros(kept)))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """rms_norm of one vector; the mean as a number of the host costs less than as a tensor."""
        wide = x.float()
        factor = 1.0 / math.sqrt(wide.dot(wide).item() / x.shape[0] + self.eps)
        return (wide * factor).to(x.dtype).mul_(weight)

    def _attend(self, heads: Tensor, tables, memory: Tensor, filled: int, window: int | None) -> Tensor:
        """heads (H + 2K, D) of q, k, v; memory (2, K, capacity, D) -> (H D,). Rotates, stores, attends."""
        cos, sin = tables
        heads = (heads * cos).addcmul_(heads.roll(self.size // 2, dims=1), sin)
        memory.select(2, filled).copy_(heads[self.queries :].view(2, self.keys, self.size))
        first = 0 if window is None else max(0, filled + 1 - window)
        keys, values = memory[:, :, first : filled + 1].split(1)  # (1, K, seen, D) each
        q = heads[: self.queries].to(memory.dtype)
        if q.dtype is torch.float32:
            q = q.view(1, self.queries, 1, self.size)
            gqa = self.queries != self.keys
            out = F.scaled_dot_product_attention(q, keys, values, scale=self.scale, enable_gqa=gqa)
        else:  # a group's heads as rows of one query: in bf16 torch's kernel is 2 to 4 times as fast with it
            q = q.view(1, self.keys, -1, self.size)
            out = F.scaled_dot_product_attention(q, keys, values, scale=self.scale)
        return out.reshape(-1)


def forward(model: Decoder, tokens: Tensor, positions, cu_seqlens, max_seqlen, cache: KVCache) -> Tensor:
    """model(tokens, positions, cu_seqlens, max_seqlen, cache), (T, E): by OneRow where that serves."""
    one_row = model.runtime.one_row
    if one_row is not None and tokens.shape[0] == 1:
        x = model.embed(tokens)  # (1, E)
        if one_row.serves(x):
            context = ForwardContext(cu_seqlens, max_seqlen, cache, model.runtime.flash_attn, x.dtype)
            cache.plan(context)
            cos, sin = model.rotation(positions, context, x.dtype)
            x = one_row(x, cos, sin, cache.storage, cache.lengths[0])
            cache.advance(context)
            return model.norm.of_sum(x, None, context.dtype)[0]
    return model(tokens, positions, cu_seqlens, max_seqlen, cache)


@torch.no_grad()
def agrees(model: Decoder, one_row: OneRow) -> bool:
    """Whether the straight line gives, for a token after others, what the first block's own forward gives up
    to the rounding of the dtype and of bytes: a model has to decode as it trains."""
    block, dtype = model.layers[0], model.compute_dtype
    cache, generator = KVCache(model.config, 1, PROBE, dtype), torch.Generator().manual_seed(0)
    rows = torch.randn(PROBE, model.config.hidden_size, generator=generator).to(dtype)
    for part in rows.split(PROBE - 1):
        filled, count = cache.lengths[0], len(part)
        borders = torch.tensor([0, count], dtype=torch.int32)
        context = ForwardContext(borders, count, cache, model.runtime.flash_attn, dtype)
        cache.plan(context)
        cos, sin = model.rotation(torch.arange(filled, filled + count), context, dtype)
        x, delta = block(part, None, cos, sin, context)
        cache.advance(context)
    off = one_row(rows[-1:], cos, sin, cache.storage[:1], filled) - (x + delta)
    rounds = one_row.wide or dtype is not torch.float32
    of_update, of_stream = (0.05, 2**-7) if rounds else (1e-3, 1e-5)
    same = bool(off.norm() <= of_update * delta.norm() + of_stream * x.norm())
    if not same:
        say_once("decoding: the short way for one token computes something else than a block; left out")
    return same
