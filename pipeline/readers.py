"""Files -> rows: json, jsonl, csv, parquet, arrow and txt, one row at a time, with its place for messages.

A .json file is one array of objects (parsed piece by piece, so a file larger than memory can be read) or, as
many hub files are, one object per line. csv values stay text. txt is one document per line, as the column
`text`. Anything that is not what it should be is a UserError that names file and line.

Run from Python: for place, row in read_file(Path("data/tiny_alpaca.json")): ...
"""

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from options.errors import UserError, refuse
from options.limits import free_host_bytes

READ_CHARACTERS = 1 << 20  # of a .json file held while one object is parsed; grows for longer ones


def read_file(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, row); place is "file:line", or "file row n" where there are no lines."""
    try:
        yield from _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise UserError(f"{path}: not UTF-8 text ({error.reason}: {found:#04x})") from error


def _read_text(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8-sig") as file:
        yield from enumerate(file, start=1)


def _read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """.txt: one document per line. Blank lines come as empty documents, which the report counts."""
    for line, text in _read_text(path):
        yield f"{path}:{line}", {"text": text.rstrip("\r\n")}


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    for line, text in _read_text(path):
        if text.isspace():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            why = f"not JSON ({error.msg}, column {error.colno}). One object per line."
            raise UserError(f"{path}:{line}: {why}") from error
        yield f"{path}:{line}", _object(row, f"{path}:{line}")


def _object(row, place: str) -> dict:
    if not isinstance(row, dict):
        found = f"{type(row).__name__} {str(row)[:60]!r}"
        raise UserError(f"{place}: expected an object with named columns, found {found}")
    return row


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """One array of objects, or one object per line (many hub files are JSON lines in disguise)."""
    with open(path, encoding="utf-8-sig") as file:
        while (head := file.read(READ_CHARACTERS)).isspace():
            pass
    head = head.lstrip()
    if not head:
        raise UserError(f"{path}: the file is empty; expected a JSON array of objects")
    if head[0] == "{":
        # `{...}` alone over several lines would be one object: not rows
        yield from _read_jsonl(path)
        return
    if head[0] != "[":
        raise UserError(f"{path}:1: expected '[' (an array of objects), found {head[:20]!r}")
    for number, (line, row) in enumerate(_iterate_array(path)):
        yield f"{path}:{line}", _object(row, f"{path}:{line} (row {number})")


def _iterate_array(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line, value) of a top-level JSON array, holding only the value being parsed and a block."""
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig") as file:
        text, start, line, step = file.read(READ_CHARACTERS), 0, 1, READ_CHARACTERS

        def more() -> bool:
            nonlocal text, start, step
            block = file.read(step)
            text, start = text[start:] + block, 0
            step *= 2  # doubling keeps a single huge object from being parsed again and again
            return bool(block)

        def skip_blanks() -> str:
            """The character found behind them ("" at the end)."""
            nonlocal start, line
            while True:
                while start < len(text) and text[start] in " \t\r\n":
                    line += text[start] == "\n"
                    start += 1
                if start < len(text) or not more():
                    return text[start : start + 1]

        skip_blanks()
        start += 1  # the "["
        if skip_blanks() == "]":
            return
        while True:
            step = READ_CHARACTERS
            while True:
                try:
                    value, end = decoder.raw_decode(text, start)
                except json.JSONDecodeError as error:
                    if more():
                        continue
                    at = line + text.count("\n", start, error.pos)
                    raise UserError(f"{path}:{at}: not JSON ({error.msg}, column {error.colno})") from error
                # a number at the very end of the block may go on in the next one
                if end < len(text) or not more():
                    break
            yield line, value
            line += text.count("\n", start, end)
            start = end
            found = skip_blanks()
            if found == ",":
                start += 1
                skip_blanks()
            elif found == "]":
                start += 1
                if rest := skip_blanks():
                    raise UserError(f"{path}:{line}: expected the end of the file after ']', found {rest!r}")
                return
            else:
                what = repr(found or "the end of the file")
                raise UserError(f"{path}:{line}: expected ',' or ']' after a row, found {what}")


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """First line = column names; every value stays text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than csv's 128 KiB default
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row:
                    raise UserError(f"{place}: {len(row[None])} more fields than the header's {len(row) - 1}")
                missing = [name for name, value in row.items() if value is None]
                if missing:
                    raise UserError(f"{place}: the line ends before the column {missing[0]!r}")
                yield place, row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    with _damage_named(path, "a parquet file"), pyarrow.parquet.ParquetFile(path) as file:
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        largest, free = max((group.total_byte_size for group in groups), default=0), free_host_bytes()
        found = f"a row group of {largest / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free"
        refuse(largest > free, f"{path}: {found}; write the file with smaller row groups")
        yield from _arrow_rows(path, file.iter_batches(batch_size=1024))


def _read_arrow(path: Path) -> Iterator[tuple[str, dict]]:
    """Both layouts: the file format (with footer) and the stream format that `datasets` writes."""
    import pyarrow

    with _damage_named(path, "an arrow file"), pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        yield from _arrow_rows(path, batches)


@contextmanager
def _damage_named(path: Path, expected: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not {expected} ({error})") from error


def _arrow_rows(path: Path, batches) -> Iterator[tuple[str, dict]]:
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        yield f"{path} row {number}", row


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
_READERS |= {".arrow": _read_arrow, ".txt": _read_lines}
FILE_TYPES = tuple(_READERS)
