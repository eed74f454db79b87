"""A checkpoint folder exists whole or not at all, and every byte of it can be checked.

    checkpoints/
        latest                 text: the tag of the newest checkpoint
        step1000/              the folder of one tag
            manifest.json      size and SHA-256 of every other file
            rso_state.json     see rso_ds.checkpoint.state
            hf/                config.json and tokenizer of the model, for rso-ds export
            extra.pt           client state, schedule, counters of the engine (torch.load, weights_only)
            .metadata, *.distcp   the tensors, written by torch.distributed.checkpoint
        .step2000.saving/      what a crash left behind: removed when the next save begins

Files are written into a folder of another name, flushed to the disk, listed in the manifest; then the folder is
renamed, then ``latest``. Before the rename nothing of the previous checkpoint is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rso_ds.errors import RSOCheckpointError, RSOConfigError

LATEST = "latest"
MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Retention:
    """How many checkpoints stay: the newest ``last``, and the ``best`` by score (lower is better). ``last`` 0: all."""

    last: int = 0
    best: int = 0


def recover(folder: Path) -> None:
    """Bring back a checkpoint that was being replaced by one of the same tag when a crash came between the two."""
    for old in folder.glob(".*.replaced"):
        final = folder / old.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, final)


def check_tag(tag: str) -> str:
    """Raise ``RSOConfigError`` for a tag that is no plain folder name."""
    if not tag or tag.startswith(".") or Path(tag).name != tag or tag == LATEST:
        raise RSOConfigError(f"checkpoint tag {tag!r} must be a plain folder name that does not begin with a dot.")
    return tag


def begin(folder: Path, tag: str) -> Path:
    """Make the folder into which the files of ``tag`` are to be written, and remove what crashes left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for entry in folder.iterdir():
        if entry.name.startswith(".") and entry.suffix in (".saving", ".removing"):
            shutil.rmtree(entry)
    final = folder / check_tag(tag)
    if final.exists() and not (final / MANIFEST).is_file():
        raise RSOCheckpointError(f"{final} exists and is no checkpoint of rso_ds: move it away, or choose another tag.")
    temporary = folder / f".{tag}.saving"
    temporary.mkdir()
    return temporary


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """File name -> size in bytes and SHA-256, of files that are on the disk by then."""
    entries = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise RSOCheckpointError(
                f"{path}, seen by rank 0, is not visible to another rank: the checkpoint folder must be on a file"
                " system that all nodes share."
            )
        sync(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def write_manifest(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    body = {"format": _FORMAT, "files": {name: dict(entries[name]) for name in sorted(entries)}}
    write_text(path / MANIFEST, json.dumps({**body, "sha256": _digest_of(body)}, indent=1))


def commit(temporary: Path, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Make what ``begin`` began the checkpoint of its tag; ``entries`` are the ``digests`` of all files."""
    write_manifest(temporary, entries)
    folder, tag = temporary.parent, temporary.name.removeprefix(".").removesuffix(".saving")
    final = folder / tag
    for inner in (p for p in temporary.rglob("*") if p.is_dir()):
        sync(inner)
    sync(temporary)
    if final.exists():
        os.replace(final, folder / f".{tag}.replaced")
    try:
        os.replace(temporary, final)
    except OSError:
        recover(folder)
        raise
    sync(folder)
    write_text(folder / LATEST, tag)
    sync(folder)
    shutil.rmtree(folder / f".{tag}.replaced", ignore_errors=True)
    return final


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, flush to the disk, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def find(folder: Path, tag: str | None = None) -> Path:
    """The folder of ``tag``, or of the tag that ``latest`` names. Raises ``RSOCheckpointError``."""
    if tag is None:
        latest = folder / LATEST
        if not latest.is_file():
            raise RSOCheckpointError(f"{latest} does not exist: there is no checkpoint to load, or name its tag.")
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not tag or Path(tag).name != tag or "\ufffd" in tag:
            raise RSOCheckpointError(
                f"{latest} is damaged: it names {tag!r}. Complete checkpoints there: {_tags_text(folder)}; write the"
                " name of one into it, or give its folder."
            )
        if not (folder / tag / MANIFEST).is_file():
            raise RSOCheckpointError(
                f"{latest} names {tag!r}, which is no complete checkpoint: {folder / tag / MANIFEST} does not exist."
                f" Complete ones there: {_tags_text(folder)}; write the name of one into {LATEST}, or give its folder."
            )
    path = folder / str(tag)
    if not path.is_dir():
        raise RSOCheckpointError(f"{path} does not exist. Complete checkpoints there: {_tags_text(folder)}.")
    return path


def has_checkpoints(folder: Path) -> bool:
    """Whether there is anything from which a run could, or should have been able to, go on."""
    return folder.is_dir() and any(not p.name.startswith(".") or p.suffix == ".replaced" for p in folder.iterdir())


def automatic_tag(folder: Path) -> tuple[str | None, str | None]:
    """(tag from which to go on without being told one, None for what ``latest`` names; remark for the user)."""
    if has_checkpoints(folder):
        if (folder / LATEST).exists() or not tags(folder):
            return None, None
        # A crash between the renaming of the very first checkpoint and the writing of 'latest'.
        newest = tags(folder)[-1]
        return newest, f"{folder / LATEST} does not exist; going on from the newest complete checkpoint, {newest}"
    remark = f"no checkpoint in {folder} yet, beginning at step 0"
    left = sorted(p.name for p in folder.glob(".*.saving")) if folder.is_dir() else []
    if left:
        remark += f" (a save was cut short there, {left[-1]} is incomplete and will be removed)"
    return None, remark


def tags(folder: Path) -> list[str]:
    """Tags of the complete checkpoints in ``folder``, oldest first."""
    found = [p for p in folder.glob(f"*/{MANIFEST}") if p.is_file() and not p.parent.name.startswith(".")]
    return [p.parent.name for p in sorted(found, key=lambda p: p.stat().st_mtime_ns)]


def fingerprint(path: Path) -> str:
    """Changes when any file of the checkpoint ``path`` does: the SHA-256 of its manifest."""
    return _sha256(path / MANIFEST)


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The files that the checkpoint ``path`` must hold. Raises ``RSOCheckpointError``."""
    file = path / MANIFEST
    if not file.is_file():
        raise RSOCheckpointError(
            f"{file} does not exist: not a checkpoint of rso_ds, or its folder is incomplete. Complete checkpoints"
            f" there: {_tags_text(path.parent)}."
        )
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        sound = digest == _digest_of(body) and body["format"] == _FORMAT
        files: dict[str, dict[str, Any]] = body["files"]
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise RSOCheckpointError(_damaged(file, "its own checksum does not fit, or it is of another format"))
    return files


def verify(path: Path, share: int = 0, shares: int = 1) -> None:
    """Compare files with the manifest: all of them, or the ``share``-th of ``shares`` parts.

    Raises ``RSOCheckpointError`` naming the first file that is missing, too many, or altered.
    """
    files = read_manifest(path)
    extra = sorted({str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - set(files) - {MANIFEST})
    if extra:
        raise RSOCheckpointError(f"{path / extra[0]} is not part of this checkpoint: remove it, or restore the folder.")
    for name, _ in sorted(files.items(), key=lambda item: -item[1]["bytes"])[share::shares]:
        verify_file(path, name, files)


def verify_file(path: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare one file of the checkpoint ``path`` with its manifest ``files``. Raises ``RSOCheckpointError``."""
    file = path / name
    entry = files.get(name)
    if entry is None or not file.is_file():
        raise RSOCheckpointError(_damaged(file, "it is missing"))
    if file.stat().st_size != entry["bytes"]:
        raise RSOCheckpointError(_damaged(file, f"{file.stat().st_size} bytes instead of {entry['bytes']}"))
    if _sha256(file) != entry["sha256"]:
        raise RSOCheckpointError(_damaged(file, "its SHA-256 is not that of the manifest"))


def prune(folder: Path, keep: Retention, scores: Mapping[str, float]) -> list[str]:
    """Remove complete checkpoints beyond ``keep``; returns their tags. Never the one that ``latest`` names."""
    if not keep.last:
        return []
    present = tags(folder)
    best = sorted((tag for tag in present if tag in scores), key=lambda tag: scores[tag])[: keep.best]
    kept = {*present[-keep.last :], *best, find(folder).name}
    gone = [tag for tag in present if tag not in kept]
    for tag in gone:
        # Renamed first: a half-removed folder must not pass for a checkpoint.
        os.replace(folder / tag, folder / f".{tag}.removing")
        shutil.rmtree(folder / f".{tag}.removing")
    return gone


def _damaged(file: Path, how: str) -> str:
    others = [tag for tag in tags(file.parent.parent) if tag != file.parent.name]
    remedy = f"use another checkpoint ({', '.join(others[-3:])})" if others else "restore the file"
    return f"{file} is damaged: {how}. Nothing was loaded; {remedy}."


def _tags_text(folder: Path) -> str:
    return ", ".join(tags(folder)) if folder.is_dir() and tags(folder) else "none"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
