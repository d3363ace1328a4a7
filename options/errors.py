"""What a program says when it cannot go on, and with which exit status.

UserError   somebody wrote or gave something that cannot be used: a line that names the key or file, what was
            found and the way out; exit status 2. Raised where it is noticed. It is a ValueError, so that who
            calls a function from Python may catch it as one; no program does. A path that the system refuses
            (permission denied, a file where a folder should be) is told alike.
StopRun     the run itself cannot go on (a loss that is not finite, a full disk): a line, exit status 1.
Anything else is a bug and keeps its traceback.
"""

import errno
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what the system says of a path that somebody named, whoever opens it; a file that is not there may be a bug
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


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


EXPECTED = (UserError, StopRun, OSError, KeyboardInterrupt)  # of the programs, though not every OSError


@contextmanager
def located(place: str) -> Iterator[None]:
    """A UserError from within begins with `place: `, the key or file that it is about."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{place}: {error}") from error


def exit_status(program: str, body: Callable[[], int]) -> int:
    """Run a program's body: 2 after a UserError, 1 after a StopRun or on a full disk, each told on stderr,
    and 128 + 2 after Ctrl-C."""
    try:
        return body()
    except EXPECTED as error:
        return tell(program, error)


def tell(program: str, error: BaseException) -> int:
    """In the `except` of EXPECTED: say it on stderr and give the exit status; a bug goes on its way with its
    traceback, and with ANVIL_TRACEBACK=1 in the environment everything does."""
    number = error.errno if isinstance(error, OSError) else None
    refused = number in REFUSED and error.filename is not None
    unread = isinstance(error, BrokenPipeError) and _is_closed(1)
    known = (
        refused or unread or number in DISK_FULL or isinstance(error, UserError | StopRun | KeyboardInterrupt)
    )
    if not known or os.environ.get("ANVIL_TRACEBACK"):
        raise error
    if unread:  # `| head` has seen enough; without this the interpreter complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    interrupted = isinstance(error, KeyboardInterrupt)
    text = "interrupted" if interrupted else str(error)
    if refused:
        text = f"{error.filename}: {error.strerror}; let this user read and write there, or name another path"
    text += "; make room and run the same command again" if number in DISK_FULL else ""
    print(f"{program}: {text}", file=sys.stderr, flush=True)
    return 130 if interrupted else 2 if refused or isinstance(error, UserError) else 1


def _is_closed(handle: int) -> bool:
    """Whether nobody reads any more what is written to this pipe."""
    poll = select.poll()
    poll.register(handle, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
