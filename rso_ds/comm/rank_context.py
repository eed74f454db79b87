"""The process's place among the ranks, and the device it computes on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rso_ds.comm.launch import export_launch_environment
from rso_ds.errors import RSOError


@dataclass(frozen=True)
class RankContext:
    """Rank among all, rank on this node, number of ranks, and whether ranks compute on GPUs."""

    rank: int
    local_rank: int
    world_size: int
    on_gpu: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.on_gpu else torch.device("cpu")


def restart_advice(resume: str | None) -> str | None:
    """What torchrun's restarts still need, None if nothing or if there are to be none."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return None
    missing = []
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        missing.append(
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun (restarted ranks cannot meet"
            " otherwise: 'Connection refused')"
        )
    if resume != "auto":
        missing.append("add --resume auto")
    return (
        "torchrun is to restart this run after a failure, which will not work: " + ", and ".join(missing)
        if missing
        else None
    )


def start(timeout: int) -> RankContext:
    """Join the other ranks, whichever launcher started them; alone without one.

    ``timeout``: seconds that a collective waits for a rank that does not answer. Raises ``RSOError`` if the ranks
    cannot meet, or if a launcher has started several without telling them.
    """
    launch = export_launch_environment()
    on_gpu = torch.cuda.is_available()
    local_rank = launch.local_rank
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise RSOError(
                f"local rank {local_rank} has no GPU of its own: this node has {torch.cuda.device_count()}; start at"
                " most so many ranks a node."
            )
        torch.cuda.set_device(local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            ranks_here = launch.local_world_size or launch.world_size
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    import deepspeed

    if not on_gpu:
        # DeepSpeed would compile a shared-memory all-reduce that only its inference uses; a lock left by a
        # killed build then makes every later start wait for ever without a word.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        where = f"{launch.master_addr}:{launch.master_port} ({launch.launcher})"
        raise RSOError(
            f"rank {launch.rank} could not meet the other ranks at {where}: {str(error).splitlines()[0][:300]}"
            " Look for the first error in the other ranks' logs; --timeout sets how long they are waited for."
        ) from None
    return RankContext(dist.get_rank(), local_rank, dist.get_world_size(), on_gpu)
