"""Options: flat keys, filled from YAML or JSON files and the command line, typed by small dataclasses.

A file declares its options as a frozen dataclass (options/option.py; checks in __post_init__); a program
lists the sections it wants and gets one read-only Config:

    config = config.load(sys.argv[1:], [ModelOptions, LoraOptions], program="train.py", description="Train.")
    config[LoraOptions].lora_rank; config.values["lora_rank"]; config.origins["lora_rank"]; config.save(path)

Accepted in any mix: FILE.yaml  --config FILE  key=value  --key value  --key=value  --flag. The command
line beats the files, a later file beats an earlier one. Keys are spelled as LLaMA-Factory and the Hugging
Face trainer spell them. A key that a section declares is never looked up in aliases.py (what is harmless,
converted or not built yet), so a new section needs no change there.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

import yaml

from options import help, launchers, rules
from options.aliases import (
    CONVERTED,
    ENVIRONMENT,
    HARMLESS,
    NOT_YET,
    NOT_YET_VALUES,
    RENAMED_VALUES,
    is_off,
    lookup,
)
from options.errors import UserError, located, refuse
from options.limits import small
from options.option import REQUIRED, Option, declared, title
from options.values import BOOLEANS, NULLS, Plain, choices_of, convert, members_of, node_value, show, untyped

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

    @property
    def given(self) -> set[str]:
        """Keys that a file or the command line set."""
        return {key for key, origin in self.origins.items() if origin != "default"}

    @property
    def shown(self) -> dict[str, object]:
        """Every key and its value but what is never shown."""
        return {name: self.values[name] for name, option in self.options.items() if not option.secret}

    def changed(self, section: type, **values) -> "Config":
        """The same with other values of this section."""
        sections = {**self.sections, section: replace(self[section], **values)}
        read_only = MappingProxyType(sections), MappingProxyType({**self.values, **values})
        return replace(self, sections=read_only[0], values=read_only[1])

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads back to equal values. Hub tokens are left out, as a comment."""
        lines = []
        for section, instance in self.sections.items():
            lines.append(f"### {title(section)}\n")
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
    reads_files_of_others=False,
    others: Iterable[type] = (),
) -> Config:
    """Read files and command line into `sections`. --help prints keys and exits with 0 (options/help.py).

    reads_files_of_others: keys in files that no section here has are left out and noticed, so that a training
    file serves chat.py too; the command line is checked all the same.  others: sections of another program,
    whose words of the command line are left out as well.  Raises UserError with every mistake found, one a
    line.
    """
    keys = declared(sections)
    topic = help.topic(argv)
    if topic is not None:
        print(help.text(keys, topic, program, description), end="", flush=True)
        raise SystemExit(0)
    reader = _Reader(keys, reads_files_of_others, declared(others))
    words, files = _read_words(argv, reader.is_flag)
    sources = [_read_environment(os.environ) if "bf16" in keys else [], *map(_read_file, files), words]
    reader.given = {setting.key: setting.raw for settings in sources for setting in settings}
    chosen: dict[str, tuple[object, _Setting]] = {}
    for settings in sources:
        chosen |= reader.resolve(settings)
    for name, key in keys.items():
        if key.default is REQUIRED and name not in chosen:
            reader.problems.append(f"{name} is required: {key.help}")
    for part, settings in reader.not_built.items():
        known, them = ("a known key", "it") if len(settings) == 1 else ("known keys", "them")
        told = f"{known}, but this version does not have {part}; leave {them} out"
        reader.problems.append(f"{', '.join(settings)}: {told}")
    refuse(reader.problems, "\n".join(reader.problems))

    places = {name: chosen[name][1].where if name in chosen else "default" for name in keys}
    built = {}
    for section in sections:
        given = {name: value for name, (value, _) in chosen.items() if keys[name].section is section}
        try:
            built[section] = section(**given)
        except UserError as error:
            reader.problems.append(_located(str(error), places))
    refuse(reader.problems, "\n".join(reader.problems))

    values = {name: getattr(built[key.section], name) for name, key in keys.items()}
    problems = rules.broken(values, places)
    refuse(problems, "\n".join(problems))
    origins = {name: chosen[name][1].origin if name in chosen else "default" for name in keys}
    read_only = (MappingProxyType(mapping) for mapping in (built, values, origins))
    return Config(*read_only, reader.notices())


@dataclass(frozen=True)
class _Setting:
    key: str  # as it was written
    raw: object  # None, Plain, str (quoted), list or dict of these
    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{show(self.key, self.raw)} ({self.where})"

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
            found = f"{word!r} on the command line is neither a configuration file ({', '.join(_FILES)})"
            wrong = word.startswith("-") or not word.lower().endswith(_FILES)
            refuse(
                wrong, f"{found} nor key=value, --key value or --flag; lists are a,b. --help lists the keys."
            )
            key, text = "config", word
        if key == "config":
            files.append(text)
        else:
            settings.append(_Setting(key, Plain(text), "command line"))
    return settings, files


def _read_environment(environ: Mapping[str, str]) -> list[_Setting]:
    """What accelerate's launcher leaves there for a training; a file and the command line beat it."""
    settings = []
    for name, value in sorted(environ.items()):
        switch = _switch_of(name)
        apart = switch not in (None, "", *launchers.CONVERTED) and not is_off(environ.get(switch), [])
        if not (switch == "" or apart) or is_off(value, ["default"]):
            continue
        theirs = {each: Plain(environ[each]) for each in sorted(environ) if _switch_of(each) == name}
        together = name in launchers.CONVERTED and name in ENVIRONMENT.values()
        settings.append(_Setting(name, theirs if together else Plain(value), "environment"))
    return settings


def _switch_of(name: str) -> str | None:
    """The variable that says whether this one is read ("": always); None for one of other programs."""
    return next((ENVIRONMENT[pattern] for pattern in ENVIRONMENT if fnmatchcase(name, pattern)), None)


def _next_value(key: str, rest: list[str], flag: bool | None) -> str:
    """The value of `--key`, from the words behind it. flag: True boolean key, False not, None unknown."""
    following = rest[0] if rest and not rest[0].startswith("--") else None
    missing = flag is False and following is None
    refuse(missing, f"--{key} needs a value behind it; write {key}=VALUE if the value starts with '--'")
    if flag is True and (following or "").lower() not in (*BOOLEANS, *NULLS):
        return "true"
    if flag is None and (following is None or "=" in following):
        return "true"
    # --trust_remote_code run.yaml has no value, --deepspeed ds.json has one
    known = key in launchers.CONVERTED or lookup(NOT_YET, key)[0] is not None
    if flag is None and following.endswith(_FILES) and not known:
        return "true"
    return rest.pop(0)


def read_values(path: Path) -> dict[str, object]:
    """Keys and plain values of a file that `Config.save` wrote. Raises UserError naming file and line."""
    return {setting.key: untyped(setting.raw) for setting in _read_file(str(path))}


def _read_file(name: str) -> list[_Setting]:
    path, where = Path(name), f"configuration file {name}"
    strange = path.suffix.lower() not in _FILES
    refuse(strange, f"{where}: expected a name that ends in {', '.join(_FILES)}")
    refuse(not path.is_file(), f"{where}: there is no such file (looked in {Path.cwd()})")
    try:
        text = small(path, 2**20).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not UTF-8 text that can be read ({error})") from error
    seen: dict[str, _Setting] = {}
    for setting in _settings(name, text):
        twice = f"{seen.get(setting.key)} and {setting}"
        refuse(setting.key in seen, f"{name}: {setting.key} is there twice, {twice}. Keep one.")
        seen[setting.key] = setting
    return list(seen.values())


def _settings(name: str, text: str) -> Iterator[_Setting]:
    # nodes and not yaml.load: duplicate keys stay visible, and `no`, `1e-4`, `1.10` keep their text, which
    # YAML 1.1 would turn into False, a string and 1.1 before the type of the key is known
    language = "JSON" if name.lower().endswith(".json") else "YAML"
    if language == "JSON":
        text = text.replace("\t", " ")  # all that YAML does not take of JSON
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name} line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{place}: not valid {language} ({problem})") from error
    found = "nothing" if root is None else f"a {root.id}"
    wrong = not isinstance(root, yaml.MappingNode)
    refuse(wrong, f"{name}: expected lines of the form 'key: value', found {found}")
    for key, value in root.value:
        line, wrong = key.start_mark.line + 1, not isinstance(key, yaml.ScalarNode)
        refuse(wrong, f"{name} line {line}: expected a key such as lora_rank, found a {key.id}")
        with located(f"{name} line {line}: {key.value}"):
            yield _Setting(key.value.replace("-", "_"), node_value(value), name, line)


class _NotHere(UserError):
    """No section of this program has such a key."""


class _NotBuilt(_NotHere):
    """The key is of a part that this version does not have; the text names the part."""


@dataclass
class _Reader:
    """Finds the key that each setting means; collects mistakes and what is worth a notice."""

    keys: dict[str, Option]
    reads_files_of_others: bool = False
    keys_of_others: Mapping[str, Option] = field(default_factory=dict)
    given: dict[str, object] = field(default_factory=dict)  # every key as it was written, of all sources
    problems: list[str] = field(default_factory=list)
    not_built: dict[str, list[str]] = field(default_factory=dict)  # part -> settings
    renamed: dict[str, str] = field(default_factory=dict)
    harmless: dict[str, str] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.names = {other: key.name for key in self.keys.values() for other in key.also}
        self.names |= {name: name for name in self.keys}
        self.names_of_others = {other for key in self.keys_of_others.values() for other in key.also}
        self.names_of_others |= {*self.keys_of_others, *(CONVERTED if self.keys_of_others else ())}

    def resolve(self, settings: list[_Setting]) -> dict[str, tuple[object, _Setting]]:
        """One file, or the command line -> key: (typed value, where it came from)."""
        given: dict[str, _Setting] = {}
        for setting in settings:
            if setting.key in given and given[setting.key].raw != setting.raw:
                self.repeated[setting.key] = show(setting.key, setting.raw)
            given[setting.key] = setting
        found: dict[str, tuple[object, _Setting]] = {}
        for setting in given.values():
            try:
                meant = self.meaning(setting.key, setting.raw)
                typed = {key: self.typed(self.keys[key], raw) for key, raw in meant.items()}
            except UserError as error:
                elsewhere = setting.line is not None and self.reads_files_of_others
                # a name that nobody here knows is no mistake there
                elsewhere |= setting.origin == "environment" and type(error) is _NotHere
                if isinstance(error, _NotHere) and (elsewhere or setting.key in self.names_of_others):
                    self.unused[setting.key] = None
                elif isinstance(error, _NotBuilt):
                    self.not_built.setdefault(str(error), []).append(str(setting))
                else:
                    self.problems.append(f"{setting}: {error}")
                continue
            for key, value in typed.items():
                if key in found and found[key][0] != value:
                    self.problems.append(f"{found[key][1]} and {setting} both set {key}. Keep one of them.")
                found[key] = (value, setting)
        return found

    def meaning(self, name: str, raw: object) -> dict[str, object]:
        """The known keys and raw values that `name: raw` stands for. UserError when there are none."""
        if name in self.keys or name not in CONVERTED:
            return self.own_meaning(name, raw)
        meant, result = CONVERTED[name](raw, self.given, self.keys), {}
        for key, value in meant.items():
            result |= self.own_meaning(key, value)
        told = [show(key, value) for key, value in meant.items()]
        note = getattr(meant, "note", "")  # of launchers.Meant
        theirs = name if isinstance(raw, dict) else show(name, raw)
        ours = ", ".join(told) + f" ({note})" * bool(told and note)
        self.renamed[theirs] = ours or note or "nothing to change"
        return result

    def own_meaning(self, name: str, raw: object) -> dict[str, object]:
        if name not in self.names:
            return self.without_effect(name, raw)
        key = self.names[name]
        if key != name:
            self.renamed[name] = key
        theirs, choices = RENAMED_VALUES.get(key, {}), choices_of(self.keys[key].kind)
        word = next((word for word in (str(raw), str(raw).lower()) if word in theirs), None)
        if isinstance(raw, str) and word is not None and raw not in choices:
            self.renamed[f"{key}={raw}"] = theirs[word]
            raw = Plain(theirs[word])
        return {key: raw}

    def typed(self, key: Option, raw: object) -> object:
        choices = choices_of(key.kind)
        not_built = NOT_YET_VALUES.get(key.name, "").split()
        if isinstance(raw, str) and raw in not_built and choices and raw not in choices:
            here = ", ".join(map(str, choices))
            raise UserError(f"known, but this version does not have that part; expected one of {here}")
        return convert(raw, key.kind)

    def without_effect(self, name: str, raw: object) -> dict[str, object]:
        if reason := lookup(HARMLESS, name)[0]:
            self.harmless[name] = reason
            return {}
        part, off = lookup(NOT_YET, name)
        if part is None:
            near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.7)
            hint = " or ".join(dict.fromkeys(self.names[other] for other in near))
            hint = f"did you mean {hint}? " if hint else ""
            raise _NotHere(f"unknown key; {hint}--help all lists all keys")
        if is_off(raw, off):
            return {}
        raise _NotBuilt(part)

    def is_flag(self, name: str) -> bool | None:
        """Whether a key takes true or false; None for one that is not known, or takes these too."""
        key = self.names.get(name)
        if key is None or "true" in RENAMED_VALUES.get(key, ()):
            return None
        return bool in members_of(self.keys[key].kind)

    def notices(self) -> tuple[str, ...]:
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.harmless.items():
            by_reason.setdefault(reason, []).append(key)
        lists = {
            "accepted without effect": "; ".join(
                f"{', '.join(keys)} ({why})" for why, keys in by_reason.items()
            ),
            "read as": ", ".join(f"{theirs} -> {ours}" for theirs, ours in self.renamed.items()),
            "not used by this script": ", ".join(self.unused),
        }
        lines = [f"{what}: {those}" for what, those in lists.items() if those]
        twice = "is given more than once, the last counts"
        return (*lines, *(f"{key} {twice}: {last}" for key, last in self.repeated.items()))


def _located(error: str, places: Mapping[str, str]) -> str:
    """The error of a section, with the place where each key that it names was given."""
    named = [word for word in dict.fromkeys(re.findall(r"\w+", error)) if word in places]
    where = ", ".join(f"{name}: {places[name]}" for name in named)
    return f"{error} ({where})" if named else error


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
