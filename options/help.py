"""What `--help` prints: the keys of the recipes; with a section, a key or `all` behind it, those."""

import difflib
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Mapping
from types import NoneType

from options.errors import UserError
from options.option import REQUIRED, Option, title
from options.values import choices_of, members_of, show

KINDS = {int: "int", float: "float", bool: "bool", str: "text", tuple: "list", typing.Literal: "choice"}
HOW = (
    "Options come from YAML or JSON files and from the command line, which wins. A boolean key alone means "
    "true, a list is a,b,c, null means not set (shown as -). The names of LLaMA-Factory, qlora and swift are "
    "understood."
)


def topic(argv: list[str]) -> str | None:
    """What help is asked for: the word behind --help, "" without one; None when it is not asked for."""
    for place, word in enumerate(argv):
        if word in ("--help", "-h"):
            behind = "".join(argv[place + 1 : place + 2])
            return behind if re.fullmatch(r"[A-Za-z_]\w*", behind) else ""
        if word.startswith("--help="):
            return word.removeprefix("--help=")
    return None


def text(options: Mapping[str, Option], topic: str, program: str, description: str) -> str:
    """topic: "" = the keys of the recipes, a section, a key, or all. UserError for what is none of these."""
    width = max(50, min(shutil.get_terminal_size((100, 24)).columns, 130))
    sections = dict.fromkeys(option.section for option in options.values())
    shown = _chosen(options, topic)
    lines = []
    if topic in ("", "all"):
        usage = f"usage: python {program} [FILE.yaml] [key=value ...] [--key value ...]"
        lines = [*textwrap.wrap(usage, width, subsequent_indent=" " * 4), ""]
        lines += [*textwrap.wrap(description, width), "", *textwrap.wrap(HOW, width)]
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    columns = [max(len(option.name) for option in shown), 6, 12]
    for section in sections:
        rows = [option for option in shown if option.section is section]
        if rows:
            lines += ["", f"{bold}{title(section)}{plain}"]
            lines += [line for option in rows for line in _lines(option, columns, width, brief=not topic)]
    if len(shown) == 1 and topic != "all":
        lines += ["", *textwrap.wrap(" ".join(_facts(shown[0])), width)]
    if topic == "":
        names = ", ".join(short_name(section) for section in sections)
        more = f"{len(options) - len(shown)} more keys: --help SECTION ({names}), --help KEY, --help all"
        lines += ["", *textwrap.wrap(more, width)]
    return "\n".join(lines).removeprefix("\n") + "\n"


def short_name(section: type) -> str:
    return section.__name__.removesuffix("Options").lower()


def _chosen(options: Mapping[str, Option], topic: str) -> list[Option]:
    everything = list(options.values())
    if topic in ("", "all"):
        return [option for option in everything if option.common and not topic] or everything
    known = {name: [option] for option in everything for name in (*option.also, option.name)}
    for section in dict.fromkeys(option.section for option in everything):
        within = [option for option in everything if option.section is section]
        known |= dict.fromkeys((short_name(section), section.__name__.lower()), within)
    if topic.lower() not in known:
        near = difflib.get_close_matches(topic.lower(), known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--help {topic}: neither a section nor a key; {hint}--help all shows everything")
    return known[topic.lower()]


def _lines(option: Option, columns: list[int], width: int, brief: bool) -> list[str]:
    """One row of the table, over several lines if need be; brief: one line."""
    name, kind, default, text = _row(option)
    if len(default) > columns[2]:
        default, text = "", f"{text}; default {default}"
    if brief:
        line = f"  {name:<{columns[0]}}  {default:<{columns[2]}}  {text}"
        return [line if len(line) <= width else f"{line[: width - 3].rstrip()}..."]
    head = f"  {name:<{columns[0]}}  {kind:<{columns[1]}}  {default:<{columns[2]}}  "
    if width - len(head) >= 24:
        return textwrap.wrap(text or "-", width, initial_indent=head, subsequent_indent=" " * len(head))
    below = textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {name}  {kind}  {default}".rstrip(), *below]  # too narrow for a table


def _row(option: Option) -> tuple[str, str, str, str]:
    members = [member for member in members_of(option.kind) if member is not NoneType]
    kind = "/".join(KINDS[typing.get_origin(member) or member] for member in members)
    default = "required" if option.default is REQUIRED else show("", option.default)[1:]
    choices = ", ".join(map(str, choices_of(option.kind)))
    text = f"{option.help} [{choices}]" if choices else option.help
    return option.name, kind, "-" if default in ("null", "") else default, text


def _facts(option: Option) -> list[str]:
    facts = [f"Also understood: {', '.join(option.also)}."] if option.also else []
    facts += [f"Read in: {', '.join(option.stages)}."] if option.stages else []
    facts += ["A resumed run may change it."] if option.resumable else []
    facts += ["It is never written or shown."] if option.secret else []
    return facts
