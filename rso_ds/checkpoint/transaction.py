"""All ranks write one checkpoint, or none: what fails on one rank is raised on every rank."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from rso_ds.checkpoint import folder as folders
from rso_ds.checkpoint.folder import Retention
from rso_ds.checkpoint.model_files import MODEL_FILES
from rso_ds.checkpoint.state import read_state, write_state
from rso_ds.comm.failures import failed_write, lost_rank
from rso_ds.errors import RSOCheckpointError, RSOError

EXTRA_FILE = "extra.pt"
T = TypeVar("T")


def write_checkpoint(
    folder: Path,
    tag: str,
    write: Callable[[Path], None],
    state: dict[str, Any],
    extra: bytes,
    keep: Retention,
    group: Any = None,
    model_files: Callable[[Path], object] | None = None,
) -> Path:
    """Make ``folder/tag`` of what ``write`` puts into a folder on all ranks, of ``state`` and ``extra``, and of
    what ``model_files`` puts into a subfolder on rank 0.

    Raises ``RSOCheckpointError`` on every rank if any of them fails; what was there before stays as it was.
    """
    first = _rank(group) == 0
    temporary = folder / f".{folders.check_tag(tag)}.saving"
    try:
        agreed(lambda: folders.begin(folder, tag) if first else None, group)
        agreed(lambda: write(temporary), group)

        def rest() -> list[str]:
            if not first:
                return []
            write_state(temporary, state)
            (temporary / EXTRA_FILE).write_bytes(extra)
            if model_files is not None:
                _write_model_files(model_files, temporary / MODEL_FILES)
            return sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())

        names = _gathered(agreed(rest, group), group)[0]
        mine = agreed(lambda: folders.digests(temporary, names[_rank(group) :: _size(group)]), group)
        entries = {name: entry for part in _gathered(mine, group) for name, entry in part.items()}
        agreed(lambda: _finish(folder, temporary, entries, keep) if first else None, group)
    except RSOError as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise RSOCheckpointError(
            f"{folder / tag} was not saved; what was saved before is as it was. {str(error).rstrip('.')}. Remove the"
            " cause, then continue from the newest checkpoint."
        ) from None
    return folder / tag


def _write_model_files(write: Callable[[Path], object], folder: Path) -> None:
    folder.mkdir()
    try:
        write(folder)
    except Exception as error:  # the other ranks must hear of it, whatever a tokenizer raises
        raise RSOCheckpointError(
            f"the files that describe the model cannot be written: {type(error).__name__}: {error}"
        ) from error


def _finish(folder: Path, temporary: Path, entries: dict[str, dict[str, Any]], keep: Retention) -> None:
    folders.commit(temporary, entries)
    if not keep.last:
        return
    scores = {}
    for tag in folders.tags(folder):
        with contextlib.suppress(RSOCheckpointError):  # one that cannot be read has no score
            score = read_state(folder / tag).get("score")
            if score is not None and math.isfinite(score):
                scores[tag] = score
    try:
        folders.prune(folder, keep, scores)
    except OSError as error:  # the new one is complete: no reason to end a run
        warnings.warn(f"older checkpoints in {folder} could not be removed: {error}", stacklevel=1)


def read_checkpoint(folder: str | Path, tag: str | None = None) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(path, state, extra) of a checkpoint whose files are all as they were written.

    All ranks call this together: each verifies a share of the files. Raises ``RSOCheckpointError`` on every
    rank, naming the damaged file.
    """

    def verified() -> Path:
        path = folders.find(Path(folder), tag)
        folders.verify(path, _rank(), _size())
        return path

    agreed(lambda: folders.recover(Path(folder)) if _rank() == 0 else None)
    path = agreed(verified)  # every share is, before any rank reads a file that another was to verify
    return agreed(lambda: (path, read_state(path), read_extra(path)))


def read_extra(path: Path) -> dict[str, Any]:
    extra: dict[str, Any] = torch.load(path / EXTRA_FILE, map_location="cpu", weights_only=True)
    return extra


def serialized(extra: Mapping[str, Any]) -> bytes:
    """``extra`` as ``read_extra`` reads it. Raises ``RSOCheckpointError`` for what would not come back."""
    buffer = io.BytesIO()
    try:
        torch.save(dict(extra), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise RSOCheckpointError(
            "client_state or a schedule holds what torch.load(weights_only=True) refuses: keep numbers, texts, tensors"
            f" and containers of them. {str(error).splitlines()[0][:300]}"
        ) from None
    return buffer.getvalue()


def agreed(action: Callable[[], T], group: Any = None) -> T:
    """What ``action`` returns; if it fails on any rank, ``RSOCheckpointError`` with that rank's message on all."""
    failure: str | None = None
    own: Exception | None = None
    try:
        result = action()
    except RSOError as error:
        failure, own = str(error), error
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        failure = f"rank {rank}: {type(cause).__name__}: {cause}"
    except Exception as error:  # whatever it is, the others must not wait for this rank
        if lost_rank(error) is not None:
            raise
        system = failed_write(error)
        failure = f"rank {_rank()}: {type(system or error).__name__}: {system or error}"
        own = None if system else error
    failures = _gathered(failure, group)
    first = next((message for message in failures if message is not None), None)
    if own is not None and failure == first:
        raise own
    if first is not None:
        raise RSOCheckpointError(first)  # the same words on all ranks
    return result


def _gathered(value: T, group: Any = None) -> list[T]:
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, value, group=group)
    return box


def _rank(group: Any = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _size(group: Any = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1
