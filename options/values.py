"""From text to typed values: what a key's type accepts, in YAML, JSON and on the command line alike.

The kinds: int, float, bool, str, Literal[...], tuple[...], and unions of these and None. Until the kind is
known a value stays text, because YAML 1.1 reads `no` as False, `1e-4` as a string and `1.10` as 1.1.
"""

import difflib
import json
import re
import textwrap
import typing
from types import NoneType, UnionType

import yaml

from options import json_reader
from options.errors import UserError, refuse

BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
NULLS = ("null", "none", "~")
MOST_VALUES = 10_000  # of one option


class Plain(str):
    """Text without quotes, from YAML or the command line: its type is decided by the key."""


def truth_word(truth: bool) -> Plain:
    return Plain("true" if truth else "false")


def node_value(node: yaml.Node, depth: int = 0, room: list[int] | None = None):
    """A YAML node as None, Plain, str (quoted), list or dict of these. UserError for what none can be.
    room: how many values are still allowed; an alias stands for all that its anchor holds."""
    room = [MOST_VALUES] if room is None else room
    room[0] -= 1
    refuse(room[0] < 0, f"more than {MOST_VALUES:,} values are no value for an option")
    if depth > 4:  # far beyond any option; an anchor that contains itself has no end
        raise UserError("lists in lists in lists are not a value for an option")
    if isinstance(node, yaml.SequenceNode):
        return [node_value(item, depth + 1, room) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(node_value(k, depth + 1, room)): node_value(v, depth + 1, room) for k, v in node.value}
    if node.style is not None:  # quoted; JSON writes a letter beyond U+FFFF as a pair of escapes
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return None if node.tag == "tag:yaml.org,2002:null" else Plain(node.value)


def members_of(kind: object) -> tuple[object, ...]:
    """The members of a union; of any other kind itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)


def choices_of(kind: object) -> tuple[object, ...]:
    """The values that the Literals of a kind list; none without them."""
    literals = [member for member in members_of(kind) if typing.get_origin(member) is typing.Literal]
    return tuple(choice for literal in literals for choice in typing.get_args(literal))


def convert(raw: object, kind: object):
    """The value of `raw` for a key of this type. UserError says what was expected."""
    options = [member for member in members_of(kind) if member is not NoneType]
    is_list = any(typing.get_origin(member) is tuple for member in options)
    if raw is None or (isinstance(raw, Plain) and raw.lower() in NULLS and raw not in choices_of(kind)):
        if len(options) < len(members_of(kind)):
            return None
        if is_list and raw not in ("none", "None"):
            return ()
        if raw is None:
            raise UserError(f"expected {type_name(kind)}; leave the key out to have its default")
    for member in sorted(options, key=_try_order):
        try:
            return _convert_member(raw, member)
        except UserError as error:
            problem = error
    raise problem if len(options) == 1 else UserError(f"expected {type_name(kind)}")


def _try_order(member: object) -> int:
    # "3" is a whole number before it is any number or true, and all these before it is text
    order = (typing.Literal, int, float, bool, tuple, str)
    return order.index(typing.get_origin(member) or member)


def _convert_member(raw: object, kind: object):
    origin = typing.get_origin(kind)
    if origin is tuple:
        return tuple(convert_scalar(item, typing.get_args(kind)[0]) for item in _items(raw))
    if origin is typing.Literal:
        return _choose(raw, typing.get_args(kind))
    if kind is str and isinstance(raw, dict):
        return json.dumps(untyped(raw))
    return convert_scalar(raw, kind)


def untyped(raw: object):
    """Plain JSON data: no key says what is a number here, so JSON's own spelling does."""
    if isinstance(raw, dict):
        return {key: untyped(value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [untyped(value) for value in raw]
    try:
        return json_reader.parse(raw, "", expected=None, nan=True) if isinstance(raw, Plain) else raw
    except UserError:
        return str(raw)


def _items(raw: object) -> list:
    if isinstance(raw, list):
        return raw
    if isinstance(raw, Plain) and raw.startswith("["):
        try:
            return node_value(yaml.compose(raw, Loader=yaml.SafeLoader))
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError("expected a list such as [a, b]") from error
    if isinstance(raw, str):
        return [Plain(item.strip()) for item in raw.split(",") if item.strip()]
    raise UserError("expected a list")


def _choose(raw: object, choices: tuple):
    same = [choice for choice in choices if str(choice).lower() == str(raw).lower()]
    exact = [choice for choice in same if str(choice) == str(raw)]
    if not same:
        near = difflib.get_close_matches(str(raw), map(str, choices), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"expected one of {', '.join(map(str, choices))}{hint}")
    return (exact or same)[0]


def convert_scalar(raw: object, kind: type):
    if not isinstance(raw, str):
        raise UserError(f"expected {type_name(kind)}, found {'null' if raw is None else 'a list or mapping'}")
    if kind is str:
        return str(raw)
    if kind is bool:
        refuse(raw.lower() not in BOOLEANS, "expected true or false")
        return BOOLEANS[raw.lower()]
    try:
        exact = kind is int and re.fullmatch(r"\s*[-+]?[\d_]+\s*", raw)  # a float would round above 2 ** 53
        number = int(raw) if exact else float(raw.replace(".inf", "inf"))
    except ValueError as error:
        raise UserError(f"expected {type_name(kind)}") from error
    refuse(number != number, "expected a number, and nan is none")
    refuse(kind is int and number != number // 1, "expected a whole number")
    return kind(number)


def type_name(kind: object) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    names |= {tuple: "a list (a,b,c)", typing.Literal: f"one of {', '.join(map(str, choices_of(kind)))}"}
    return " or ".join(names[typing.get_origin(member) or member] for member in members_of(kind))


def show(key: str, value: object) -> str:
    """key=value as one would type it; what is secret stays so."""
    if value is not None and key.endswith("_token"):
        return f"{key}=***"
    if value is None or isinstance(value, bool):
        return f"{key}={json.dumps(value)}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{key}={textwrap.shorten(text, 80, placeholder='...')}"
