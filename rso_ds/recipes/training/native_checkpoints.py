"""Checkpoints of DeepSpeed engines with optimizers that are not ours: DeepSpeed's own files, whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rso_ds.checkpoint.folder import Retention
from rso_ds.checkpoint.model_files import write_model_files
from rso_ds.checkpoint.native_model import DEEPSPEED_TAG
from rso_ds.checkpoint.transaction import read_checkpoint, serialized, write_checkpoint
from rso_ds.comm.outcome import agreed
from rso_ds.errors import RSOCheckpointError


class NativeCheckpoints:
    """The methods of ``rso_ds.checkpoint.Checkpointer`` around ``engine.save_checkpoint``.

    DeepSpeed's files bind a run to its stage and number of ranks.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._binds = {"stage": engine.zero_optimization_stage(), "world_size": dist.get_world_size()}

    def save(
        self,
        folder: str | Path,
        tag: str,
        client_state: Mapping[str, Any] | None = None,
        *,
        keep: Retention | None = None,
        score: float | None = None,
        model_files: Callable[[Path], object] | None = None,
    ) -> None:
        def write(path: Path) -> None:
            self._engine.save_checkpoint(str(path), tag=DEEPSPEED_TAG)

        extra = agreed(lambda: serialized({"client": dict(client_state or {})}))
        state = {"rso": None, "native": self._binds, "score": score}
        describe = partial(write_model_files, self._engine.module, model_files)
        write_checkpoint(Path(folder), tag, write, state, extra, keep or Retention(), None, describe)

    def wait(self) -> None:
        """Saves are complete when ``save`` returns."""

    def load(
        self, folder: str | Path, tag: str | None = None, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[Path, dict[str, Any]]:
        path, state, extra = read_checkpoint(folder, tag)
        if state.get("native") != self._binds:
            raise RSOCheckpointError(
                f"{path} is bound to {state.get('native') or 'RSO'}, this run has {self._binds}: resume with the same"
                " optimizer, stage and number of ranks."
            )
        if check is not None:
            agreed(lambda: check(extra["client"]))
        if self._engine.load_checkpoint(str(path), tag=DEEPSPEED_TAG)[0] is None:
            raise RSOCheckpointError(f"DeepSpeed could not load {path}: see its log above.")
        return path, extra["client"]
