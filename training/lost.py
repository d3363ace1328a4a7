"""Which rank is gone, asked when a collective has failed on this one, or never came."""

import datetime
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from options.errors import StopRun, refuse
from parallel.world import PEERS, World, stop

PATIENCE_SECONDS = 3.0  # for a rank of another host to say that it is there
SILENT = "is gone or does not answer"
TIMED_OUT = re.compile("time[d ]*out", re.IGNORECASE)  # of gloo, NCCL and the store


def name_of_rank(program: str) -> str:
    """What a rank calls itself in front of an error."""
    rank = int(os.environ.get("RANK", 0))
    return f"{program} [rank {rank}]" if rank else program


@contextmanager
def naming_absent() -> Iterator[None]:
    """Around parallel.world.start: StopRun where the ranks do not find one another within ddp_timeout."""
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    rank, size, host, port = map(os.environ.get, names)
    unset = [name for name in names if name not in os.environ]
    many = size not in (None, "1")
    refuse(many and unset, f"WORLD_SIZE: {size}, but {', '.join(unset)} is not set; start it with torchrun")
    try:
        yield
    except dist.DistError as error:
        absent = []
        if PEERS:
            PEERS[0].set_timeout(datetime.timedelta(seconds=PATIENCE_SECONDS))
            with suppress(RuntimeError):
                absent = [str(each) for each in range(int(size)) if not PEERS[0].check([f"has come {each}"])]
        why = f"rank {', '.join(absent[:8])} did not come" if absent else str(error).strip().splitlines()[0]
        met = f"rank {rank} of {size} did not meet the others at {host}:{port} within ddp_timeout ({why})"
        remedy = "start all nodes, with one --rdzv_endpoint that names the first of them"
        raise StopRun(f"{met}; {remedy}, and see whether its port can be reached") from error


def lost(error: BaseException, world: World) -> str | None:
    """`rank 1 on HOST is gone`, for an error of a collective; None for any other. Leaves the process group.

    Of ranks of this host /proc says what has become of them; those of another host, and all that others have
    waited for in vain, have PATIENCE_SECONDS to leave a word in the group's store, as they do when they come
    here themselves.
    """
    if not PEERS or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, for the ranks that are left: a moment yet
    store, peers = PEERS
    store.set_timeout(
        datetime.timedelta(seconds=PATIENCE_SECONDS)
    )  # who holds it may be the one that is gone
    with suppress(RuntimeError):
        store.set(f"here {world.rank}", "")
    stop(failed=True)  # or a third rank would wait for this one
    end, late = time.monotonic() + PATIENCE_SECONDS, TIMED_OUT.search(str(error)) is not None
    while True:
        found = {rank: _fate(rank, peers, world.rank, store, late) for rank in range(world.size)}
        found = {rank: fate for rank, fate in found.items() if fate is not None and rank != world.rank}
        if (found and SILENT not in found.values()) or time.monotonic() > end:
            break
        time.sleep(0.05)
    if found:
        return ", ".join(f"rank {rank} on {peers[rank][0]} {fate}" for rank, fate in found.items())
    return f"the ranks have lost each other ({str(error).strip().splitlines()[0]})"


def _fate(rank: int, peers: list, mine: int, store, late: bool) -> str | None:
    """None: it is well. late: whoever is well has run out of time, too, and comes to say so."""
    host, process = peers[rank]
    with suppress(RuntimeError):  # rank 0 may hold the store, and be gone
        if store.check([f"here {rank}"]):
            return None
    if host == peers[mine][0]:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "X"
        if state in "ZXT":
            return "is stopped (SIGSTOP)" if state == "T" else "is gone"
        if not late:
            return None
    return SILENT
