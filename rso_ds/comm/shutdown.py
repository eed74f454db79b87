"""Leaving the process group at the end of a program."""

from __future__ import annotations

import gc
import time

import torch.distributed as dist


def leave_process_groups() -> None:
    """Destroy all process groups, so that the interpreter can shut down. Nothing if there is none.

    gloo's threads may hold the tensors of the last collective a little longer than the program does (pytorch issue
    190489): the interpreter's end then aborts the process, unless they have had the GIL until there is nothing left.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
        time.sleep(0.1)
