"""progress.py: a bar in a terminal, lines elsewhere, nothing for what is short or cannot be written."""

import io
import sys
import time

from options import progress
from options.progress import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Gone(io.StringIO):
    def write(self, text):
        if text:
            raise BrokenPipeError
        return 0


def work(**looks) -> None:
    for _ in Bar(range(8), "reading", unit=" rows", **looks):
        time.sleep(0.03)


def test_without_a_terminal_progress_comes_in_lines(capsys, monkeypatch):
    work()
    assert capsys.readouterr().err == ""  # too short to be told of
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.06)
    work()
    text = capsys.readouterr().err
    assert "\r" not in text and 1 < text.count("\n") < 8
    assert all(line.startswith("reading: ") and " rows/s" in line for line in text.splitlines())
    work(disable=True)
    assert capsys.readouterr().err == ""


def test_in_a_terminal_it_is_a_bar_that_goes_again(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(delay=0.05)
    assert "\rreading: " in sys.stderr.getvalue() and "\n" not in sys.stderr.getvalue()


def test_an_output_that_fails_or_is_closed_ends_nothing(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        work()
