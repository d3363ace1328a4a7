"""Files and folders that are complete or absent, whatever happens while they are written.

    with atomic_file(path) as temporary:            # write there; it takes its place when the block ends well
        temporary.write_text(text)
    with atomic_folder(path) as temporary:          # the same for a folder of files
        save_model(model, temporary)

What is written lies under a temporary name beside its place, is flushed to the disk and renamed, so a kill
-9, a disk or another process never leaves or reads half of it. After an error the temporary is removed, after
a kill by the next who writes the same.
"""

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"  # what such names begin with


def temporary_name(path: Path) -> Path:
    """Beside `path`, for this process alone: two that write the same file do not meet."""
    return path.with_name(f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{path.name}")


def _sweep(path: Path) -> None:
    """Remove what processes of this machine that were killed left of the same file or folder."""
    own = f"{TEMPORARY}{socket.gethostname()}-"
    for old in path.parent.glob(f"{glob.escape(own)}*-{glob.escape(path.name)}"):
        process = old.name.removeprefix(own).removesuffix(f"-{path.name}")
        if process.isdigit() and (int(process) == os.getpid() or not Path(f"/proc/{process}").exists()):
            shutil.rmtree(old) if old.is_dir() else old.unlink()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """The name to write to; renamed to `path` at the end."""
    path = Path(path)
    temporary = temporary_name(path)
    _sweep(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to write into; takes the place of `path`, and of what lies there, at the end."""
    path = Path(path)
    temporary = temporary_name(path)
    _sweep(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_tree(temporary)
        remove_folder(path)
        temporary.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Renamed first, so that a kill half-way never leaves one that looks complete."""
    if not path.exists():
        return
    doomed = path if path.name.startswith(TEMPORARY) else temporary_name(path).with_suffix(".old")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
