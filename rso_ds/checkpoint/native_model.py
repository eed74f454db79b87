"""The model in a checkpoint of DeepSpeed's own files, tensor by tensor: what ``StoredModel`` is for ours."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rso_ds.errors import RSOCheckpointError

DEEPSPEED_TAG = "deepspeed"  # under which DeepSpeed saves: a folder within the checkpoint


class NativeModel:
    """A dense run's model, saved under ZeRO ``stage`` into ``path``, whose files have been verified.

    From stage 1 on the tensors are the fp32 ones that DeepSpeed's optimizer steps, by DeepSpeed's own converter; at
    stage 0 those of the model. At stages 1 and 2 all of them are in memory at once. These files are pickles, which run
    code when they are read: read your own.
    Raises ``RSOCheckpointError`` if DeepSpeed cannot read them, or is not installed.
    """

    def __init__(self, path: Path, stage: int) -> None:
        self.path = path
        try:
            tensors = _masters(path) if stage else _of_the_model(path)
        except Exception as error:  # a pickle of another version may fail in any way
            raise RSOCheckpointError(
                f"{path / DEEPSPEED_TAG}: DeepSpeed's own files of a run without RSO cannot be read"
                f" ({type(error).__name__}: {error}). Reading them needs DeepSpeed, best the version that wrote them."
            ) from error
        found: dict[Any, tuple[str, Any]] = {}
        for name, tensor in tensors.items():  # a tied tensor comes under its other names after its first
            found.setdefault(_place(tensor), (name, tensor))
        self._tensors: dict[str, Any] = dict(found.values())

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[name].dtype
        return dtype

    def value(self, name: str, merged: bool = True) -> Tensor:
        """The tensor ``name``; nothing is to be ``merged``."""
        tensor: Tensor = self._tensors[name].contiguous()  # under ZeRO-3 the ranks' parts are put together here
        return tensor


def _place(tensor: Any) -> tuple[type, int]:
    """Equal for the names of one tied tensor: where it lies, or which object stands for it under ZeRO-3."""
    return type(tensor), tensor.data_ptr() if isinstance(tensor, Tensor) else id(tensor)


def _masters(path: Path) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(path), DEEPSPEED_TAG, lazy_mode=True)
    return found


def _of_the_model(path: Path) -> dict[str, Tensor]:
    file = path / DEEPSPEED_TAG / "mp_rank_00_model_states.pt"
    found: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    return found
