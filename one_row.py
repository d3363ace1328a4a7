"""One token of one sequence through the decoder on a CPU, as a straight line of few operations.

At one token, a layer's matrices take 0.4 ms to read (135M model, fp32) and the modules' some forty small operations
as long as half of that. Here a layer is some twenty, over vectors instead of rows of one:
    the products as embedding bags (kernels/linear.py), whose shares are summed together with the residual stream,
    one rotation for q, k and v side by side (v turns by the angle 0) and one copy of k and v into the cache.
Values are those of model.Decoder up to the order of sums.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_mlp import ACTIVATIONS


class Product(NamedTuple):
    """One matrix as matvec_by_rows reads it."""

    table: Tensor  # (in, out)
    bias: Tensor | None  # (out,)
    rows: Tensor  # 0..in-1
    starts: Tensor  # where each thread's share of the rows begins

    def shares(self, x: Tensor) -> Tensor:
        """x (in,) -> (threads, out): what every thread's rows give; the product is their sum."""
        return torch.embedding_bag(self.table, self.rows, self.starts, mode=0, per_sample_weights=x)[0]


class Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Product
    o: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product
    window: int | None  # tokens


class OneRow:
    """The blocks of a decoder that was laid out for decoding (model.lay_out_for_decoding).

    places: (module, name, layer that stood there): an adapter put around one since then must not be left out.
    """

    def __init__(self, layers: list[Layer], places: list[tuple[nn.Module, str, nn.Module]], config):
        self.layers = layers
        self._places = [(module._modules, name, layer) for module, name, layer in places]
        self.eps, self.size = config.norm_eps, config.head_dim
        self.queries, self.keys = config.num_heads, config.num_kv_heads
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.ones = torch.ones(layers[0].qkv.starts.shape[0], dtype=layers[0].qkv.table.dtype)

    def serves(self, x: Tensor) -> bool:
        """Whether x (T, E) is one row in the weights' dtype, and the decoder still has the layers of the start."""
        fits = x.shape[0] == 1 and x.dtype is self.ones.dtype and not torch.is_grad_enabled()
        return fits and all(modules[name] is layer for modules, name, layer in self._places)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, storage: Tensor, filled: int) -> Tensor:
        """x (1, E), cos and sin (1, D/2), storage (layers, 2, 1, K, capacity, D) with `filled` slots -> (1, E).

        The new keys and values go to slot `filled`. The final norm is left to the caller.
        """
        tables = self._tables(cos, sin)
        x = x[0]
        for layer, memory in zip(self.layers, storage.select(2, 0).unbind(0)):
            heads = self._sum(layer.qkv, self._norm(x, layer.attention_norm)).view(-1, self.size)
            attended = self._attend(heads, tables, memory, filled, layer.window)
            x = self._add(x, layer.o, attended)
            gate, up = self._sum(layer.gate_up, self._norm(x, layer.mlp_norm)).chunk(2)
            x = self._add(x, layer.down, self.activation(gate).mul_(up))
        return x[None]

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

    def _sum(self, product: Product, x: Tensor) -> Tensor:
        result = product.shares(x).sum(0)
        return result if product.bias is None else result.add_(product.bias)

    def _add(self, x: Tensor, product: Product, update: Tensor) -> Tensor:
        """x + product(update), (E,)."""
        x = torch.addmv(x, product.shares(update).mT, self.ones)
        return x if product.bias is None else x.add_(product.bias)

    def _attend(self, heads: Tensor, tables, memory: Tensor, filled: int, window: int | None) -> Tensor:
        """heads (H + 2K, D) of q, k, v; memory (2, K, capacity, D) -> (H D,). Rotates, stores, attends."""
        cos, sin = tables
        heads = (heads * cos).addcmul_(heads.roll(self.size // 2, dims=1), sin)
        memory.select(2, filled).copy_(heads[self.queries :].view(2, self.keys, self.size))
        first = 0 if window is None else max(0, filled + 1 - window)
        keys, values = memory[:, :, first : filled + 1].split(1)  # (1, K, seen, D) each
        q = heads[: self.queries]
        if q.dtype is torch.float32:
            q = q.view(1, self.queries, 1, self.size)
            gqa = self.queries != self.keys
            out = F.scaled_dot_product_attention(q, keys, values, scale=self.scale, enable_gqa=gqa)
        else:  # a group's heads as rows of one query: in bf16 torch's kernel is 2 to 4 times as fast with it
            q = q.view(1, self.keys, -1, self.size)
            out = F.scaled_dot_product_attention(q, keys, values, scale=self.scale)
        return out.reshape(-1)
