"""One rank of cluster.py: bytes that a collective makes this node send to others, beside those of a ring."""

import json
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rso_ds.comm.launch import export_launch_environment
from rso_ds.comm.ring import wire_bytes

NUMBERS = 1 << 20  # fp32: 4 MiB


def sent() -> int:
    """Of eth0, headers included."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0" in line)
    return int(re.split(r"[:\s]+", line.strip())[9])


def run(op: str, group: dist.ProcessGroup, ranks: int) -> int:
    """Payload bytes of a rank."""
    whole, part = torch.ones(NUMBERS), torch.ones(NUMBERS // ranks)
    if op == "all_reduce":
        dist.all_reduce(whole, group=group)
    elif op == "all_gather":
        dist.all_gather_into_tensor(whole, part, group=group)
    else:
        dist.reduce_scatter_tensor(part, whole, group=group)
    return 4 * (part if op == "all_gather" else whole).numel()


if sys.argv[1:] in ([], ["-h"], ["--help"]):
    print(f"usage: cluster_worker.py OUT.json, which cluster.py starts on every rank\n\n{__doc__}")
    sys.exit()
launch = export_launch_environment()
dist.init_process_group("gloo")
half = launch.world_size // 2
pairs = [dist.new_group([i, i + half]) for i in range(half)]
everyone = dist.group.WORLD
assert everyone is not None
rows = []
for op in ("all_reduce", "all_gather", "reduce_scatter"):
    for where, group, ranks in (
        ("all ranks", everyone, 2 * half),
        ("pairs across nodes", pairs[launch.rank % half], 2),
    ):
        run(op, group, ranks)  # connections
        dist.barrier()
        time.sleep(0.3)
        before, times = sent(), 5
        payload = max(run(op, group, ranks) for _ in range(times))
        time.sleep(0.3)
        dist.barrier()
        # One link of the ring of all leaves a node; every pair has its own ring of two.
        ring = wire_bytes(op, payload, ranks) * (1 if ranks > 2 else half)
        rows.append({"op": op, "group": where, "measured": (sent() - before) / times, "ring": ring})
if launch.rank == 0:
    Path(sys.argv[1]).write_text(json.dumps(rows))
dist.barrier()
os._exit(0)
