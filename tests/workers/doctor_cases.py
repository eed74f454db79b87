"""One rank: compare with the others under one fault after another; what was found."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.comm.launch import find_launch
from rso_ds.comm.outcome import gathered
from rso_ds.doctor import together
from rso_ds.doctor.speed import findings_of, measure

LAUNCH = find_launch(os.environ)
SECOND = LAUNCH.rank == 1
CONFIG = {"optimizer": {"type": "RSO", "params": {"lr": 0.1}}}


def compare(config=None, **changes):
    mine = dataclasses.replace(together.facts(LAUNCH, config or CONFIG), **changes)
    everyone = gathered(mine)
    clocks, _ = together.check_clocks(everyone)
    return everyone, [*together.check_placement(everyone), *together.check_agreement(everyone), *clocks]


def on_two_nodes(ahead):
    """Each rank a node, the clock of the second ``ahead`` by so many seconds."""
    os.environ["RSO_DS_NODE"] = f"node{LAUNCH.rank}"
    right = together.clock
    together.clock = lambda: right() + SECOND * round(ahead * 1e9)
    try:
        return compare()
    finally:
        together.clock = right
        del os.environ["RSO_DS_NODE"]


def speeds(everyone, link=None):
    return findings_of(measure(everyone, torch.device("cpu"), 1, 30), link)


def wrong_sum(everyone):
    right = dist.all_reduce

    def corrupt(x, *args, **kwargs):
        if SECOND and x.dtype == torch.float32:
            x[-1] += 1
        return right(x, *args, **kwargs)

    dist.all_reduce = corrupt
    try:
        return speeds(everyone)
    finally:
        dist.all_reduce = right


def run(case: str, _: Path) -> dict[str, Any]:
    """All faults one after the other; ``case`` is "all"."""
    same, found = compare()
    apart, on_two = on_two_nodes(0)
    results = {
        "same": found,
        "config": compare({"optimizer": {"type": "RSO", "params": {"lr": 0.2 if SECOND else 0.1}}})[1],
        "version": compare(versions={"torch": "2.6.0" if SECOND else "2.7.1"})[1],
        "code": compare(code="a" if SECOND else "b")[1],
        "variable": compare(variables={"NCCL_DEBUG": "INFO"} if SECOND else {})[1],
        "local_rank": compare(local_rank=0)[1],
        "gpu": compare(gpu="GPU-1")[1],
        "two_nodes": on_two,
        "ahead_5": on_two_nodes(5)[1],
        "behind_100": on_two_nodes(-100)[1],
        "speed": speeds(same),
        "speed_apart": speeds(apart),
        "speed_slow": speeds(apart, link=1e15),
        "wrong_sum": wrong_sum(same),
    }
    return {case: [vars(finding) for finding in found] for case, found in results.items()}
