"""Randomized Subspace Optimization (arXiv 2502.07222) for sharded, multi-node training.

Importing this package needs torch only; DeepSpeed is imported when ``initialize`` is first used.
"""

from __future__ import annotations

from typing import Any

import torch

from rso_ds.config import RSOConfig
from rso_ds.engines.optimizer import RSO
from rso_ds.errors import (
    RSOCheckpointError,
    RSOConfigError,
    RSOConversionError,
    RSOError,
    RSOReplicaError,
    RSOUnsupportedError,
)
from rso_ds.layers import RSOEmbedding, RSOLinear, convert, summary_table, to_dense

__version__ = "0.1.0"


def _bare_rso(*args: Any, **kwargs: Any) -> Any:
    """What DeepSpeed finds as ``torch.optim.RSO`` when nothing has converted the model.

    DeepSpeed shows an optimizer the parameters only, never the model, so RSO cannot come into effect
    here; training on as AdamW would be silent. Hence this always raises ``RSOConversionError``.
    """
    raise RSOConversionError(
        "the DeepSpeed JSON selects RSO but the model was not converted: call rso_ds.initialize(...) instead of"
        ' deepspeed.initialize(...), or "import rso_ds.auto" at the top of the program.'
    )


torch.optim.RSO = _bare_rso  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    if name in ("initialize", "patch_deepspeed"):
        import rso_ds.engines.deepspeed as engine

        return getattr(engine, name)
    raise AttributeError(f"module 'rso_ds' has no attribute {name!r}")


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
    "patch_deepspeed",
    "summary_table",
    "to_dense",
]
