"""Options: flat keys, filled from YAML or JSON files and from the command line, typed by small dataclasses.

A library file declares its options as a frozen dataclass (Annotated help, Literal choices, checks in
__post_init__); a script lists the sections it wants and gets one read-only Config:

    config = config.load(sys.argv[1:], [ModelOptions, LoraOptions], program="train.py", description="Train.")
    config[LoraOptions].lora_rank; config.values["lora_rank"]; config.origins["lora_rank"]; config.save(path)

Accepted in any mix: FILE.yaml  --config FILE  key=value  --key value  --key=value  --flag. The command line
beats the files, a later file beats an earlier one. Keys are spelled as LLaMA-Factory and the Hugging Face
trainer spell them; option_names.py holds what other systems call them, what is harmless and what is not built
yet. A key that a section declares is never looked up there, so a new section needs no change in it.
"""

import difflib
import inspect
import json
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import MappingProxyType, NoneType

import yaml

from options.aliases import CONVERTED, HARMLESS, NOT_YET, NOT_YET_VALUES, RENAMED_VALUES, is_off, lookup
from options.errors import UserError
from options.option import Option, declared
from options.rules import RULES
from options.values import BOOLEANS, NULLS, Plain, choices_of, convert, members_of, node_value, truth_word

_FILES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Config:
    """The resolved options of one run; nothing in it can be assigned."""

    sections: Mapping[type, object]
    values: Mapping[str, object]  # flat key -> value
    origins: Mapping[str, str]  # flat key -> "configs/demo.yaml" | "command line" | "default"
    notices: tuple[str, ...]  # what was accepted without effect or under another name; print once, on rank 0

    def __getitem__(self, section: type):
        return self.sections[section]

    @property
    def options(self) -> dict[str, Option]:
        return declared(self.sections)

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads back to equal values. Hub tokens are left out, as a comment."""
        lines = []
        for section, instance in self.sections.items():
            lines.append(f"### {_title(section)}\n")
            for name, option in declared([section]).items():
                value = getattr(instance, name)
                if option.secret and value is not None:
                    lines.append(f"# {name}: given, not written here\n")
                elif value is not None or option.default is not None:
                    lines.append(yaml.dump({name: value}, Dumper=_Dumper, allow_unicode=True, width=10**9))
            lines.append("\n")
        Path(path).write_text("".join(lines), encoding="utf-8")


def load(
    argv: list[str],
    sections: list[type],
    *,
    program: str,
    description: str,
    other_sections: Iterable[type] = (),
    foreign_keys: bool = False,
) -> Config:
    """Read files and command line into `sections`. --help prints every key and exits with 0.

    other_sections: options of other scripts; their keys are checked and then left out, so that for example
    chat.py reads a training file.  foreign_keys: keys of a file that no section here has are left out, for
    scripts
    that must not import the sections of others; the command line is still checked.  Raises UserError with
    every mistake found, one a line.
    """
    keys = declared(sections)
    reader = _Reader(keys, {k: v for k, v in declared(other_sections).items() if k not in keys})
    reader.foreign_keys = foreign_keys
    if "--help" in argv or "-h" in argv:
        print(_help_text(keys, program, description), end="")
        raise SystemExit(0)
    words, files = _read_words(argv, reader.is_flag)
    chosen: dict[str, tuple[object, _Setting]] = {}
    for settings in [*(_read_file(name) for name in files), words]:
        chosen |= reader.resolve(settings)
    reader.problems += [
        f"{name} is required: {key.help}"
        for name, key in keys.items()
        if key.default is MISSING and name not in chosen
    ]
    _raise(reader.problems)

    built = {}
    for section in sections:
        given = {name: value for name, (value, _) in chosen.items() if keys[name].section is section}
        try:
            built[section] = section(**given)
        except ValueError as error:
            reader.problems.append(_located(str(error), keys, chosen))
    _raise(reader.problems)

    values = {name: getattr(built[key.section], name) for name, key in keys.items()}
    _raise(_broken_rules(values, chosen))
    origins = {name: chosen[name][1].origin if name in chosen else "default" for name in keys}
    read_only = (MappingProxyType(mapping) for mapping in (built, values, origins))
    return Config(*read_only, reader.notices())


# Words and files -> settings


@dataclass(frozen=True)
class _Setting:
    key: str  # as it was written
    raw: object  # None, Plain, str (quoted), list or dict of these
    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{_show(self.key, self.raw)} ({self.where})"

    @property
    def where(self) -> str:
        return self.origin if self.line is None else f"{self.origin} line {self.line}"


def _read_words(argv: list[str], is_flag: Callable[[str], bool | None]) -> tuple[list[_Setting], list[str]]:
    """-> settings of the command line, names of configuration files."""
    settings, files, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        is_key = re.fullmatch(r"[A-Za-z_][\w-]*", key) is not None
        key = key.replace("-", "_")
        if is_key and word.startswith("--"):
            text = text if equals else _next_value(key, rest, False if key == "config" else is_flag(key))
        elif not (is_key and equals):
            if word.startswith("-") or not word.lower().endswith(_FILES):
                raise UserError(
                    f"{word!r} on the command line is neither a configuration file ({', '.join(_FILES)}) nor "
                    "key=value, --key value or --flag. --help lists the keys."
                )
            key, text = "config", word
        if key == "config":
            files.append(text)
        else:
            settings.append(_Setting(key, Plain(text), "command line"))
    return settings, files


def _next_value(key: str, rest: list[str], flag: bool | None) -> str:
    """The value of `--key`, from the words behind it. flag: True boolean key, False not, None unknown."""
    following = rest[0] if rest and not rest[0].startswith("--") else None
    if flag is False and following is None:
        raise UserError(f"--{key} needs a value behind it; write {key}=VALUE if the value starts with '--'")
    if flag is True and (following or "").lower() not in (*BOOLEANS, *NULLS):
        return "true"
    if flag is None and (following is None or "=" in following):
        return "true"
    # --trust_remote_code run.yaml has no value, --deepspeed ds.json has one
    if flag is None and following.endswith(_FILES) and lookup(NOT_YET, key)[0] is None:
        return "true"
    return rest.pop(0)


def _read_file(name: str) -> list[_Setting]:
    path = Path(name)
    if path.suffix.lower() not in _FILES:
        raise UserError(f"configuration file {name}: expected a name that ends in {', '.join(_FILES)}")
    if not path.is_file():
        raise UserError(f"configuration file {name}: there is no such file (looked in {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"configuration file {name}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    settings = _read_json(name, text) if path.suffix.lower() == ".json" else _read_yaml(name, text)
    seen: dict[str, _Setting] = {}
    for setting in settings:
        if setting.key in seen:
            raise UserError(
                f"{name}: {setting.key} is there twice, {seen[setting.key]} and {setting}. Keep one."
            )
        seen[setting.key] = setting
    return settings


def _read_yaml(name: str, text: str) -> list[_Setting]:
    # nodes and not yaml.load: duplicate keys stay visible, and `no`, `1e-4`, `1.10` keep their text, which
    # YAML 1.1 would turn into False, a string and 1.1 before the type of the key is known
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{name}{place}: not valid YAML ({getattr(error, 'problem', None) or error})"
        ) from error
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else f"a {root.id}"
        raise UserError(f"{name}: expected lines of the form 'key: value', found {found}")
    settings = []
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{name} line {line}: expected a key such as lora_rank, found a {key.id}")
        try:
            settings.append(_Setting(key.value.replace("-", "_"), node_value(value), name, line))
        except ValueError as error:
            raise UserError(f"{name} line {line}: {key.value}: {error}") from error
    return settings


def _read_json(name: str, text: str) -> list[_Setting]:
    try:
        pairs = json.loads(
            text, object_pairs_hook=_Pairs, parse_int=Plain, parse_float=Plain, parse_constant=Plain
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{name} line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(pairs, _Pairs):
        raise UserError(
            f'{name}: expected an object of the form {{"key": value}}, found {text.strip()[:40]!r}'
        )
    return [_Setting(key.replace("-", "_"), _json_value(value), name) for key, value in pairs]


class _Pairs(list):
    """A JSON object as its (key, value) pairs, so that a key that is there twice can be seen."""


def _json_value(value):
    if isinstance(value, bool):
        return truth_word(value)
    if isinstance(value, _Pairs):
        return {key: _json_value(item) for key, item in value}
    return [_json_value(item) for item in value] if isinstance(value, list) else value


# Settings -> typed values of known keys


@dataclass
class _Reader:
    """Finds the key that each setting means; collects mistakes and what is worth a notice."""

    keys: dict[str, Option]
    others: dict[str, Option]
    foreign_keys: bool = False
    problems: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    harmless: dict[str, str] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)

    def resolve(self, settings: list[_Setting]) -> dict[str, tuple[object, _Setting]]:
        """One file, or the command line -> key: (typed value, where it came from)."""
        given: dict[str, _Setting] = {}
        for setting in settings:
            if setting.key in given and given[setting.key].raw != setting.raw:
                self.repeated[setting.key] = _show(setting.key, setting.raw)
            given[setting.key] = setting
        raws = {key: setting.raw for key, setting in given.items()}
        found: dict[str, tuple[object, _Setting]] = {}
        for setting in given.values():
            try:
                meant = self.meaning(setting.key, setting.raw, raws)
                typed = {key: self.typed(self.known(key), raw) for key, raw in meant.items()}
            except ValueError as error:
                if self.is_foreign(setting):
                    self.unused[setting.key] = None
                else:
                    self.problems.append(f"{setting}: {error}")
                continue
            for key, value in typed.items():
                if key in found and found[key][0] != value:
                    self.problems.append(f"{found[key][1]} and {setting} both set {key}. Keep one of them.")
                found[key] = (value, setting)
        self.unused |= dict.fromkeys(key for key in found if key not in self.keys)
        return {key: pair for key, pair in found.items() if key in self.keys}

    def is_foreign(self, setting: _Setting) -> bool:
        names = (setting.key, *self.targets_of(setting.key))
        return self.foreign_keys and setting.origin != "command line" and not any(map(self.known, names))

    def known(self, name: str) -> Option | None:
        return self.keys.get(name) or self.others.get(name)

    def meaning(self, name: str, raw: object, given: Mapping) -> dict[str, object]:
        """The known keys and raw values that `name: raw` stands for. ValueError when there are none."""
        key = self.known(name)
        if key is not None:
            return self.own_meaning(key, raw)
        if name in CONVERTED:
            meant = CONVERTED[name](raw, given, self.keys)
            ours = ", ".join(_show(key, value) for key, value in meant.items())
            self.renamed[_show(name, raw)] = ours or "nothing to change"
            return self.targets(meant)
        target = next((ours for ours in self.targets_of(name) if self.known(ours)), None)
        if target is not None:
            self.renamed[name] = target
            return self.own_meaning(self.known(target), raw)
        return self.without_effect(name, raw)

    def own_meaning(self, key: Option, raw: object) -> dict[str, object]:
        theirs = RENAMED_VALUES.get(key.name, {})
        if isinstance(raw, str) and raw in theirs and raw not in choices_of(key.kind):
            self.renamed[f"{key.name}={raw}"] = theirs[raw]
            raw = Plain(theirs[raw])
        return {key.name: raw}

    def typed(self, key: Option, raw: object) -> object:
        choices = choices_of(key.kind)
        not_built = NOT_YET_VALUES.get(key.name, "").split()
        if isinstance(raw, str) and raw in not_built and choices and raw not in choices:
            here = ", ".join(map(str, choices))
            raise ValueError(f"known, but this version does not have that part; expected one of {here}")
        return convert(raw, key.kind)

    def targets(self, meant: Mapping[str, object]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, raw in meant.items():
            result |= (
                self.own_meaning(self.known(key), raw) if self.known(key) else self.without_effect(key, raw)
            )
        return result

    def targets_of(self, name: str) -> list[str]:
        return [key.name for key in (*self.keys.values(), *self.others.values()) if name in key.also]

    def without_effect(self, name: str, raw: object) -> dict[str, object]:
        for candidate in (*self.targets_of(name), name):
            if reason := lookup(HARMLESS, candidate)[0]:
                self.harmless[name] = reason
                return {}
            part, off = lookup(NOT_YET, candidate)
            if part is not None:
                if is_off(raw, off):
                    return {}
                raise ValueError(f"a known key, but this version does not have {part}; remove the key")
        raise ValueError(self.unknown(name))

    def unknown(self, name: str) -> str:
        if ours := self.targets_of(name):
            return f"unknown key; its name here would be {' or '.join(ours)}, which this script does not have"
        known = self.others | self.keys
        names = {other: key.name for key in known.values() for other in key.also} | {
            key: key for key in known
        }
        near = dict.fromkeys(
            names[other] for other in difflib.get_close_matches(name, names, n=3, cutoff=0.7)
        )
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"unknown key; {hint}--help lists all keys"

    def is_flag(self, name: str) -> bool | None:
        target = next((ours for ours in (name, *self.targets_of(name)) if self.known(ours)), None)
        return None if target is None else bool in members_of(self.known(target).kind)

    def notices(self) -> tuple[str, ...]:
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.harmless.items():
            by_reason.setdefault(reason, []).append(key)
        lines = []
        if by_reason:
            groups = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
            lines.append(f"accepted without effect: {groups}")
        if self.renamed:
            lines.append(
                "read as: " + ", ".join(f"{theirs} -> {ours}" for theirs, ours in self.renamed.items())
            )
        if self.unused:
            lines.append(f"not used by this script: {', '.join(self.unused)}")
        lines += [
            f"{key} is given more than once, the last counts: {last}" for key, last in self.repeated.items()
        ]
        return tuple(lines)


# Checks across keys, and text for people


def _raise(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _located(error: str, keys: Mapping[str, Option], chosen: Mapping) -> str:
    """The error of a section, with the place where each key that it names was given."""
    named = [word for word in dict.fromkeys(re.findall(r"\w+", error)) if word in keys]
    places = [f"{word}: {chosen[word][1].where if word in chosen else 'default'}" for word in named]
    return f"{error} ({', '.join(places)})" if places else error


def _broken_rules(values: Mapping[str, object], chosen: Mapping) -> list[str]:
    problems = []
    for predicate, message in RULES:
        names = list(inspect.signature(predicate).parameters)
        if not values.keys() >= set(names) or not predicate(*(values[name] for name in names)):
            continue
        places = (chosen[name][1].where if name in chosen else "default" for name in names)
        found = (f"{_show(name, values[name])} ({place})" for name, place in zip(names, places))
        problems.append(f"{' with '.join(found)}: {message}")
    return problems


def _show(key: str, value: object) -> str:
    """key=value as one would type it; what is secret stays so."""
    if value is not None and key.endswith("_token"):
        return f"{key}=***"
    if value is None or isinstance(value, bool):
        return f"{key}={json.dumps(value)}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{key}={textwrap.shorten(text, 80, placeholder='...')}"


class _Dumper(yaml.SafeDumper):
    """Lists on one line; quotes the text None too, because `load` reads a bare None as null."""

    yaml_representers = yaml.SafeDumper.yaml_representers | {
        tuple: lambda self, items: self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True),
        # PyYAML writes U+0085 and its like bare in single quotes and reads a space back
        str: lambda self, text: self.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
        ),
    }
    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers | {
        letter: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []),
            ("tag:yaml.org,2002:null", re.compile("(?i)(none|null)$")),
        ]
        for letter in "nN"
    }


def _title(section: type) -> str:
    documented = section.__doc__ and not section.__doc__.startswith(f"{section.__name__}(")
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", section.__name__).capitalize()
    return section.__doc__.strip().splitlines()[0].rstrip(".") if documented else spaced


def _help_text(keys: Mapping[str, Option], program: str, description: str) -> str:
    width = max(50, min(shutil.get_terminal_size((100, 24)).columns, 130))
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    usage = f"usage: python {program} [FILE.yaml] [key=value ...] [--key value ...]"
    lines = [*textwrap.wrap(usage, width, subsequent_indent=" " * 4), ""]
    lines += [*textwrap.wrap(description, width), ""]
    lines += textwrap.wrap(
        "Options come from YAML or JSON files and from the command line, which wins. A boolean key alone "
        "means true, a list is a,b,c, null means not set (shown as -). The names of LLaMA-Factory, qlora and "
        "swift are understood.",
        width,
    )
    sections = dict.fromkeys(key.section for key in keys.values())
    columns = [max((len(name) for name in keys), default=0), 6, 10]
    for section in sections:
        rows = [_help_row(key) for key in keys.values() if key.section is section]
        lines += ["", f"{bold}{_title(section)}{plain}"]
        for name, kind, default, text in rows:
            if len(default) > columns[2]:
                default, text = "", f"{text}; default {default}"
            head = f"  {name:<{columns[0]}}  {kind:<{columns[1]}}  {default:<{columns[2]}}  "
            if width - len(head) < 24:  # too narrow for a table: the text goes below
                lines += [f"  {name}  {kind}  {default}".rstrip()]
                lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
            else:
                lines += textwrap.wrap(
                    text or "-", width, initial_indent=head, subsequent_indent=" " * len(head)
                )
    return "\n".join(lines) + "\n"


def _help_row(key: Option) -> tuple[str, str, str, str]:
    names = {int: "int", float: "float", bool: "bool", str: "text", tuple: "list", typing.Literal: "choice"}
    kinds = [names[typing.get_origin(kind) or kind] for kind in members_of(key.kind) if kind is not NoneType]
    default = "required" if key.default is MISSING else _show("", key.default)[1:]
    choices = ", ".join(map(str, choices_of(key.kind)))
    text = f"{key.help} [{choices}]" if choices else key.help
    return key.name, "/".join(kinds), "-" if default in ("null", "") else default, text
