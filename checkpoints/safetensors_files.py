"""Folders of safetensors files in the Hugging Face layout: model.safetensors, or shards and an index.

Reading streams one tensor at a time from the memory-mapped file. Writing goes to a hidden folder first and
only then replaces what was there, so neither a full disk nor a crash leaves half a model. Nothing is ever
unpickled.
"""

import errno
import json
import os
import re
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from options import json_reader
from options.atomic import flush_tree, swept
from options.errors import NOT_FINITE, UserError, refuse

NamedTensor = tuple[str, torch.Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
EXPORT_RECORD = "export_info.json"  # marks a folder as an export, which the next one there may replace
PICKLE = "a pickle, which can run any code when it is read, so it is refused"


# Reading


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError names the file and the line."""
    if not path.is_file():
        raise UserError(f"{path}: file not found; is {path.parent} a complete model or adapter folder?")
    return json_reader.read(path, way_out="the file is damaged, fetch it again")


def stream_tensors(folder: str | Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """(file, name, tensor) of every tensor in the folder's files; the tensors lean on the mapped file."""
    for path in weight_files(Path(folder)):
        for name, tensor in file_tensors(path):
            yield path, name, tensor


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """safetensors' handle of one file; UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}); fetch it again") from error


def file_tensors(path: Path) -> Iterator[NamedTensor]:
    """(name, tensor) of every tensor in one safetensors file; UserError if it is damaged."""
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
            yield name, file.get_tensor(name)


def refuse_not_finite(tensor: torch.Tensor, place: str) -> None:
    """UserError for NaN and infinity in what was just read, before a step of a run meets them."""
    if tensor.numel() and tensor.is_floating_point():
        numbers = tensor if tensor.itemsize > 1 else tensor.float()
        low, high = numbers.aminmax()  # one pass without a copy; a NaN comes out of both
        refuse(not (low.isfinite() and high.isfinite()), f"{place} {NOT_FINITE}")


def file_notes(path: Path) -> dict[str, str]:
    """The metadata of one safetensors file; UserError if it is damaged."""
    with opened(path) as file:
        return file.metadata() or {}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; UserError with the way out for folders that have none."""
    if (folder / SINGLE).is_file():  # before the index, as transformers looks
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        remedy = "Take the model's safetensors revision, or convert it once in an environment you trust"
        code = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        found = f"only {pickles[0]} found. A .bin file is {PICKLE}"
        raise UserError(f"{folder}: {found}. {remedy}: transformers' {code}")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds an adapter, not a model; give it as adapter_name_or_path")
    raise UserError(f"{folder}: no {SINGLE} or {INDEX}; is it a model folder?")


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: key weight_map missing or not a map of file names; fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        refuse(Path(name).name != name, f"{index}: {name} points outside the folder; refused")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: named in {INDEX} but not there; the download is incomplete")
    return [folder / name for name in names]


# Writing


@contextmanager
def staged(folder: str | Path, earlier: Iterable[str] = ()) -> Iterator[Path]:
    """A fresh folder to write files into; on leaving they replace those of the same name in `folder`, and of
    the `earlier` ones those that are not among them go; all others stay (atomic_folder would replace them
    too). New weights replace all old ones, however many files either has. An error inside leaves `folder` as
    it was."""
    folder = Path(folder)
    staging = swept(folder / "files")
    staging.mkdir(parents=True)
    try:
        yield staging
        flush_tree(staging)
        _publish(staging, folder, earlier)
    finally:
        shutil.rmtree(staging)


def _publish(staging: Path, folder: Path, earlier: Iterable[str]) -> None:
    """Move the files, in an order in which a reader finds the old weights or the new ones, no mixture, and
    with anything else of another model no config.json."""
    names = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
    shards = sorted(path.name for path in staging.glob(SHARDS))
    heads = [name for name in (SINGLE, INDEX) if name in names]
    first, last = (sorted(names & {name}) for name in (EXPORT_RECORD, "config.json"))
    others = sorted(names.difference(shards, heads, first, last))
    for name in names:
        found = f"{folder / name} is a folder where a file is to be written; move it away"
        refuse((folder / name).is_dir(), found)
    for name in last:
        (folder / name).unlink(missing_ok=True)
    if any((folder / name).exists() for name in shards):
        (folder / INDEX).unlink(missing_ok=True)  # no index while files are renamed, which is a clear error
    for name in [*first, *shards, *heads]:
        os.replace(staging / name, folder / name)
    if heads:
        (folder / (INDEX if SINGLE in names else SINGLE)).unlink(missing_ok=True)
        for stale in folder.glob(SHARDS):
            if stale.name not in names:
                stale.unlink()
    for name in [*others, *last]:
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(staging / name, folder / name)
    for name in set(earlier) - names:
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # the folder is not empty, or not one of its own
            (folder / name).parent.rmdir()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, str] | None = None) -> None:
    """One safetensors file with the permissions of any new file; OSError if it cannot be written."""
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"} | (notes or {}))
    except SafetensorError as error:
        told = re.search(r"os error (\d+)", str(error))
        text = f"could not be written ({error}); is the disk full?"
        raise OSError(int(told[1]) if told else errno.EIO, text, str(path)) from error
    path.chmod(permissions)  # safetensors makes files that only their owner can read


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_shards(folder: str | Path, tensors: Iterable[NamedTensor], shard_gigabytes: float) -> torch.dtype:
    """Write (name, tensor) pairs as safetensors files of at most this many GB (1e9 bytes); give back their
    main dtype.

    Only one shard is held in memory; a tensor above the limit gets a shard of its own. One shard ->
    model.safetensors, more -> numbered files and an index. Old weights in the folder go when the new stand.
    """
    if not shard_gigabytes > 0:
        raise ValueError(f"export_size: {shard_gigabytes} GB per file must be above 0")
    names: list[list[str]] = []  # of each finished shard
    held: dict[str, torch.Tensor] = {}
    held_bytes, bytes_of = 0, Counter()
    with staged(folder) as staging:

        def flush() -> None:
            write_tensors(staging / f"{len(names)}", held)
            names.append(list(held))
            held.clear()

        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            bytes_of[tensor.dtype] += size
            if held and held_bytes + size > shard_gigabytes * 1e9:
                flush()
                held_bytes = 0
            held[name] = tensor.cpu().contiguous()
            held_bytes += size
        flush()
        _name_shards(staging, names, bytes_of.total())
    return max(bytes_of, key=bytes_of.get)


def _name_shards(staging: Path, names: list[list[str]], total_bytes: int) -> None:
    """Final names, which hold the number of shards, and the index."""
    if len(names) == 1:
        (staging / "0").rename(staging / SINGLE)
        return
    weight_map = {}
    for i, shard in enumerate(names):
        final = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        (staging / f"{i}").rename(staging / final)
        weight_map |= dict.fromkeys(shard, final)
    write_json(staging / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def read_plain(path: Path) -> object:
    """What torch.save wrote: tensors and plain values. UserError says what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load itself does not look at the checksums
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise UserError(str(error)) from error
    refuse(broken, broken)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, errors of pickle: the file may be anybody's
        raise UserError("not written by torch.save, or more than tensors and plain values") from error
