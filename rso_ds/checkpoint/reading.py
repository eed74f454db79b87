"""The dense model of a checkpoint, whoever wrote its files."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rso_ds.checkpoint import folder as folders
from rso_ds.checkpoint.native_model import NativeModel
from rso_ds.checkpoint.state import STATE_FILE, read_state
from rso_ds.checkpoint.stored_model import StoredModel
from rso_ds.errors import RSOCheckpointError


class DenseModel(Protocol):
    """The tensors by their names in the model, one that is tied under one name; ``merged``: with the current B P^T."""

    path: Path

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def value(self, name: str, merged: bool = True) -> Tensor: ...


def open_model(checkpoint: Path) -> StoredModel | NativeModel:
    """The model in ``checkpoint``, the folder of one or a folder of checkpoints, whose ``latest`` is taken.

    Every checksum is verified first. Raises ``RSOCheckpointError`` for one that is missing or damaged.
    """
    path = _locate(checkpoint)
    folders.verify(path)
    state = read_state(path)
    return NativeModel(path, state["native"]["stage"]) if "native" in state else StoredModel(path, state)


def _locate(checkpoint: Path) -> Path:
    if (checkpoint / folders.MANIFEST).is_file() or (checkpoint / STATE_FILE).is_file():
        return checkpoint
    if not checkpoint.is_dir():
        raise RSOCheckpointError(f"{checkpoint} does not exist: name a checkpoint, or the folder that holds them.")
    return folders.find(checkpoint)
