"""The decoder: what a Llama is, driven by the switches of ModelConfig, over flat rows of tokens.

Shape letters: T tokens of a packed row, N segments in it, E hidden, H query heads, K key/value heads, D head
size, F MLP size, V vocabulary. A row holds N segments one after the other; `cu_seqlens` are their N+1
borders, `positions` restart at 0 in each, and attention never crosses a border. So there is no padding and no
mask.

The heads are applied by whoever needs them (loss on some rows, logits of the last token), so (T, V) logits
never exist unless somebody asks. Weight names are Hugging Face's for Llama without the leading "model.".
Linear, RMSNorm and MLP stand in architectures/layers.py, products and attention in kernels/.

    model = load_model("models/SmolLM2-135M-Instruct")          # checkpoints/huggingface.py
    hidden = model(tokens, positions, cu_seqlens, max_seqlen)   # (T, E)
    logits = model.logits(hidden)                               # (T, V)
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from architectures import rope
from architectures.config import ModelConfig
from architectures.layers import MLP, ForwardContext, Linear, RMSNorm
from kernels.recompute import Plan


class Attention(nn.Module):
    """Softmax attention within a segment's past: softmax(q k^T / sqrt(D)) v, the last `window` tokens only.

    H / K query heads share the keys and values of one head (arXiv 2305.13245); q and k are rotated by their
    positions (architectures/rope.py).
    """

    def __init__(self, config: ModelConfig, layer: int, **factory):
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_heads * size, bias=config.qkv_bias, **factory)
        self.k_proj = Linear(hidden, config.num_kv_heads * size, bias=config.qkv_bias, **factory)
        self.v_proj = Linear(hidden, config.num_kv_heads * size, bias=config.qkv_bias, **factory)
        self.o_proj = Linear(config.num_heads * size, hidden, bias=config.out_bias, **factory)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.norm_eps, config.norm_offset, **factory)
            self.k_norm = RMSNorm(size, config.norm_eps, config.norm_offset, **factory)
        self.head_dim, self.scale = size, 1.0 / math.sqrt(size)
        self.window = config.sliding_windows[layer]  # tokens; None = all
        self.layer = layer  # its place in a cache

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext) -> tuple[Tensor, ...]:
        """x (T, E) -> q (T, H, D), k and v (T, K, D), q and k normalised and rotated."""
        heads = kernels.linears(x, [self.q_proj.part(), self.k_proj.part(), self.v_proj.part()])
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return *kernels.rope(q, k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext) -> Tensor:
        q, k, v = self.project(x, cos, sin, context)
        if context.cache is None:
            row = context.cu_seqlens, context.max_seqlen
            out = kernels.attention(q, k, v, *row, self.window, self.scale, flash_attn=context.flash_attn)
        else:
            out = context.cache.attend(self.layer, q, k, v, context, self.window, self.scale)
        return self.o_proj(out.flatten(-2))  # (T, H, D) -> (T, E)


# The kinds of layers, of which config.kinds(layer) names one each; a new kind is a file of architectures/.
# attention: x (T, E), cos, sin (T, D/2), context -> (T, E); feed-forward: x (T, E) -> (T, E)
ATTENTION = {"attention": Attention}
FEED_FORWARD = {"mlp": MLP}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, **factory):
        super().__init__()
        attention, feed_forward = config.kinds(layer)
        norm = config.hidden_size, config.norm_eps, config.norm_offset
        self.input_layernorm = RMSNorm(*norm, **factory)
        self.self_attn = ATTENTION[attention](config, layer, **factory)
        self.post_attention_layernorm = RMSNorm(*norm, **factory)
        self.mlp = FEED_FORWARD[feed_forward](config, layer, **factory)

    def forward(
        self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x and what is still to be added to it -> the same two, each (T, E).

        Pending, because the next norm adds it in the kernel that reads both anyway.
        """
        normed, x = self.input_layernorm.of_sum(x, delta, context.dtype)
        delta = self.self_attn(normed, cos, sin, context)
        normed, x = self.post_attention_layernorm.of_sum(x, delta, context.dtype)
        return x, self.mlp(normed)


@dataclass
class Runtime:
    """What may be set from outside: how a decoder computes, not what it is."""

    compute_dtype: torch.dtype | None = None  # of the activations; None = that of the embedding
    recompute: Plan = field(default_factory=Plan)  # what the blocks keep for the backward pass
    flash_attn: str = "auto"  # which attention, one of kernels.ATTENTION
    embedding_noise: float = 0.0  # NEFTune's alpha (arXiv 2310.05914), in train mode only
    context: Any = None  # of parallel/context.py alone: the ranks that share a row


class Decoder(nn.Module):
    """Token ids -> hidden states after the final norm."""

    def __init__(self, config: ModelConfig, dtype=torch.float32, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, layer, **factory) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset, **factory)
        if not config.tied_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.v_head: nn.Module | None = None  # a number for each token, in the stages that have one
        self.runtime = Runtime()

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the activations."""
        return self.runtime.compute_dtype or self.embed_tokens.weight.dtype

    def forward(self, tokens, positions, cu_seqlens, max_seqlen: int, cache=None) -> Tensor:
        """tokens (T,) int64, positions (T,), cu_seqlens (N+1,) int32, max_seqlen host int -> hidden (T, E).

        With a cache (generation/), segment i holds the new tokens of sequence i, and the cache grows by them.
        """
        runtime = self.runtime
        x = self.embed(tokens)  # (T, E)
        if self.training and runtime.embedding_noise:
            x = x + _neftune_noise(x, cu_seqlens, runtime.embedding_noise)
        context = ForwardContext(cu_seqlens, max_seqlen, cache, runtime.flash_attn, x.dtype)
        if cache is not None:
            cache.plan(context)
        cos, sin = self.rotation(positions, context, x.dtype)
        if x.dtype is torch.float16:
            x = x.float()  # see layers.FP16_ROW_LIMIT
        delta = None  # what the last block adds to x: the next norm does it
        recomputed = runtime.recompute.full + runtime.recompute.selective if torch.is_grad_enabled() else 0
        for number, block in enumerate(self.layers):
            if number < recomputed:
                again = partial(block, cos=cos, sin=sin, context=context)
                x, delta = runtime.recompute.run(number, again, x, delta)
            else:
                x, delta = block(x, delta, cos, sin, context)
        if cache is not None:
            cache.advance(context)
        return self.norm.of_sum(x, delta, context.dtype)[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (T,) -> (T, E) in compute_dtype."""
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        scale = self.config.embedding_scale  # rounded as x is, like the models that were trained with one
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype)

    def rotation(self, positions: Tensor, context: ForwardContext, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """cos and sin (T, D/2) of the angles by which q and k turn."""
        config, lengths = self.config, None if context.cache is None else context.lengths
        return rope.rotation(config.rope, config.head_dim, positions, context.cu_seqlens, lengths, dtype)

    def head_weight(self) -> Tensor:
        """The output head (V, E); the embedding itself when tied."""
        return self.embed_tokens.weight if self.config.tied_head else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, E) -> (T, V) in hidden's dtype."""
        if self.config.tied_head:
            return kernels.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)  # as a layer: it may have an adapter


def _neftune_noise(x: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """Uniform(-1, 1) * alpha / sqrt(L * E) with L the token's own segment length.  arXiv 2310.05914,
    algorithm 1."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    length = lengths.repeat_interleave(lengths, output_size=x.shape[0])[:, None]
    bound = alpha / torch.sqrt(length * float(x.shape[1]))
    return (torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1) * bound).to(x.dtype)


def initialize_weights(model: Decoder, generator: torch.Generator | None = None) -> None:
    for name, parameter in model.named_parameters():
        initialize(name, parameter, model.config, generator)


@torch.no_grad()
def initialize(name: str, weight: Tensor, config: ModelConfig, generator: torch.Generator | None) -> None:
    """A fresh weight: N(0, initializer_range) for matrices, ones for norms, zeros for biases, as transformers
    does."""
    if name.endswith("bias"):
        weight.zero_()
    elif weight.dim() == 1:
        weight.fill_(1.0 - config.norm_offset)
    else:
        weight.normal_(0.0, config.initializer_range, generator=generator)
