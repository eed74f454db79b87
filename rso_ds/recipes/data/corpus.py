"""Documents from files, folders, the Hugging Face hub, or the text that every Python carries."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rso_ds.errors import RSOConfigError

STDLIB = "stdlib"
_COMPRESSIONS = (".xz", ".gz", ".zst")
_PLAIN = (".txt", ".md", ".py")
_FORMATS = (*_PLAIN, ".jsonl", ".json", ".parquet")
_FEW = 500  # below this, choosing whole documents could hold out none
_TRAIN, _HELD_OUT = ("train",), ("valid", "validation", "val", "dev")


class Corpus:
    """A source of documents with a held-out part.

    ``source``: "stdlib" (the source code of the installed Python standard library), a text, jsonl(.xz, .gz,
    .zst) or parquet file, a folder of such files, or a hub dataset "org/name" or
    "org/name:subset", of which the whole train split is read. In a folder, files named
    train.* and valid.* (or validation, val, dev) are the two parts; otherwise ``held_out`` of the documents,
    chosen by their content, are held out; of fewer than 500 documents, the end of each.
    ``held_out_source`` overrides.

    Raises ``RSOConfigError`` if a file is missing, empty, of unknown format, or lacks ``text_key``.
    """

    def __init__(
        self,
        source: str,
        held_out: float = 0.02,
        held_out_source: str | None = None,
        text_key: str = "text",
    ) -> None:
        self.source, self.held_out, self.text_key = source, held_out, text_key
        self.files = _files_of(source)
        self.held_out_source = held_out_source
        self.held_out_files = _files_of(held_out_source, "--val-data") if held_out_source else None
        if self.files is not None and source != STDLIB:
            named = [f for f in self.files if f.name.split(".")[0] in _HELD_OUT]
            train = [f for f in self.files if f.name.split(".")[0] in _TRAIN]
            if train and (named or held_out_source is not None):
                self.files = train  # never the folder's valid.* or test.*
                self.held_out_files = self.held_out_files if held_out_source is not None else named

    def fingerprint(self) -> str:
        """Changes when a file or the split does; names the cached tokens."""
        parts = [self.source, str(self.held_out_source), str(self.held_out), self.text_key]
        for files in (self.files, self.held_out_files):
            parts += ["|"] + [f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files or ()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def documents(self, part: str) -> Iterator[str]:
        """Documents of ``part`` ("train" or "held_out"), in a fixed order."""
        if self.held_out_source is not None and part == "held_out":
            yield from self._read(self.held_out_files, self.held_out_source)
            return
        if self.held_out_source is not None or self.held_out_files is not None:
            yield from self._read(self.held_out_files if part == "held_out" else self.files)
            return
        if self.files is not None and self._few_documents():
            for text in self._read(self.files):
                cut = text.rfind("\n", 0, int(len(text) * (1 - self.held_out))) + 1
                yield text[cut:] if part == "held_out" else text[:cut]
            return
        for text in self._read(self.files):
            bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") / 2**32
            if (bucket < self.held_out) == (part == "held_out"):
                yield text

    def _few_documents(self) -> bool:
        return sum(1 for _ in itertools.islice(self._read(self.files), _FEW)) < _FEW

    def _read(self, files: list[Path] | None, hub_name: str | None = None) -> Iterator[str]:
        if files is None:
            yield from _hub_documents(hub_name or self.source, self.text_key)
            return
        for file in files:
            try:
                yield from _file_documents(file, self.text_key)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise RSOConfigError(f"{file} cannot be read, it may be damaged: {error}") from None


def _files_of(source: str, flag: str = "--data") -> list[Path] | None:
    """Files of a local source, None for a hub name."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}
        return sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and _format_of(f) is not None)
        if not files:
            raise RSOConfigError(f"{flag} {source}: the folder has no {', '.join(_FORMATS)} file.")
    elif path.is_file():
        if _format_of(path) is None:
            raise RSOConfigError(
                f"{flag} {source}: unknown format; known are {', '.join(_FORMATS)},"
                f" also with {', '.join(_COMPRESSIONS)}."
            )
        files = [path]
    elif source.count("/") == 1 and not source.startswith((".", "/")) and not Path(source).suffix:
        return None
    else:
        raise RSOConfigError(
            f"{flag} {source}: no such file or folder (a hub dataset is written org/name; '{STDLIB}' needs no file)."
        )
    empty = [f for f in files if f.stat().st_size == 0]
    if empty:
        raise RSOConfigError(f"{flag} {source}: {empty[0]} is empty.")
    return files


def _format_of(file: Path) -> str | None:
    suffixes = [s for s in file.suffixes if s not in _COMPRESSIONS]
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _open(file: Path) -> IO[str]:
    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8", errors="replace")
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", errors="replace")
    if file.suffix == ".zst":
        import zstandard

        return zstandard.open(file, "rt", encoding="utf-8", errors="replace")
    return open(file, encoding="utf-8", errors="replace")


def _file_documents(file: Path, key: str) -> Iterator[str]:
    kind = _format_of(file)
    if kind == ".parquet":
        import pyarrow.parquet as pq

        table = pq.ParquetFile(file)
        if key not in table.schema_arrow.names:
            raise RSOConfigError(f"{file}: no column '{key}' (there are {table.schema_arrow.names}): set --text-key.")
        for batch in table.iter_batches(columns=[key]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    elif kind in (".jsonl", ".json"):
        with _open(file) as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise RSOConfigError(f"{file}, line {number}: not a JSON object a line ({error}).") from None
                if not isinstance(record, dict) or key not in record:
                    raise RSOConfigError(f"{file}, line {number}: no key '{key}': set --text-key.")
                if not isinstance(record[key], (str, type(None))):
                    raise RSOConfigError(f"{file}, line {number}: '{key}' is not a text.")
                if record[key]:
                    yield record[key]
    else:
        with _open(file) as f:
            text = f.read()
        if text.strip():
            yield text


def _hub_documents(name: str, key: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        repository, _, subset = name.partition(":")
        rows = load_dataset(repository, subset or None, split="train", streaming=True)
    except Exception as error:
        raise RSOConfigError(f"--data {name}: no such file, and the hub cannot give it: {error}") from None
    for row in rows:
        if key not in row:
            raise RSOConfigError(f"--data {name}: no column '{key}' (there are {sorted(row)}): set --text-key.")
        if row[key]:
            yield row[key]
