"""Which documents of a corpus are held out: chosen by their text, so that a copy is on the same side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

FEW = 500  # documents below which a share of their number would be too coarse
_SURE = 10  # held-out documents to be expected, so that hardly ever there is none
_MOST = 100_000  # documents that are looked at for that
_LONG = 4_000  # characters from which a document may be cut in two
_HASHES = 1 << 64


@dataclass(frozen=True)
class Split:
    """A document is held out from the character on that ``cuts`` has for its hash: 0 for all of it, its length for
    none. Of documents without a cut those are held out whose hash is below ``bound``."""

    bound: float
    cuts: Mapping[int, int] = field(default_factory=dict)

    def part(self, text: str, held_out: bool) -> str:
        """What of the document ``text`` belongs to the held-out part, or to the other; may be empty."""
        if not self.bound and not self.cuts:
            return "" if held_out else text
        mark = _hash(text)
        at = self.cuts.get(mark, 0 if mark < self.bound else len(text))
        return text[at:] if held_out else text[:at]


def choose(documents: Callable[[], Iterable[str]], share: float) -> Split:
    """Hold out about ``share`` of ``documents()``, which may be called more than once; some of it, and never all.

    Of 500 or more, copies not counted, those whose hash says so. Of fewer, whole ones in the order of their hashes,
    until ``share`` of all characters is reached; those that would go beyond it by half are left out. If less than half
    of it is found so, since documents are large, the smallest of the others: whole, or, where it is long or the last
    one to train on, only its end, cut at a line, else at a space, else anywhere.
    """
    if share == 0:
        return Split(0)
    sizes: dict[int, int] = {}  # of all copies together
    lengths: dict[int, int] = {}
    enough = max(FEW, min(_MOST, _SURE / share))
    for text in documents():
        mark = _hash(text)
        sizes[mark] = sizes.get(mark, 0) + len(text)
        lengths[mark] = len(text)
        if len(sizes) >= enough:
            return Split(max(share * _HASHES, min(sizes) + 1))
    wanted, taken = share * sum(sizes.values()), 0
    cuts = dict(lengths)
    left: list[int] = []
    for mark in sorted(sizes):
        if taken < wanted and taken + sizes[mark] <= min(1.5 * wanted, sum(sizes.values()) - 1):
            cuts[mark], taken = 0, taken + sizes[mark]
        else:
            left.append(mark)
    if taken < wanted / 2:
        mark = min(left, key=lambda m: (sizes[m], m))
        cuts[mark] = 0
        if len(left) == 1 or lengths[mark] >= _LONG:
            text = next(t for t in documents() if _hash(t) == mark)
            cuts[mark] = _cut(text, (wanted - taken) * lengths[mark] / sizes[mark])
    return Split(0, cuts)


def united(splits: Sequence[Split]) -> Split:
    """One split for the documents of several, so that what one of them holds out does not train in another."""
    cuts: dict[int, int] = {}
    for split in splits:
        for mark, at in split.cuts.items():
            cuts[mark] = min(at, cuts.get(mark, at))
    return Split(max((split.bound for split in splits), default=0), cuts)


def _cut(text: str, wanted: float) -> int:
    """Where to cut ``text`` so that about ``wanted`` characters are behind: not at either end if it has two."""
    latest = max(1, min(len(text) - 1, int(len(text) - wanted)))
    for sign in ("\n", " "):
        at = text.rfind(sign, 0, latest) + 1
        if at and len(text) - at <= max(2 * wanted, wanted + 200) and text[at:].strip() and text[:at].strip():
            return at
    return latest


def _hash(text: str) -> int:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[3::-1] + digest[4:8], "big")  # by its first four bytes as ever, and finer
