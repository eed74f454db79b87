"""``--profile-memory``: what a run takes, measured, beside what ``rso-ds memory`` says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from rso_ds.comm.rank_context import RankContext
from rso_ds.config import RSOConfig
from rso_ds.errors import RSOConfigError
from rso_ds.planning.memory.account import Account, Accountant, model_builder
from rso_ds.planning.memory.phases import PhasePeaks
from rso_ds.planning.memory.profile import StepProfiler, phase_comparison, phase_report, report
from rso_ds.planning.memory.states import Engine
from rso_ds.recipes.training.arguments import TrainArguments

Say = Callable[[str], None]


def check_profile(args: TrainArguments, steps: int) -> None:
    """Raise ``RSOConfigError`` if a run that takes ``steps`` steps is to be measured and cannot be."""
    if args.profile_memory and args.engine == "ddp":
        raise RSOConfigError("--profile-memory knows where DeepSpeed and FSDP2 keep their state: use one of them.")
    if args.profile_memory and steps < 2:
        raise RSOConfigError("--profile-memory measures the second step, and this run takes fewer than two.")


class MemoryProfile:
    """``peaks``: ``PhasePeaks``, which count only if ``args`` ask for a profile. Rank 0 writes memory.json."""

    def __init__(self, args: TrainArguments, context: RankContext) -> None:
        self.args, self.context = args, context
        self.peaks = PhasePeaks(context.on_gpu)
        if args.profile_memory:
            self.peaks.begin()

    def built(self, engine: Any, ds_json: dict[str, Any], micro: int) -> None:
        """Called when the engine is there; ``micro``: sequences of a micro batch."""
        self.engine, self.ds_json, self.micro = engine, ds_json, micro
        if hasattr(engine, "rso"):
            self.peaks.watch(engine.rso)

    def backward(self, forward: Callable[[], Tensor], say: Say) -> Tensor:
        """Forward and backward of one micro batch, measured; returns its loss."""
        profiler = StepProfiler(self.engine, self.args.gradient_checkpointing)
        self.peaks.note()
        with profiler:
            loss = profiler.forward(forward)
            self.engine.backward(loss)
        if self.context.rank == 0:
            text, details = report(profiler.result, self._account())
            self._path().write_text(json.dumps(details, indent=2))
            say(text)
        return loss

    def report_phases(self, say: Say) -> None:
        """What each phase of this run took at most, beside the model."""
        self.peaks.end()
        if self.context.rank == 0:
            compared = phase_comparison(self.peaks.bytes, self._account(), self.context.on_gpu)
            details = json.loads(self._path().read_text())
            self._path().write_text(json.dumps({**details, "phases": compared}, indent=2))
            say(phase_report(compared))

    def _path(self) -> Path:
        return Path(self.args.output) / "memory.json"

    def _account(self) -> Account:
        is_rso = hasattr(self.engine, "rso")
        kind = "fsdp2" if self.args.engine == "fsdp2" else "zero"
        accountant = Accountant(
            model_builder(self.engine.module.config, self.args.trust_remote_code),
            self.engine.rso.config if is_rso else RSOConfig(),
            Engine.from_json(self.ds_json, self.context.world_size // self.args.replicas, kind),
            self.args.gradient_checkpointing,
        )
        return accountant.account("rso" if is_rso else "adamw", self.micro, self.args.seq_len)
