"""The one reader of JSON: files of models, data sets and runs; JSON inside options, rows, tensors, answers.

UTF-8 with or without a byte order mark. What cannot be meant is a UserError of one line that names the file
and the way out: a name that is there twice in one object, NaN, half a character, another kind of value, one
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
MOST_DIGITS = 308  # of the largest float there are 309; Python refuses to read 4,300


def read(path: Path, *, expected: type | None = dict, way_out: str = "", nan: bool = False) -> Any:
    """The value in this file; OSError if there is none. The other arguments: see parse."""
    return parse(small(path).read_bytes(), str(path), expected=expected, way_out=way_out, nan=nan)


def parse(
    text: str | bytes, place: str, *, expected: type | None = dict, way_out: str = "", nan: bool = False
) -> Any:
    """The value of this JSON. UserError begins with `place`; its cause is JSONDecodeError if it is no JSON.

    expected: the kind of the whole value; None = any.  nan: whether NaN may be in it, as in a log of losses.
    """
    where, remedy, of_file = place, f"; {way_out}" if way_out else "", isinstance(text, bytes)
    try:
        text = text.decode("utf-8-sig") if of_file else text
        value = decoder(nan).decode(text)
        kind = KINDS.get(type(value), "a number")
        refuse(expected not in (None, type(value)), f"found {kind}, expected {KINDS.get(expected)}")
        refuse(not nan and _is_nan(value), "found nan, expected a number")
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        where += f":{error.lineno}" if of_file else ""
        problem = f"not JSON ({error.msg}, column {error.colno})" if text.strip() else "empty"
        raise UserError(f"{where}: {problem}{remedy}") from error
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason} at byte {error.start})"
    except UnicodeEncodeError as error:
        problem = f"holds half a character, {ascii(error.object[error.start])} (a lone surrogate)"
    except RecursionError:
        problem = "lists and objects are nested too deep"
    except UserError as error:
        problem = str(error)
    raise UserError(f"{where}: {problem}{remedy}")


def decoder(nan: bool) -> json.JSONDecoder:
    """For who reads one value after another. Raises UserError and RecursionError beside JSONDecodeError."""
    return json.JSONDecoder(object_pairs_hook=partial(_object, nan=nan), parse_int=_whole)


def _object(pairs: list[tuple[str, Any]], nan: bool) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice!r} is there twice in one object; keep one")
    for name, value in () if nan else pairs:
        refuse(_is_nan(value), f"{name} is nan, expected a number")
    return found


def _is_nan(value: Any) -> bool:
    return any(map(_is_nan, value)) if isinstance(value, list) else type(value) is float and value != value


def _whole(digits: str) -> int:
    refuse(len(digits) > MOST_DIGITS, f"a number of {len(digits)} digits")
    return int(digits)
