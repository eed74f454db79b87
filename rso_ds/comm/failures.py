"""Tell a lost rank from an error of one's own."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

# What gloo and NCCL say when a peer has gone or does not answer in time.
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "Socket closed",
    "remote process exited",
)


def limit_waiting(timeout: timedelta) -> None:
    """Give every process group that exists this timeout: engines make groups of their own with the default one."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def lost_rank(error: BaseException) -> str | None:
    """A message about the rank that is gone if ``error`` comes from a collective that failed for that reason."""
    if not dist.is_initialized():
        return None  # the ranks have not met yet: the rendezvous has better words for what is wrong
    own = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    text = str(error).strip()
    if not own and not (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)):
        return None
    first = next((line for line in text.splitlines() if any(sign in line for sign in _SIGNS)), text.splitlines()[0])
    return (
        f"rank {dist.get_rank()} lost another rank in the middle of a collective: {first.strip()[:300]}\n"
        "A rank has died, hangs, or cannot be reached. Look for the first error in the other ranks' logs, then continue"
        " with --resume auto. --timeout sets how long a silent rank is waited for."
    )
