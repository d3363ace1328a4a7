"""Rows read while training, nothing stored: several data sets mixed, shuffled in a buffer, dealt to lanes.

A lane is a place in an update: lane v trains the stream's rows v, v + V, v + 2V, ..., V = rows of an update
over all ranks. It tokenises its rows, leaves out what is dropped and packs what is left, without looking at
another lane. So a rank tokenises its own lanes only, nothing is exchanged, and every order is a pure function
of (seed, row number): batch 8, 8 x 1 accumulated and 2 ranks x 4 train the same groups of rows. Rows are read
by every rank; where rows are dropped or packed lanes are at different rows, and at the end of a pass one may
be in the next pass already: in a long run each row comes equally often.

A run resumes by counts alone: which rows the buffer held follows from drawing numbers instead of rows, and
reading begins at the first row that is still to come, a little before it to see that the data are the same.
"""

import itertools
import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np

from options.errors import UserError, refuse
from parallel.world import World
from pipeline.batch import Batch, Example, Loader
from pipeline.encoding import ChunkEncoder
from pipeline.mixing import mixing_ends, turns
from pipeline.packing import pack
from pipeline.sources import Row, read_rows
from pipeline.store import Tally

MARKS = 2**14  # that a stream remembers: more than are drawn ahead of the update that is saved
CHECKED_ROWS = 1000  # before the place where a run goes on
WINDOW_ROWS = 64  # packed at once in all lanes, so that the first batch does not wait for 8192 examples
LEAST_WINDOW = 8  # rows of a lane
IDLE_ROWS = 1000  # of a lane, in whole passes without an example
NOTHING = "the streamed data holds no example to train on"


class Drawn(NamedTuple):
    """A row in the order of a stream."""

    part: int  # data set
    turn: int  # how often this data set was begun before, in this pass of the stream
    row: Row  # with None for its columns where it was not read


First = Callable[[int, int], float]


def from_its_start(part: int, turn: int) -> float:
    return 0


def not_at_all(part: int, turn: int) -> float:
    return math.inf


@dataclass
class RowStream:
    """The rows of a pass, and `encode`, which makes examples of one; what StreamingLoader needs."""

    encoders: list[ChunkEncoder]  # one for each data set
    opened: list  # hub data sets as opened, None for files
    mix_strategy: str  # concat, interleave_under, interleave_over
    interleave_probs: tuple[float, ...]
    seed: int
    held_out: frozenset[tuple[int, int]] = frozenset()  # (data set, row) of the evaluation rows
    tallies: list[Tally] = field(default_factory=list)  # of what this rank tokenised, every pass counted
    lengths: dict[int, int] = field(default_factory=dict)  # rows of the data sets that were read to their end

    def __post_init__(self):
        self.tallies = [Tally() for _ in self.encoders]

    @property
    def datasets(self) -> list[str]:
        return [encoder.info.name for encoder in self.encoders]

    def rows(self, epoch: int, first: First = from_its_start) -> Iterator[Drawn]:
        """One pass, before shuffling. first: (data set, turn) -> the row at which reading begins; those
        before it come unread. Where that is beyond the end of a data set `lengths` has to know the end."""
        for drawn in self._mixed(epoch, first):
            if (drawn.part, drawn.row[0]) not in self.held_out:
                yield drawn

    def encode(self, drawn: Drawn) -> list[Example]:
        return self.encoders[drawn.part].encode(drawn.row, self.tallies[drawn.part])

    def open(self, part: int, start: int) -> Iterator[Row]:
        """The rows of a data set from number `start` on."""
        return read_rows(self.encoders[part].info, self.opened[part], start)

    def _turn(self, part: int, turn: int, first: First) -> Iterator[Drawn]:
        start, known = first(part, turn), self.lengths.get(part, math.inf)
        unread = itertools.count() if min(start, known) == math.inf else range(int(min(start, known)))
        yield from (Drawn(part, turn, (number, "", None)) for number in unread)
        if start > known:
            return
        number = int(start) - 1
        for row in self.open(part, int(start)):
            yield Drawn(part, turn, row)
            number = row[0]
        self.lengths[part] = number + 1

    def _mixed(self, epoch: int, first: First) -> Iterator[Drawn]:
        parts = range(len(self.encoders))
        if len(parts) == 1 or self.mix_strategy == "concat":
            for k in parts:
                yield from self._turn(k, 0, first)
            return
        passes = [self._turn(k, 0, first) for k in parts]
        upcoming = [next(rows, None) for rows in passes]  # one row ahead: a set is used up with its last row
        used_up = [False] * len(parts)
        for k in turns(len(parts), self.interleave_probs, [self.seed, epoch]):
            drawn = upcoming[k]
            if drawn is None:
                raise UserError(f"dataset {self.datasets[k]!r} holds no rows, so it cannot be interleaved")
            yield drawn
            upcoming[k] = next(passes[k], None)
            if upcoming[k] is None:
                used_up[k] = True
                passes[k] = self._turn(k, drawn.turn + 1, first)
                upcoming[k] = next(passes[k], None)
            if mixing_ends(used_up, k, not self.interleave_probs, self.mix_strategy == "interleave_under"):
                return


class Mark(NamedTuple):
    """A place where a lane can begin: with an example, or with a window of packed rows."""

    units: int = 0  # examples, or packed rows, that it gave before
    position: int = 0  # of the row in the shuffled stream
    skip: int = 0  # examples of that row that were used before
    examples: int = 0  # of all rows that were used before


class StreamingLoader(Loader):
    """Batches of an endless stream, for data that is never stored.

    `source` is a RowStream, or what else has its `rows`, `encode` and `lengths`. `couple` makes other
    examples of the shuffled ones, one of each in their order, by what it sees of later ones. Layouts over
    ranks and batches with the same number of lanes train the same groups of rows.
    """

    batches_per_epoch = None

    def __init__(self, source, *, lanes: int = 1, buffer_size: int = 16384, couple=iter, **layout):
        """couple: Iterator[Example] -> Iterator[Example]."""
        super().__init__(**layout)
        self.source, self.couple = source, couple
        self.buffer_size = buffer_size if self.shuffle else 1
        self._restored: dict = {}
        self._set_lanes(lanes)

    def _set_lanes(self, lanes: int) -> None:
        self.lanes = lanes
        starts = map(self._first_unit, range(lanes))  # and then in the same lanes again
        mine = {(start + i) % lanes for start in starts for i in range(self.rows_per_batch)}
        self._begin = dict.fromkeys(sorted(mine), Mark())
        self._begins = {0: 0}  # the stream's position at which each of the latest epochs began
        self._checksums: dict[int, int] = {}  # of the latest rows, by position
        self._marks: dict[int, deque[Mark]] = {}
        self._restart()

    def _restart(self) -> None:
        most = max(64, MARKS // len(self._begin))
        self._marks = {lane: deque([mark], most) for lane, mark in self._begin.items()}

    def _first_unit(self, batch: int) -> int:
        """The number over all ranks of the first unit of a batch of this one."""
        return (batch * self.world + self.rank) * self.rows_per_batch

    def _mark(self, lane: int, batches: int) -> Mark:
        """The last place of a lane from which everything behind the first so many batches can be made."""
        units = max(0, batches * self.world * self.rows_per_batch - lane + self.lanes - 1) // self.lanes
        marks = self._marks[lane]
        while len(marks) > 1 and marks[1].units <= units:
            marks.popleft()
        return marks[0]

    def batches(self, start: int = 0) -> Iterator[Batch]:
        self._restart()
        marks = {lane: self._mark(lane, start) for lane in self._begin}
        begin = min(mark.position for mark in marks.values())
        seen = self._restored.get("checks", [])
        rows = _Dealer(self._rows(min([begin, *(check[0] for check in seen)])), marks, self.lanes)
        units = {lane: self._units(lane, mark, rows) for lane, mark in marks.items()}
        for number in itertools.count(start):
            examples: list[Example] = []
            first = self._first_unit(number)
            for unit in range(first, first + self.rows_per_batch):
                index, lane = divmod(unit, self.lanes)
                examples += next(found for i, found in units[lane] if i == index)
            yield self.collate(examples)

    def state(self, batches: int) -> dict:
        """Counts, and a checksum of the last rows before those that are still to come."""
        if not self._checksums:  # none was drawn since `restore`
            return self._restored
        marks = {lane: self._mark(lane, batches) for lane in self._begin}
        position, begins = min(mark.position for mark in marks.values()), dict(self._begins)
        epoch = max(epoch for epoch, begin in begins.items() if begin <= position)
        start = min(position, max(begins[epoch], position - CHECKED_ROWS, next(iter(self._checksums))))
        return {
            "batches": batches,
            "lanes": self.lanes,
            "marks": {lane: tuple(mark) for lane, mark in marks.items()},
            "begins": {n: begin for n, begin in begins.items() if n >= epoch},
            "lengths": dict(self.source.lengths),
            "checks": [(start, position, self._checksum_of(start, position))],
        }

    def restore(self, state: dict) -> None:
        """What was saved of this rank, or, one after another, of all ranks of a run of another size."""
        if not state:
            return
        if state["lanes"] != self.lanes:
            self._set_lanes(state["lanes"])
        before = self._restored or {"marks": {}, "begins": state["begins"], "checks": []}
        self._restored = state | {
            "marks": before["marks"] | state["marks"],
            "begins": before["begins"] | state["begins"],
            "checks": before["checks"] + state["checks"],
        }
        self._begin |= {lane: Mark(*mark) for lane, mark in state["marks"].items() if lane in self._begin}
        self._begins = dict(sorted(self._restored["begins"].items()))
        self.source.lengths |= state["lengths"]
        self._restart()

    def gather_tallies(self, world: World) -> None:
        """Add to the tallies of the source what the other ranks tokenised."""
        if len(self._begin) * self.world != self.lanes:
            return  # each has tokenised some or all of what the others did
        mine = [asdict(tally) for tally in self.source.tallies]
        # ranks that share a row or a layer have tokenised the same
        of_ranks = dict(world.gather([world.data_rank, mine]))
        for tallies in (of_ranks[rank] for rank in of_ranks if rank != world.data_rank):
            for tally, other in zip(self.source.tallies, tallies):
                tally.add(Tally(**other))

    def draws_per_epoch(self, size: int) -> None:
        """Nobody knows."""

    def draws(self, size: int, start: int = 0) -> Iterator[list[Batch]]:
        """The batches of draw number `start` and of those that follow, `size` each."""
        batches = self.batches(start * size)
        while True:
            yield list(itertools.islice(batches, size))

    def most_tokens(self) -> int:
        """Tokens of the largest batch that may come: nobody knows the stream's lengths."""
        return self.rows_per_batch * self.cutoff_len

    def most_examples(self) -> int:
        """Examples of the largest batch that may come, if none in a packed row is shorter than 16 tokens."""
        return self.rows_per_batch * (max(1, self.cutoff_len // 16) if self.packing else 1)

    def _rows(self, start: int) -> Iterator[tuple[int, int, int, Drawn]]:
        """(position, epoch, place in it, row) of the endless shuffled stream, from position `start` on."""
        self._checksums, checks = {}, list(self._restored.get("checks", []))
        begin, epoch = max((begin, epoch) for epoch, begin in self._begins.items() if begin <= start)
        skip = start - begin
        first = self._still_to_come(epoch, skip) if skip else from_its_start
        for number in itertools.count(epoch):
            self._begins[number] = begin
            rows = self._shuffled(self.source.rows(number, first), number)
            place = skip - 1
            for place, drawn in enumerate(itertools.islice(rows, skip, None), skip):
                position = begin + place
                self._checksums[position] = _checksum(drawn)
                self._checksums.pop(position - MARKS - CHECKED_ROWS, None)
                for check in [check for check in checks if check[1] == position + 1]:
                    self._refuse_other_rows(check)
                    checks.remove(check)
                yield position, number, place, drawn
            refuse(place < 0, NOTHING)
            begin, skip, first = begin + place + 1, 0, from_its_start

    def _shuffled(self, rows: Iterator[Drawn], epoch: int) -> Iterator[Drawn]:
        return shuffle_buffer(rows, self.buffer_size, [self.seed, epoch])

    def _still_to_come(self, epoch: int, count: int) -> First:
        """Where reading has to begin so that every row of the pass behind the first `count` is read."""
        waiting: set[tuple[int, int, int]] = set()
        first: dict[tuple[int, int], int] = {}

        def noted() -> Iterator[Drawn]:
            for drawn in self.source.rows(epoch, not_at_all):
                number = drawn.row[0]
                waiting.add((drawn.part, drawn.turn, number))
                first[drawn.part, drawn.turn] = number + 1
                yield drawn

        for drawn in itertools.islice(self._shuffled(noted(), epoch), count):
            waiting.remove((drawn.part, drawn.turn, drawn.row[0]))
        for part, turn, number in waiting:
            first[part, turn] = min(first[part, turn], number)
        return lambda part, turn: first.get((part, turn), 0)

    def _checksum_of(self, start: int, end: int) -> int:
        numbers = (self._checksums[position] for position in range(start, end))
        return zlib.crc32(b"".join(number.to_bytes(4) for number in numbers))

    def _refuse_other_rows(self, check: tuple[int, int, int]) -> None:
        start, end, checksum = check
        if self._checksum_of(start, end) != checksum:
            found = (
                f"the first {self._restored['batches']} batches of the stream are not those of the run so far"
            )
            raise UserError(f"dataset: {found}; restore the data, or set overwrite_output_dir=true")

    def _encoded(self, lane: int, mark: Mark, rows: "_Dealer", origins: deque) -> Iterator[Example]:
        """The examples of a lane; `origins` gets number, position and place in its row of each."""
        number, skip, latest, idle = mark.examples, mark.skip, None, 0
        while True:
            position, epoch, drawn = rows.take(lane)
            examples = self.source.encode(drawn)
            for place, example in enumerate(examples[skip:], skip):
                origins.append((number, position, place))
                # any row may come again, in this pass or the next, and is another copy
                yield replace(example, copy=number * self.lanes + lane)
                number += 1
            skip, idle = 0, 0 if examples else idle + 1
            latest = epoch if examples or latest is None else latest
            passes = epoch - latest  # of each the lane has seen a part, of `lanes` of them all rows
            refuse(passes > self.lanes or (passes > 1 and idle > IDLE_ROWS), NOTHING)

    def _units(self, lane: int, mark: Mark, rows: "_Dealer") -> Iterator[tuple[int, list[Example]]]:
        """The examples or packed rows of a lane with their numbers."""
        origins: deque[tuple[int, int, int]] = deque()
        examples = self.couple(self._encoded(lane, mark, rows, origins))
        least = max(LEAST_WINDOW, WINDOW_ROWS // self.lanes) * self.cutoff_len if self.packing else 0
        number = mark.units
        while True:
            window = [next(examples)]
            total = len(window[0])
            while total < least:
                window.append(next(examples))
                total += len(window[-1])
            while origins[0][0] * self.lanes + lane != window[0].copy:
                origins.popleft()
            before, position, skip = origins[0]
            self._marks[lane].append(Mark(number, position, skip, before))
            lengths = np.array([len(example) for example in window])
            units = pack(lengths, self.cutoff_len, np.arange(len(window))) if self.packing else [[0]]
            for unit in units:
                yield number, [window[i] for i in unit]
                number += 1


class _Dealer:
    """The rows of each lane, out of one stream that is read once for all lanes of a rank."""

    def __init__(self, rows: Iterator[tuple[int, int, int, Drawn]], marks: dict[int, Mark], lanes: int):
        self.rows, self.lanes, self.marks = rows, lanes, marks
        self.waiting: dict[int, deque] = {lane: deque() for lane in marks}

    def take(self, lane: int) -> tuple[int, int, Drawn]:
        """(position, epoch, row)."""
        while not self.waiting[lane]:
            position, epoch, place, drawn = next(self.rows)
            # one lane further in each pass, so that none has rows that never give an example, for ever
            given = (place + epoch) % self.lanes
            if given in self.waiting and position >= self.marks[given].position:
                self.waiting[given].append((position, epoch, drawn))
        return self.waiting[lane].popleft()


def shuffle_buffer(items: Iterator, size: int, seed: list[int]) -> Iterator:
    """The items in an order that depends on `seed` alone: each comes from a random place of a full buffer."""
    random = np.random.default_rng(seed)
    buffer: list = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(random.integers(size))
        yield buffer[place]
        buffer[place] = item
    for place in random.permutation(len(buffer)):
        yield buffer[place]


def _checksum(drawn: Drawn) -> int:
    number, _, columns = drawn.row
    return zlib.crc32(json.dumps([drawn.part, number, columns], default=repr).encode())
