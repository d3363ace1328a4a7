"""The one reader of JSON: the files of models, data sets and runs, and JSON inside an option.

UTF-8 with or without a byte order mark. What cannot be meant is a UserError of one line that names the file
and the way out: a name that is there twice in one object, NaN, a value of another kind than expected, a file
that ends too early or is nested without end. Infinity stays, because transformers' configurations hold it.

    config = json_reader.read(folder / "config.json", way_out="fetch it again")
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from options.errors import UserError, refuse
from options.limits import small

KINDS = {dict: "a JSON object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
MOST_DIGITS = 400  # beyond the largest float; Python refuses to read 4,300


def read(path: Path, *, expected: type | None = dict, way_out: str = "", nan: bool = False) -> Any:
    """The value in this file; OSError if there is none. The other arguments: see parse."""
    try:
        text = small(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        raise UserError(_with(found, way_out)) from error
    return parse(text, str(path), expected=expected, way_out=way_out, nan=nan)


def parse(text: str, place: str, *, expected: type | None = dict, way_out: str = "", nan: bool = False):
    """The value of this JSON. Raises UserError that begins with `place`.

    expected: the kind of the whole value; None = any.  nan: whether NaN may be in it, as in a log of losses.
    """
    where, of_object = place, partial(_object, nan=nan)
    try:
        refuse(not text.strip(), "empty")
        value = json.loads(text, object_pairs_hook=of_object, parse_int=_whole)
        kind = KINDS.get(type(value), "a number")
        refuse(expected not in (None, type(value)), f"found {kind}, expected {KINDS.get(expected)}")
        return value
    except json.JSONDecodeError as error:
        where, problem = f"{place}:{error.lineno}", f"not JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        problem = "lists and objects are nested too deep"
    except UserError as error:
        problem = str(error)
    raise UserError(_with(f"{where}: {problem}", way_out))


def _with(problem: str, way_out: str) -> str:
    return f"{problem}; {way_out}" if way_out else problem


def _object(pairs: list[tuple[str, Any]], nan: bool) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice!r} is there twice in one object; keep one")
    for name, value in () if nan else pairs:
        numbers = value if isinstance(value, list) else [value]
        is_nan = any(isinstance(number, float) and number != number for number in numbers)
        refuse(is_nan, f"{name} is nan, expected a number")
    return found


def _whole(digits: str) -> int:
    refuse(len(digits) > MOST_DIGITS, f"a number of {len(digits)} digits")
    return int(digits)
