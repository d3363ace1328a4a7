"""What one option is; everything that is to be said of it stands at its field in the section's dataclass.

    @dataclass(frozen=True)
    class LoraOptions:
        lora_rank: int = option(8, "rank R of the update", COMMON, also="lora_r")
        lora_dropout: float = option(0.0, "dropout on the input of the low-rank branch")

A section whose options are all for certain stages says so once: STAGES = "ppo grpo".
"""

import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields

REQUIRED = MISSING  # as default: it has to be given
COMMON = "common"  # `--help` shows it; the others have to be asked for
RESUMABLE = "resumable"  # a resumed run may change it: how long, where or how talkatively it trains
SECRET = "secret"  # never written and never shown, because run folders and logs get shared


def option(default: object, help: str, *facts: str, also: str = "", stages: str = "", when: str = ""):
    """A field of a section. facts: COMMON, RESUMABLE, SECRET; also: what other systems call it, in words;
    stages: those that read it, in words; when: the `key=value` or `key!=value` beside which alone it is read
    (elsewhere it is noticed that it does nothing)."""
    said = {"help": help, "also": tuple(also.split()), "when": when} | dict.fromkeys(facts, True)
    if stages:
        said["stages"] = tuple(stages.split())
    return field(default=default, metadata=said)


@dataclass(frozen=True)
class Option:
    name: str
    kind: object  # int, float, bool, str, Literal[...], tuple[...] or a union of these and None
    default: object
    section: type
    help: str = ""
    also: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()  # () = all
    when: str = ""
    common: bool = False
    resumable: bool = False
    secret: bool = False

    def does_nothing(self, stage: str) -> bool:
        return bool(self.stages) and stage not in self.stages

    def unread(self, values: Mapping[str, object]) -> str | None:
        """What keeps it from being read, as `key=value`; None where it is read."""
        key, _, wanted = self.when.partition("=")
        key, unequal = key.removesuffix("!"), key.endswith("!")
        same = str(values.get(key)).lower() == wanted.lower()
        return f"{key}={values[key]}" if key in values and same == unequal else None


def declared(sections: Iterable[type]) -> dict[str, Option]:
    """The options of these sections by name, in order. ValueError when two sections declare one name."""
    options: dict[str, Option] = {}
    for section in sections:
        kinds = typing.get_type_hints(section)
        shared = {"stages": tuple(getattr(section, "STAGES", "").split())}
        for item in fields(section):
            if item.name in options:
                names = f"{options[item.name].section.__name__} and {section.__name__}"
                raise ValueError(f"{item.name} is declared by {names}")
            facts = shared | item.metadata
            options[item.name] = Option(item.name, kinds[item.name], item.default, section, **facts)
    return options


def title(section: type) -> str:
    """The first line of its docstring, or its name in words."""
    if section.__doc__ and not section.__doc__.startswith(f"{section.__name__}("):
        return section.__doc__.strip().splitlines()[0].rstrip(".")
    first, *rest = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", section.__name__).split()
    return " ".join([first, *map(str.lower, rest)])
