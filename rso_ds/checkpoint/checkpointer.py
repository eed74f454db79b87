"""Save and load a training run: the same folder layout, checks and promises for every engine."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from rso_ds.checkpoint.folder import Retention
from rso_ds.checkpoint.model_files import write_model_files
from rso_ds.checkpoint.pieces import Piece
from rso_ds.checkpoint.storage import StoredTensors, load_pieces, save_pieces
from rso_ds.checkpoint.stored_model import StoredModel
from rso_ds.checkpoint.training_state import TrainingState
from rso_ds.checkpoint.transaction import read_checkpoint, serialized, write_checkpoint
from rso_ds.comm.counter import install
from rso_ds.comm.outcome import agreed
from rso_ds.errors import RSOCheckpointError

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """A learning-rate schedule, say."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Checkpointer:
    """Checkpoints of one engine. All ranks call every method together.

    ``extras`` maps names to further objects whose state belongs to the run; ``own`` to those of the engine
    itself, which are handed an empty state by a checkpoint of another engine. A checkpoint is readable on any
    number of ranks and by any engine, and is whole or absent: see ``rso_ds.checkpoint.folder``.
    """

    def __init__(
        self,
        state: TrainingState,
        extras: Mapping[str, Stateful],
        own: Mapping[str, Stateful] | None = None,
        ready: Callable[[], None] | None = None,
    ) -> None:
        self._state, self._extras, self._own = state, dict(extras), dict(own or {})
        self._ready = ready
        self._group: Any = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[Path] | None = None

    def save(
        self,
        folder: str | Path,
        tag: str,
        client_state: Mapping[str, Any] | None = None,
        *,
        wait: bool = True,
        keep: Retention | None = None,
        score: float | None = None,
        model_files: Callable[[Path], object] | None = None,
    ) -> None:
        """Save the run as ``folder/tag`` and make it the latest. Call it between optimizer steps.

        ``client_state``: numbers, texts, tensors and containers of them. With ``wait`` False the state is copied
        to host memory and written by a thread while training goes on; the next ``save`` or ``wait`` waits for it
        and raises what it raised. ``keep`` limits how many checkpoints stay, the best by ``score`` among them.
        ``model_files`` is called on rank 0 with a folder of the checkpoint, into which it may write a tokenizer;
        a Hugging Face model's config.json is there already. ``rso-ds export`` takes both along.

        Raises ``RSOCheckpointError`` on every rank if any of them cannot write (a full disk); the checkpoints
        that were there before stay as they were.
        """
        self.wait()
        if self._ready is not None:
            agreed(self._ready)
        extra = agreed(lambda: self._extra(client_state))
        with self._state.at_rest():
            state = {**self._state.describe(), "score": None if score is None else float(score)}
            pieces = agreed(self._state.pieces)
        thread = None if wait else self._background()
        group = None if wait else self._group
        if not wait:
            pieces = {n: Piece(p.shape, p.start, p.flat.to("cpu", copy=True)) for n, p in pieces.items()}

        def write() -> Path:
            return write_checkpoint(
                Path(folder),
                tag,
                lambda path: save_pieces(pieces, path, group),
                state,
                extra,
                keep or Retention(),
                group,
                partial(write_model_files, self._state.module, model_files),
            )

        if thread is None:
            write()
        else:
            self._pending = thread.submit(write)

    def _background(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            atexit.register(self._report)
            if dist.is_initialized():
                # Collectives of the training's own group would meet those of the next step.
                self._group = dist.new_group(backend="gloo")
                install().label(self._group, "other")
        return self._thread

    def _report(self) -> None:
        if self._pending is not None and (error := self._pending.exception()) is not None:
            logger.error("the last checkpoint was not saved, and nobody waited for it: %s", error)

    def wait(self) -> None:
        """Wait until the save that goes on in the background, if any, is complete."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def load(
        self,
        folder: str | Path,
        tag: str | None = None,
        check: Callable[[dict[str, Any]], None] | None = None,
        *,
        solver: bool = True,
        extras: bool = True,
    ) -> tuple[Path, dict[str, Any]]:
        """Continue from ``folder/tag`` (None: the latest). Returns its path and client state.

        Without ``solver`` the solver's moments and count of steps begin at zero and its kind is this run's; its rates
        come along with the schedule that sets them. Without ``extras`` those stay as they are. Everything else is
        compared, by ``check`` too, which is handed the client state, and every checksum verified before anything
        changes. Raises ``RSOCheckpointError`` on every rank for a checkpoint that is damaged, incomplete, or of another
        model, solver or configuration.
        """
        self.wait()
        path, state, extra = read_checkpoint(folder, tag)
        if check is not None:
            agreed(lambda: check(extra["client"]))
        with self._state.at_rest():
            mine = self._state.describe()
            rates = solver or (extras and bool(self._extras))
            agreed(lambda: self._state.check(state, mine, str(path), solver, rates))
            if extras:
                agreed(lambda: self._check_extras(extra, path))
            targets = agreed(lambda: self._state.targets(StoredTensors(path), solver))
            agreed(lambda: load_pieces(targets, path))
            self._state.loaded(state, solver, rates)
        self._state.adopt(state)
        agreed(lambda: self._load_extras(extra, extras))
        return path, extra["client"]

    def load_weights(self, folder: str | Path, tag: str | None = None) -> tuple[Path, dict[str, Any]]:
        """Begin a new run with the effective weights W + B P^T of ``folder/tag``, and its buffers, alone.

        The checkpoint may be of another rank, seed, solver or number of ranks, and of a run without RSO. Returns its
        path and client state; raises ``RSOCheckpointError`` on every rank if it is damaged or of another model.
        """
        self.wait()
        path, state, extra = read_checkpoint(folder, tag)
        with self._state.at_rest():
            agreed(lambda: self._state.start_from(StoredModel(path, state)))
        return path, extra["client"]

    def _load_extras(self, extra: dict[str, Any], extras: bool) -> None:
        for name, part in self._extras.items() if extras else ():
            part.load_state_dict(extra["extras"][name])
        for name, part in self._own.items():
            part.load_state_dict(extra["own"].get(name, {}))

    def _extra(self, client_state: Mapping[str, Any] | None) -> bytes:
        extras = {name: dict(part.state_dict()) for name, part in self._extras.items()}
        own = {name: dict(part.state_dict()) for name, part in self._own.items()}
        return serialized({"client": dict(client_state or {}), "extras": extras, "own": own})

    def _check_extras(self, extra: dict[str, Any], path: Path) -> None:
        theirs, ours = set(extra["extras"]), set(self._extras)
        if theirs != ours:
            name = sorted(theirs ^ ours)[0]
            where = "the checkpoint has a" if name in theirs else "this run has a"
            raise RSOCheckpointError(
                f"{path}: only {where} '{name}', whose state would be lost or made up. Resume with the same settings."
            )
