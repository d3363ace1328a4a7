"""What a program says when it cannot go on, and with which exit status.

UserError   somebody wrote or gave something that cannot be used: a line that names the key or file, what was
            found and the way out; exit status 2. Raised where it is noticed. It is a ValueError, so that who
            calls a function from Python may catch it as one; no program does. A path that the system refuses
            (permission denied, a file where a folder should be) is told alike.
StopRun     the run itself cannot go on (a loss that is not finite, a full disk, no memory): a line, exit
            status 1.
Anything else is a bug and keeps its traceback.
"""

import errno
import importlib.util
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NOT_FINITE = "holds NaN or infinity; the file is damaged, fetch it again"  # what is said of such a weight
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what the system says of a path that somebody named, whoever opens it; a file that is not there may be a bug
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
REFUSED += (errno.ELOOP,)
# what torch, for a CPU and for a GPU, numpy, C++ and the system say
LOOP = re.compile("Symlink loop from '(.*)'")  # RuntimeError of pathlib in Python up to 3.12
NO_MEMORY = re.compile(r"out of memory|(can't|[Uu]nable to|Cannot) allocate|not enough memory|bad_alloc")


class UserError(ValueError):
    """The text is for the user: key or file, what was found, the way out."""


def refuse(wrong: object, text: str) -> None:
    """UserError if `wrong`: for the checks of a section."""
    if wrong:
        raise UserError(text)


def require(section: object, keys: str, allowed: Callable[[float], bool], text: str) -> None:
    """UserError `key: value text` where one of these numbers of a section is not allowed; None always is."""
    for key in keys.split():
        value = getattr(section, key)
        refuse(value is not None and not allowed(value), f"{key}: {value} {text}")


class StopRun(Exception):
    """The run cannot go on; the text is for the user."""


def say(*values: object) -> None:
    """Print a line on the way. One that cannot be written (nobody reads the pipe any more, the disk is full,
    the terminal is gone, a character that it does not have) is lost: it never ends what runs."""
    try:
        print(*values, flush=True)
    except UnicodeEncodeError:
        say(*(str(value).encode("ascii", "backslashreplace").decode("ascii") for value in values))
    except OSError as error:
        if error.errno not in DISK_FULL:  # there may be room again, but who read the pipe is gone for good
            drop_output()


def end_output() -> None:
    """When a program ends: what waits for room is written now or not at all."""
    try:
        print(end="", flush=True)  # not sys.stdout.flush(): that is None where it was closed from the start
    except OSError:
        drop_output()


def drop_output() -> None:
    """What is still to be written to stdout goes nowhere; without this the interpreter complains at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# of the programs, though not every one of the last four
EXPECTED = (UserError, StopRun, KeyboardInterrupt, MemoryError, OSError, RuntimeError, ValueError)


@contextmanager
def located(place: str) -> Iterator[None]:
    """A UserError from within begins with `place: `, the key or file that it is about."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{place}: {error}") from error


@contextmanager
def fitting(what: str, remedy: str) -> Iterator[None]:
    """Where memory runs out within: StopRun, with what did not fit, and the keys that make it smaller."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_of_memory(error):
            raise
        raise StopRun(f"out of memory: {what} does not fit{_asked_for(error)}; {remedy}") from error


def _asked_for(error: BaseException) -> str:
    found = re.search(r"allocate ([\d.]+) (bytes|[KMGTP]iB)", str(error))
    if found is None:
        return ""
    size = f"{float(found[1]) / 1e9:.2f} GB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f" ({size} more were asked for)"


def is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a GPU."""
    kinds = isinstance(error, OSError) and error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    return kinds or told or isinstance(error, MemoryError)


def exit_status(program: str, body: Callable[[], int]) -> int:
    """Run a program's body: 2 after a UserError, 1 after a StopRun or on a full disk, each told on stderr,
    and 128 + 2 after Ctrl-C."""
    try:
        listen_to_ctrl_c()
        many = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
        alone = f"it works in one process, and torchrun has started {many}; start it with python"
        refuse(many != "1", alone)
        status = body()
        print(end="", flush=True)
        return status
    except EXPECTED as error:
        return tell(program, error)


def tell(program: str, error: BaseException) -> int:
    """In the `except` of EXPECTED: say it on stderr and give the exit status; a bug goes on its way with its
    traceback, and with ANVIL_TRACEBACK=1 in the environment everything does."""
    number = error.errno if isinstance(error, OSError) else None
    refused = number in REFUSED and error.filename is not None
    unwritten = isinstance(error, OSError) and error.filename is None and _stdout_fails(number in DISK_FULL)
    loop = LOOP.fullmatch(str(error)) if isinstance(error, RuntimeError) else None
    nul = isinstance(error, ValueError) and str(error) == "embedded null byte"  # os: of a path
    interrupted, deep = isinstance(error, KeyboardInterrupt), isinstance(error, RecursionError)
    full, of_memory = number in DISK_FULL, is_of_memory(error)
    known = refused or unwritten or interrupted or deep or full or of_memory or loop or nul
    if not (known or isinstance(error, UserError | StopRun)) or os.environ.get("ANVIL_TRACEBACK"):
        raise error
    if unwritten and isinstance(error, BrokenPipeError):  # `| head` has seen enough
        return 0
    text = str(error)
    if interrupted:
        text = "interrupted"
    elif unwritten:
        text = f"the output cannot be written ({error.strerror}); send it to another place"
    elif refused:
        place = error.filename2 or error.filename  # of a renaming that where to
        text = f"{place}: {error.strerror}; let this user read and write there, or name another path"
    elif loop:
        text = f"{loop[1]}: a link that leads back to itself; name another path"
    elif nul:
        text = "one of the paths that are named holds a NUL character; write it anew"
    elif full:
        text += "; make room and run the same command again"
    elif deep:
        text = f"something that was read is nested too deeply ({error}); ANVIL_TRACEBACK=1 shows where"
    elif of_memory:
        text = f"out of memory{_asked_for(error)}; take a smaller model, batch or text"
    print(f"{program}: {harmless(text)}", file=sys.stderr, flush=True)
    return 130 if interrupted else 2 if refused or loop or nul or isinstance(error, UserError) else 1


def _stdout_fails(full: bool) -> bool:
    """Whether what was printed cannot be written: nobody reads the pipe, or, if a disk is full, its disk is.
    What is left of it goes."""
    poll = select.poll()
    poll.register(1, 0)
    closed = any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
    try:
        print(end="", flush=True)
        if full:
            os.write(1, b"\n")  # a long text waits in no buffer that a flush could try again
    except (OSError, ValueError):  # ValueError: it was closed
        closed = True
    if closed:
        drop_output()
    return closed


# Before torch is imported


def begin(program: str) -> None:
    """The first line of a program: until it listens, Ctrl-C is a line and no traceback (where a shell has
    started it in the background it stays ignored); and so is an environment without torch."""

    def end(number, frame) -> None:
        os.write(2, f"{program}: interrupted\n".encode())
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    if importlib.util.find_spec("torch") is None:
        enter = "make env && source .venv/bin/activate"
        print(f"{program}: this Python ({sys.executable}) has no torch; {enter}", file=sys.stderr)
        raise SystemExit(2)


def listen_to_ctrl_c() -> None:
    """From here on it is KeyboardInterrupt again, where begin() was called."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# C0 and C1 but tab and newline, and what turns the direction of writing: a text must not steer a terminal
_STEERING = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}
_STEERING |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


def harmless(text: str) -> str:
    """The text with pictures in place of control characters, for a terminal."""
    return text.translate(_STEERING)
