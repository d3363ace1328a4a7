"""SIGTERM and SIGINT: a training saves and ends, an evaluation or a prediction is broken off."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from parallel.world import World

_GRACE_SECONDS = 1.0  # a terminal and a launcher may both pass on one Ctrl-C; a later one means it


class Interrupted(BaseException):
    """A signal, by its number, in the middle of an evaluation or a prediction, which then gives nothing."""


class Signals:
    """SIGTERM and SIGINT are noted in `received`, for a checkpoint after this step; a repeated one kills."""

    def __init__(self, world: World):
        self.world, self.received, self.first_at, self.raises = world, [], 0.0, False

    def __enter__(self) -> "Signals":
        self.before = {each: signal.signal(each, self._note) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        again = bool(self.received)
        self.received.append(number)
        if not again:
            self.first_at = time.monotonic()
            name = signal.Signals(number).name
            with suppress(OSError):  # nobody may read it
                os.write(2, f"\n{name}: saving after this step; once more to stop at once\n".encode())
            if self.raises:
                raise Interrupted(number)
        elif time.monotonic() - self.first_at > _GRACE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def end_this(self) -> Iterator[None]:
        """Within it, where nothing is changed that a run goes on with, a signal raises Interrupted: of one
        process at once, of several at the next `look`."""
        self.raises = self.world.size == 1
        try:
            self.look()
            yield
        finally:
            self.raises = False

    def look(self) -> None:
        """All ranks call it; all of them raise Interrupted if one of them has got a signal."""
        (number,) = self.world.max_over_ranks(max(self.received, default=0))
        if number:
            raise Interrupted(number)
