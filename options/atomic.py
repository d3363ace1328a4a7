"""Files and folders that are complete or absent, whatever happens while they are written.

    with atomic_file(path) as temporary:            # write there; it takes its place when the block ends well
        temporary.write_text(text)
    with atomic_folder(path) as temporary:          # the same for a folder of files
        save_model(model, temporary)
    with alone_in(folder, "output_dir", "training"):        # nobody else writes there meanwhile

What is written lies under a temporary name beside its place, is flushed to the disk and renamed: no kill -9
leaves half of it, no process reads half. The temporary goes after an error, or with the next who writes it.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from options.errors import DISK_FULL, StopRun, UserError, refuse

TEMPORARY = ".tmp-"  # what such names begin with
NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # of a disk


def temporary_name(path: Path) -> Path:
    """Beside `path`, for this call alone: two that write the same file do not meet, and nobody guesses it."""
    own = f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{own}-{path.name}")


def swept(path: Path) -> Path:
    """Its temporary_name, once what killed processes of this machine left of the same has been removed."""
    own = rf"{re.escape(TEMPORARY + socket.gethostname())}-(\d+)-[0-9a-f]{{8}}-{re.escape(path.name)}"
    for old in path.parent.iterdir() if path.parent.is_dir() else ():
        left = re.fullmatch(own, old.name)
        if left and (int(left[1]) == os.getpid() or not Path(f"/proc/{left[1]}").exists()):
            remove(old)
    return temporary_name(path)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """The name to write to, of a new empty file; renamed to `path` at the end."""
    temporary = swept(Path(path))
    # made here or not at all: a link of that name, which somebody else put there, is not written through
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to write into; takes the place of `path`, or of what `path` leads to if it is a link,
    and of what lies there, at the end."""
    path = Path(path).resolve()
    temporary = swept(path)
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
        doomed = temporary_name(path)
        path.rename(doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """A folder with all that is in it; a file; a link, and not what it leads to; or nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


# Folders that several processes may want


@contextmanager
def alone_in(folder: Path, key: str, what: str) -> Iterator[None]:
    """Make the folder that `key` names and keep every other `what` out of it while the block runs.

    The lock (flock on the folder itself) leaves no file and ends with the process. UserError where another
    one holds it or nothing can be written, StopRun on a full disk. A new folder that stays empty goes again.
    """
    new, mine = not folder.exists(), False
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        why = f"cannot be made or written ({error.strerror})" if file is None else f"{file} is a file"
        raise UserError(f"{key}: {folder}: {why}; name another folder") from error
    try:
        mine = _is_locked(handle, folder, what)
        remedy = "choose another folder or wait for its end"
        refuse(not mine, f"{key}: {folder}: another {what} is writing into it; {remedy}")
        writable = os.access(folder, os.W_OK)
        refuse(not writable, f"{key}: {folder}: cannot be written (permission denied)")
        with room_in(folder, key):
            yield
    finally:
        if mine and new:
            with suppress(OSError):  # it holds something
                folder.resolve().rmdir()
        os.close(handle)


def _is_locked(handle: int, folder: Path, what: str) -> bool:
    """Whether this process has got the lock; told as a note where the disk has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"note: the disk of {folder} has no locks; run one {what} there at a time", flush=True)
    # who held it before may have removed the folder since it was opened here
    return folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())


@contextmanager
def room_in(folder: Path, key: str) -> Iterator[None]:
    """A full disk is StopRun: the key that names the folder, what the system says, what is free there."""
    try:
        yield
    except OSError as error:
        inside = error.filename is None or Path(error.filename).absolute().is_relative_to(folder.absolute())
        if error.errno not in DISK_FULL or not inside:
            raise
        free = f"{free_bytes_on(folder) / 1e9:.2f} GB are free"
        again = f"make room and run the same command again ({free})"
        raise StopRun(f"{key}: {folder}: could not be written: {error}; {again}") from error


def free_bytes_on(path: Path) -> int:
    """Of the disk that the path lies on, or would lie on."""
    path = path.absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.is_dir())).free


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The only process to make what a cache keeps at `path`; others that want it wait. The kernel ends the
    lock with the process. UserError where nothing can be written, StopRun on a full disk, of cache_dir."""
    folder = path.parent
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f"{path.name}.lock"), "w")  # noqa: SIM115  (its errors alone are told)
    except OSError as error:
        why = f"{folder} cannot be made or written ({error.strerror})"
        raise UserError(f"cache_dir: {why}; name another") from error
    with lock, room_in(folder, "cache_dir"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
