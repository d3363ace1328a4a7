"""The decoder: one class, driven by the switches of ModelConfig, over flat rows of tokens.

Shape letters: T tokens of a packed row, N segments in it, E hidden, H query heads, K key/value heads, D head
size, F MLP size, V vocabulary. A row holds N segments one after the other; `cu_seqlens` are their N+1
borders, `positions` restart at 0 in each, and attention never crosses a border. So there is no padding and no
mask.

The heads are applied by whoever needs them (loss on some rows, logits of the last token), so (T, V) logits
never exist unless somebody asks. Weight names are Hugging Face's for Llama without the leading "model.".

    model = checkpoint.load_model("models/SmolLM2-135M-Instruct")
    hidden = model(tokens, positions, cu_seqlens, max_seqlen)   # (T, E)
    logits = model.logits(hidden)                               # (T, V)
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

import kernels
from architectures.config import ModelConfig, Rope
from generation.cpu_decode import Adapter, ByteProduct, Layer, OneRow, Product
from kernels import recompute


class Linear(nn.Linear):
    """nn.Linear that casts its weight to the input's dtype where it is used: fp32 masters under bf16
    compute."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, dtype=None, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return recompute.cheap(kernels.rms_norm, x, self.weight, self.eps)

    def of_sum(self, x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x, delta (T, E) -> the norm of x + delta in `dtype`, and x + delta: one kernel on a GPU. delta
        None: nothing to add."""
        normed, total = kernels.add_rms_norm(x, delta, self.weight, self.eps, dtype=dtype)
        return recompute.remember(normed, kernels.rms_norm, total, self.weight, self.eps, 0.0, dtype), total


class KVCache:
    """Keys and values of several sequences, for decoding. `lengths` are host ints: how much of each is
    filled.

    kept: what others made for this memory (captured steps, token_steps.py); forgotten when the cache moves.
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

    def plan(self, row: "ForwardContext") -> None:
        """Tell the row where its new tokens go. `filled`: on a GPU, the lengths once they are stored."""
        borders = row.cu_seqlens.tolist()
        if len(borders) - 1 != len(self.lengths):
            raise ValueError(
                f"cache: {len(self.lengths)} sequences, but the row has {len(borders) - 1} segments"
            )
        lengths = [filled + stop - start for filled, start, stop in zip(self.lengths, borders, borders[1:])]
        if max(lengths) > self.capacity:
            raise ValueError(f"cache: {max(lengths)} tokens do not fit its capacity of {self.capacity}")
        row.borders, row.lengths, row.is_whole = borders, lengths, not any(self.lengths)
        if self.on_device:
            row.filled = torch.tensor(lengths, dtype=torch.int32, device=self.storage.device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, row: "ForwardContext", window, scale: float
    ) -> Tensor:
        """Store k, v (T, K, D) of one layer, then attention of q (T, H, D) against everything stored."""
        keys, values = self.layers[layer]
        if row.filled is not None:
            kernels.store_in_cache(k, v, keys, values, row.cu_seqlens, row.filled, row.max_seqlen)
        else:
            self.append(layer, k, v, row.borders)
        if row.is_whole:  # the cache was empty, so the row holds all there is
            chosen = row.flash_attn
            return kernels.attention(
                q, k, v, row.cu_seqlens, row.max_seqlen, window, scale, flash_attn=chosen
            )
        if row.filled is not None and row.max_seqlen <= kernels.MAX_NEW:
            return kernels.decode_attention(
                q, keys, values, row.cu_seqlens, row.filled, row.max_seqlen, window, scale
            )
        return kernels.cached_attention(q, keys, values, row.borders, row.lengths, window, scale)

    def advance(self, row: "ForwardContext") -> None:
        """All layers have stored the row's tokens."""
        self.lengths = row.lengths

    def append(self, layer: int, k: Tensor, v: Tensor, borders: list[int]) -> None:
        """Store the new k, v (T, K, D) of one layer behind each sequence's filled part."""
        keys, values = self.layers[layer]
        if k.shape[0] == len(self.lengths) and borders[-1] == len(self.lengths):  # one new token each
            if len(set(self.lengths)) == 1:  # all at the same place: two copies serve every sequence
                place = self.lengths[0]
                keys.select(2, place).copy_(k)
                values.select(2, place).copy_(v)
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
        """Make room for this many tokens per sequence; at least half as much again is added, so growing stays
        rare."""
        if capacity <= self.capacity:
            return
        grown = max(capacity, self.capacity + self.capacity // 2)
        rows = self.storage[:, :, : len(self.lengths)]
        storage = rows.new_zeros((*rows.shape[:4], grown, rows.shape[5]))
        storage[..., : self.capacity, :] = rows
        self._hold(storage)

    def drop(self, sequence: int) -> None:
        """Forget one sequence. The last one takes its place, so at most one sequence is copied."""
        last = len(self.lengths) - 1
        if sequence != last:
            filled = self.lengths[last]
            self.storage[:, :, sequence, :, :filled] = self.storage[:, :, last, :, :filled]
        lengths = list(self.lengths)
        lengths[sequence] = lengths[last]
        self.lengths = lengths[:last]
        self._look()


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # what Joined joins


class Joined:
    """Linears with one input, as one product for decoding: (T, in) -> one (T, sum of out).

    The weights become views of one table. On a CPU that is (in, sum of out): the layout in which a processor
    reads the weights of a one-row product at full memory speed (kernels/linear.py). A GPU keeps (sum of out,
    in) and gains fewer, larger kernels. Names, shapes and values stay, nothing is held twice.
    """

    def __init__(self, parts: list[Linear]):
        self.parts = parts
        self.sizes = [part.out_features for part in parts]
        with torch.no_grad():
            if parts[0].weight.device.type == "cpu":
                table = torch.cat([part.weight.T for part in parts], dim=1).contiguous()  # (in, sum of out)
                self.weight = table.T
            else:
                self.weight = torch.cat([part.weight for part in parts])
            for part, rows in zip(parts, self.weight.split(self.sizes)):
                part.weight = nn.Parameter(rows, requires_grad=part.weight.requires_grad)
            self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])

    def serve(self, owner: nn.Module, names: tuple[str, ...]) -> bool:
        """Whether the owner still has the layers that were joined: an adapter may have been put around one
        since."""
        children = owner._modules  # a plain dict: this is asked in every layer of every step
        return all(children[name] is part for name, part in zip(names, self.parts))

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


def project_together(x: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """[layer(x) for layer in layers]. A kind of layer that gains from one input for several (an adapter: it
    saves and reads x once) says so by a static method `fused(x, layers)`, which then does it; its results
    are the same."""
    for layer in layers:
        fused = getattr(type(layer), "fused", None)
        if fused is not None:
            return fused(x, layers)
    return [layer(x) for layer in layers]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, **factory):
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_heads * size, bias=config.qkv_bias, **factory)
        self.k_proj = Linear(hidden, config.num_kv_heads * size, bias=config.qkv_bias, **factory)
        self.v_proj = Linear(hidden, config.num_kv_heads * size, bias=config.qkv_bias, **factory)
        self.o_proj = Linear(config.num_heads * size, hidden, bias=config.out_bias, **factory)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.norm_eps, **factory)
            self.k_norm = RMSNorm(size, config.norm_eps, **factory)
        self.head_dim = size
        self.qk_norm = config.qk_norm
        self.scale = 1.0 / math.sqrt(size)
        self.window = config.sliding_windows[layer]
        self.layer = layer
        self.joined: Joined | None = None

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, row: "ForwardContext"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, E) -> q (T, H, D), k and v (T, K, D), q and k normalised and rotated."""
        if self.joined is not None and self.joined.serve(self, _QKV):
            heads = self.joined(x).view(x.shape[0], -1, self.head_dim)  # (T, H + 2K, D)
            queries, keys, _ = (size // self.head_dim for size in self.joined.sizes)
            if (
                row.tables is not None and not self.qk_norm
            ):  # q and k stand side by side: one rotation for both
                v = heads.narrow(1, queries + keys, keys)
                heads = kernels.rotate(heads.narrow(1, 0, queries + keys), *row.tables)
                return heads.narrow(1, 0, queries), heads.narrow(1, queries, keys), v
            q, k, v = heads.split([queries, keys, keys], dim=1)
        else:
            heads = project_together(x, [self.q_proj, self.k_proj, self.v_proj])
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return *kernels.rope(q, k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, row: "ForwardContext") -> Tensor:
        q, k, v = self.project(x, cos, sin, row)
        if row.cache is None:
            out = kernels.attention(
                q, k, v, row.cu_seqlens, row.max_seqlen, self.window, self.scale, flash_attn=row.flash_attn
            )
        else:
            out = row.cache.attend(self.layer, q, k, v, row, self.window, self.scale)
        return self.o_proj(out.flatten(-2))  # (T, H, D) -> (T, E)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, **factory):
        super().__init__()
        hidden, size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, size, bias=bias, **factory)
        self.up_proj = Linear(hidden, size, bias=bias, **factory)
        self.down_proj = Linear(size, hidden, bias=bias, **factory)
        self.activation = config.activation
        self.joined: Joined | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is not None and self.joined.serve(self, _GATE_UP):
            gate, up = self.joined(x).chunk(2, dim=-1)
        else:
            gate, up = project_together(x, [self.gate_proj, self.up_proj])
        if x.dtype is torch.float16:
            scale = _row_scale(gate, up)
            gated = recompute.cheap(kernels.gated_mlp, gate, up * scale.to(up.dtype), self.activation)
            return self.down_proj(gated).float() / scale
        return self.down_proj(recompute.cheap(kernels.gated_mlp, gate, up, self.activation))


# fp16 ends at 65,504, and trained models go there at a few tokens: first in act(gate) * up and what down_proj
# makes of it, then in the residual stream that adds this up. So under fp16 the stream is fp32
# (Decoder.forward; the norms give fp16 to the products), and the row of such a token goes through down_proj
# smaller by a power of two, which costs no digit. Rows below the limit are as they were.
FP16_ROW_LIMIT = 64.0  # of |act(gate) * up|: sums of 11,008 such values times weights of 0.05 still fit


@torch.no_grad()
def _row_scale(gate: Tensor, up: Tensor) -> Tensor:
    """(T, 1) fp32, powers of two up to 1: by which each row of act(gate) * up, (T, F), stays within the
    limit."""
    bound = (
        gate.abs().amax(-1, keepdim=True).float() * up.abs().amax(-1, keepdim=True).float()
    )  # |act(x)| <= |x|
    exponent = torch.floor(torch.log2(FP16_ROW_LIMIT / bound.clamp_min(FP16_ROW_LIMIT)))
    return torch.exp2(exponent.clamp_min(-24))  # the smallest that fp16 has


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, **factory):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
        self.self_attn = Attention(config, layer, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
        self.mlp = MLP(config, **factory)

    def forward(
        self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, row: "ForwardContext"
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x and what is still to be added to it -> the same two, each (T, E).

        Pending, because the next norm adds it in the kernel that reads both anyway.
        """
        normed, x = self.input_layernorm.of_sum(x, delta, row.dtype)
        normed, x = self.post_attention_layernorm.of_sum(x, self.self_attn(normed, cos, sin, row), row.dtype)
        return x, self.mlp(normed)


class ForwardContext:
    """What every layer needs to know of the row: borders, the cache if there is one, the dtype of the
    products."""

    def __init__(
        self, cu_seqlens, max_seqlen: int, cache: KVCache | None, flash_attn: str, dtype: torch.dtype
    ):
        self.cu_seqlens, self.max_seqlen, self.cache = cu_seqlens, max_seqlen, cache
        self.flash_attn, self.dtype = flash_attn, dtype
        self.tables: tuple[Tensor, Tensor] | None = None  # of the rotation, when decoding on a CPU
        self.filled: Tensor | None = None
        if cache is not None:
            cache.plan(self)


class Decoder(nn.Module):
    """Token ids -> hidden states after the final norm.

    compute_dtype: dtype of the activations; None = that of the embedding. recompute: what the blocks keep for
    the backward pass (recompute.py). flash_attn: which attention, one of kernels.ATTENTION. embedding_noise:
    NEFTune's alpha (arXiv 2310.05914), active in train mode only.
    """

    def __init__(self, config: ModelConfig, dtype=torch.float32, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, i, **factory) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, **factory)
        if not config.tied_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.v_head: nn.Module | None = (
            None  # a number for each token (value_head.py), in the stages that have one
        )
        self.compute_dtype: torch.dtype | None = None
        self.recompute = recompute.Plan()
        self.flash_attn = "auto"
        self.embedding_noise = 0.0
        self.one_row: OneRow | None = None  # the short way for one token on a CPU, see lay_out_for_decoding

    def forward(self, tokens, positions, cu_seqlens, max_seqlen: int, cache: KVCache | None = None) -> Tensor:
        """tokens (T,) int64, positions (T,), cu_seqlens (N+1,) int32, max_seqlen host int -> hidden (T, E).

        With a cache, segment i holds the new tokens of sequence i and the cache grows by them.
        """
        x = self.embed_tokens(tokens)  # (T, E)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        if self.training and self.embedding_noise:
            x = x + _neftune_noise(x, cu_seqlens, self.embedding_noise)
        row = ForwardContext(cu_seqlens, max_seqlen, cache, self.flash_attn, x.dtype)
        cos, sin = self.rotation(positions, row, x.dtype)
        if x.dtype is torch.float16:
            x = x.float()  # see FP16_ROW_LIMIT
        if type(cache) is KVCache and self.one_row is not None and self.one_row.serves(x):
            x = self.one_row(x, cos, sin, cache.storage, cache.lengths[0])
            cache.advance(row)
            return self.norm(x)
        if cache is not None and not torch.is_grad_enabled() and x.device.type == "cpu":
            row.tables = kernels.rotation_tables(cos, sin)
        delta = None  # what the last block adds to x: the next norm does it
        for number, block in enumerate(self.layers):
            if delta is not None and self.recompute.runs_again(number):
                x, delta = x + delta, None  # such a block keeps its input: one tensor, not two
            x, delta = self.recompute.run(number, partial(block, cos=cos, sin=sin, row=row), x, delta)
        if cache is not None:
            cache.advance(row)
        return self.norm.of_sum(x, delta, row.dtype)[0]

    def head_weight(self) -> Tensor:
        """The output head (V, E); the embedding itself when tied."""
        return self.embed_tokens.weight if self.config.tied_head else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, E) -> (T, V) in hidden's dtype."""
        # an untied head is asked as a layer: it may have an adapter
        return (
            kernels.linear(hidden, self.embed_tokens.weight)
            if self.config.tied_head
            else self.lm_head(hidden)
        )

    def rotation(self, positions: Tensor, row: "ForwardContext", dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (T, D/2) of every token's angles; angles in fp32, since bf16 cannot count past 256."""
        rope, size, device = self.config.rope, self.config.head_dim, positions.device
        if rope.kind == "dynamic":
            frequency = self._dynamic_frequencies(row, positions.shape[0], device)  # (T, D/2)
        else:
            frequency = inverse_frequencies(rope, size, device)
        angle = positions[:, None].float() * frequency
        return (angle.cos() * rope.attention_factor).to(dtype), (angle.sin() * rope.attention_factor).to(
            dtype
        )

    def _dynamic_frequencies(self, row: "ForwardContext", tokens: int, device) -> Tensor:
        """Each segment by its own length, so that a packed row equals its segments alone."""
        if row.cache is not None:
            lengths = torch.as_tensor(row.lengths, device=device)
        else:
            lengths = row.cu_seqlens[1:] - row.cu_seqlens[:-1]
        frequency = dynamic_inverse_frequencies(self.config.rope, self.config.head_dim, lengths)  # (N, D/2)
        new = row.cu_seqlens[1:] - row.cu_seqlens[:-1]
        return frequency.repeat_interleave(new.long(), dim=0, output_size=tokens)


def inverse_frequencies(rope: Rope, size: int, device=None) -> Tensor:
    """(D/2,) fp32 radians per position, for every kind but dynamic.

    linear: divided by the factor (arXiv 2306.15595). yarn: arXiv 2309.00071, eq. 17-19 with the ramp over
    dimensions. llama3: kept above, divided below, blended between two wavelengths (Llama 3.1 model card
    code).
    """
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
    frequency = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * frequency / rope.factor + smooth * frequency
    if rope.kind == "yarn":

        def dimension(rotations: float) -> float:  # the pair that turns this often over the trained length
            return (
                size
                * math.log(rope.original_positions / (rotations * 2 * math.pi))
                / (2 * math.log(rope.theta))
            )

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        ramp = ((torch.arange(size // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(
            0, 1
        )
        return frequency / rope.factor * ramp + frequency * (1 - ramp)
    return frequency


def dynamic_inverse_frequencies(rope: Rope, size: int, lengths: Tensor) -> Tensor:
    """NTK-aware base by text length: theta * (f s / L0 - (f - 1))^(D / (D - 2)) for s > L0; (N,) -> (N,
    D/2)."""
    length = lengths.float().clamp(min=rope.original_positions)
    growth = rope.factor * length / rope.original_positions - (rope.factor - 1)
    theta = rope.theta * growth ** (size / (size - 2))  # (N,)
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=lengths.device).float() / size
    return 1.0 / (theta[:, None] ** exponent)


def _neftune_noise(x: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """Uniform(-1, 1) * alpha / sqrt(L * E) with L the token's own segment length.  arXiv 2310.05914,
    algorithm 1."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    length = lengths.repeat_interleave(lengths, output_size=x.shape[0])[:, None]
    bound = alpha / torch.sqrt(length * float(x.shape[1]))
    return (torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1) * bound).to(x.dtype)


def lay_out_for_decoding(model: Decoder) -> None:
    """Order the weights in memory so that one token at a time is fast; values, names and shapes stay.

    For models that will only generate: training and saving work too, but are not faster. Layers that are not
    plain linears (adapters, quantised) keep their layout; on a CPU quantised ones get, beside their codes, a
    table of bytes or where their format has none a dense one, for one token at a time (one_row.py). A tied
    head is turned too: the embedding then gathers a token's numbers from E places, which costs 0.02 ms where
    the head saves 0.5 (fp32) to 1.7 ms (bf16) of a 135M model. On a GPU layers with one input are joined, and
    that is all.
    """
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        if _all_plain(attention.q_proj, attention.k_proj, attention.v_proj):
            attention.joined = Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        if _all_plain(mlp.gate_proj, mlp.up_proj):
            mlp.joined = Joined([mlp.gate_proj, mlp.up_proj])
    if model.embed_tokens.weight.device.type != "cpu":
        return
    for block in model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            if _all_plain(linear):
                Joined([linear])
    if model.config.tied_head:
        weight = model.embed_tokens.weight
        turned = weight.detach().T.contiguous().T  # (V, E), a token's numbers V apart
        model.embed_tokens.weight = nn.Parameter(turned, requires_grad=weight.requires_grad)
    elif _all_plain(model.lm_head):
        Joined([model.lm_head])
    places = [place for block in model.layers for place in _linears(block)]
    linears = [layer for _, _, layer in places]
    if model.config.qk_norm or not all(_served(linear) for linear in linears):
        return
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    if dtype is torch.float16:
        return  # its stream is fp32, see FP16_ROW_LIMIT; no processor here is faster with fp16
    adapters = [linear for linear in linears if hasattr(linear, "base")]
    straight = [_straight(block, dtype) for block in model.layers]
    model.one_row = OneRow(straight, places, adapters, model.config, dtype)


def _linears(block: Block) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of every linear of a block, whatever stands in its place now."""
    attention, mlp = block.self_attn, block.mlp
    places = [(attention, name) for name in (*_QKV, "o_proj")] + [
        (mlp, name) for name in (*_GATE_UP, "down_proj")
    ]
    return [(parent, name, getattr(parent, name)) for parent, name in places]


def _served(linear: nn.Module) -> bool:
    """Whether one_row.py can take this layer's place: a plain linear, or a quantised one with or without an
    adapter."""
    if type(linear) is Linear:
        return True
    return _is_quantised(linear.lora_factors()[0] if hasattr(linear, "lora_factors") else linear)


def _is_quantised(layer: nn.Module) -> bool:
    return hasattr(layer, "bytes_for_decoding")


def _straight(block: Block, dtype: torch.dtype) -> Layer:
    """The block as the straight line of one_row.py reads it. Plain weights stay those of the parameters."""
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        attention_norm=block.input_layernorm.weight.detach(),
        qkv=_product([getattr(attention, name) for name in _QKV], attention.joined, dtype),
        o=_product([attention.o_proj], attention.o_proj, dtype),
        mlp_norm=block.post_attention_layernorm.weight.detach(),
        gate_up=_product([getattr(mlp, name) for name in _GATE_UP], mlp.joined, dtype),
        down=_product([mlp.down_proj], mlp.down_proj, dtype),
        window=attention.window,
    )


def _product(linears: list[nn.Module], joined, dtype: torch.dtype) -> Product | ByteProduct:
    """Linears with one input as one product. joined: what holds their weights side by side if all are
    plain."""
    if _all_plain(*linears):
        return _dense_product(joined.weight.detach().T, joined.bias)
    beside = [
        linear.lora_factors() if hasattr(linear, "lora_factors") else (linear, None, None)
        for linear in linears
    ]
    bases = [base for base, _, _ in beside]
    parts = [base.bytes_for_decoding(dtype) if _is_quantised(base) else None for base in bases]
    in_bytes = None not in parts and len({(part.zero, part.scales.shape[0]) for part in parts}) == 1
    wide = torch.float32 if in_bytes else dtype
    adapter, bias = _side_by_side(beside, wide), None
    if any(base.bias is not None for base in bases):
        biases = [
            torch.zeros(base.out_features) if base.bias is None else base.bias.detach() for base in bases
        ]
        bias = torch.cat([each.to(wide) for each in biases])
    if in_bytes:
        return ByteProduct(kernels.ByteTable(parts), bias, adapter)
    dense = [base.dequantize(dtype) if _is_quantised(base) else base.weight.detach() for base in bases]
    return _dense_product(torch.cat([weight.T for weight in dense], dim=1), bias)._replace(adapter=adapter)


def _dense_product(table: Tensor, bias: Tensor | None) -> Product:
    rows, starts = kernels.shares_of_rows(table.shape[0], min(torch.get_num_threads(), table.shape[0]))
    return Product(table, None if bias is None else bias.detach(), rows, starts)


def _side_by_side(
    beside: list[tuple[nn.Module, Tensor | None, Tensor | None]], dtype: torch.dtype
) -> Adapter | None:
    """Adapters of linears with one input as one: A under each other, B along a diagonal."""
    if all(lora_a is None for _, lora_a, _ in beside):
        return None
    down = torch.cat([lora_a for _, lora_a, _ in beside if lora_a is not None])  # (sum of R, in)
    blocks = [torch.zeros(base.out_features, 0) if lora_b is None else lora_b for base, _, lora_b in beside]
    return Adapter(down.to(dtype), torch.block_diag(*(block.float() for block in blocks)).to(dtype))


def _all_plain(*linears: nn.Module) -> bool:
    return all(type(linear) is Linear for linear in linears)


@torch.no_grad()
def initialize_weights(model: Decoder, generator: torch.Generator | None = None) -> None:
    """Fresh weights: N(0, initializer_range) for matrices, ones for norms, zeros for biases, as transformers
    does."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)
