"""Rows read while training, nothing stored: several data sets mixed, shuffled in windows, dealt to lanes.

Lane v, a place in an update, trains the stream's rows v, v + V, v + 2V, ..., V = rows of an update over all
ranks, and drops and packs without looking at another lane. So every rank reads all rows and tokenises those
of its lanes; batch 8, 8 x 1 accumulated and 2 ranks x 4 train the same groups. Where rows are dropped or
packed, lanes are at different rows, and at the end of a pass one may be in the next.

A checkpoint holds the place of each lane's next example, and the sum of the checksums of all rows that were
used before. A run that goes on reads these again, and tokenises none of them; with other data it is refused.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from options.errors import UserError, refuse
from parallel.world import World
from pipeline.batch import Batch, Example, Loader
from pipeline.encoding import ChunkEncoder, encode_rows
from pipeline.mixing import mixing_ends, turns
from pipeline.packing import pack
from pipeline.sources import Row, checksum, read_rows
from pipeline.store import Tally

AHEAD = 2**10  # batches, more than are drawn ahead of the update that is saved
# packed together of a lane, and of all lanes, for which the first update waits: rows are full to 0.98 with
# chats of 300 to 800 tokens in windows of 64
FEWEST_ROWS, MOST_ROWS, ALL_ROWS = 8, 64, 512
PATIENCE = 20  # passes over as many rows as there are, of a rank that sees not all of each, for an example
NOTHING = "the streamed data holds no example to train on"


@dataclass
class RowStream:
    """Data sets to be mixed, and how their rows become examples; what StreamingLoader needs."""

    encoders: list[ChunkEncoder]  # one for each data set
    opened: list  # hub data sets as opened, None for files
    mix_strategy: str  # concat, interleave_under, interleave_over
    interleave_probs: tuple[float, ...]
    seed: int
    held_out: frozenset[tuple[int, int]] = frozenset()  # (data set, row) of the evaluation rows
    workers: int = 1
    tallies: list[Tally] = field(default_factory=list)  # of what this process tokenised

    def __post_init__(self):
        self.tallies = [Tally() for _ in self.encoders]

    @property
    def datasets(self) -> list[str]:
        return [encoder.info.name for encoder in self.encoders]

    def rows(self, epoch: int) -> Iterator[tuple[int, Row]]:
        """(data set, row) of one pass, before shuffling."""
        for k, row in self._mixed(epoch):
            if (k, row[0]) not in self.held_out:
                yield k, row

    def encoded(self, rows: Iterator[tuple[Any, int, Row]]) -> Iterator[tuple[Any, list[Example]]]:
        """(anything, data set, row) -> (the same thing, examples), in that order."""
        return encode_rows(rows, self.encoders, self.tallies, self.workers)

    def read(self, part: int) -> Iterator[Row]:
        return read_rows(self.encoders[part].info, self.opened[part])

    def _mixed(self, epoch: int) -> Iterator[tuple[int, Row]]:
        parts = range(len(self.encoders))
        if len(parts) == 1 or self.mix_strategy == "concat":
            for k in parts:
                yield from ((k, row) for row in self.read(k))
            return
        passes = [self.read(k) for k in parts]
        upcoming = [next(rows, None) for rows in passes]  # one row ahead: a set is used up with its last row
        used_up = [False] * len(parts)
        for k in turns(len(parts), self.interleave_probs, [self.seed, epoch]):
            if upcoming[k] is None:
                raise UserError(f"dataset {self.datasets[k]!r} holds no rows, so it cannot be interleaved")
            yield k, upcoming[k]
            upcoming[k] = next(passes[k], None)
            if upcoming[k] is None:
                used_up[k] = True
                passes[k] = self.read(k)
                upcoming[k] = next(passes[k], None)
            if mixing_ends(used_up, k, not self.interleave_probs, self.mix_strategy == "interleave_under"):
                return


class Mark(NamedTuple):
    """Where a lane can begin: at an example, or at a window of packed rows."""

    units: int = 0  # examples, or packed rows, that it gave before
    position: int = 0  # of the row in the shuffled stream
    skip: int = 0  # examples of that row that were used before
    end: int = 0  # position behind the rows of which the example, or the window, was made
    total: int = 0  # of the checksums of the lane's rows up to there


class StreamingLoader(Loader):
    """Batches of an endless stream, for data that is never stored.

    `couple` makes other examples of the shuffled ones, one of each in their order, by what it sees of later
    ones. Ranks and batches with the same number of lanes train the same groups of rows.
    """

    batches_per_epoch = None

    def __init__(self, source: RowStream, *, lanes: int = 1, buffer_size: int = 16384, couple=iter, **layout):
        """lanes: rows of an update over all ranks. couple: Iterator[Example] -> Iterator[Example]."""
        super().__init__(**layout)
        self.source, self.couple, self.lanes = source, couple, lanes
        self.buffer_size = buffer_size if self.shuffle else 1
        self._kept = AHEAD
        self._restored: dict = {}
        self._marks: dict[int, Mark] = {}  # of this rank's lanes
        self._states: dict[int, dict] = {}  # behind so many batches

    def _units_of(self, batch: int) -> range:
        """The numbers over all ranks of the units of a batch of this one."""
        first = (batch * self.world + self.rank) * self.rows_per_batch
        return range(first, first + self.rows_per_batch)

    def _own_lanes(self) -> list[int]:
        units = map(self._units_of, range(self.lanes))
        return sorted({unit % self.lanes for unit in itertools.chain(*units)})

    def batches(self, start: int = 0) -> Iterator[Batch]:
        units = self._begin()
        for number in itertools.count(start):
            examples: list[Example] = []
            for unit in self._units_of(number):
                index, lane = divmod(unit, self.lanes)
                found, self._marks[lane] = next(each for i, *each in units[lane] if i == index)
                examples += found
            marks = {lane: tuple(mark) for lane, mark in self._marks.items()}
            self._states[number + 1] = {"lanes": self.lanes, "marks": marks}
            self._states.pop(number - self._kept, None)
            yield self.collate(examples)

    def state(self, batches: int) -> dict:
        """Where a run can begin that goes on behind the first so many batches."""
        return self._states.get(batches, self._restored)

    def restore(self, *states: dict) -> None:
        """Go on where the ranks were that gave these states."""
        states = [state for state in states if state]
        if not states:
            return
        old = "the checkpoint's stream is of an older version, in another order"
        refuse("marks" not in states[0], f"dataset: {old}; set overwrite_output_dir=true to start anew")
        marks = {lane: mark for state in states for lane, mark in state["marks"].items()}
        self.lanes, self._restored = states[0]["lanes"], states[0] | {"marks": marks}

    def gather_tallies(self, world: World) -> None:
        """Add to the tallies of the source what the other ranks tokenised."""
        if len(self._own_lanes()) * self.world == self.lanes:  # else some have tokenised what others did, too
            mine = [asdict(tally) for tally in self.source.tallies]
            of_ranks = dict(world.gather((world.data_rank, mine)))  # once of ranks that share rows
            for tallies in (of_ranks[rank] for rank in of_ranks if rank != world.data_rank):
                for tally, other in zip(self.source.tallies, tallies):
                    tally.add(Tally(**other))

    def draws_per_epoch(self, size: int) -> None:
        """Nobody knows."""

    def draws(self, size: int, start: int = 0) -> Iterator[list[Batch]]:
        """The batches of draw number `start` and of those that follow, `size` each."""
        self._kept = max(AHEAD, 4 * size)
        batches = self.batches(start * size)
        while True:
            yield list(itertools.islice(batches, size))

    def most_tokens(self) -> int:
        """Tokens of the largest batch that may come: nobody knows the stream's lengths."""
        return self.rows_per_batch * self.cutoff_len

    def most_examples(self) -> int:
        """Examples of the largest batch that may come, if none in a packed row is shorter than 16 tokens."""
        return self.rows_per_batch * (max(1, self.cutoff_len // 16) if self.packing else 1)

    def _begin(self) -> dict[int, Iterator[tuple[int, list[Example], Mark]]]:
        """The units of each lane of this rank, from where `restore` says, with their numbers."""
        known, mine = self._restored.get("marks", {}), self._own_lanes()
        self._marks = {lane: Mark(*known.get(lane, ())) for lane in mine}
        self._states, self._pass_rows, idle = {}, np.inf, 0
        waiting: dict[int, deque] = {lane: deque() for lane in mine}
        dealt = self.source.encoded(self._rows(dict(self._marks)))
        patience = 2 if len(mine) == self.lanes else PATIENCE

        def deal() -> int:
            nonlocal idle
            (lane, position, total), examples = next(dealt)
            idle = 0 if examples else idle + 1
            refuse(idle > patience * self._pass_rows, NOTHING)
            if examples:
                waiting[lane].append((position, total, examples))
            return position

        def take(lane: int) -> Iterator[tuple[int, int, list[Example]]]:
            while True:
                while not waiting[lane]:
                    deal()
                yield waiting[lane].popleft()

        last = max(mark.end for mark in self._marks.values()) - 1  # what was consumed is compared before
        while last >= 0 and deal() < last:
            pass
        return {lane: self._units(mark, take(lane)) for lane, mark in self._marks.items()}

    def _rows(self, marks: dict[int, Mark]) -> Iterator[tuple[tuple[int, int, int], int, Row]]:
        """((lane, position, total of checksums), data set, row) of the rows of this rank's lanes that are
        behind their marks, in the order of the shuffled stream."""
        position, totals = 0, dict.fromkeys(marks, 0)
        ends = {mark.end - 1: lane for lane, mark in marks.items()}
        for epoch in itertools.count():
            begin, rows = position, self.source.rows(epoch)
            while window := list(itertools.islice(rows, self.buffer_size)):
                order = np.random.default_rng([self.seed, position]).permutation(len(window))
                for part, row in (window[i] for i in order.tolist()):
                    # one lane further in each pass, so that none has rows without examples for ever
                    lane = (position - begin + epoch) % self.lanes
                    if lane in marks:
                        known = checksum([position, part, row[0], row[2]])
                        totals[lane] = (totals[lane] + known) % 2**62
                    # where passes have other borders now, it is another lane's
                    ended = ends.get(position)
                    if ended is not None and (ended != lane or totals[ended] != marks[ended].total):
                        found = f"{row[1]}, or a row before it, is not what the run was trained on"
                        raise UserError(f"dataset: {found}; restore it, or set overwrite_output_dir=true")
                    if lane in marks and position >= marks[lane].position:
                        yield (lane, position, totals[lane]), part, row
                    position += 1
            refuse(position == begin, NOTHING)
            self._pass_rows = position - begin

    def _units(self, mark: Mark, rows: Iterator) -> Iterator[tuple[int, list[Example], Mark]]:
        """The examples or packed rows of a lane: number, examples, where their window begins."""
        origins: deque = deque()  # (position of its row, place in the row, total) of each that is to come
        examples, number = self.couple(self._examples(mark.skip, rows, origins)), mark.units
        full = self.cutoff_len * max(FEWEST_ROWS, min(MOST_ROWS, ALL_ROWS // self.lanes))
        while True:
            window, total = [next(examples)], 0
            while self.packing and (total := total + len(window[-1])) < full:
                window.append(next(examples))
            lengths, order = np.array(list(map(len, window))), np.arange(len(window))
            units = pack(lengths, self.cutoff_len, order) if self.packing else [order]
            (position, skip, _), (last, _, total) = origins[0], origins[-1]
            mark = Mark(number, position, skip, last + 1, total)
            for _ in window:
                origins.popleft()
            for unit in units:
                yield number, [window[i] for i in unit], mark
                number += 1

    def _examples(self, skip: int, rows: Iterator, origins: deque) -> Iterator[Example]:
        for position, total, examples in rows:
            for place, example in enumerate(examples[skip:], skip):
                origins.append((position, place, total))
                yield replace(example, copy=position)  # any row may come again, and is another copy
            skip = 0
