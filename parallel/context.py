"""Context parallel: ranks that hold one row of tokens between them, applied from outside to a decoder.

    divide_rows(model, world, "ulysses")      # model(...) takes and gives whole rows, as before

A hook before the model keeps this rank's slice of tokens and positions; blocks see nothing of the others but
in attention, which the model asks of a `cache` (generation/) where it is given one: here it is given Ulysses
or Ring. A hook behind the model joins the slices again, so a stage finds what it knows: every rank of the
group computes the same loss, and only the rows of the head are divided once more (divided). All collectives
are followed by their adjoints, so gradients summed over the group and divided by its size are those of one
process.

ulysses  heads for tokens and back (all-to-all, arXiv 2309.14509): any kernel serves; the ranks divide K
ring     keys and values travel, queries stay (arXiv 2310.01889): any number of ranks; here by the formula,
         block by block with an online softmax (arXiv 2205.14135), so slower than a fused kernel
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

import kernels
from parallel.world import World

# torch 2.13's names, and the older ones
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
PIECE = 512  # queries whose scores exist at a time


class _Gather(torch.autograd.Function):
    """(n, ...) of each rank -> (n ranks, ...); backward: sums over ranks of what belongs to each."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        whole = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
        _all_gather(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ranks = dist.get_world_size(ctx.group)
        mine = gradient.new_empty((gradient.shape[0] // ranks, *gradient.shape[1:]))
        _reduce_scatter(mine, gradient.contiguous(), group=ctx.group)
        return mine, None


class _Exchange(torch.autograd.Function):
    """x (ranks, ...): part i goes to rank i, and what came from rank i stands there; its own adjoint."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Exchange.apply(gradient.contiguous(), ctx.group), None


class Ulysses:
    """Attention of a slice of a row: of all its tokens for a share of the heads. In place of a cache."""

    def __init__(self, group, tokens: int, cu_seqlens: Tensor, max_seqlen: int):
        """tokens: of the row, without those that fill it up; cu_seqlens: with them."""
        self.group, self.ranks, self.tokens = group, dist.get_world_size(group), tokens
        self.row = cu_seqlens, max_seqlen

    def plan(self, context) -> None:
        """Nothing: the borders are those of the whole row already."""

    def advance(self, context) -> None:
        """Nothing is kept."""

    def attend(self, layer: int, q, k, v, context, window: int | None, scale: float) -> Tensor:
        """q (t, H, D), k and v (t, K, D) of t = T / ranks tokens -> (t, H, D)."""
        q, k, v = (self._all_tokens(x) for x in (q, k, v))
        out = kernels.attention(q, k, v, *self.row, window, scale, flash_attn=context.flash_attn)
        return self._all_heads(out)

    def _all_tokens(self, x: Tensor) -> Tensor:
        """(t, H, D) -> (T, H / ranks, D)."""
        parts = x.unflatten(1, (self.ranks, -1)).transpose(0, 1)  # (ranks, t, H / ranks, D)
        return _Exchange.apply(parts.contiguous(), self.group).flatten(0, 1)

    def _all_heads(self, x: Tensor) -> Tensor:
        """(T, H / ranks, D) -> (t, H, D)."""
        parts = _Exchange.apply(x.unflatten(0, (self.ranks, -1)).contiguous(), self.group)
        return parts.transpose(0, 1).flatten(1, 2)


class Ring(Ulysses):
    """Attention of a slice of a row against slices of keys and values that go round. In place of a cache."""

    def attend(self, layer: int, q, k, v, context, window: int | None, scale: float) -> Tensor:
        return _RingAttention.apply(q, k, v, self.row[0], window, scale, self.group)


class _RingAttention(torch.autograd.Function):
    """softmax over all keys of a segment that a query may see, one rank's slice of them at a time.

    The first slice is the rank's own, so every query has seen a key from then on. forward keeps q, k, v, the
    result and the logarithm of each softmax's sum; backward sends keys and values round once more, and with
    them the sums of their gradients, which so come home.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens, window, scale: float, group) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        total = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)  # (t, H)
        ring, pair = _Slices(q, k, cu_seqlens, window, scale, group), torch.stack((k, v))
        for owner in ring.owners():
            for rows, scores in ring.scores(q, pair[0], owner):
                above = torch.logaddexp(total[rows], torch.logsumexp(scores, -1).T)
                weights = (scores - above.T[..., None]).exp()  # (H, n, t)
                kept = (total[rows] - above).exp()[..., None]
                out[rows] = out[rows] * kept + ring.of_keys(weights, pair[1].to(wide))
                total[rows] = above
            pair = ring.passed_on(pair)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, total)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, out, total = ctx.saved_tensors
        ring, gradient, wide_q = ctx.ring, gradient.to(out.dtype), q.to(out.dtype)
        delta, of_q = (gradient * out).sum(-1), torch.zeros_like(out)
        none = torch.zeros_like(k, dtype=out.dtype)
        travels = torch.stack((k.to(out.dtype), v.to(out.dtype), none, none))
        for owner in ring.owners():
            keys, values, of_keys, of_values = travels
            for rows, scores in ring.scores(q, keys.to(q.dtype), owner):
                weights = (scores - total[rows].T[..., None]).exp()  # (H, n, t)
                of_values += ring.to_keys(weights, gradient[rows])
                of_weights = ring.against_keys(gradient[rows], values)
                of_scores = weights * (of_weights - delta[rows].T[..., None]) * ring.scale
                of_q[rows] += ring.of_keys(of_scores, keys)
                of_keys += ring.to_keys(of_scores, wide_q[rows])
            travels = ring.passed_on(travels)
        return of_q.to(q.dtype), travels[2].to(k.dtype), travels[3].to(v.dtype), None, None, None, None


class _Slices:
    """This rank's slice of a row among those of the ring, and products of its queries with their keys."""

    def __init__(self, q: Tensor, k: Tensor, cu_seqlens: Tensor, window: int | None, scale: float, group):
        self.group, self.window, self.scale, self.heads = group, window, scale, k.shape[1]
        self.rank, self.ranks, self.tokens = dist.get_rank(group), dist.get_world_size(group), q.shape[0]
        place = torch.arange(self.tokens * self.ranks, device=q.device)
        self.segment = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)

    def owners(self) -> list[int]:
        """Whose keys are here, turn by turn."""
        return [(self.rank - turn) % self.ranks for turn in range(self.ranks)]

    def passed_on(self, x: Tensor) -> Tensor:
        """x goes to the next rank; gives what the one before had."""
        after, before = (dist.get_global_rank(self.group, (self.rank + by) % self.ranks) for by in (1, -1))
        out = torch.empty_like(x)
        ways = [dist.P2POp(dist.isend, x, after, self.group), dist.P2POp(dist.irecv, out, before, self.group)]
        for work in dist.batch_isend_irecv(ways):
            work.wait()
        return out

    def scores(self, q: Tensor, keys: Tensor, owner: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their scores (H, n, t), -inf where a key is not seen) for pieces of the queries. What comes
        later in the row is seen by none of them."""
        for start in range(0, self.tokens if owner <= self.rank else 0, PIECE):
            rows = slice(start, min(start + PIECE, self.tokens))
            query = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + self.rank * self.tokens
            key = torch.arange(self.tokens, device=q.device) + owner * self.tokens
            seen = (self.segment[query] == self.segment[key]) & (key <= query)
            if self.window is not None:
                seen &= key > query - self.window
            scores = self.against_keys(q[rows], keys).to(torch.promote_types(q.dtype, torch.float32))
            yield rows, (scores * self.scale).masked_fill(~seen, -torch.inf)

    def against_keys(self, x: Tensor, keys: Tensor) -> Tensor:
        """x (n, H, D), keys (t, K, D) -> (H, n, t)."""
        return torch.einsum("nkgd,tkd->kgnt", x.unflatten(1, (self.heads, -1)), keys).flatten(0, 1)

    def of_keys(self, weights: Tensor, values: Tensor) -> Tensor:
        """weights (H, n, t), values (t, K, D) -> (n, H, D)."""
        return torch.einsum("kgnt,tkd->nkgd", weights.unflatten(0, (self.heads, -1)), values).flatten(1, 2)

    def to_keys(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights (H, n, t), x (n, H, D) -> (t, K, D)."""
        grouped = weights.unflatten(0, (self.heads, -1)), x.unflatten(1, (self.heads, -1))
        return torch.einsum("kgnt,nkgd->tkd", *grouped)


KINDS = {"ulysses": Ulysses, "ring": Ring}


def divide_rows(model: nn.Module, world: World, kind: str) -> None:
    """From here on every rank of a context group computes its slice of the rows that model(...) is given."""
    model.register_forward_pre_hook(partial(_keep_slice, world, KINDS[kind]))
    model.register_forward_hook(partial(_join, world))
    model.runtime.context = world


def _keep_slice(world: World, kind: type[Ulysses], model: nn.Module, row: tuple) -> tuple | None:
    if len(row) > 4 and row[4] is not None:  # with a cache every rank of the group writes the same texts
        return None
    tokens, positions, cu_seqlens, max_seqlen = row[:4]
    more = -len(tokens) % world.context
    if more:  # one segment more, which nobody sees
        tokens, positions = (torch.cat((x, x.new_zeros(more))) for x in (tokens, positions))
        cu_seqlens = torch.cat((cu_seqlens, cu_seqlens[-1:] + more))
        max_seqlen = max(max_seqlen, more)
    attention = kind(world.groups["context"], len(row[0]), cu_seqlens, max_seqlen)
    tokens, positions = (x.chunk(world.context)[world.context_rank] for x in (tokens, positions))
    return tokens, positions, cu_seqlens, max_seqlen, attention


def _join(world: World, model: nn.Module, row: tuple, hidden: Tensor) -> Tensor:
    if not isinstance(row[4], Ulysses):
        return hidden
    whole = _Gather.apply(hidden, world.groups["context"])
    return whole if len(whole) == row[4].tokens else whole[: row[4].tokens].clone()  # no view, for the engine


def divided(world: World | None, rows: Tensor, labels: Tensor, function: Callable) -> Tensor:
    """function(rows (L, E), labels (L,)) -> (L,), which treats each row by itself: on a share of the rows on
    each rank of a context group."""
    if world is None or len(labels) == 0:
        return function(rows, labels)
    size = -(-len(labels) // world.context)
    last = labels.new_full((size * world.context - len(labels),), len(labels) - 1)  # fills up the last share
    mine = torch.cat((torch.arange(len(labels), device=labels.device), last))
    mine = mine.split(size)[world.context_rank]
    return _Gather.apply(function(rows[mine], labels[mine]), world.groups["context"])[: len(labels)]
