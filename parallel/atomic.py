"""Files and folders that are complete or absent, whatever happens while they are written.

    with atomic_file(path) as temporary:            # write there; it takes its place when the block ends well
        temporary.write_text(text)
    with atomic_folder(path) as temporary:          # the same for a folder of files
        save_model(model, temporary)

What is written lies under a temporary name beside its place, is flushed to the disk and renamed: no kill -9
leaves half of it, no process reads half. The temporary goes after an error, or with the next who writes it.
"""

import fcntl
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from options.errors import DISK_FULL, StopRun, UserError

TEMPORARY = ".tmp-"  # what such names begin with


def temporary_name(path: Path) -> Path:
    """Beside `path`, for this process alone: two that write the same file do not meet."""
    return path.with_name(f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{path.name}")


def _swept(path: Path) -> Path:
    """Its temporary_name, once what killed processes of this machine left of the same has been removed."""
    own = f"{TEMPORARY}{socket.gethostname()}-"
    for old in path.parent.glob(f"{glob.escape(own)}*-{glob.escape(path.name)}"):
        process = old.name.removeprefix(own).removesuffix(f"-{path.name}")
        if process.isdigit() and (int(process) == os.getpid() or not Path(f"/proc/{process}").exists()):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return temporary_name(path)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """The name to write to; renamed to `path` at the end."""
    temporary = _swept(Path(path))
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
    temporary = _swept(path)
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
    doomed = path
    if path.exists() and not path.name.startswith(TEMPORARY):
        doomed = temporary_name(path).with_suffix(".old")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def flush_tree(folder: Path) -> None:
    for path in (*filter(Path.is_file, folder.rglob("*")), folder):
        flush(path)


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The only process to make what a cache keeps at `path`; others that want it wait. The kernel ends the
    lock with the process. UserError where nothing can be written, StopRun on a full disk, of cache_dir."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f"{path.name}.lock"), "w")  # noqa: SIM115  (its errors alone are told)
    except OSError as error:
        why = f"{folder} cannot be made or written ({error.strerror})"
        raise UserError(f"cache_dir: {why}; name another") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            again = "make room and run the same command again"
            raise StopRun(f"cache_dir: {folder}: {error}; {again}") from error
