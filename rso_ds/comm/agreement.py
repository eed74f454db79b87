"""Ranks compare at the start what must be equal, before any of them waits for another in a collective."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOReplicaError
from rso_ds.layers import SubspaceLayer


def agree_on_setup(layers: Mapping[str, SubspaceLayer], config: RSOConfig, group: Any = None) -> None:
    """Raise ``RSOReplicaError`` on every rank unless all run the same code, configuration and layers.

    Call it before an engine touches the model: its broadcasts would hang or fail on unequal shapes. A
    single process agrees with itself.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    shapes = {n: [x.rows, x.in_features, x.subspace.rank, x.subspace.name] for n, x in layers.items()}
    mine = {
        "RSO configuration": _digest(config.to_dict()),
        "layers of the model": _digest(shapes),
        "code of rso_ds": code_digest(),
        "version of torch": torch.__version__,
    }
    agree_on(mine, "Give every rank the same JSON, the same model and the same installation.", group)


def agree_on(mine: Mapping[str, Any], advice: str, group: Any = None) -> None:
    """Raise ``RSOReplicaError`` on every rank unless all ranks of ``group`` have the same values in ``mine``, naming
    the first that differs, and ``advice``."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, dict(mine), group=group)
    for what in mine:
        values = [theirs.get(what, "absent") for theirs in everyone]
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise RSOReplicaError(
                f"ranks disagree on the {what}: {values[0]} on rank 0, {values[odd]} on rank {odd}"
                f" ({sum(v != values[0] for v in values)} of {len(values)} ranks differ from rank 0). {advice}"
            )


@cache
def code_digest() -> str:
    """Hash of the package's source files, as installed here."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
