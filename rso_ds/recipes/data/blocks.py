"""Blocks: parts of data files that are read by themselves, and the order in which an endless stream has them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO

import numpy as np

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.files import DataFile
from rso_ds.recipes.data.records import (
    BLANK,
    json_row,
    parquet_rows,
    readable,
    text_of,
    text_stream,
    texts,
    without_zeros,
)
from rso_ds.text import codec_of, undecodable

_BLOCK = 1 << 18  # bytes
_LEAST = 128  # smaller ones would mostly hold no beginning of a line
_PIECE = 1 << 16  # bytes of a plain text that are a document of their own
_MOST_BLOCKS = 1 << 18  # beyond, blocks are larger and not more: their order is held in memory
_PARTS_OF_A_ROW_GROUP = 16  # each of which decodes all of it
_HEAD = 4096
# One byte a newline, and no byte of another character equal to it.
_RANGED = ("utf-8", "ascii", "iso8859", "cp125", "koi8")


@dataclass(frozen=True)
class Block:
    """Part ``part`` of ``parts`` of the file number ``file``."""

    file: int
    part: int
    parts: int


class BlockOrder:
    """The endless order of blocks: a permutation for each epoch, a function of (seed, epoch) and the files' sizes only.

    ``lanes``: number of readers that take turns; there are enough blocks for each, where the files allow it.
    """

    def __init__(self, files: Sequence[DataFile], encoding: str, lanes: int, seed: int) -> None:
        total = sum(f.size for f in files)
        size = max(min(_BLOCK, total // (8 * lanes)), total // _MOST_BLOCKS, _LEAST)
        parts = np.asarray([_parts(f, encoding, size, -(-lanes // len(files))) for f in files])
        self._ends = np.cumsum(parts)
        self._parts, self._seed = parts, seed
        self.count = int(self._ends[-1])
        self._permutations: dict[int, np.ndarray] = {}

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) >= 4:  # lanes are in one epoch or the next
                self._permutations.pop(min(self._permutations))
            self._permutations[epoch] = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(
                self.count
            )
        return self._permutations[epoch]

    def block(self, place: int) -> tuple[Block, int]:
        """(the block at ``place`` of the endless order, its epoch)."""
        epoch, offset = divmod(place, self.count)
        number = int(self._permutation(epoch)[offset])
        file = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[file] - self._parts[file])
        return Block(file, number - first, int(self._parts[file])), epoch


def _parts(file: DataFile, encoding: str, size: int, sequential: int) -> int:
    """In how many parts ``file`` is read: of about ``size`` bytes where a part can be found without reading what is
    before it, else ``sequential``."""
    wanted = -(-file.size // size) if file.kind != "text" else min(_pieces(file), -(-file.size // size))
    if not _ranged(file, encoding):
        return sequential
    if file.kind == "parquet":
        import pyarrow.parquet as pq

        with readable(file), file.open() as stream:
            metadata = pq.ParquetFile(stream).metadata
            some = max(min(wanted, _PARTS_OF_A_ROW_GROUP * metadata.num_row_groups), sequential)
            return max(1, min(some, metadata.num_rows))
    return wanted


def _pieces(file: DataFile) -> int:
    """Of how many documents a plain text consists, wherever it is cut into blocks."""
    return max(1, file.size // _PIECE)


@cache
def _ranged(file: DataFile, encoding: str) -> bool:
    """Whether a part of ``file`` can be found without reading what is before it; on the hub none is looked for."""
    if file.remote:
        return False
    if file.kind == "parquet":
        return True
    if file.compression or file.kind not in ("text", "jsonl") or not codecs.lookup(encoding).name.startswith(_RANGED):
        return False
    if file.kind == "text":
        return True
    with readable(file), file.open() as stream:
        head = stream.read(_HEAD)
    lines = b"\n" in head or b"\r" not in head  # a carriage return alone ends a line for whoever reads from the start
    return lines and not head.lstrip(BLANK.encode()).startswith(b"[")


# -- reading one ---------------------------------------------------------------------------------------


def block_texts(file: DataFile, block: Block, key: str, encoding: str) -> Iterator[str]:
    """The texts of one block of ``file``, in the file's order; may be none.

    The blocks of a file hold each of its records once: by the bytes in which a line begins, by rows of parquet, or,
    where a file can only be read from its start, every ``block.parts``-th record. A plain text of more than 128 KiB is
    a document for each 64 KiB or so, cut at lines; which they are does not depend on the blocks. Raises
    ``RSOConfigError`` as ``texts`` does.
    """
    if file.kind == "text":
        yield from _plain(file, block, encoding)
    elif block.parts == 1:
        for text, _ in texts(file, key, encoding):
            yield text
    elif file.kind == "parquet":
        yield from _parquet(file, block, key)
    elif _ranged(file, encoding):
        first, end = file.size * block.part // block.parts, file.size * (block.part + 1) // block.parts
        with readable(file, encoding), file.open() as stream:
            codec = codec_of(stream.read(_HEAD), file.url, encoding)
            yield from _line_range(file, stream, first, end, key, codec, encoding)
    else:
        yield from _every(block, (text for text, _ in texts(file, key, encoding)))


def _every(block: Block, records: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(records):
        if number % block.parts == block.part:
            yield text


def _plain(file: DataFile, block: Block, encoding: str) -> Iterator[str]:
    count = _pieces(file)
    if not _ranged(file, encoding):
        yield from _every(block, _plain_pieces(file, encoding))
    elif count == 1:
        yield from _every(block, (text for text, _ in texts(file, "", encoding)))
    else:
        with readable(file, encoding), file.open() as stream:
            codec = codec_of(stream.read(_HEAD), file.url, encoding)
            for piece in range(count * block.part // block.parts, count * (block.part + 1) // block.parts):
                at = _line_start(stream, piece * _PIECE)
                end = _line_start(stream, (piece + 1) * _PIECE) if piece + 1 < count else file.size
                yield from _plain_range(file, stream, at, end, codec, encoding)


def _parquet(file: DataFile, block: Block, key: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with readable(file):
        with file.open() as stream:
            count = pq.ParquetFile(stream, pre_buffer=False).metadata.num_rows
        first, end = count * block.part // block.parts, count * (block.part + 1) // block.parts
        for row, number in parquet_rows(file, (key,), first, end):
            text = text_of(row, key, file, number)
            if text:
                yield text


def _line_range(
    file: DataFile, stream: IO[bytes], first: int, end: int, key: str, codec: str, encoding: str
) -> Iterator[str]:
    """Texts of the JSON lines that begin at ``first`` or later and before ``end`` (bytes)."""
    stream.seek(max(0, first - 1))
    at = stream.tell() + len(stream.readline()) if first else 0
    while at < end:
        raw = stream.readline()
        try:
            line = raw.decode(codec if at == 0 else encoding)
        except UnicodeDecodeError as error:
            raise undecodable(file.url, at + error.start, raw[error.start :], encoding) from None
        if line.strip(BLANK):
            try:
                text = text_of(json_row(line, file, 0), key, file, 0)
            except RSOConfigError:  # once more, with the number of the line, which is counted for this alone
                number = _line_at(file, at)
                text = text_of(json_row(line, file, number), key, file, number)
            if text:
                yield text
        at += len(raw)


def _line_at(file: DataFile, offset: int) -> int:
    number = 1
    with file.open() as stream:
        while offset > 0:
            chunk = stream.read(min(offset, 1 << 20))
            number, offset = number + chunk.count(b"\n"), offset - len(chunk)
    return number


def _plain_range(file: DataFile, stream: IO[bytes], at: int, end: int, codec: str, encoding: str) -> Iterator[str]:
    """The text between ``at`` and ``end`` (bytes), if it has any."""
    stream.seek(at)
    raw = stream.read(end - at)
    try:
        text = raw.decode(codec if at == 0 else encoding)
    except UnicodeDecodeError as error:
        raise undecodable(file.url, at + error.start, raw[error.start :], encoding) from None
    text = without_zeros(text.replace("\r\n", "\n").replace("\r", "\n"), file)
    if text.strip():
        yield text


def _line_start(stream: IO[bytes], at: int) -> int:
    """Where the first line begins at ``at`` or later; in a line of more than a block the first character instead."""
    if at == 0:
        return 0
    stream.seek(at - 1)
    ahead = stream.read(_BLOCK)
    newline = ahead.find(b"\n")
    if newline >= 0:
        return at + newline
    if len(ahead) < _BLOCK:
        return at - 1 + len(ahead)
    inside = next((i for i in range(1, 5) if ahead[i] & 0xC0 != 0x80), 1)  # not within a character of UTF-8
    return at - 1 + inside


def _plain_pieces(file: DataFile, encoding: str) -> Iterator[str]:
    """The documents of a plain text that can only be read from its start."""
    with readable(file, encoding), file.open() as stream:
        reader, left = text_stream(stream, file, encoding), ""
        while chunk := reader.read(_PIECE):
            text = left + chunk
            cut = text.rfind("\n") + 1 or len(text)
            text, left = text[:cut], text[cut:]
            if without_zeros(text, file).strip():
                yield text
        if without_zeros(left, file).strip():
            yield left
