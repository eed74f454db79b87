"""What the ranks' agreement after every step costs (rso_ds.recipes.training.steps.StepSync): 16 bytes by gloo.

    python benchmarks/speed/step_sync.py --ranks 2 4

Prints median and 90th percentile in microseconds over 2000 syncs of ranks that are already in step.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))

from support.train_workspace import free_port

from rso_ds.comm.counter import install
from rso_ds.comm.rank_context import RankContext
from rso_ds.recipes.training.steps import StepSync


def rank_main(rank: int, ranks: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    sync = StepSync(RankContext(rank, rank, ranks, False), install(), 60)
    times = []
    for i in range(2200):
        began = time.perf_counter()
        sync(1.0, False)
        if i >= 200:
            times.append(1e6 * (time.perf_counter() - began))
    if rank == 0:
        times.sort()
        print(f"{ranks} ranks: median {times[len(times) // 2]:.0f} us, 90% {times[len(times) * 9 // 10]:.0f} us")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    for ranks in parser.parse_args().ranks:
        mp.spawn(rank_main, (ranks, free_port()), ranks)


if __name__ == "__main__":
    main()
