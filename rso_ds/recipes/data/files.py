"""Data files: what format each has, how it is opened, and which split the files of a folder belong to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from datasets.data_files import (
    ALL_SPLIT_PATTERNS,
    DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME,
    DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    FILES_TO_IGNORE,
    SPLIT_KEYWORDS,
)
from fsspec.utils import glob_translate

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.card import files_by_card
from rso_ds.text import HEAD, check_content, content_of

KINDS = {
    ".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = {".xz": "xz data", ".gz": "gzip data", ".zst": "zstd data", ".bz2": "bzip2 data"}
SPLITS = {str(split): tuple(words) for split, words in SPLIT_KEYWORDS.items()}  # how each may be called
_ABOUT_DATA = re.compile(
    r"readme([-_. ].*)?|(licen[cs]e|copying|changelog|citation|contributing|code_of_conduct|notice)s?\.\w+"
)
_BUFFER = 1 << 17  # a stream has many files open
_SHOWN = 20  # files that a refusal lists


@dataclass(frozen=True)
class DataFile:
    """``url``: a path, or hf://... on the hub. ``name``: below its source, with slashes. ``size``: bytes as stored.
    ``compression``: a key of ``COMPRESSIONS``, or ""."""

    url: str
    name: str
    size: int
    kind: str
    compression: str

    @property
    def remote(self) -> bool:
        return "://" in self.url

    def open_stored(self) -> IO[bytes]:
        """The bytes as they lie on the disk or the hub."""
        if not self.remote:
            return open(self.url, "rb", buffering=_BUFFER)
        import fsspec

        return cast(IO[bytes], fsspec.open(self.url, "rb").open())

    def open(self) -> IO[bytes]:
        """The bytes, decompressed. Raises ``RSOConfigError`` if the content is not what the suffix says."""
        stored = self.open_stored()
        if not self.compression and self.kind != "parquet":
            return stored
        try:
            head = stored.read(HEAD)
            stored.seek(0)
            if self.compression and self.kind == "parquet":
                raise RSOConfigError(f"{self.url}: parquet cannot be read where it is compressed once more: unpack it.")
            check_content(head, self.url, COMPRESSIONS.get(self.compression, "a parquet file"))
            if self.compression and content_of(head) is None:
                raise RSOConfigError(
                    f"{self.url} is named {self.compression} but not compressed so: rename or pack it."
                )
        except BaseException:
            stored.close()
            raise
        return io.BufferedReader(_decompressed(stored, self.compression), _BUFFER) if self.compression else stored


class _Streams(io.RawIOBase):
    """Compressed streams, one after the other, to the very end of ``stored``. Python's own readers of bz2 and xz take a
    damaged beginning of a later stream for the end of the file, and what pbzip2 writes has a stream for each 900 kB."""

    def __init__(self, stored: IO[bytes], new: Callable[[], Any]) -> None:
        self._stored, self._new, self._stream = stored, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer):
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data or self._stored.read(_BUFFER)
                if not packed:
                    break
                self._stream = self._new()
            elif self._stream.needs_input:
                packed = self._stored.read(_BUFFER)
                if not packed:
                    raise EOFError("it ends within compressed data")
            data = self._stream.decompress(packed, len(buffer) - filled)
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    def close(self) -> None:
        self._stored.close()
        super().close()


class _Gzip(gzip.GzipFile):
    def __init__(self, stored: IO[bytes]) -> None:
        super().__init__(fileobj=stored)
        self._stored = stored

    def close(self) -> None:
        super().close()
        self._stored.close()


def _decompressed(stored: IO[bytes], compression: str) -> Any:
    if compression == ".xz":
        return _Streams(stored, lzma.LZMADecompressor)
    if compression == ".bz2":
        return _Streams(stored, bz2.BZ2Decompressor)
    if compression == ".gz":
        return _Gzip(stored)
    import pyarrow  # its reader, unlike zstandard's, does not take a truncated file for a whole one

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), "zstd")


def format_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the suffixes of a file's name, None if it is no data file."""
    stem, compression = _unpacked(name.rpartition("/")[2].lower())
    bare, dot, last = stem.rpartition(".")
    kind = KINDS.get(dot + last) if bare else None
    return None if kind is None else (kind, compression)


def _unpacked(name: str) -> tuple[str, str]:
    stem, dot, last = name.rpartition(".")
    suffix = dot + last.lower()
    return (stem, suffix) if suffix in COMPRESSIONS else (name, "")


def local_file(path: Path, name: str | None = None) -> DataFile:
    """Raises ``RSOConfigError`` for an unknown format, an empty file and what cannot be read as a file."""
    known = format_of(path.name)
    if known is None:
        raise RSOConfigError(
            f"{path}: unknown format; known are {', '.join(KINDS)}, also with {', '.join(COMPRESSIONS)}."
        )
    try:
        status = path.stat()
    except OSError as error:
        what = "it is a link to what is not there" if path.is_symlink() else error.strerror
        raise RSOConfigError(f"{path} cannot be read: {what}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise RSOConfigError(f"{path} cannot be read: it is no regular file.")
    if status.st_size == 0:
        raise RSOConfigError(f"{path} is empty.")
    return DataFile(str(path), name or path.name, status.st_size, *known)


# -- folders -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Files by split ("train", "validation", "test", or as a dataset's card or shards are named); names of the rest."""

    splits: Mapping[str, tuple[DataFile, ...]]
    ignored: tuple[str, ...] = ()


def files_of_folder(folder: Path, kinds: Sequence[str], subset: str | None = None) -> Found:
    """The data files of ``folder`` by split, as Hugging Face ``datasets`` finds them: by the dataset's card if it names
    files, else by the names of shards (data/train-00000-of-00002.parquet), folders and files; all of it "train" if no
    name says so. Hidden files, cards, licences and what is not of ``kinds`` are no data; nor are empty plain texts.

    Raises ``RSOConfigError``, listing the files, where it is not clear which of them train: a split of several formats,
    a file of two splits, or files of no split beside those that train.
    """
    names = _names(folder)
    by_card = files_by_card(folder, names, subset)
    if by_card is None:
        return files_by_name(folder, names, kinds)
    if isinstance(by_card, Mapping):
        by_kind = {split: [n for n in members if _usable(n, kinds)] for split, members in by_card.items()}
        return _found(folder, by_kind, names)
    inside = {name.removeprefix(by_card): name for name in names if name.startswith(by_card)}
    splits = _splits_of_names(folder, [n for n in inside if _usable(n, kinds)])
    return _found(folder, {split: [inside[n] for n in members] for split, members in splits.items()}, names)


def files_by_name(folder: Path, names: Sequence[str], kinds: Sequence[str]) -> Found:
    """``files_of_folder`` for the files ``names`` below ``folder``, by their names alone."""
    return _found(folder, _splits_of_names(folder, [n for n in names if _usable(n, kinds)]), names)


def may_be_data(name: str) -> bool:
    """Whether a file of this name (with slashes) may be data: neither hidden, nor a card, a licence and the like."""
    *folders, file = name.split("/")
    if file.startswith(".") or file in FILES_TO_IGNORE or any(part.startswith((".", "__")) for part in folders):
        return False
    known = format_of(file)
    return known is None or known[0] != "text" or not _ABOUT_DATA.fullmatch(file.lower())


def _splits_of_names(folder: Path, usable: Sequence[str]) -> dict[str, list[str]]:
    shards = _by_shards(usable)
    if shards or not usable:
        return shards
    splits: dict[str, list[str]] = {}
    left = list(usable)
    for patterns in (DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, DEFAULT_PATTERNS_SPLIT_IN_FILENAME):
        rest: list[str] = []
        for name in left:
            # datasets takes Test.jsonl for a file of no split: one that trains.
            its = [str(s) for s, globs in patterns.items() if any(_regex(g).fullmatch(name.lower()) for g in globs)]
            if len(its) > 1:
                raise _ambiguous(folder, f"'{name}' may be of the splits {' and '.join(its)}", usable)
            (splits.setdefault(its[0], []) if its else rest).append(name)
        left = rest
    if not splits:
        return {"train": left}
    trained = {_kind(name) for name in splits.get("train", ())}
    stray = next((name for name in left if _kind(name) in trained), None)
    if stray is not None:
        raise _ambiguous(folder, f"'{stray}' belongs to no split, though others do", usable)
    return splits


def _by_shards(names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for pattern in ALL_SPLIT_PATTERNS:
        matcher = re.compile(glob_translate(pattern.replace("{split}", "SPLIT")).replace("SPLIT", r"(\w+(?:\.\w+)*)"))
        for name in names:
            match = matcher.fullmatch(name)
            if match:
                splits.setdefault(match[1], []).append(name)
    return splits


def _found(folder: Path, splits: Mapping[str, Sequence[str]], names: Iterable[str]) -> Found:
    train = set(splits.get("train", ()))
    for split, members in splits.items():
        kinds = sorted({kind for kind in map(_kind, members) if kind})
        if len(kinds) > 1:
            raise _ambiguous(
                folder, f"the split '{split}' has files of several formats, {' and '.join(kinds)}", members
            )
        packed: dict[str, str] = {}
        for name in members:
            other = packed.setdefault(_unpacked(name)[0], name)
            if other != name:
                raise _ambiguous(folder, f"'{other}' and '{name}' are one file, packed and unpacked", members)
        trained = [name for name in members if name in train and split in SPLITS["validation"] + SPLITS["test"]]
        if trained:
            raise _ambiguous(folder, f"'{trained[0]}' is of the splits train and {split}", members)
    files = {split: tuple(_files(folder, members)) for split, members in splits.items()}
    taken = {file.name for members in files.values() for file in members}
    return Found({k: v for k, v in files.items() if v}, tuple(n for n in names if n not in taken))


def _files(folder: Path, names: Iterable[str]) -> Iterable[DataFile]:
    for name in names:
        path = folder / name
        if _kind(name) == "text" and path.is_file() and path.stat().st_size == 0:
            continue  # as __init__.py often is
        yield local_file(path, name)


def _ambiguous(folder: Path, why: str, names: Sequence[str]) -> RSOConfigError:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return RSOConfigError(
        f"{folder}: {why}, so that it is not clear which files train. It holds {', '.join(names[:_SHOWN])}{more}. Name"
        " the files, or a pattern in quotes like 'folder/train-*.jsonl', or sort them into folders train, validation"
        " and test."
    )


def _names(folder: Path) -> list[str]:
    """Names below ``folder``, with slashes, of files that may be data. Links are followed, but for those to files that
    are there under their own names."""
    root = Path(os.path.realpath(folder))
    own, linked = set(), {}
    for at, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        here = Path(os.path.realpath(at))
        above = [] if here == Path(at) else [p for p in Path(at).parents if p == root or root in p.parents]
        if any(here == Path(os.path.realpath(p)) for p in above):
            folders.clear()
            continue
        folders[:] = [f for f in folders if not f.startswith((".", "__"))]
        for file in files:
            path = Path(at) / file
            name = path.relative_to(root).as_posix()
            if not may_be_data(name):
                continue
            if here == Path(at) and not path.is_symlink():
                own.add(name)
            else:
                linked[name] = Path(os.path.realpath(path))
    there = {root / name for name in own}
    return sorted(own | {name for name, target in linked.items() if target not in there})


def _unreadable(error: OSError) -> NoReturn:
    raise RSOConfigError(f"{error.filename} cannot be read: {error.strerror}.")


def _usable(name: str, kinds: Sequence[str]) -> bool:
    return _kind(name) in kinds


def _kind(name: str) -> str:
    known = format_of(name)
    return "" if known is None else known[0]


@cache
def _regex(glob: str) -> re.Pattern[str]:
    return re.compile(glob_translate(glob))
