"""How far a long piece of work is: a bar in a terminal, a line now and then where there is none."""

import sys
from contextlib import suppress

from tqdm import tqdm

DELAY_SECONDS = 2.0  # work that is shorter shows no bar
LINE_SECONDS = 10.0  # between lines; work that is shorter writes none


class Bar(tqdm):
    """tqdm's, without its thread (with a second thread no worker could be forked); an output that fails is no
    reason to stop."""

    monitor_interval = 0

    def __init__(self, *given, disable: bool = False, **looks):
        self.in_lines = sys.stderr is None or not sys.stderr.isatty()
        looks = {"leave": False, "delay": DELAY_SECONDS, "dynamic_ncols": True} | looks
        if self.in_lines:
            looks |= {
                "leave": False,
                "delay": LINE_SECONDS,
                "mininterval": LINE_SECONDS,
                "dynamic_ncols": False,
            }
        super().__init__(*given, disable=disable or sys.stderr is None, **looks)

    def display(self, msg: str | None = None, pos: int | None = None):
        with suppress(OSError):
            if not self.in_lines:
                return super().display(msg, pos)
            if text := str(self) if msg is None else msg:
                print(text, file=sys.stderr, flush=True)
        return False
