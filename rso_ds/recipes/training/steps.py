"""What the ranks tell each other after every step, and when a run whose steps are all skipped ends."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.checkpoint.folder import tags
from rso_ds.comm.counter import CommCounter
from rso_ds.comm.rank_context import RankContext
from rso_ds.errors import RSOError


class StepSync:
    """One reduction of three numbers on the CPU: the loss, whether a signal asks this rank to stop, and whether it has
    skipped this step.

    Signals reach ranks at different moments, or only one of them, and ranks that step apart skip apart; all must save
    at the same step. On GPUs the
    reduction has a gloo group of its own, so that it does not wait for the device.
    """

    def __init__(self, context: RankContext, traffic: CommCounter, timeout: int) -> None:
        self._ranks = context.world_size
        self._group: Any = None
        if context.on_gpu and self._ranks > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            traffic.label(self._group, "other")

    def __call__(self, loss: float, stop: bool, skipped: bool) -> tuple[float, bool, bool]:
        """(mean loss, not finite if it is not on some rank; whether any rank is asked to stop; whether any skipped)."""
        if self._ranks == 1:
            return loss, stop, skipped
        box = torch.tensor([loss / self._ranks, float(stop), float(skipped)], dtype=torch.float64)
        dist.all_reduce(box, group=self._group)
        return box[0].item(), box[1].item() > 0, box[2].item() > 0


class StepWatch:
    """Mean loss of the steps that counted, and an end to a run in which none counts any more.

    A step does not count if the engine skipped it (gradients that overflowed or are not finite) or if its loss
    is not finite. ``sound`` is False after a step that was applied although its loss is not finite: the weights
    cannot be trusted then and must not become a checkpoint.
    """

    def __init__(self, limit: int, checkpoints: Path) -> None:
        self.limit, self.checkpoints = limit, checkpoints
        self.sound = True
        self._in_a_row = 0
        self._last_finite: tuple[float, int] | None = None
        self._sum, self._counted = 0.0, 0

    def after(self, step: int, loss: float, skipped: bool) -> None:
        """``loss``: mean over ranks; ``skipped``: by any rank. Raises ``RSOError`` at the limit."""
        finite = math.isfinite(loss)
        self.sound = finite or skipped
        if finite:
            self._last_finite = (loss, step)
        if finite and not skipped:
            self._in_a_row = 0
            self._sum, self._counted = self._sum + loss, self._counted + 1
            return
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            raise RSOError(self._message(step, loss))

    def window(self) -> float | None:
        """Mean loss of the steps that counted since the last call; None if none did."""
        mean = self._sum / self._counted if self._counted else None
        self._sum, self._counted = 0.0, 0
        return mean

    def _message(self, step: int, loss: float) -> str:
        last = (
            "no step had a finite loss" if self._last_finite is None else "the last finite loss was {:.4f} at step {}"
        )
        saved = tags(self.checkpoints) if self.checkpoints.is_dir() else []
        newest = f"the newest checkpoint is {self.checkpoints / saved[-1]}" if saved else "there is no checkpoint yet"
        return (
            f"{self._in_a_row} steps in a row had a loss or gradients that are not finite, the last at step {step}"
            f" (loss {loss}): {last.format(*(self._last_finite or ()))}, {newest}. Look at the data of these steps, or"
            " lower the learning rate, and continue with --resume auto; --max-skipped allows more."
        )
