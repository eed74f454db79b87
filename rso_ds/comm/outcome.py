"""What fails on one rank is raised on every rank, so that none waits for it in the next collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from rso_ds.comm.failures import failed_write, lost_rank
from rso_ds.errors import RSOCheckpointError, RSOError

T = TypeVar("T")


def agreed(
    action: Callable[[], T], group: Any = None, kind: type[RSOError] = RSOCheckpointError, whose: bool = False
) -> T:
    """What ``action`` returns on this rank. All ranks of ``group`` call this together.

    If it fails on any rank, every rank raises: the first that failed its own exception, the others ``kind`` with
    the same words; with ``whose``, for what may be otherwise on each rank, the number of that rank stands in front. The
    loss of a rank in a collective inside ``action`` is raised as it is.
    """
    failure: str | None = None
    own: Exception | None = None
    try:
        result = action()
    except RSOError as error:
        failure, own = str(error), error
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        failure = f"rank {rank}: {type(cause).__name__}: {cause}"
    except Exception as error:  # whatever it is, the others must not wait for this rank
        if lost_rank(error) is not None:
            raise
        system = failed_write(error)
        failure = f"rank {rank_of()}: {type(system or error).__name__}: {system or error}"
        own = None if system else error
    failures = gathered(failure, group)
    rank, first = next(((r, message) for r, message in enumerate(failures) if message is not None), (0, None))
    if first is None:
        return result
    if whose and None in failures:
        raise (type(own) if isinstance(own, RSOError) else kind)(f"rank {rank}: {first.removeprefix(f'rank {rank}: ')}")
    if own is not None and failure == first:
        raise own
    raise kind(first)


def gathered(value: T, group: Any = None) -> list[T]:
    """``value`` of every rank, in the order of ranks; a picklable object."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, value, group=group)
    return box


def rank_of(group: Any = None) -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def ranks_of(group: Any = None) -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1
