"""Randomized Subspace Optimization (arXiv 2502.07222) for sharded, multi-node training.

Importing this package needs torch only; DeepSpeed is imported when ``initialize`` is first used. Where a program
imports DeepSpeed, before or after, its ``deepspeed.initialize`` takes RSO up from the JSON.
"""

from __future__ import annotations

from typing import Any

import torch

from rso_ds.config import RSOConfig
from rso_ds.console import log_to_console
from rso_ds.engines.optimizer import RSO
from rso_ds.errors import (
    RSOCheckpointError,
    RSOConfigError,
    RSOConversionError,
    RSOError,
    RSOReplicaError,
    RSOUnsupportedError,
)
from rso_ds.integrations.deepspeed_import import watch_deepspeed
from rso_ds.layers import RSOEmbedding, RSOLinear, convert, summary_table, to_dense
from rso_ds.moved import keep_old_paths

__version__ = "0.1.0"


def _bare_rso(*args: Any, **kwargs: Any) -> Any:
    """What DeepSpeed finds as ``torch.optim.RSO`` if its own ``initialize`` was called past ``watch_deepspeed``.

    DeepSpeed shows an optimizer the parameters only, never the model, so RSO cannot come into effect
    here; training on as AdamW would be silent. Hence this always raises ``RSOConversionError``.
    """
    raise RSOConversionError(
        "the DeepSpeed JSON selects RSO but this deepspeed.initialize is not the one that rso_ds put in its place:"
        " write deepspeed.initialize(...) instead of importing the function before rso_ds, or call"
        " rso_ds.initialize(...)."
    )


torch.optim.RSO = _bare_rso  # type: ignore[attr-defined]
watch_deepspeed()
log_to_console()


def __getattr__(name: str) -> Any:
    if name == "initialize":
        from rso_ds.engines.deepspeed import initialize

        return initialize
    raise AttributeError(f"module 'rso_ds' has no attribute {name!r}")


keep_old_paths()  # last: it adds to what this module's own __getattr__ knows

__all__ = [
    "RSO",
    "RSOCheckpointError",
    "RSOConfig",
    "RSOConfigError",
    "RSOConversionError",
    "RSOEmbedding",
    "RSOError",
    "RSOLinear",
    "RSOReplicaError",
    "RSOUnsupportedError",
    "convert",
    "initialize",
    "summary_table",
    "to_dense",
]
