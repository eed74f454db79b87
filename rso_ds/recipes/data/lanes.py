"""Sequences of an endless stream of text, which starts again anywhere from a few numbers.

The stream is dealt to lanes. Sequence q of the stream is the next one of lane q mod ``lanes``, and a lane reads every
``lanes``-th block of the order of blocks. So what is in sequence q depends on the data, the seed and the number of
lanes alone: not on how many ranks or processes read them, nor on where they begin.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.blocks import BlockOrder, block_texts
from rso_ds.recipes.data.corpus import Member
from rso_ds.recipes.data.tokenization import encode, end_of_text_id, pieces

FIELDS = ("block", "record", "token", "checksum")  # of a place in a lane
START = (0, -1, 0, 0)
_WINDOW = 1 << 18  # characters of records that are shuffled among themselves
_PIECE = 1 << 16  # characters of a document that are encoded at once
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it are spread as evenly as can be


@dataclass(frozen=True)
class StreamPlan:
    """What a stream is: everything but the place in it. It pickles. ``weights`` of ``members`` add up to 1; each member
    has its own order of blocks."""

    members: Sequence[Member]
    weights: Sequence[float]
    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    seed: int
    lanes: int
    orders: Sequence[BlockOrder]

    def member_of(self, sequence: int) -> int:
        """Which member sequence number ``sequence`` is of: shares are as ``weights`` say, to one sequence or two."""
        if len(self.members) == 1:
            return 0
        at = ((self.seed + sequence) * _GOLDEN % 2**64) / 2**64
        return int(np.searchsorted(np.cumsum(self.weights)[:-1], at, side="right"))


@dataclass(frozen=True)
class _Piece:
    """Ids ``ids`` of the record number ``record`` of the lane's block number ``block``, from its token ``first`` on."""

    block: int
    record: int
    first: int
    checksum: int
    ids: np.ndarray


class Lane:
    """Lane ``number`` of one member: sequence after sequence, from ``place`` on.

    ``place``: (block, record, token, checksum), the next token is number ``token`` of record ``record`` of the lane's
    block number ``block``, whose text has ``checksum``; records are counted in the order in which they are given out.
    """

    def __init__(self, plan: StreamPlan, member: int, number: int, place: Sequence[int]) -> None:
        self._plan, self._member, self._number = plan, plan.members[member], number
        self._order = plan.orders[member]
        self._end = end_of_text_id(plan.tokenizer)
        self.place = (int(place[0]), int(place[1]), int(place[2]), int(place[3]))
        self._pieces = self._from(self.place)
        self._left = np.empty(0, dtype=np.int64)

    def next(self) -> np.ndarray:
        """The next sequence: int64 [seq_len]. Raises ``RSOConfigError`` for unreadable data, or other data than were
        there when ``place`` was noted."""
        out = np.empty(self._plan.seq_len, dtype=np.int64)
        filled = 0
        while filled < len(out):
            if not len(self._left):
                self._piece = next(self._pieces)
                self._left = self._piece.ids
            taken = self._left[: len(out) - filled]
            out[filled : filled + len(taken)] = taken
            filled, self._left = filled + len(taken), self._left[len(taken) :]
        piece = self._piece
        used = piece.first + len(piece.ids) - len(self._left)
        self.place = (piece.block, piece.record, used, piece.checksum)
        return out

    def _from(self, place: tuple[int, int, int, int]) -> Iterator[_Piece]:
        block, record, token, checksum = place
        begun = record >= 0
        batch: list[tuple[int, int, str]] = []
        size = 0
        for at, number, text in self._records(block, max(record, 0)):
            if begun:  # the record in which the stream stopped
                begun = False
                if (at, number) != (block, record) or _checksum(text) != checksum:
                    raise RSOConfigError(
                        f"--data {self._member.source.name}: the text at the place where this run stopped is another"
                        " than it was. Restore the data, or start anew without --resume."
                    )
                for piece in self._encoded(at, number, text):
                    if piece.first + len(piece.ids) > token:
                        cut = max(0, token - piece.first)
                        yield _Piece(at, number, piece.first + cut, piece.checksum, piece.ids[cut:])
                continue
            if len(text) > _PIECE:
                yield from self._together(batch)
                batch, size = [], 0
                yield from self._encoded(at, number, text)
                continue
            batch.append((at, number, text))
            size += len(text)
            if size >= 4 * self._plan.seq_len:
                yield from self._together(batch)
                batch, size = [], 0

    def _together(self, batch: Sequence[tuple[int, int, str]]) -> Iterator[_Piece]:
        for (at, number, text), ids in zip(
            batch, encode(self._plan.tokenizer, [text for *_, text in batch]), strict=True
        ):
            yield _Piece(at, number, 0, _checksum(text), np.asarray([*ids, self._end], dtype=np.int64))

    def _encoded(self, at: int, number: int, text: str) -> Iterator[_Piece]:
        first, checksum, seen = 0, _checksum(text), 0
        for part in pieces(text, _PIECE):
            seen += len(part)
            ids = encode(self._plan.tokenizer, [part])[0] + ([self._end] if seen == len(text) else [])
            yield _Piece(at, number, first, checksum, np.asarray(ids, dtype=np.int64))
            first += len(ids)

    def _records(self, block: int, first: int) -> Iterator[tuple[int, int, str]]:
        """(block, record, text) of the training part, endlessly, from record ``first`` of ``block`` on."""
        while True:
            for number, text in enumerate(self._shuffled(block)):
                own = self._member.split.part(text, held_out=False)
                if number >= first and own:
                    yield block, number, own
            block, first = block + 1, 0

    def _shuffled(self, number: int) -> Iterator[str]:
        """The texts of the lane's block ``number``, shuffled in windows, so that a block of any size needs no more
        memory than a window."""
        place = self._number + number * self._plan.lanes
        block, epoch = self._order.block(place)
        file = self._member.source.train[block.file]
        window: list[str] = []
        size = windows = 0
        for text in block_texts(file, block, self._member.text_key, self._member.encoding):
            window.append(text)
            size += len(text)
            if size >= _WINDOW:
                yield from _permuted(window, [self._plan.seed, epoch, block.file, block.part, windows])
                window, size, windows = [], 0, windows + 1
        yield from _permuted(window, [self._plan.seed, epoch, block.file, block.part, windows])


def _permuted(window: list[str], seed: list[int]) -> Iterator[str]:
    for i in np.random.Generator(np.random.PCG64(seed)).permutation(len(window)):
        yield window[i]


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())


class LaneReader:
    """Sequences of a plan by number, for some lanes; each lane's in rising order.

    ``places``: int64 [lanes, members, 4], where each lane goes on (``FIELDS``); ``taken``: the number of the stream's
    sequences before that.
    """

    def __init__(self, plan: StreamPlan, places: np.ndarray, taken: int) -> None:
        self._plan, self._places, self._taken = plan, places, taken
        self._lanes: dict[int, list[Lane]] = {}
        self._next: dict[int, int] = {}

    def sequence(self, number: int) -> np.ndarray:
        """Sequence ``number``: int64 [seq_len]. Those of its lane that were left out before it are read and dropped."""
        lane = number % self._plan.lanes
        if lane not in self._lanes:
            self._lanes[lane] = [Lane(self._plan, m, lane, p) for m, p in enumerate(self._places[lane])]
            self._next[lane] = self._taken + (lane - self._taken) % self._plan.lanes
        while True:
            at = self._next[lane]
            tokens = self._lanes[lane][self._plan.member_of(at)].next()
            self._next[lane] = at + self._plan.lanes
            if at == number:
                return tokens

    def places(self, lane: int) -> np.ndarray:
        """Where ``lane``, which has been read, goes on: int64 [members, 4]."""
        return np.asarray([member.place for member in self._lanes[lane]], dtype=np.int64)


def first_places(lanes: int, members: int) -> np.ndarray:
    """The places of a stream that has not begun."""
    return np.broadcast_to(np.asarray(START, dtype=np.int64), (lanes, members, len(FIELDS))).copy()
