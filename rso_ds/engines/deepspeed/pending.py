"""Whether a DeepSpeed engine holds gradients that no step has used yet: they are in no checkpoint.

Counts do not tell. DeepSpeed's own loop calls ``engine.step`` after every micro batch, Accelerate's (and with it
Trainer's and TRL's) once for each optimizer step, and the last accumulation of an epoch may be shorter than the
others. So this follows what happens: a backward pass leaves gradients, and a step at the end of an accumulation uses
them, whether it is applied or skipped.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from rso_ds.engines.used_gradients import UNUSED
from rso_ds.errors import RSOUnsupportedError


class PendingGradients:
    """Follows the backward passes and steps of ``engine`` from now on."""

    def __init__(self, engine: Any) -> None:
        self.pending = False
        # backward of the engine itself, and of a loss by torch's own call, which enters DeepSpeed at its prologue
        for name in ("backward", "_backward_prologue"):
            setattr(engine, name, self._noting(getattr(engine, name), True, after=False))
        engine._take_model_step = self._noting(engine._take_model_step, False, after=True)

    def _noting(self, inner: Any, pending: bool, after: bool) -> Any:
        @wraps(inner)
        def noting(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self.pending = pending
            result = inner(*args, **kwargs)
            if after:
                self.pending = pending
            return result

        return noting

    def refuse(self) -> None:
        """Raise ``RSOUnsupportedError`` if there are any."""
        if self.pending:
            raise RSOUnsupportedError(UNUSED)
