"""Rows read while training: one pass after another, several data sets mixed, evaluation rows left out."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from options.errors import UserError
from pipeline.batch import Example
from pipeline.encoding import ChunkEncoder
from pipeline.mixing import mixing_ends, turns
from pipeline.sources import Row, read_rows
from pipeline.store import Tally


@dataclass
class RowStream:
    """The rows of a pass, and `encode`, which makes examples of one; what batch.StreamingLoader needs."""

    encoders: list[ChunkEncoder]  # one for each data set
    opened: list  # hub data sets as opened, None for files
    mix_strategy: str  # concat, interleave_under, interleave_over
    interleave_probs: tuple[float, ...]
    seed: int
    held_out: frozenset[tuple[int, int]] = frozenset()  # (data set, row) of the evaluation rows
    tallies: list[Tally] = field(default_factory=list)  # of what was read so far, every pass counted

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

    def encode(self, item: tuple[int, Row]) -> list[Example]:
        part, row = item
        return self.encoders[part].encode(row, self.tallies[part])

    def _read(self, part: int) -> Iterator[Row]:
        return read_rows(self.encoders[part].info, self.opened[part])

    def _mixed(self, epoch: int) -> Iterator[tuple[int, Row]]:
        parts = range(len(self.encoders))
        if len(parts) == 1 or self.mix_strategy == "concat":
            for k in parts:
                yield from ((k, row) for row in self._read(k))
            return
        passes = [self._read(k) for k in parts]
        upcoming = [next(rows, None) for rows in passes]  # one row ahead: a set is used up with its last row
        used_up = [False] * len(parts)
        for k in turns(len(parts), self.interleave_probs, [self.seed, epoch]):
            if upcoming[k] is None:
                raise UserError(f"dataset {self.datasets[k]!r} holds no rows, so it cannot be interleaved")
            yield k, upcoming[k]
            upcoming[k] = next(passes[k], None)
            if upcoming[k] is None:
                used_up[k] = True
                passes[k] = self._read(k)
                upcoming[k] = next(passes[k], None)
            if mixing_ends(used_up, k, not self.interleave_probs, self.mix_strategy == "interleave_under"):
                return
