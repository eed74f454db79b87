"""All ranks write one checkpoint, or none."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rso_ds.checkpoint import folder as folders
from rso_ds.checkpoint.folder import Retention
from rso_ds.checkpoint.model_files import MODEL_FILES
from rso_ds.checkpoint.state import read_state, write_state
from rso_ds.comm.outcome import agreed, gathered, rank_of, ranks_of
from rso_ds.errors import RSOCheckpointError, RSOError

EXTRA_FILE = "extra.pt"


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
    first = rank_of(group) == 0
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

        names = gathered(agreed(rest, group), group)[0]
        mine = agreed(lambda: folders.digests(temporary, names[rank_of(group) :: ranks_of(group)]), group)
        entries = {name: entry for part in gathered(mine, group) for name, entry in part.items()}
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

    agreed(lambda: folders.recover(Path(folder)) if rank_of() == 0 else None)
    path = agreed(lambda: folders.find(Path(folder), tag), whose=True)  # disks of nodes differ
    # Every share is verified before any rank reads a file that another was to verify.
    agreed(lambda: folders.verify(path, rank_of(), ranks_of()))
    return agreed(lambda: (path, read_state(path), read_extra(path)))


def peek_client(folder: Path, tag: str | None = None) -> tuple[Path, dict[str, Any]]:
    """(path, client state) of a checkpoint, of which only the file that holds it is verified. One rank calls this.

    Raises ``RSOCheckpointError``.
    """
    folders.recover(folder)
    path = folders.find(folder, tag)
    folders.verify_file(path, EXTRA_FILE, folders.read_manifest(path))
    client: dict[str, Any] = read_extra(path)["client"]
    return path, client


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
