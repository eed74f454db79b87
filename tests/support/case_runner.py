"""What every worker does with its cases, once its rank has joined the others."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.comm import leave_process_groups


def run_cases(cases: Mapping[str, Any], run: Callable[[Any], dict[str, Any]], path: Path) -> None:
    """Rank 0 writes {name: what ``run(case)`` returned, or {"error": traceback}} to ``path``, anew after each.

    The last thing a worker does: the ranks part at the end.
    """
    gc.freeze()  # DeepSpeed collects at every start under ZeRO-3, and would look through all imports each time
    results: dict[str, dict[str, Any]] = {}
    for name, spec in cases.items():
        print("CASE", name, flush=True)
        try:
            results[name] = run(spec)
        except Exception:
            traceback.print_exc()
            results[name] = {"error": traceback.format_exc()}
        if dist.get_rank() == 0:
            torch.save(results, path)
    dist.barrier()
    leave_process_groups()


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
