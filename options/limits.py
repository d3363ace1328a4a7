"""Bounds for what others wrote, and the memory that there is.

    @bounded("the chat_template", "choose a built-in one by `template`")
    def render(...):                    # UserError where it takes SECONDS of computing or BYTES of memory

Templates and patterns come with a checkpoint and run here; a loop in a loop, or a text times a number, would
hold the program for hours or take the machine's memory.
"""

import functools
import multiprocessing
import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from options.errors import UserError, refuse

# the dearest template of a published model takes some milliseconds and megabytes
SECONDS, BYTES = 10.0, 2**30


class _Expired(Exception):
    """No UserError: on its way out nothing may take it for a refusal of the template's own."""


def bounded(what: str, remedy: str) -> Callable[[Callable], Callable]:
    """Decorates: UserError where a call takes more than SECONDS of computing, or BYTES beyond what there is;
    within another one that one counts. A call in another thread than the main one is made, pickled, in a
    process beside this one: signals reach main threads alone, a limit of memory would be every thread's."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if threading.current_thread() is threading.main_thread():
                with _within(what, remedy):
                    return function(*args, **kwargs)
            try:
                return _beside().submit(call, *args, **kwargs).result()
            except BrokenExecutor as error:
                raise UserError(f"{what} has ended the process that runs it; {remedy}") from error

        return call

    return decorate


@functools.cache
def _beside() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), serve_parent, (signal.SIGTERM,))


def serve_parent(*also: int) -> None:
    """In a worker process: Ctrl-C is the parent's to tell, and once that is gone so is this."""
    for number in (signal.SIGINT, *also):
        signal.signal(number, signal.SIG_IGN)
    gone = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (gone(), os._exit(1)), daemon=True).start()


@contextmanager
def _within(what: str, remedy: str) -> Iterator[None]:
    if signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0:
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, _expire)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        if sys.platform.startswith("linux"):
            resource.setrlimit(resource.RLIMIT_AS, (_least(limits[0], _address_bytes() + BYTES), limits[1]))
        yield
    except (_Expired, MemoryError) as error:
        much = f"{SECONDS:g} seconds" if isinstance(error, _Expired) else f"{BYTES / 2**30:g} GiB of memory"
        raise UserError(f"{what} takes more than {much}; {remedy}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, before)


def _expire(number, frame) -> None:
    raise _Expired


def _address_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _least(limit: int, other: int) -> int:
    return other if limit == resource.RLIM_INFINITY else min(limit, other)


def small(path: Path, most: int = 2**28) -> Path:
    """The same path, of a file that is read as a whole: OSError if there is none, UserError if it has more
    bytes, or is a pipe or a device, which may have no end."""
    status = path.stat()
    endless = not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))
    refuse(endless, f"{path}: a pipe or a device, expected a file")
    large = status.st_size > most
    refuse(large, f"{path}: more than {most >> 20} MiB, which is no such file; fetch it again")
    return path


def leaves(path: str) -> bool:
    """Whether a path of somebody's file points out of the folder that it should lie in."""
    inside = os.path.normpath(path)
    return os.path.isabs(inside) or inside.split(os.sep)[0] == ".." or "://" in path


def free_host_bytes(root: Path = Path("/")) -> int:
    """What this process may still take of the host's memory: the least of what Linux calls available, of what
    its control groups leave, and of what its own limits (ulimit) leave; elsewhere all there is."""
    if not sys.platform.startswith("linux"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _numbers(root / "proc/meminfo")["MemAvailable:"] * 1024
    status, own = _numbers(root / "proc/self/status"), []
    for limit, taken in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft = resource.getrlimit(limit)[0]
        own += [] if soft == resource.RLIM_INFINITY else [soft - status[taken] * 1024]
    return max(0, min([available, *own, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in each control group around this process that has a limit; pages of files count as free."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, place = line.split(":", 2)
        top, limit, taken = root / "sys/fs/cgroup", "memory.max", "memory.current"
        if "memory" in controllers.split(","):  # of version 1
            top, limit, taken = top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif controllers:
            continue
        folder = top / place.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                most, used = (int((group / name).read_text()) for name in (limit, taken))
            except (OSError, ValueError):  # not to be seen from in a container; "max"
                continue
            files = _numbers(group / "memory.stat")
            yield most - used + files.get("inactive_file", 0) + files.get("active_file", 0)


def _numbers(path: Path) -> dict[str, int]:
    """First word -> number of the lines of a file of the system that are so."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
