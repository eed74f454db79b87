"""What ``--data`` may name: a file, a pattern, a folder, a dataset of the Hugging Face hub, or the standard library."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.files import (
    KINDS,
    SPLITS,
    DataFile,
    Found,
    files_by_name,
    files_of_folder,
    format_of,
    local_file,
    may_be_data,
)

STDLIB = "stdlib"
TEXT_KINDS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
ROW_KINDS = ("jsonl", "json", "csv", "tsv", "parquet")


@dataclass(frozen=True)
class Source:
    """Files of one ``--data``: those that train, those that are held out, and names of files that do neither.

    ``held_out`` is None where the source has no validation split of its own.
    """

    name: str
    train: tuple[DataFile, ...]
    held_out: tuple[DataFile, ...] | None = None
    untouched: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub: asked for when its files are needed, not before. ``revision``: a commit, branch or tag."""

    name: str
    repository: str
    subset: str | None
    split: str
    flag: str
    prefer: Sequence[str] = ("train",)
    revision: str | None = None

    def find(self) -> Source:
        """Its files. Raises ``RSOConfigError``."""
        found = _on_the_hub(self)
        return _of_splits(self.name, self.flag, found, "no data file", self.split, self.prefer)


def find_source(
    name: str, flag: str = "--data", kinds: Sequence[str] = TEXT_KINDS, prefer: Sequence[str] = ("train",)
) -> Source | HubDataset:
    """The files that ``name`` stands for.

    A path of a file or folder, a pattern like ``dir/*.jsonl``, ``folder:subset``, a hub dataset
    ``[owner/]name[@revision][:subset[:split]]``, or "stdlib", the source code of Python's standard library. Splits are
    told apart as ``datasets`` does (``files_of_folder``); test splits neither train nor are held out. A file named by
    itself is what it is named for. ``prefer``: of several splits, the first of these that is there is ``Source.train``.

    Raises ``RSOConfigError`` for what is not there, is empty, or leaves open what trains.
    """
    if name == STDLIB and "text" in kinds:
        return Source(name, _standard_library())
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Source(name, (_usable(local_file(Path(path)), kinds, flag),))
    folder, subset, split = _folder_and_split(path)
    if folder is not None:
        found = files_of_folder(folder, kinds, subset)
        return _of_splits(name, flag, found, _none_here(kinds), split, prefer)
    if glob.has_magic(name):
        return _of_pattern(name, flag, kinds, prefer)
    place, _, subset = name.partition(":")
    place, _, revision = place.partition("@")
    if not _may_be_on_the_hub(place):
        raise RSOConfigError(
            f"{flag} {name}: no such file or folder (a hub dataset is written owner/name"
            f"{f'; {STDLIB!r} needs no file' if 'text' in kinds else ''})."
        )
    subset, _, split = subset.partition(":")
    return HubDataset(name, place, subset or None, split, flag, tuple(prefer), revision or None)


def _folder_and_split(path: str) -> tuple[Path | None, str | None, str]:
    """(folder, subset, split) that ``path`` names, None if there is no such folder."""
    if path and os.path.isdir(path):
        return Path(path), None, ""
    place, _, rest = path.partition(":")
    if place and os.path.isdir(place):
        subset, _, split = rest.partition(":")
        return Path(place), subset or None, split
    return None, None, ""


def _may_be_on_the_hub(place: str) -> bool:
    """Whether ``place`` is no mistyped path: those would wait for an answer of the hub."""
    try:
        validate_repo_id(place)
    except HFValidationError:
        return False
    return format_of(place) is None


def _of_splits(
    name: str, flag: str, found: Found, none: str, split: str = "", prefer: Sequence[str] = ("train",)
) -> Source:
    splits = dict(found.splits)
    if not splits:
        raise RSOConfigError(f"{flag} {name}: {none}.")
    wanted = split or next((s for s in prefer if s in splits), prefer[-1])
    if wanted not in splits:
        place = name.removesuffix(f":{split}") if split else name.rstrip("/")
        raise RSOConfigError(
            f"{flag} {name}: its files are of the splits {', '.join(splits)}, and none is '{wanted}', so that it is not"
            f" clear which files train: {_first_names(splits)}. Name the files, or a split, as in"
            f" {place}{':' if ':' in place else '::'}{next(iter(splits))}."
        )
    validation = next((s for s in SPLITS["validation"] if s in splits), "") if wanted == "train" else ""
    rest = [f.name for other, files in splits.items() if other not in (wanted, validation) for f in files]
    return Source(name, splits[wanted], splits.get(validation), (*rest, *found.ignored))


def _first_names(splits: Mapping[str, tuple[DataFile, ...]]) -> str:
    return ", ".join(f"{files[0].name} ({split})" for split, files in splits.items())


def _none_here(kinds: Sequence[str]) -> str:
    known = [suffix for suffix, kind in KINDS.items() if kind in kinds]
    return f"the folder has no {', '.join(known)} file"


def _usable(file: DataFile, kinds: Sequence[str], flag: str) -> DataFile:
    if file.kind not in kinds:
        raise RSOConfigError(f"{flag} {file.url}: expected files of one of {', '.join(kinds)}.")
    return file


def _of_pattern(pattern: str, flag: str, kinds: Sequence[str], prefer: Sequence[str]) -> Source:
    folder, rest = _folder_and_pattern(pattern)
    matches = (Path(p) for p in glob.glob(os.path.join(glob.escape(folder), rest), recursive=True))
    names = sorted(p.relative_to(folder).as_posix() for p in matches if not p.is_dir())
    if not names:
        raise RSOConfigError(f"{flag} {pattern}: no such file.")
    found = files_by_name(Path(folder), [n for n in names if may_be_data(n)], kinds)
    # A pattern that names a split means it; one that happens to match files of one split alone may not.
    alone = next(iter(found.splits), "") if len(found.splits) == 1 else ""
    meant = any(word in rest.lower() for word in SPLITS.get(alone, (alone,)))
    known = [suffix for suffix, kind in KINDS.items() if kind in kinds]
    none = f"none of its files ({', '.join(names[:3])}, ...) is a {', '.join(known)} file"
    return _of_splits(pattern, flag, found, none, alone if meant else "", prefer)


def _folder_and_pattern(pattern: str) -> tuple[str, str]:
    """The part of ``pattern`` that is a folder as it stands there, whatever signs its name has, and the rest."""
    folder, rest = os.path.split(os.path.expanduser(pattern))
    while folder and not os.path.isdir(folder):
        folder, last = os.path.split(folder)
        rest = os.path.join(last, rest)
    return folder or os.curdir, rest


def _standard_library() -> tuple[DataFile, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    paths = sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
    return tuple(
        DataFile(str(f), f.relative_to(root).as_posix(), f.stat().st_size, "text", "")
        for f in paths
        if f.stat().st_size
    )


def _on_the_hub(asked: HubDataset) -> Found:
    """What ``datasets`` finds in a dataset of the hub (or in a local folder of the same layout), by split."""
    import fsspec
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(asked.repository, asked.subset, revision=asked.revision)
        by_split = {str(split): [str(url) for url in urls] for split, urls in (builder.config.data_files or {}).items()}
        splits: dict[str, tuple[DataFile, ...]] = {}
        for split, urls in by_split.items():
            formats = [format_of(url) for url in urls]
            if None in formats:
                raise RSOConfigError(f"{asked.flag} {asked.name}: {urls[formats.index(None)]} is of no known format.")
            sizes = [int(fs.info(path)["size"]) for fs, path in (fsspec.core.url_to_fs(url) for url in urls)]
            splits[split] = tuple(
                DataFile(url, url.rpartition("://")[2], size, *known)
                for url, size, known in zip(urls, sizes, formats, strict=True)
                if known
            )
    except RSOConfigError:
        raise
    except Exception as error:  # datasets and the hub client raise dozens of kinds
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        raise RSOConfigError(f"{asked.flag} {asked.name}: no such file, and the hub cannot give it: {cause}") from None
    return Found(splits)
