"""What a program says when it cannot go on, and with which exit status.

UserError   somebody wrote or gave something that cannot be used: one line that names the key or file, what was found
            and the way out; exit status 2. Raised where it is noticed. It is a ValueError, so that who calls a
            function from Python may catch it as one; no program does.
StopRun     the run itself cannot go on (a loss that is not finite, a full disk): one line, exit status 1.
Anything else is a bug and keeps its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """The text is for the user: key or file, what was found, the way out."""


class StopRun(Exception):
    """The run cannot go on; the text is for the user."""


@contextmanager
def located(place: str) -> Iterator[None]:
    """A UserError from within begins with `place: `, the key or file that it is about."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{place}: {error}") from error


def exit_status(program: str, body: Callable[[], int]) -> int:
    """Run a program's body: 2 after a UserError, 1 after a StopRun or on a full disk, each with one line on stderr;
    128 + 2 after Ctrl-C. With ANVIL_TRACEBACK=1 in the environment these keep their tracebacks too."""
    try:
        return body()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return 130
    except (UserError, StopRun, OSError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        if os.environ.get("ANVIL_TRACEBACK") or (isinstance(error, OSError) and not full):
            raise
        print(
            f"{program}: {error}{'; make room and run the same command again' if full else ''}",
            file=sys.stderr,
        )
        return 2 if isinstance(error, UserError) else 1
