"""Keys and values of what came before: the memory of decoding."""

import torch
from torch import Tensor

import kernels
from architectures.config import ModelConfig
from architectures.layers import ForwardContext
from kernels.decode_attention import MAX_NEW


class KVCache:
    """Keys and values of several sequences. `lengths` are host ints: how much of each is filled.

    kept: what others made for this memory (captured steps, cuda_graph.py); forgotten when the cache moves.
    """

    def __init__(self, config: ModelConfig, sequences: int, capacity: int, dtype=torch.float32, device="cpu"):
        shape = (config.num_layers, 2, sequences, config.num_kv_heads, capacity, config.head_dim)
        self.lengths = [0] * sequences
        self._hold(torch.zeros(shape, dtype=dtype, device=device))  # zeros: a masked NaN is still a NaN
        self.on_device = self.storage.device.type != "cpu"  # whether kernels are told the lengths by a tensor

    def _hold(self, storage: Tensor) -> None:
        self.storage, self.kept = storage, {}
        self.capacity = storage.shape[-2]  # tokens per sequence
        self._look()

    def _look(self) -> None:
        rows = self.storage[:, :, : len(self.lengths)]
        self.layers = [tuple(layer.unbind(0)) for layer in rows]  # (keys, values) of each, made once

    def restart(self, sequences: int) -> None:
        """Empty, for this many sequences; the memory stays if it is enough for them."""
        self.lengths = [0] * sequences
        layers, two, rows, *rest = self.storage.shape
        if sequences > rows:
            self._hold(self.storage.new_zeros((layers, two, sequences, *rest)))
        self._look()

    def plan(self, context: ForwardContext) -> None:
        """Tell the row where its new tokens go. `filled`: on a GPU, the lengths once they are stored."""
        borders = context.cu_seqlens.tolist()
        if len(borders) - 1 != len(self.lengths):
            raise ValueError(f"cache: {len(self.lengths)} sequences, but {len(borders) - 1} segments")
        lengths = [filled + stop - start for filled, start, stop in zip(self.lengths, borders, borders[1:])]
        if max(lengths) > self.capacity:
            raise ValueError(f"cache: {max(lengths)} tokens do not fit its capacity of {self.capacity}")
        context.borders, context.lengths, context.is_whole = borders, lengths, not any(self.lengths)
        if self.on_device:
            context.filled = torch.tensor(lengths, dtype=torch.int32, device=self.storage.device)

    def attend(self, layer: int, q, k, v, context: ForwardContext, window, scale: float) -> Tensor:
        """Store k, v (T, K, D) of one layer, then attention of q (T, H, D) against everything stored."""
        keys, values = self.layers[layer]
        if context.filled is not None:
            kernels.store_in_cache(k, v, keys, values, context.cu_seqlens, context.filled, context.max_seqlen)
        else:
            self.append(layer, k, v, context.borders)
        if context.is_whole:  # the cache was empty, so the row holds all there is
            borders = context.cu_seqlens, context.max_seqlen
            return kernels.attention(q, k, v, *borders, window, scale, flash_attn=context.flash_attn)
        if context.filled is not None and context.max_seqlen <= MAX_NEW:
            new = context.cu_seqlens, context.filled, context.max_seqlen
            return kernels.decode_attention(q, keys, values, *new, window, scale)
        return kernels.cached_attention(q, keys, values, context.borders, context.lengths, window, scale)

    def advance(self, context: ForwardContext) -> None:
        """All layers have stored the row's tokens."""
        self.lengths = context.lengths

    def append(self, layer: int, k: Tensor, v: Tensor, borders: list[int]) -> None:
        """Store the new k, v (T, K, D) of one layer behind each sequence's filled part."""
        keys, values = self.layers[layer]
        if k.shape[0] == len(self.lengths) and borders[-1] == len(self.lengths):  # one new token each
            if len(set(self.lengths)) == 1:  # all at the same place: two copies serve every sequence
                keys.select(2, self.lengths[0]).copy_(k)
                values.select(2, self.lengths[0]).copy_(v)
            else:
                sequence = torch.arange(len(self.lengths), device=k.device)
                place = torch.tensor(self.lengths, device=k.device)
                keys[sequence, :, place] = k
                values[sequence, :, place] = v
            return
        for i, place in enumerate(self.lengths):
            start, stop = borders[i], borders[i + 1]
            keys[i, :, place : place + stop - start] = k[start:stop].transpose(0, 1)
            values[i, :, place : place + stop - start] = v[start:stop].transpose(0, 1)

    def reserve(self, capacity: int) -> None:
        """Make room for this many tokens per sequence; at least half as much again, so growing stays rare."""
        if capacity <= self.capacity:
            return
        grown = max(capacity, self.capacity + self.capacity // 2)
        rows = self.storage[:, :, : len(self.lengths)]
        storage = rows.new_zeros((*rows.shape[:4], grown, rows.shape[5]))
        storage[..., : self.capacity, :] = rows
        self._hold(storage)

    def drop(self, sequence: int) -> None:
        """Forget one sequence. The last one takes its place, so at most one sequence is copied."""
        *lengths, filled = self.lengths
        if sequence < len(lengths):
            self.storage[:, :, sequence, :, :filled] = self.storage[:, :, len(lengths), :, :filled]
            lengths[sequence] = filled
        self.lengths = lengths
        self._look()
