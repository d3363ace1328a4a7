"""Tokenised examples on disk: flat arrays, memory-mapped, written in a way that survives being killed.

A folder holds tokens.i32, trained.u8, turns.i16, roles.u8 (one entry per token), lengths.i32, rows.i64,
splits.i32, tags.i8 and asked.u32 (one per example), and meta.json (sizes, checksums, counts). While it is
being written its name ends in `.partial` and `progress.json` says how far it is: a killed run goes on there.
Renaming makes it complete; a finished folder whose sizes or checksums are wrong is refused.

Run from Python: store = ExampleStore([TokenArrays.open(folder)], ["my data"]); store.example(0)
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from options import json_reader
from options.atomic import TEMPORARY, atomic_file, atomic_folder, remove_folder, room_in
from options.errors import UserError
from pipeline.batch import Example
from pipeline.mixing import hold_out

PER_TOKEN = {"tokens": "<i4", "trained": "bool", "turns": "<i2", "roles": "u1"}
PER_EXAMPLE = {"lengths": "<i4", "rows": "<i8", "splits": "<i4", "tags": "i1", "asked": "<u4"}
ENDINGS = {"<i8": "i64", "<i4": "i32", "<u4": "u32", "<i2": "i16", "i1": "i8", "u1": "u8", "bool": "u8"}
ARRAYS = PER_TOKEN | PER_EXAMPLE  # name -> file and dtype
ARRAYS = {name: (f"{name}.{ENDINGS[kind]}", np.dtype(kind)) for name, kind in ARRAYS.items()}
SETS_FILE = "anvil_tokenised.json"
CHECK_BYTES = 1 << 24  # read this much at a time for checksums

# of a Tally
SUMMED = ("read", "used", "cut", "examples", "tokens", "tokens_cut", "tokens_trained", "desirable")


@dataclass
class Tally:
    """What happened to rows: read = used + all dropped. Counts of tokens are those of the kept examples."""

    read: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    first: dict[str, str] = field(default_factory=dict)  # reason or note -> the first place it was seen
    notes: dict[str, int] = field(default_factory=dict)  # what was repaired -> rows
    cut: int = 0  # rows cut to cutoff_len
    examples: int = 0
    tokens: int = 0
    tokens_cut: int = 0
    tokens_trained: int = 0
    longest: int = 0  # tokens of the longest kept example
    desirable: int = 0  # examples tagged 1: KTO's good answers

    def add(self, other: "Tally") -> None:
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        for mine, theirs in ((self.dropped, other.dropped), (self.notes, other.notes)):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count
        self.first = other.first | self.first

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def note(self, note: str, place: str) -> None:
        self.notes[note] = self.notes.get(note, 0) + 1
        self.first.setdefault(note, place)


@dataclass
class TokenArrays:
    """Examples of a run of rows or of a whole data set, flat; in memory, or memory-mapped from a folder."""

    tokens: np.ndarray  # (tokens of all examples,), as trained, turns and roles; see Example
    trained: np.ndarray
    turns: np.ndarray
    roles: np.ndarray
    lengths: np.ndarray  # (n,) tokens of each example
    rows: np.ndarray  # (n,) the row that it came from
    splits: np.ndarray  # (n,), as tags and asked; see Example
    tags: np.ndarray
    asked: np.ndarray
    tally: Tally

    @classmethod
    def join(cls, examples: Sequence[Example], tally: Tally) -> "TokenArrays":
        def flat(name: str) -> np.ndarray:
            parts = [getattr(example, name) for example in examples]
            return np.concatenate(parts or [np.empty(0)]).astype(ARRAYS[name][1], copy=False)

        found = [(len(one), one.source[1], one.split, one.tag, one.asked) for one in examples]
        columns = np.array(found, np.int64).reshape(-1, len(PER_EXAMPLE)).T
        arrays = {name: flat(name) for name in PER_TOKEN}
        arrays |= {name: each.astype(PER_EXAMPLE[name]) for name, each in zip(PER_EXAMPLE, columns)}
        return cls(**arrays, tally=tally)

    @classmethod
    def open(cls, folder: str | Path, check: bool = True) -> "TokenArrays":
        """Memory-map a finished folder. Raises UserError when a file is missing, short, or changed."""
        folder = Path(folder)
        meta = _read_json(folder / "meta.json")
        if meta is None or meta.get("sizes", {}).keys() != ARRAYS.keys():
            why = "meta.json is missing, not readable, or of another version"
            raise UserError(f"{folder}: {why}; tokenise anew")
        arrays = {}
        for name, (file, dtype) in ARRAYS.items():
            path = folder / file
            found = path.stat().st_size if path.is_file() else -1
            if found != meta["sizes"][name]:
                raise UserError(f"{path}: {found} bytes, expected {meta['sizes'][name]}")
            if check and _checksum(path) != meta["checksums"][name]:
                raise UserError(f"{path}: its bytes changed since it was written (checksum)")
            # an empty file cannot be mapped; asarray drops the memmap subclass, whose slicing is slow
            arrays[name] = np.asarray(np.memmap(path, dtype, "r")) if found else np.empty(0, dtype)
        return cls(**arrays, tally=Tally(**meta["tally"]))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n + 1,) where each example begins; the last one where all end."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @cached_property
    def questions(self) -> np.ndarray:  # gathered by name in stages/kto.py
        """(n,) tokens in front of the first trained one."""
        trained = np.flatnonzero(self.trained)
        return trained[np.searchsorted(trained, self.offsets[:-1])] - self.offsets[:-1]


class ExampleStore:
    """Examples of several datasets in one order. index: (n, 2), part and example of that part; None = all."""

    def __init__(self, parts: Sequence[TokenArrays], datasets: Sequence[str], index=None):
        if index is None:
            pairs = [(k, j) for k, part in enumerate(parts) for j in range(len(part))]
            index = np.array(pairs, np.int64).reshape(-1, 2)
        self.parts, self.datasets, self.index = list(parts), list(datasets), index
        self.lengths = self._gather("lengths", np.int32)
        self.reference: np.ndarray | None = None  # (n, segments) fp32; filled by stages/reference.py

    @classmethod
    def from_examples(cls, examples: Sequence[Example], datasets: Sequence[str]) -> "ExampleStore":
        """A store in memory, in the order of the data sets."""
        mine = [[example for example in examples if example.source[0] == k] for k in range(len(datasets))]
        return cls([TokenArrays.join(part, Tally()) for part in mine], datasets)

    def __len__(self) -> int:
        return len(self.index)

    def example(self, i: int) -> Example:
        k, j = self.index[i]
        part = self.parts[k]
        span = slice(part.offsets[j], part.offsets[j + 1])
        arrays = (array[span] for array in (part.tokens, part.trained, part.turns, part.roles))
        source, split, tag = (int(k), int(part.rows[j])), int(part.splits[j]), int(part.tags[j])
        reference = None if self.reference is None else tuple(self.reference[i].tolist())
        return Example(*arrays, source, split, tag, reference, int(self.copies[i]), int(part.asked[j]))

    @cached_property
    def copies(self) -> np.ndarray:
        """(n,) how often the same example stands before each: num_samples and interleave_over repeat some."""
        starts = np.cumsum([0, *map(len, self.parts)])
        numbers, copies = starts[self.index[:, 0]] + self.index[:, 1], np.zeros(len(self), np.int64)
        if np.bincount(numbers, minlength=1).max() > 1:  # sorting takes a second per million
            order = np.argsort(numbers, kind="stable")
            copies[order] = np.arange(len(self)) - np.searchsorted(numbers[order], numbers[order])
        return copies

    @property
    def trained_share(self) -> float:
        """Share of all tokens that are trained on, whichever examples are drawn."""
        total = sum(len(part.tokens) for part in self.parts)
        return sum(int(np.count_nonzero(part.trained)) for part in self.parts) / max(1, total)

    @property
    def segment_lengths(self) -> np.ndarray:
        """(segments,) int64: tokens of every segment; an example has one or two."""
        lengths, splits = np.asarray(self.lengths, np.int64), self._gather("splits", np.int64)
        return np.concatenate([np.where(splits > 0, splits, lengths), (lengths - splits)[splits > 0]])

    @property
    def sources(self) -> np.ndarray:
        """(n, 2): dataset and row of each example."""
        return np.stack([self.index[:, 0], self._gather("rows", np.int64)], 1)

    def digest(self) -> str:
        """A checksum of every token, mark, border and tag and of the order, read at the speed of the disk."""
        found = zlib.crc32(np.ascontiguousarray(self.index, np.int64).view(np.uint8))
        for part in self.parts:
            for name in ARRAYS:
                array = getattr(part, name).view(np.uint8)
                for start in range(0, len(array), CHECK_BYTES):
                    found = zlib.crc32(array[start : start + CHECK_BYTES], found)
        return f"{found:08x}"

    def select(self, which: np.ndarray) -> "ExampleStore":
        return ExampleStore(self.parts, self.datasets, self.index[which])

    def split(self, val_size: float, seed: int) -> tuple["ExampleStore", "ExampleStore"]:
        """(train, validation) by whole rows; a row that is repeated is evaluated once."""
        held = hold_out(self.sources, val_size, seed)
        validation = np.flatnonzero(held)
        _, first = np.unique(self.index[validation], axis=0, return_index=True)
        return self.select(np.flatnonzero(~held)), self.select(validation[np.sort(first)])

    def _gather(self, name: str, dtype) -> np.ndarray:
        values = np.empty(len(self.index), dtype)
        for k, part in enumerate(self.parts):
            mine = self.index[:, 0] == k
            values[mine] = getattr(part, name)[self.index[mine, 1]]
        return values


def partial_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


class StoreWriter:
    """Appends to `folder`.partial; `finish` makes it `folder`. Goes on where a killed writer stopped."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.partial = partial_folder(self.folder)
        self.partial.mkdir(parents=True, exist_ok=True)
        for litter in self.partial.glob(TEMPORARY + "*"):  # of a writer that was killed
            litter.unlink()
        state = _read_json(self.partial / "progress.json") or {}
        self.sizes = state.get("sizes", dict.fromkeys(ARRAYS, 0))
        self.checksums = state.get("checksums", dict.fromkeys(ARRAYS, 0))
        self.tally = Tally(**state.get("tally", {}))
        self.files = {}
        for name, (file, _) in ARRAYS.items():
            path = self.partial / file
            handle = self.files[name] = open(path, "ab")  # noqa: SIM115 (closed in finish and close)
            if path.stat().st_size < self.sizes[name]:
                raise UserError(f"{path} is shorter than progress.json says; delete {self.partial}")
            handle.truncate(self.sizes[name])  # what was written after the last progress.json does not count

    def append(self, chunk: TokenArrays) -> None:
        for name, (_, dtype) in ARRAYS.items():
            data = getattr(chunk, name).astype(dtype, copy=False).tobytes()
            self.files[name].write(data)
            self.files[name].flush()
            self.sizes[name] += len(data)
            self.checksums[name] = zlib.crc32(data, self.checksums[name])
        self.tally.add(chunk.tally)
        self._state("progress.json")

    def _state(self, file: str) -> None:
        state = {"sizes": self.sizes, "checksums": self.checksums, "tally": asdict(self.tally)}
        with atomic_file(self.partial / file) as temporary:
            temporary.write_text(json.dumps(state))

    def close(self) -> None:
        for handle in self.files.values():
            handle.close()

    def finish(self) -> None:
        for handle in self.files.values():
            handle.flush()
            os.fsync(handle.fileno())
        self.close()
        self._state("meta.json")
        (self.partial / "progress.json").unlink(missing_ok=True)
        remove_folder(self.folder)
        os.replace(self.partial, self.folder)


def save_sets(folder: Path, sets: dict[str, ExampleStore], meta: dict) -> None:
    """Write several stores that may share parts, and `meta`, into a new folder; complete or absent."""
    parts = list({id(part): part for store in sets.values() for part in store.parts}.values())
    described = []
    with room_in(folder.parent, "tokenized_path"), atomic_folder(folder) as temporary:
        for number, part in enumerate(parts):
            writer = StoreWriter(temporary / f"part-{number}")
            writer.append(part)
            writer.finish()
        for number, (name, store) in enumerate(sets.items()):
            np.save(temporary / f"index-{number}.npy", store.index)
            used = [next(i for i, part in enumerate(parts) if part is mine) for mine in store.parts]
            described.append({"name": name, "datasets": store.datasets, "parts": used})
        (temporary / SETS_FILE).write_text(json.dumps(meta | {"sets": described}, indent=1))


def load_sets(folder: Path) -> tuple[dict, dict[str, ExampleStore]]:
    """What save_sets wrote. Raises UserError for a folder of something else or damaged files."""
    meta = _read_json(folder / SETS_FILE)
    if meta is None:
        why = f"exists but holds no tokenised data of Anvil ({SETS_FILE} is missing); name another folder"
        raise UserError(f"tokenized_path: {folder} {why}, and the data will be written there")
    used = sorted({part for entry in meta["sets"] for part in entry["parts"]})
    opened = {part: TokenArrays.open(folder / f"part-{part}") for part in used}
    sets = {}
    for number, entry in enumerate(meta["sets"]):
        path = folder / f"index-{number}.npy"
        try:
            index = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError, MemoryError) as error:
            raise UserError(f"{path}: missing or damaged ({error})") from error
        parts = [opened[part] for part in entry["parts"]]
        sets[entry["name"]] = ExampleStore(parts, entry["datasets"], index)
    return meta, sets


def _read_json(path: Path):
    if not path.is_file():
        return None
    try:
        return json_reader.read(path, expected=None)
    except UserError:  # half-written by a full disk: as good as absent
        return None


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(CHECK_BYTES):
            value = zlib.crc32(block, value)
    return value
