"""A thread prepares what comes next: same items, same errors, and it is gone afterwards."""

import itertools
import threading
import time

import pytest

from pipeline import prefetch
from pipeline.prefetch import ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_the_same_items_in_the_same_order(depth):
    with ahead(iter(range(57)), depth) as ready:
        assert list(ready) == list(range(57))
        assert list(ready) == []
    assert not threads()


def test_items_are_prepared_while_the_last_one_is_used_and_no_more_than_asked():
    made = []

    def source():
        for i in itertools.count():
            made.append((i, threading.current_thread().name))
            yield i

    with ahead(source(), 2) as ready:
        assert next(ready) == 0
        wait_until(lambda: len(made) == 4)  # one taken, two waiting, one in the thread's hands
        time.sleep(0.05)
        assert len(made) == 4
        assert next(ready) == 1
        wait_until(lambda: len(made) == 5)
    assert {name for _, name in made} == {"prefetch"} and not threads()


def wait_until(happened, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_in_its_place(depth):
    def source():
        yield from range(3)
        raise ValueError("row 3 is broken")

    taken = []
    with pytest.raises(ValueError, match="row 3 is broken") as caught, ahead(source(), depth) as ready:
        for item in ready:
            taken.append(item)
    assert taken == [0, 1, 2] and not threads()
    assert any(entry.name == "source" for entry in caught.traceback)  # says where


def test_an_error_behind_the_last_item_that_is_taken_does_not_show():
    def source():
        yield from range(3)
        raise ValueError("nobody asked for it")

    with ahead(source(), 5) as ready:
        assert [next(ready) for _ in range(3)] == [0, 1, 2]
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_and_the_source_is_closed_when_the_block_breaks_off(error):
    closed = []

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    with pytest.raises(error), ahead(source(), 1) as ready:
        next(ready)
        raise error
    assert closed == [True] and not threads()


def test_a_source_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(prefetch, "PATIENCE_SECONDS", 0.1)
    release = threading.Event()

    def source():
        yield 1
        release.wait(30)

    started = time.monotonic()
    with ahead(source(), 1) as ready:
        assert next(ready) == 1
    assert time.monotonic() - started < 5
    release.set()
    wait_until(lambda: not threads())
