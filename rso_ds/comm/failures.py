"""Tell a lost rank from an error of one's own."""

from __future__ import annotations

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


def lost_rank(error: BaseException) -> str | None:
    """A message about the rank that is gone if ``error`` comes from a collective that failed for that reason."""
    own = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    text = str(error).strip()
    if not own and not (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)):
        return None
    rank = dist.get_rank() if dist.is_initialized() else "unknown"
    first = next((line for line in text.splitlines() if any(sign in line for sign in _SIGNS)), text.splitlines()[0])
    return (
        f"rank {rank} lost another rank in the middle of a collective: {first.strip()[:300]}\nA rank has died,"
        " hangs, or cannot be reached. Look for the first error in the other ranks' logs, then continue with --resume"
        " auto. --timeout sets how long a silent rank is waited for."
    )
