"""Files -> rows: json, jsonl, csv, parquet, arrow and txt, one row at a time, with its place for messages.

.json and .jsonl are read alike, as `datasets` does: an array of objects, an array of texts (column `text`),
or objects one after another, each on a line or over several; they are parsed piece by piece, so a file may be
larger than memory. csv values stay text, an empty one is null. txt is one document per line, as the column
`text`. Anything that is not what it should be is a UserError that names file and line.

Run from Python: for place, row in read_file(Path("data/tiny_alpaca.json")): ...
"""

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from options import json_reader
from options.errors import UserError, refuse
from options.limits import BYTES, free_host_bytes

BATCH_ROWS = 1024  # of parquet and arrow files that are Python's at once
MOST_GROWTH = 50  # of rows that take gigabytes: numbers of one byte become objects of 40
READ_CHARACTERS = 1 << 20  # of a .json file held while one object is parsed; grows for longer ones


def read_file(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, row); place is "file:line", or "file row n" where there are no lines."""
    try:
        yield from _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise UserError(f"{path}: not UTF-8 text ({error.reason}: {found:#04x})") from error


def _lines(file, path: Path) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(BYTES)
        refuse(len(line) == BYTES, f"{path}:{number}: a line of more than {BYTES >> 20} MiB; divide the text")
        if not line:
            return
        yield line


def _read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """.txt: one document per line. Blank lines come as empty documents, which the report counts."""
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(_lines(file, path), start=1):
            yield f"{path}:{line}", {"text": text.rstrip("\r\n")}


def _object(row, place: str) -> dict:
    if not isinstance(row, dict):
        found = f"{type(row).__name__} {str(row)[:60]!r}"
        raise UserError(f"{place}: expected an object with named columns, found {found}")
    return row


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    of_texts = False
    for number, (line, value, in_array) in enumerate(_iterate_json(path)):
        of_texts |= number == 0 and in_array and isinstance(value, str)
        row = {"text": value} if of_texts and isinstance(value, str) else value
        yield f"{path}:{line}", _object(row, f"{path}:{line}{f' (row {number})' if in_array else ''}")


def _iterate_json(path: Path) -> Iterator[tuple[int, object, bool]]:
    """(line, value, whether in an array) of each row, holding only the value being parsed and a block."""
    decoder = json_reader.decoder(nan=True)
    with open(path, encoding="utf-8-sig") as file:
        text, start, line, step = "", 0, 1, READ_CHARACTERS

        def more() -> bool:
            nonlocal text, start, step
            refuse(step > BYTES, f"{path}:{line}: a row of more than {BYTES >> 20} MiB, or no JSON")
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

        def parse() -> tuple[object, int]:
            """The value that begins at `start`, and its end."""
            while True:
                try:
                    value, end = decoder.raw_decode(text, start)
                except json.JSONDecodeError as error:
                    # a value breaks off only at the end of the block, and never with a line behind it
                    if "\n" not in text[error.pos :] and more():
                        continue
                    at = line + text.count("\n", start, error.pos)
                    begun = f" of line {at}, one object began here" if at > line and not in_array else ""
                    found = f"not JSON ({error.msg}, column {error.colno}{begun})"
                    raise UserError(f"{path}:{line if begun else at}: {found}") from error
                except (UserError, RecursionError) as error:  # a name twice, 5,000 digits; nested too deeply
                    raise UserError(f"{path}:{line}: JSON that cannot be read ({error})") from error
                # a number at the very end of the block may go on in the next one
                if end < len(text) or not more():
                    return value, end

        found = skip_blanks()
        if not found and path.suffix.lower() == ".jsonl":
            return  # no lines, no rows
        refuse(not found, f"{path}: the file is empty; expected a JSON array of objects")
        if found not in "[{":
            what = repr(text[start : start + 20])
            raise UserError(f"{path}:{line}: expected '[' (an array of objects) or '{{', found {what}")
        in_array = found == "["
        if in_array:
            start += 1
            found = skip_blanks()
        while found and not (in_array and found == "]"):
            step = READ_CHARACTERS
            value, end = parse()
            yield line, value, in_array
            line += text.count("\n", start, end)
            start = end
            found = skip_blanks()
            if in_array and found not in (",", "]"):
                what = repr(found or "the end of the file")
                raise UserError(f"{path}:{line}: expected ',' or ']' after a row, found {what}")
            if found == "," and in_array:
                start += 1
                skip_blanks()
        if in_array:
            start += 1
            if rest := skip_blanks():
                raise UserError(f"{path}:{line}: expected the end of the file after ']', found {rest!r}")


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """First line = column names; every value stays text, but nothing is null, as in `datasets`."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than csv's 128 KiB default
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_lines(file, path), strict=True)
        try:
            names = reader.fieldnames or []
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            refuse(twice is not None, f"{path}:1: two columns have the name {twice!r}; rename one")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row:
                    raise UserError(f"{place}: {len(row[None])} more fields than the header's {len(row) - 1}")
                missing = [name for name, value in row.items() if value is None]
                if missing:
                    raise UserError(f"{place}: the line ends before the column {missing[0]!r}")
                yield place, {name: value or None for name, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    from pyarrow import parquet

    with _damage_named(path, "a parquet file"):
        about = parquet.read_metadata(path)
        columns = [about.schema.column(i) for i in range(about.num_columns)]
        groups, free = [about.row_group(i) for i in range(about.num_row_groups)], free_host_bytes()
        # one row of a column of lists may hold any number of values, and the file count where it holds one
        lists = [i for i, column in enumerate(columns) if column.max_repetition_level > 0]
        sizes = (each.total_byte_size + sum(8 * each.column(i).num_values for i in lists) for each in groups)
        largest = max(sizes, default=0)
        found = f"a row group of {largest / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free"
        refuse(largest > free, f"{path}: {found}; write the file with smaller row groups")
        # a text stored once for many rows stays so until they are weighed; not one of DELTA_BYTE_ARRAY
        used = [" ".join(name for g in groups for name in g.column(i).encodings) for i in range(len(columns))]
        kept = [column.path for column, names in zip(columns, used) if "BYTE_ARRAY" not in names]
        rows = BATCH_ROWS if len(kept) == len(columns) else min(BATCH_ROWS, 1 + BYTES // (1 + largest))
        with parquet.ParquetFile(path, metadata=about, read_dictionary=kept) as file:
            yield from _arrow_rows(path, file.iter_batches(rows), about.schema.to_arrow_schema())


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


def _arrow_rows(path: Path, batches, plain=None) -> Iterator[tuple[str, dict]]:
    """plain: the schema without dictionaries. UserError for a few rows that would take all memory."""
    number = 0
    for batch in (each.slice(i, BATCH_ROWS) for each in batches for i in range(0, len(each), BATCH_ROWS)):
        size = sum(map(_python_bytes, batch.columns))
        wrong = size > BYTES and (size > MOST_GROWTH * batch.nbytes or size > free_host_bytes())
        found = f"{len(batch)} rows become {size / 1e9:.1f} GB, of {batch.nbytes / 1e6:.1f} MB in the file"
        refuse(wrong, f"{path} row {number}: {found}; leave out the column that repeats a long text or list")
        batch = batch if plain is None else batch.cast(plain)
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError, LookupError):  # bytes that are no text, a date that Python lacks
            first = number
            rows = (_one_row(batch, i, f"{path} row {first + i}") for i in range(batch.num_rows))
        for row in rows:
            yield f"{path} row {number}", row
            number += 1


def _python_bytes(array) -> int:
    """About what to_pylist makes of it; a text that a dictionary holds once comes for every row."""
    from pyarrow import ArrowNotImplementedError, compute, types

    size, kind = 40 * len(array), array.type
    if types.is_nested(kind):
        parts = [array.keys, array.items] if types.is_map(kind) else array.flatten()
        return size + sum(map(_python_bytes, parts if isinstance(parts, list) else [parts]))
    values = array.dictionary if types.is_dictionary(kind) else array
    with suppress(ArrowNotImplementedError):  # for numbers
        lengths = compute.binary_length(values)
        size += compute.sum(lengths if values is array else lengths.take(array.indices)).as_py() or 0
    return size


def _one_row(batch, i: int, place: str) -> dict:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except (ValueError, OverflowError, LookupError) as error:
        raise UserError(f"{place}: a value that cannot be read ({error})") from error


_READERS = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
_READERS |= {".arrow": _read_arrow, ".txt": _read_lines}
FILE_TYPES = tuple(_READERS)
