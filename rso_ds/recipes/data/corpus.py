"""Documents to train on and documents held out, from one source or several."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.blocks import Block, block_texts
from rso_ds.recipes.data.files import DataFile
from rso_ds.recipes.data.records import texts
from rso_ds.recipes.data.sources import HubDataset, Source, find_source
from rso_ds.recipes.data.split import Split, choose, united
from rso_ds.text import UTF8

_VAL = ("validation", "test", "train")  # which split of several --val-data means
_CHUNK = 1 << 22
_SAMPLE = 1 << 16
_LARGE = 1 << 30


class Member:
    """The documents of one source. Its held-out part is its validation split, else ``held_out`` of its documents
    (``split.choose``), chosen when first asked for. ``in_pieces``: documents are those of a stream, where a long plain
    text is several (``block_texts``)."""

    def __init__(self, source: Source, held_out: float, text_key: str, encoding: str, in_pieces: bool = False) -> None:
        self.source, self.share, self.text_key, self.encoding = source, held_out, text_key, encoding
        self._in_pieces = in_pieces
        self.together: list[Member] = [self]  # what one of these holds out, none of them trains on

    @property
    def validates(self) -> bool:
        """Whether it holds something out."""
        return self.source.held_out is not None or self.share > 0

    @cached_property
    def split(self) -> Split:
        """Which documents of the training files are held out."""
        return united([member._own_split for member in self.together])

    @cached_property
    def _own_split(self) -> Split:
        return choose(lambda: self._texts(self.source.train), 0 if self.source.held_out is not None else self.share)

    def documents(self, part: str) -> Iterator[str]:
        held_out = part == "held_out"
        if held_out and self.source.held_out is not None:
            yield from self._texts(self.source.held_out)
        elif self.validates or not held_out:
            for text in self._texts(self.source.train):
                own = self.split.part(text, held_out)
                if own:
                    yield own

    def _texts(self, files: Sequence[DataFile]) -> Iterator[str]:
        for file in files:
            if self._in_pieces:
                yield from block_texts(file, Block(0, 0, 1), self.text_key, self.encoding)
            else:
                yield from (text for text, _ in texts(file, self.text_key, self.encoding))


class Corpus:
    """Text by document, with a held-out part.

    ``source``: what ``--data`` names (``find_source``), or several of them, read one after the other. The held-out part
    is all of ``held_out_source``, else each source's validation split, else ``held_out`` of its documents (0: none).
    ``text_key``: the key or column of the text in jsonl, json, csv and parquet.

    Raises ``RSOConfigError`` if a source is missing, empty, of unknown format, or leaves open what trains.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        held_out: float = 0.02,
        held_out_source: str | None = None,
        text_key: str = "text",
        encoding: str = UTF8,
    ) -> None:
        self.names = [source] if isinstance(source, str) else list(source)
        self.source = " + ".join(self.names)
        self.held_out, self.text_key, self.encoding = held_out, text_key, encoding
        self._digests: dict[str, str] = {}
        self.is_streamed = False
        self._found = [find_source(name) for name in self.names]
        self._found_held_out = (
            None if held_out_source is None else find_source(held_out_source, "--val-data", prefer=_VAL)
        )
        apart = self._found_held_out
        if isinstance(apart, Source):
            self._found = [_without(found, apart) if isinstance(found, Source) else found for found in self._found]

    def streamed(self) -> Corpus:
        """The same corpus with the documents of a stream (``Member``)."""
        other = copy.copy(self)
        other.is_streamed = True
        for name in ("members", "held_out_member"):
            other.__dict__.pop(name, None)
        return other

    @property
    def files(self) -> list[Path] | None:
        """Paths of the files that train, None where they are on the hub."""
        local = [s for s in self._found if isinstance(s, Source)]
        return [Path(f.url) for s in local for f in s.train] if len(local) == len(self._found) else None

    @cached_property
    def members(self) -> list[Member]:
        """One for each source. Asks the hub for what is there. Raises ``RSOConfigError``."""
        share = self.held_out if self._found_held_out is None else 0.0
        members = []
        for found in self._found:
            source = found.find() if isinstance(found, HubDataset) else found
            if self.held_out_member is not None:
                source = _without(source, self.held_out_member.source)
            members.append(Member(source, share, self.text_key, self.encoding, self.is_streamed))
        cut = [member for member in members if member.source.held_out is None]
        for member in cut:
            member.together = cut
        return members

    @cached_property
    def held_out_member(self) -> Member | None:
        """``held_out_source``, all of it."""
        found = self._found_held_out
        if found is None:
            return None
        source = found.find() if isinstance(found, HubDataset) else found
        return Member(Source(source.name, source.train), 0.0, self.text_key, self.encoding, self.is_streamed)

    @property
    def size(self) -> int:
        """Bytes of the files that train, as stored."""
        return sum(f.size for m in self.members for f in m.source.train)

    def shares(self, weights: Sequence[float] | None) -> list[float]:
        """What each source adds to a mixture: ``weights``, or in proportion to the bytes of its files as stored."""
        parts = weights or [sum(f.size for f in m.source.train) for m in self.members]
        return [part / sum(parts) for part in parts]

    @property
    def large(self) -> bool:
        """Whether there is more than one would read before training: more than 1 GiB, or data of the hub."""
        return self.files is None or self.size > _LARGE

    @property
    def held_out_files(self) -> list[DataFile] | None:
        """Files that are held out as a whole, None where documents of the training files are."""
        if self.held_out_member is not None:
            return list(self.held_out_member.source.train)
        own = [f for m in self.members for f in m.source.held_out or ()]
        return own or None

    @property
    def validates(self) -> bool:
        """Whether there is a held-out part."""
        return self._found_held_out is not None or any(m.validates for m in self.members)

    def documents(self, part: str) -> Iterator[str]:
        """Documents of ``part`` ("train" or "held_out"), in a fixed order."""
        for source in self.parts(part):
            yield from source

    def parts(self, part: str) -> list[Iterator[str]]:
        """``documents`` of each source by itself."""
        if part == "held_out" and self.held_out_member is not None:
            return [self.held_out_member.documents("train")]
        return [member.documents(part) for member in self.members]

    def fingerprint(self, part: str = "") -> str:
        """Changes when the content of a file does that ``part`` is read from ("train", "held_out"; "": either), or the
        split; not with names, places or times of files. Names the cached tokens. All bytes are read, once; of ``large``
        data the size of each file, its beginning, middle and end."""
        apart = self.held_out_member
        share = self.held_out if apart is None else 0.0
        digest = hashlib.sha256(repr((share, self.text_key, self.encoding, self.is_streamed)).encode())
        for member in self.members:
            validates = member.source.held_out or (() if apart else member.source.train)
            for what, files in (("train", member.source.train), ("held_out", validates)):
                if part in ("", what):
                    self._add(digest, what, files)
        if apart is not None and part != "train":
            self._add(digest, "held_out", apart.source.train)
        return digest.hexdigest()[:16]

    def _add(self, digest: Any, what: str, files: Sequence[DataFile]) -> None:
        digest.update(f"\n{what} {len(files)}".encode())
        for file in files:
            digest.update(f"\n{file.kind}{file.compression}:{self._digest(file)}".encode())

    def _digest(self, file: DataFile) -> str:
        if file.url not in self._digests:
            self._digests[file.url] = _digest(file, self.large)
        return self._digests[file.url]


def _without(source: Source, held_out: Source) -> Source:
    """``source`` less the files of ``held_out``, which may lie in its folder, and its own validation split."""
    apart = {_identity(file) for file in held_out.train}
    train = tuple(file for file in source.train if _identity(file) not in apart)
    if not train:
        raise RSOConfigError(
            f"--data {source.name} and --val-data {held_out.name} are the same files, so that none is left to train on."
        )
    rest = [file.name for file in (*source.train, *(source.held_out or ())) if file not in train]
    return Source(source.name, train, None, (*rest, *source.untouched))


def _identity(file: DataFile) -> str:
    return file.url if file.remote else os.path.realpath(file.url)


def _digest(file: DataFile, sampled: bool) -> str:
    if file.remote:
        return file.url  # names the revision of the hub's repository
    digest = hashlib.sha256(str(file.size).encode())
    try:
        with file.open_stored() as stream:
            if sampled and file.size > 3 * _SAMPLE:
                for at in (0, (file.size - _SAMPLE) // 2, file.size - _SAMPLE):
                    stream.seek(at)
                    digest.update(stream.read(_SAMPLE))
            else:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
    except OSError as error:
        raise RSOConfigError(f"{file.url} cannot be read, it may be damaged: {error}") from None
    return digest.hexdigest()
