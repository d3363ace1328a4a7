"""Where training rows come from: dataset_info.json, files, folders and hubs -> one dict per row.

`dataset_info.json` is LLaMA-Factory's format: name -> one source (`hf_hub_url`, `ms_hub_url` or `file_name`)
plus `subset`, `split`, `folder`, `revision`, `num_samples`, `file_sha1`, `formatting`, `columns`, `tags`,
`ranking`. A name that is not in it may be a path to a file or a folder; its columns are then those of all its
rows, and a row may leave some out, as in `datasets`. Files are read row by row (readers.py), so memory does
not grow with the file. A dataset's own code (`script_url`) is never run.

Run from Python: for number, place, row in read_rows(find_dataset("identity", "data")): ...
"""

import difflib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from options import json_reader
from options.errors import UserError, located, refuse
from options.json_fields import Field, check
from options.limits import leaves
from pipeline.readers import FILE_TYPES, read_file
from text.render import parsed

TEXT_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
COLUMN_NAMES = (*TEXT_COLUMNS, "images", "videos", "audios", "chosen", "rejected", "kto_tag")
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
PROMPT_NAMES, RESPONSE_NAMES = ("instruction", "prompt"), ("output", "completion", "response", "answer")
MESSAGES_COLUMNS = {"sharegpt": {"messages": "conversations"}, "openai": {"messages": "messages"}}
SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
SHAREGPT_TAGS |= {"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
OPENAI_TAGS = SHAREGPT_TAGS | {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
OPENAI_TAGS |= {"assistant_tag": "assistant", "observation_tag": "tool"}
SOURCES = ("hf_hub_url", "ms_hub_url", "file_name", "script_url")
TEXTS = ("subset", "split", "folder", "revision", "file_sha1")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
NOT_READ = {"om_hub_url": "the Modelers hub is not read", "cloud_file_name": "cloud storage is not read"}
FIELDS = dict.fromkeys((*SOURCES, *NOT_READ, "formatting"), Field(str)) | {"ranking": Field(bool, null=True)}
FIELDS |= dict.fromkeys(TEXTS, Field(str, null=True)) | {"num_samples": Field(int, 1, null=True)}
FIELDS |= dict.fromkeys(("columns", "tags"), Field(dict, null=True))
# what another source has; "train" is what a file has too
NOT_OF = {"file": ("subset", "split", "revision"), "ms_hub": ("revision",), "hf_hub": ()}


Row = tuple[int, str, dict]  # number; place, "file:line" or "file row n", for messages; columns


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset. `kind` says how `location` is read: the path of a file or folder, or the id on a hub."""

    name: str
    kind: str  # "file", "hf_hub", "ms_hub"
    location: str
    formatting: str = "alpaca"  # "alpaca", "sharegpt"; "openai" is sharegpt with other tags
    columns: dict[str, str] = field(default_factory=dict)  # only the columns this dataset has
    tags: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    revision: str | None = None
    num_samples: int | None = None
    file_sha1: str | None = None
    home: str | None = None  # the folder of dataset_info.json, which files of its entries may not leave
    ranking: bool = False
    listed: tuple[str, ...] = ()  # of a data set by path: columns of all rows, null where a row has none


@dataclass(frozen=True)
class HubAccess:
    """What reading from a hub needs beside the id. All may stay None."""

    hf_token: str | None = None
    ms_token: str | None = None
    cache_dir: str | None = None


# ------------------------------------------------------------------------------------------------------------
# dataset_info.json


def read_dataset_info(dataset_dir: str | Path) -> dict:
    """The parsed dataset_info.json of the folder, or {} when there is none."""
    path = Path(dataset_dir) / "dataset_info.json"
    if not path.is_file():
        return {}
    return json_reader.read(path, way_out="it maps the name of each data set to where its rows are")


def find_dataset(name: str, dataset_dir: str | Path, default_split: str = "train") -> DatasetInfo:
    """Look `name` up in dataset_info.json; else take it as the path of a file or folder.

    dataset_dir "ONLINE" (LLaMA-Factory's word) means that every name is a hub id.
    Raises UserError that names what was looked for and the closest known name.
    """
    if str(dataset_dir) == "ONLINE":
        with located(f"dataset: {name!r} (dataset_dir: ONLINE)"):
            _refuse_no_hub_id(name)
        return DatasetInfo(name, _hub_kind(), name, columns=dict(ALPACA_COLUMNS), split=default_split)
    entries = read_dataset_info(dataset_dir)
    if name in entries:
        return parse_entry(name, entries[name], dataset_dir, default_split)
    for path in (Path(name), Path(dataset_dir) / name):
        if path.exists():
            return _guess_format(DatasetInfo(name, "file", str(path), split=default_split))
    listing = Path(dataset_dir) / "dataset_info.json"
    if not listing.is_file():
        raise UserError(f"dataset: {name!r} is no file or folder, and {listing} does not exist (dataset_dir)")
    near = difflib.get_close_matches(name, entries, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    hint += f" Known: {', '.join(list(entries)[:12])}{', ...' if len(entries) > 12 else ''}"
    raise UserError(f"dataset: {name!r} is not in {listing} and is no path of a file or folder{hint}")


def parse_entry(name: str, entry: dict, dataset_dir: str | Path, default_split: str = "train") -> DatasetInfo:
    """One entry of dataset_info.json -> DatasetInfo, every field checked."""
    with located(f"{Path(dataset_dir) / 'dataset_info.json'}: dataset {name!r}"):
        refuse(not isinstance(entry, dict), f"expected an object, found {type(entry).__name__}")
        _check_names(entry, tuple(FIELDS), "unknown field")
        check(entry, FIELDS)
        kind, location = _source(entry, dataset_dir)
        formatting = entry.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt", "openai"):
            raise UserError(f"formatting is {formatting!r}, expected 'alpaca', 'sharegpt' or 'openai'")
        wrong = {key: entry[key] for key in NOT_OF[kind] if entry.get(key) not in (None, "train")}
        refuse(wrong, f"{wrong} does not apply to {location}; take it out (num_samples takes fewer rows)")
        for key in ("folder", "subset", "revision"):
            refuse(leaves(entry.get(key) or ""), f"{key} {entry.get(key)!r} leaves {location}")
        columns, tags = _columns(entry, formatting), _tags(entry, formatting)
    texts = {key: entry.get(key) for key in TEXTS} | {"split": entry.get("split") or default_split}
    shared = {"columns": columns, "tags": tags, "home": str(dataset_dir), **texts}
    shared |= {"num_samples": entry.get("num_samples"), "ranking": bool(entry.get("ranking"))}
    return DatasetInfo(name, kind, location, formatting, **shared)


def _source(entry: dict, dataset_dir: str | Path) -> tuple[str, str]:
    """LLaMA-Factory's order: hub ids first (ModelScope's when USE_MODELSCOPE_HUB=1), script, file."""
    for key in SOURCES:
        refuse(entry.get(key) == "", f"{key} is '', expected text")
    for kind in sorted(("hf_hub", "ms_hub"), key=lambda kind: kind != _hub_kind()):
        if f"{kind}_url" in entry:
            with located(f"{kind}_url"):
                _refuse_no_hub_id(entry[f"{kind}_url"])
            return kind, entry[f"{kind}_url"]
    if "script_url" in entry:
        remedy = "Convert the dataset to json, jsonl, csv or parquet once and give file_name."
        raise UserError(f"script_url: it would run Python code that came with the data. {remedy}")
    for key, what in NOT_READ.items():
        refuse(key in entry, f"{key}: {what}; download the data once and give file_name")
    if "file_name" not in entry:
        raise UserError(f"none of hf_hub_url, ms_hub_url and file_name is given (it has {sorted(entry)})")
    # a registry that came with somebody's data must not be able to point at other files of this machine
    if leaves(entry["file_name"]):
        found = f"file_name {entry['file_name']!r} leaves the folder {str(dataset_dir)!r}"
        raise UserError(f"{found}. Move the file there, or give its path itself as `dataset`.")
    return "file", str(Path(dataset_dir) / os.path.normpath(entry["file_name"]))


def _refuse_no_hub_id(name: str) -> None:
    """`datasets` takes the names of its readers (json, csv), paths and addresses in the same place."""
    files = "files are named by file_name in dataset_info.json"
    refuse(not HUB_ID.fullmatch(name), f"{name!r} is no id of a hub (owner/name); {files}")
    refuse(Path(name).exists(), f"{name!r} is a path here, read in place of the hub's; {files}")


def _hub_kind() -> str:
    return "ms_hub" if os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true") else "hf_hub"


def _columns(entry: dict, formatting: str) -> dict[str, str]:
    """As LLaMA-Factory: without `columns` the defaults; with it only what it names (plus nothing else)."""
    defaults = MESSAGES_COLUMNS.get(formatting, ALPACA_COLUMNS)
    given = entry.get("columns")
    if given is None:
        return dict(defaults)
    columns = _checked_mapping(given, COLUMN_NAMES, "columns")
    needed = "prompt" if formatting == "alpaca" else "messages"
    columns.setdefault(needed, defaults[needed])
    return columns


def _tags(entry: dict, formatting: str) -> dict[str, str]:
    defaults = OPENAI_TAGS if formatting == "openai" else SHAREGPT_TAGS
    return defaults | _checked_mapping(entry.get("tags") or {}, tuple(SHAREGPT_TAGS), "tags")


def _checked_mapping(given, known: tuple[str, ...], where: str) -> dict[str, str]:
    """What is given, without what is null."""
    _check_names(given, known, f"{where}: unknown key")
    check(given, dict.fromkeys(given, Field(str, null=True)), f"{where}.")
    return {key: value for key, value in given.items() if value is not None}


def _check_names(given: dict, known: tuple[str, ...], what: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{what} {key!r}; {hint}")


def as_messages(value, named: tuple[str, ...] = ("role", "from")):
    """The messages, or the message, whose JSON a cell of text is; anything else as it is."""
    found = parsed(value) if isinstance(value, str) else value
    messages = found if isinstance(found, list) else [found]
    told = all(isinstance(each, dict) and any(name in each for name in named) for each in messages)
    return found if messages and told else value


def _guess_format(info: DatasetInfo) -> DatasetInfo:
    """Format of a dataset given by path, from the columns of all rows and the first value of each."""
    row: dict = {}
    rows = 0
    for _, _, found in read_rows(info):
        rows += 1
        row |= {name: value for name, value in found.items() if row.get(name) in (None, "", [])}
    if not rows:
        raise UserError(f"dataset: {info.location} holds no rows")
    info = replace(info, listed=tuple(row))
    row = {name: as_messages(value) for name, value in row.items()}
    ranked = "chosen" in row and "rejected" in row
    columns = {key: key for key in ("system", "tools", "history", "kto_tag") if key in row}
    columns |= {key: key for key in ("chosen", "rejected") if ranked}
    if "functions" in row:  # OpenAI's older name
        columns.setdefault("tools", "functions")
    if str(row.get("label")).lower() in ("true", "false"):  # trl's name; a table of text has words
        columns["kto_tag"] = "label"
    listed = ("messages", "conversations", "prompt")
    messages = next((name for name in listed if isinstance(row.get(name), list)), None)
    if messages is not None or (ranked and isinstance(row["chosen"], list)):
        some = row[messages] if messages is not None else row["chosen"]
        openai = bool(some) and isinstance(some[0], dict) and "role" in some[0]
        columns |= {"messages": messages or "messages"}
        if messages == "prompt" and "completion" in row:
            columns["response"] = "completion"
        columns.pop("history", None)
        formatting, tags = ("openai", OPENAI_TAGS) if openai else ("sharegpt", SHAREGPT_TAGS)
        return replace(info, formatting=formatting, columns=columns, tags=tags)
    prompt = next((name for name in PROMPT_NAMES if name in row), None)
    response = next((name for name in RESPONSE_NAMES if name in row), None)
    if prompt is not None:
        columns |= {"prompt": prompt} | ({} if response is None else {"response": response})
        columns |= {"query": "input"} if "input" in row else {}
        paired = response is not None and isinstance(row[response], list) and len(row[response]) == 2
        return replace(info, columns=columns, ranking=paired)
    if "text" in row:
        return replace(info, columns={"prompt": "text"})
    nested = next((name for name in row if rows == 1 and isinstance(row[name], list)), None)
    hint = "" if nested is None else f". If the rows are what {nested!r} holds, let the file be that list"
    known = "'instruction' or 'prompt' (alpaca), 'conversations' (sharegpt), 'messages' (OpenAI) or 'text'"
    found = f"{info.location} has the columns {', '.join(map(str, row))}"
    raise UserError(f"dataset: {found}; expected {known}; or an entry for it{hint}")


# ------------------------------------------------------------------------------------------------------------
# rows


def list_files(info: DatasetInfo) -> list[Path]:
    """The data files of a `file` dataset in reading order: itself, or a folder's files by name."""
    path = Path(info.location) / (info.folder or "")
    with located(f"dataset {info.name!r}"):
        refuse(leaves(info.folder or ""), f"folder {info.folder!r} leaves {info.location}")
        if path.is_file():
            files = [path]
        elif path.is_dir():
            names = sorted(child.name for child in path.iterdir() if child.is_file())
            files = [path / name for name in names if name[0] != "." and name != "dataset_info.json"]
        else:
            raise UserError(f"{path} is no file or folder" if path.exists() else f"{path} does not exist")
        endings = {file.suffix.lower() for file in files}
        refuse(not files, f"the folder {path} is empty")
        if not endings <= set(FILE_TYPES):
            wrong = next(file for file in files if file.suffix.lower() not in FILE_TYPES)
            raise UserError(f"{wrong} is of no known type; known: {', '.join(FILE_TYPES)}")
        if len(endings - {".json", ".jsonl"}) + bool(endings & {".json", ".jsonl"}) > 1:
            raise UserError(f"the folder {path} mixes {', '.join(sorted(endings))}; keep one type")
        home = Path(info.home).resolve() if info.home is not None else None
        for file in files if home is not None else ():
            # the files of a snapshot of the hub's cache are links into its folder blobs
            blobs, found = home.parent.parent / "blobs", file.resolve()
            inside = found.is_relative_to(home) or found.parent == blobs
            remedy = "move the file there, name its own folder as dataset_dir, or give its path as `dataset`"
            refuse(not inside, f"{file} is a link that leaves {info.home}; {remedy}")
    return files


def read_rows(info: DatasetInfo, opened: Iterable[dict] | None = None) -> Iterator[Row]:
    """Every row in a fixed order. opened: what open_hub returned, for a hub data set."""
    if info.kind == "file":
        rows = chain.from_iterable(map(read_file, list_files(info)))
    else:
        rows = _hub_rows(info, opened)
    absent = dict.fromkeys(info.listed)
    for number, (place, row) in enumerate(rows):
        yield number, place, absent | row if absent else row


def checksum(row, start: int = 0) -> int:
    """Of the values of a row; of an object that JSON does not know what it says of itself."""
    described = json.dumps(row, default=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)))
    return zlib.crc32(described.encode(), start)


def _hub_rows(info: DatasetInfo, opened: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    number, rows = 0, iter(opened)
    while True:
        place = f"{info.location} row {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of datasets, what it reads with, or the network: it may be anything
            raise UserError(f"{place}: cannot be read ({type(error).__name__}: {error})") from error
        yield place, row
        number += 1


def open_hub(info: DatasetInfo, hub: HubAccess, streaming: bool):
    """The hub dataset as an iterable of dicts. Only data files are read; repositories' code never runs."""
    shared = {"data_dir": info.folder, "split": info.split, "cache_dir": hub.cache_dir}
    if info.kind == "ms_hub":
        try:
            from modelscope import MsDataset
        except ImportError as error:
            why = "comes from ModelScope; run `pip install modelscope` first"
            raise UserError(f"dataset {info.name!r} {why}") from error
        named = {"dataset_name": info.location, "subset_name": info.subset, "token": hub.ms_token}
        rows = MsDataset.load(**named, **shared, use_streaming=streaming)
        return rows.to_hf_dataset() if hasattr(rows, "to_hf_dataset") else rows
    from datasets import load_dataset  # imported here: it takes a second and only hub data needs it
    from datasets.exceptions import DatasetsError

    named = {"name": info.subset, "revision": info.revision, "token": hub.hf_token}
    try:
        return load_dataset(info.location, **named, **shared, streaming=streaming)
    # not found, offline, script refused, unknown split; files that are damaged
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        where = f"dataset {info.name!r}: the hub id {info.location!r} (split {info.split!r})"
        raise UserError(f"{where} cannot be read: {error}") from error


def data_key(info: DatasetInfo, rows=None) -> str:
    """A hash of what the rows are made of: the bytes of the files, or the hub dataset's own fingerprint."""
    digest = hashlib.blake2b(digest_size=20)
    if info.kind != "file":
        fingerprint = getattr(rows, "_fingerprint", "")
        digest.update(f"{info.location} {info.subset} {info.split} {fingerprint}".encode())
        return digest.hexdigest()
    for path in list_files(info):
        digest.update(path.suffix.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def check_sha1(info: DatasetInfo) -> str | None:
    """A warning text when `file_sha1` is given and differs from the file, else None."""
    if info.file_sha1 is None or info.kind != "file":
        return None
    files, where = list_files(info), f"dataset {info.name!r}"
    if len(files) > 1:
        return f"{where}: file_sha1 is given for a folder of {len(files)} files and was not checked"
    with open(files[0], "rb") as file:
        found = hashlib.file_digest(file, "sha1").hexdigest()
    if found == info.file_sha1.lower():
        return None
    return f"{where}: {files[0]} has sha1 {found}, but file_sha1 says {info.file_sha1}: other contents"
