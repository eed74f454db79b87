"""What one rank decides, or does alone, while the others wait.

A rank that decides by its own files, clock, loss or environment what leads to a collective leaves the others waiting in
it for ever: so one decides and tells. And waiting for slow work is not a collective, whose deadline would end ranks
that have nothing to do with how long it takes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist

from rso_ds.comm.outcome import agreed, rank_of, ranks_of
from rso_ds.errors import RSOCheckpointError, RSOError

T = TypeVar("T")
_BEAT, _LOOK = 1.0, 0.1  # seconds between two signs of life, and between two looks for them
_numbers = itertools.count()  # of the waits of this process: equal on all ranks, which make the same calls


def decided(decide: Callable[[], T], kind: type[RSOError] = RSOCheckpointError) -> T:
    """What ``decide`` returns on rank 0, on every rank: something that pickles. All ranks call this together; a failure
    is raised on all, as by ``agreed``."""
    box: list[Any] = [agreed(lambda: decide() if rank_of() == 0 else None, kind=kind)]
    if ranks_of() > 1:
        dist.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result


def patiently(
    work: Callable[[], T] | None, what: str, silence: float, kind: type[RSOError] = RSOCheckpointError
) -> T | None:
    """Do ``work`` (None: nothing) and wait until every rank has done its own, however long that takes.

    All ranks call this together; returns what ``work`` returned. Who works gives a sign of life every second.
    ``silence``: seconds without one after which a rank counts as lost; then, or where the work fails on any rank,
    every rank raises ``kind`` (the one that failed its own exception). ``what``: in words, for that message.
    """
    if ranks_of() == 1:
        return None if work is None else work()
    store = dist.distributed_c10d._get_default_store()
    key = f"rso_ds/patiently/{next(_numbers)}"
    result, failure = None, None
    try:
        if work is not None:
            with _signs_of_life(store, f"{key}/beats"):
                result = work()
    except Exception as error:
        failure = error
    lost = _wait_for_all(store, key, silence)
    if lost is not None:
        raise kind(
            f"rank {rank_of()} lost another rank while it was {what}: {lost}. Look for the first error in the other"
            " ranks' logs; --timeout sets how long a silent rank is waited for."
        )

    def outcome() -> T | None:
        if failure is not None:
            raise failure
        return result

    return agreed(outcome, kind=kind)


def first_on_each_node(
    work: Callable[[], T], what: str, silence: float, local_rank: int, kind: type[RSOError] = RSOCheckpointError
) -> T:
    """What ``work`` returns on this rank: on one rank a node first, then on the others, which find in place what that
    one has fetched or made. All ranks call this together; ``what``, ``silence`` and ``kind`` as for ``patiently``."""
    made = patiently(work if local_rank == 0 else None, what, silence, kind)
    return agreed(lambda: work() if made is None else made, kind=kind)


def _wait_for_all(store: Any, key: str, silence: float) -> str | None:
    """Say that this rank is done and wait for the others; what is wrong, if one of them is lost."""
    try:
        store.add(f"{key}/done", 1)
        beats, since = -1, time.monotonic()
        while store.add(f"{key}/done", 0) < ranks_of():
            seen = store.add(f"{key}/beats", 0)
            if seen != beats:
                beats, since = seen, time.monotonic()
            elif time.monotonic() - since > silence:
                return f"no sign of life for {silence:.0f} s"
            time.sleep(_LOOK)
    except dist.DistError:  # the store is in the process of rank 0, or of the launcher's agent
        return "rank 0 is gone"
    return None


@contextmanager
def _signs_of_life(store: Any, key: str) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with suppress(dist.DistError):  # whoever waits finds the same
                store.add(key, 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
