"""Tell a lost rank from an error of one's own."""

from __future__ import annotations

import errno
from datetime import timedelta

import torch.distributed as dist

# What gloo and NCCL say when a peer has gone or does not answer in time.
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket closed",
    "remote process exited",
    "remote error",
    "Watchdog caught collective operation timeout",
)

_WAITED = ("Timed out waiting", "Watchdog caught collective operation timeout")  # those that are no sign of a death

# What writing a file fails with where it is the place that fails, not the program.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def failed_write(error: BaseException) -> OSError | None:
    """The failed write behind ``error``, if any.

    On a full disk torch.save says "unexpected pos": in an exception raised while the true one is handled, or, where
    it opened the file itself, without any system call to name.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and "unexpected pos" in str(error):
        return OSError(f"a file could not be written whole (disk full, or a limit on its size?): {error}")
    return cause


def limit_waiting(timeout: timedelta) -> None:
    """Give every process group that exists this timeout: engines make groups of their own with the default one."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def lost_rank(error: BaseException) -> str | None:
    """A message about the rank that is gone if ``error`` comes from a collective that failed for that reason."""
    if not dist.is_initialized():
        return None  # the ranks have not met yet: the rendezvous has better words for what is wrong
    text = str(error)
    sign = next((line for line in text.splitlines() if any(sign in line for sign in _SIGNS)), None)
    if sign is None or not isinstance(error, RuntimeError):
        return None
    if any(waited in sign for waited in _WAITED):
        what, why = "waited in vain for another rank", "A rank hangs, does something else, or cannot be reached."
    else:
        what, why = "lost another rank", "A rank has died, or cannot be reached any more."
    return (
        f"rank {dist.get_rank()} {what} in the middle of a collective: {sign.strip()[:300]}\n"
        f"{why} Look for the first error in the other ranks' logs, then continue with --resume auto. --timeout sets how"
        " long a silent rank is waited for."
    )
