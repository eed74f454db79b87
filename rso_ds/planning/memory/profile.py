"""``--profile-memory``: one training step measured, beside what the account said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rso_ds.planning.memory.account import GIB, Account
from rso_ds.planning.memory.kept import KeptRecorder, by_kind
from rso_ds.planning.memory.live import LiveBytes
from rso_ds.planning.memory.measured import split_of_state


@dataclass
class Measurement:
    """Bytes of one rank. ``state``: what it held before the step, by kind; ``kept``: what the forward pass
    left for backward, by module and op (empty under gradient checkpointing); ``peak``: the most
    that was allocated, and how much of that came on top of ``state``."""

    state: dict[str, int]
    kept: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    peak_above_state: int = 0
    source: str = ""

    @property
    def kept_total(self) -> int:
        return sum(self.kept.values())


class StepProfiler:
    """Context around forward and backward of one micro batch. Call ``forward`` inside.

    On CUDA the figures are the caching allocator's; elsewhere every storage that torch makes is counted,
    which slows this one step down.
    """

    def __init__(self, engine: Any, checkpointing: bool = False) -> None:
        self.engine, self.checkpointing = engine, checkpointing
        self.on_gpu = torch.cuda.is_available() and next(engine.module.parameters()).is_cuda
        self._live: Any = nullcontext() if self.on_gpu else LiveBytes()
        self.result = Measurement(split_of_state(engine))

    def __enter__(self) -> StepProfiler:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        self._live.__enter__()
        return self

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """``run()`` is the forward pass; returns its loss."""
        if self.checkpointing:
            return run()  # looking at what a checkpointed block saves would recompute it
        with KeptRecorder(self.engine.module) as recorder:
            loss = run()
        recorder.name_ops(loss)
        self.result.kept = by_kind(recorder.entries)
        return loss

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)
        result = self.result
        if self.on_gpu:
            torch.cuda.synchronize()
            result.peak = torch.cuda.max_memory_allocated()
            result.peak_above_state = result.peak - self._before
            result.source = "CUDA caching allocator"
        else:
            result.peak_above_state = self._live.peak
            result.peak = sum(result.state.values()) + self._live.peak
            result.source = "storages made by torch"


def _step(modelled: Account) -> int:
    return modelled.phases["training"].device if modelled.phases else modelled.total


def comparison(measured: Measurement, modelled: Account) -> dict[str, Any]:
    """Model and measurement side by side, in bytes; ``error`` is (model - measured) / measured."""
    kept = 0 if modelled.trace is None else modelled.trace.kept
    device = modelled.device
    held = sum(device.get(k, 0) for k in ("weights", "B or adapters", "P", "solver state", "fp32 masters"))
    held += sum(modelled.host.get(k, 0) for k in ("weights", "B or adapters", "solver state", "fp32 masters"))
    state = {k: v for k, v in measured.state.items() if k not in ("gradients", "other")}
    pairs = {
        "kept for backward": (kept, measured.kept_total),
        "weights, P, solver state, masters": (held, sum(state.values())),
        "peak of the step": (_step(modelled), measured.peak),
    }
    if modelled.trace is None or modelled.trace.checkpointing:
        del pairs["kept for backward"]  # the hooks do not see what checkpointing holds
    return {
        name: {"model": model, "measured": real, "error": (model - real) / real if real else None}
        for name, (model, real) in pairs.items()
    }


def phase_comparison(measured: dict[str, int], modelled: Account, on_gpu: bool) -> dict[str, Any]:
    """Phase -> the peak by the model and as measured, in bytes. On a CPU a rank has one memory for both."""
    found = {}
    for name, phase in modelled.phases.items():
        if name in measured:
            model, real = phase.device if on_gpu else phase.together, measured[name]
            found[name] = {"model": model, "measured": real, "error": (model - real) / real if real else None}
    return found


def phase_report(compared: dict[str, Any]) -> str:
    lines = [f"peaks by phase on rank 0, GiB {'model':>20} {'measured':>9} {'error':>8}"]
    for name, row in compared.items():
        error = "" if row["error"] is None else f"{row['error']:+8.1%}"
        lines.append(f"  {name:<40} {row['model'] / GIB:9.4f} {row['measured'] / GIB:9.4f} {error}")
    return "\n".join(lines)


def report(measured: Measurement, modelled: Account) -> tuple[str, dict[str, Any]]:
    """(text, plain dict) of a measured step beside its account."""
    compared = comparison(measured, modelled)
    lines = [f"memory of one step on rank 0, GiB ({measured.source})"]
    lines += [f"  {'':<40} {'model':>9} {'measured':>9} {'error':>8}"]
    for name, row in compared.items():
        error = "" if row["error"] is None else f"{row['error']:+8.1%}"
        lines.append(f"  {name:<40} {row['model'] / GIB:9.4f} {row['measured'] / GIB:9.4f} {error}")
    lines.append("  held before the step: " + ", ".join(f"{k} {v / GIB:.4f}" for k, v in measured.state.items() if v))
    lines.append(f"  peak above that: {measured.peak_above_state / GIB:.4f}")
    if measured.kept:
        lines.append("  kept for backward, by module and op:")
    largest = sorted(measured.kept.items(), key=lambda item: -item[1])
    lines += [f"    {name:<70} {size / GIB:9.4f}" for name, size in largest[:20]]
    details = {
        "source": measured.source,
        "state_bytes": measured.state,
        "kept_bytes": measured.kept,
        "peak_bytes": measured.peak,
        "peak_above_state_bytes": measured.peak_above_state,
        "comparison": compared,
        "account": modelled.to_dict(),
    }
    return "\n".join(lines), details
