"""What the keys of a JSON file that another program wrote may hold; everything is checked before it is used.

    FIELDS = {"vocab_size": Field(int, 1, 2**24), "tie_word_embeddings": Field(bool)}
    check(values, FIELDS)    # UserError: vocab_size is '9', expected a whole number from 1 to 16777216

JSON's true is no number and its "false" no truth value, and NaN and Infinity, which Python reads, are none.
"""

import reprlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from options.errors import refuse

NUMBER = int | float
NAMES = {int: "a whole number", NUMBER: "a number", bool: "true or false", str: "text"}
NAMES |= {list: "a list of names", dict: "an object"}


@dataclass(frozen=True)
class Field:
    kind: object  # int, NUMBER, bool, str, list, dict, or a union of them
    least: float = -inf
    most: float = inf
    null: bool = False  # whether null may stand there
    items: object = str  # of a list, within the same bounds

    def allows(self, value: object) -> bool:
        if value is None or isinstance(value, bool):
            return self.null if value is None else self.kind is bool
        if isinstance(value, list):
            each = replace(self, kind=self.items, null=False)
            return isinstance(value, self.kind) and all(map(each.allows, value))
        inside = not isinstance(value, NUMBER) or (self.least <= value <= self.most and abs(value) != inf)
        return isinstance(value, self.kind) and inside  # NaN lies between no bounds

    def __str__(self) -> str:
        name = NAMES.get(self.kind) or " or ".join(NAMES[kind] for kind in typing.get_args(self.kind))
        bounds = f" from {self.least:.10g}" if self.least > -inf else ""
        bounds += f" to {self.most:.10g}" if self.most < inf else ""
        return name + bounds + (" or null" if self.null else "")


def check(values: Mapping[str, object], fields: Mapping[str, Field], place: str = "") -> None:
    """UserError for the first key of `values` that holds what its field does not allow; place: before it."""
    for key, field in fields.items():
        wrong = key in values and not field.allows(values[key])
        refuse(wrong, f"{place}{key} is {reprlib.repr(values.get(key))}, expected {field}")
