"""One rank: cases that leave something behind, or fail, for the tests of the ranks themselves."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(case: str, _: Path) -> Any:
    rank = dist.get_rank()
    if case == "leave":
        torch.nn.functional.relu = lambda *_: None
        os.environ["RSO_DS_LEFT_BEHIND"] = "1"
    if case == "look":
        return "RSO_DS_LEFT_BEHIND" not in os.environ and torch.nn.functional.relu(torch.ones(1)) is not None
    if case == "fail" and rank == 1:
        raise ValueError("only here")
    return rank
