"""Examples -> flat batches without padding: order, sharding over ranks, resuming.

A Batch is one row of T tokens made of N segments (design: no padding anywhere). Every order here is a pure
function of (seed, batch number), so a run resumes by asking for batches(start=i), and every rank computes the
same plan. Rank r of `world` takes the global batches k * world + r; the last round is filled with empty
batches, so that all ranks see the same number of them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from options.errors import refuse
from pipeline.packing import group_by_length, pack

IGNORED = -100  # label of a position that is not trained; torch's cross_entropy default
ROLES = ("prefix", "system", "user", "assistant", "observation", "function", "text")  # caches keep the order
ANSWER = 64  # bit in Example.roles
# tokens, see Batch.rounded; a GPU's products work in tiles of 128 rows, so less would save nothing
ROW_MULTIPLE = {"cpu": 32, "cuda": 128}


@dataclass(frozen=True)
class Example:
    """One segment, or two that belong together (a preference pair: chosen, rejected). All arrays have the
    length of both; `source` is (dataset, row), both counted from 0."""

    tokens: np.ndarray  # (n,) int32
    trained: np.ndarray  # (n,) bool, True where the token is a target
    turns: np.ndarray  # (n,) int16, index of the message, -1 = prefix
    roles: np.ndarray  # (n,) uint8, place in ROLES, plus ANSWER where the text is the model's to produce
    source: tuple[int, int]
    split: int = 0  # where the second segment begins; 0 = there is one segment
    tag: int = 0  # KTO: 1 = desirable, 0 = undesirable
    reference: tuple[float, ...] | None = None  # log-probability of each segment's labels
    copy: int = 0  # how often the data set's order repeated the same example before
    asked: int = 0  # KTO: a checksum of the question, all of it even where it was cut

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def segments(self) -> list[slice]:
        """Where its segments lie in the arrays."""
        borders = (0, self.split, len(self.tokens)) if self.split else (0, len(self.tokens))
        return list(itertools.starmap(slice, itertools.pairwise(borders)))


@dataclass
class Batch:
    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int32, restart at 0 in every segment
    cu_seqlens: torch.Tensor  # (N+1,) int32
    max_seqlen: int
    labels: torch.Tensor  # (T,) int64, already shifted inside each segment; IGNORED = not trained
    label_rows: torch.Tensor  # (L,) int64, where labels != IGNORED
    sources: list[tuple[int, int]]  # (dataset, row) of each segment; empty for an empty batch
    pairs: int = 0  # P: segments 0..P-1 are the first of each pair (chosen), P..2P-1 the second (rejected)

    # What a stage knows beside, in the order of the segments with a source, and of label_rows. Here: "labels"
    # int64 (how many each has), "tags" int64 and, where it is known ahead, "reference" fp32 of Example
    per_segment: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (N, ...)
    per_label: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (L,)
    per_token: dict[str, np.ndarray] = field(default_factory=dict)  # "turns", "roles" of Example, for people
    host: "Batch | None" = None  # of a batch on a device: the one that was moved there

    @property
    def borders(self) -> list[int]:
        """cu_seqlens on the host; nothing waits for the device."""
        return (self if self.host is None else self.host).cu_seqlens.tolist()

    @property
    def label_counts(self) -> torch.Tensor:
        """(N,) int64: labels of each segment that has a source (not of what pads the row)."""
        return self.per_segment["labels"]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, host=self if self.host is None else self.host)

    def pinned(self) -> "Batch":
        """The same batch in memory that a GPU can fetch while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The same batch with this done to every tensor."""

        def done(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: done(part) for name, part in value.items()}
            return function(value) if torch.is_tensor(value) else value

        return Batch(**{name: done(value) for name, value in vars(self).items()})

    def plain(self) -> dict:
        """For a checkpoint, and Batch(**plain): tensors and plain values."""
        return vars(self) | {"per_token": {}, "host": None}

    def rounded(self, multiple: int) -> "Batch":
        """The same batch with one segment of untrained tokens behind it, so that T is a multiple of this.

        Products are compiled per shape (oneDNN: 1.2 ms and up to 1 MB for each new T and weight), so few
        values of T are faster and smaller than exactly the tokens. Nothing sees that segment, and no loss or
        gradient comes of it: it has no source, and no entry in per_segment and per_label.
        """
        count = -len(self.tokens) % multiple
        if count == 0:
            return self
        places = torch.arange(count, dtype=torch.int32, device=self.tokens.device)
        zeros = torch.zeros(count, dtype=torch.int64, device=places.device)
        behind = {"tokens": zeros, "positions": places, "labels": zeros + IGNORED}
        behind["cu_seqlens"] = self.cu_seqlens[-1:] + count
        longer = {name: torch.cat([getattr(self, name), more]) for name, more in behind.items()}
        longer["per_token"] = {
            name: np.pad(each, (0, count), constant_values={"turns": -1, "roles": 0}[name])
            for name, each in self.per_token.items()
        }
        host = None if self.host is None else self.host.rounded(multiple)
        return replace(self, **longer, max_seqlen=max(self.max_seqlen, count), host=host)

    def __len__(self) -> int:
        """Examples; a pair is one."""
        return len(self.sources) - self.pairs


def collate(examples: Sequence[Example]) -> Batch:
    """Examples -> one flat row. No examples -> the empty batch: one token 0, no label, no source.

    Examples of two segments: the first segments of all, then the second ones in the same order.
    """
    pairs = sum(example.split > 0 for example in examples)
    if pairs not in (0, len(examples)):
        raise ValueError("collate: some examples are pairs and some are not; a batch holds one kind")
    order = [(example, number) for number in range(2 if pairs else 1) for example in examples]  # of segment
    spans = [(example, example.segments[number]) for example, number in order]
    if not examples:
        one = np.zeros(1, np.int64)
        nothing = Example(one, one > 0, one.astype(np.int16) - 1, one.astype(np.uint8), (-1, -1))
        spans = [(nothing, slice(0, 1))]

    def flat(name: str) -> np.ndarray:
        return np.concatenate([getattr(example, name)[span] for example, span in spans])

    lengths = np.fromiter((span.stop - span.start for _, span in spans), np.int64, len(spans))
    borders = np.zeros(len(spans) + 1, np.int64)
    np.cumsum(lengths, out=borders[1:])
    tokens, trained = flat("tokens").astype(np.int64), flat("trained")
    labels = np.full(len(tokens), IGNORED, np.int64)
    labels[:-1] = np.where(trained[1:], tokens[1:], IGNORED)
    labels[borders[1:] - 1] = IGNORED  # the last token of a segment must not predict the first of the next
    label_rows = np.flatnonzero(labels != IGNORED)
    counts = np.diff(np.searchsorted(label_rows, borders[: len(order) + 1]))
    per_segment = {"labels": counts, "tags": np.array([example.tag for example, _ in order], np.int64)}
    if all(example.reference is not None for example in examples):
        known = [example.reference[number] for example, number in order]
        per_segment["reference"] = np.array(known, np.float32)
    positions = (np.arange(len(tokens)) - np.repeat(borders[:-1], lengths)).astype(np.int32)
    row = {"tokens": tokens, "positions": positions, "labels": labels, "label_rows": label_rows}
    row["cu_seqlens"] = borders.astype(np.int32)
    row = {name: torch.from_numpy(array) for name, array in row.items()}
    known = {name: torch.from_numpy(array) for name, array in per_segment.items()}
    beside = {"per_segment": known, "per_token": {name: flat(name) for name in ("turns", "roles")}}
    sources = [example.source for example, _ in order]
    return Batch(**row, max_seqlen=int(lengths.max()), sources=sources, pairs=pairs, **beside)


@dataclass(kw_only=True)
class Loader:
    """How examples become what is drawn, whether they are stored or streamed."""

    rows_per_batch: int  # examples of a batch, or packed rows of `cutoff_len` tokens
    packing: bool = False
    cutoff_len: int = 0
    shuffle: bool = True
    seed: int = 0
    rank: int = 0
    world: int = 1
    collate: Callable[[list[Example]], Any] = collate  # -> a Batch, or prompts (stages/rollouts.py)

    def state(self, batches: int) -> dict:
        """What a checkpoint holds of the first so many batches."""
        return {}

    def restore(self, *states: dict) -> None:
        """What `state` gave, on this rank or on all, of the batches that come before the next one."""


class BatchLoader(Loader):
    """Batches of a store, endless over epochs; batch i depends on (seed, i) alone.

    store: a pipeline.store.ExampleStore, or what else has lengths, len() and example(i). group_by_length:
    megabatches of 50 batches sorted by length, longest first (needs packing off). The packing plan is made
    once from `seed`; each epoch shuffles its rows anew.
    """

    def __init__(self, store, *, group_by_length: bool = False, **layout):
        super().__init__(**layout)
        nothing = "there is no example to train or evaluate on"
        refuse(len(store) == 0, f"{nothing}; the data report says what was dropped")
        refuse(self.rows_per_batch < 1, f"rows_per_batch is {self.rows_per_batch}, expected at least 1")
        both = self.packing and group_by_length
        refuse(both, "group_by_length: packing already fills rows; set one of the two to false")
        self.store, self.group_by_length = store, group_by_length
        self.rows: list[np.ndarray] | None = None
        if self.packing:
            order = self._permutation(len(store), 0) if self.shuffle else np.arange(len(store))
            self.rows = pack(np.asarray(store.lengths), self.cutoff_len, order)
        self.units = len(store) if self.rows is None else len(self.rows)
        self.batches_per_epoch = -(-self.units // (self.rows_per_batch * self.world))
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def examples_of(self, batch: int) -> list[int]:
        """Example numbers of this rank's batch `batch`, counted over epochs; [] for an empty batch."""
        epoch, k = divmod(batch, self.batches_per_epoch)
        start = (k * self.world + self.rank) * self.rows_per_batch
        units = self._epoch_order(epoch)[start : start + self.rows_per_batch].tolist()
        return units if self.rows is None else [int(i) for unit in units for i in self.rows[unit]]

    def batch(self, i: int) -> Batch:
        return self.collate([self.store.example(example) for example in self.examples_of(i)])

    def batches(self, start: int = 0) -> Iterator[Batch]:
        return (self.batch(i) for i in itertools.count(start))

    def draws_per_epoch(self, size: int) -> int:
        return -(-self.batches_per_epoch // size)

    def draws(self, size: int, start: int = 0) -> Iterator[list[Batch]]:
        """The batches of draw number `start` and of all later ones: `size` each, fewer at the end of an
        epoch, so batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 train on the same groups of rows."""
        for number in itertools.count(start):
            epoch, place = divmod(number, self.draws_per_epoch(size))
            first, end = epoch * self.batches_per_epoch + place * size, (epoch + 1) * self.batches_per_epoch
            yield [self.batch(i) for i in range(first, min(first + size, end))]

    def most_tokens(self) -> int:
        """Tokens of the largest batch that an epoch's order can make."""
        lengths = np.asarray(self.store.lengths)
        if self.rows is not None:
            lengths = np.array([lengths[row].sum() for row in self.rows])
        return int(np.sort(lengths)[-self.rows_per_batch :].sum())

    def largest(self) -> Batch:
        """A batch of the longest rows, which an epoch's order can make."""
        lengths = np.asarray(self.store.lengths)
        rows = np.arange(len(lengths))[:, None] if self.rows is None else self.rows
        longest = np.argsort([lengths[row].sum() for row in rows], kind="stable")[-self.rows_per_batch :]
        return self.collate([self.store.example(int(i)) for unit in longest for i in rows[unit]])

    def most_examples(self) -> int:
        """Examples of the largest batch that an epoch's order can make."""
        if self.rows is None:
            return min(self.rows_per_batch, len(self.store))
        return int(np.sort([len(row) for row in self.rows])[-self.rows_per_batch :].sum())

    def _permutation(self, count: int, *stream: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *stream]).permutation(count)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            order = self._permutation(self.units, 1, epoch) if self.shuffle else np.arange(self.units)
            if self.group_by_length:
                size = self.rows_per_batch * self.world
                order = group_by_length(order, np.asarray(self.store.lengths), size)
            self._order = (epoch, order)
        return self._order[1]
