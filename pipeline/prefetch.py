"""The next items of an iterator, prepared by a thread while the current one is worked on.

    with ahead(batches, depth=2) as ready:
        for batch in ready: ...

Order and content are those of the iterator. What it raises is raised where its item would have come; what it
raises beyond the last item that is taken never shows. Leaving the block, by an error too, ends the thread.
"""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# at the end, for an item that is being prepared; a source that hangs is left to die with us
PATIENCE_SECONDS = 5.0


@contextmanager
def ahead(items: Iterator, depth: int) -> Iterator[Iterator]:
    """At most `depth` items wait, and one more is in the thread's hands. depth 0: no thread at all."""
    if depth == 0:
        yield items
        return
    ready: queue.Queue = queue.Queue(depth)
    stopping = threading.Event()

    def draw() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if stopping.is_set():
                    break
            else:
                ready.put((None, StopIteration()))
        except BaseException as error:  # whatever it is, it belongs to the thread that asked
            ready.put((None, error))
        finally:
            if hasattr(items, "close"):
                items.close()

    def taken() -> Iterator:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    thread = threading.Thread(target=draw, name="prefetch", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopping.set()
        end = time.monotonic() + PATIENCE_SECONDS
        while thread.is_alive() and time.monotonic() < end:
            try:
                ready.get(timeout=0.02)  # makes room for the thread that waits to put
            except queue.Empty:
                continue
        thread.join(0)
