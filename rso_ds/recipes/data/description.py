"""What a run says about its data before it trains: which files, how much, and how the text begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BEGINNING = 200  # characters of the first text
_FILES, _UNTOUCHED = 5, 8


@dataclass(frozen=True)
class PartDescription:
    """One part of the data. ``counts``: numbers by what they count, as far as they are known. ``note``: in words."""

    what: str
    files: Sequence[str]
    counts: dict[str, int]
    note: str = ""

    def line(self) -> str:
        counts = {"files": len(self.files), **self.counts} if self.files else self.counts
        amounts = [f"{number:,} {what.removesuffix('s') if number == 1 else what}" for what, number in counts.items()]
        listed = f": {shortened(self.files, _FILES)}" if self.files else ""
        note = f" ({self.note})" if self.note else ""
        return f"  {self.what:<9} {', '.join(amounts) or 'nothing'}{note}{listed}"


@dataclass(frozen=True)
class DataDescription:
    """The parts of a run's data, names of files that are left alone, and the beginning of the first training text."""

    source: str
    parts: Sequence[PartDescription]
    untouched: Sequence[str]
    beginning: str

    def text(self) -> str:
        """Some lines for people."""
        lines = [f"data {self.source}", *(part.line() for part in self.parts)]
        if self.untouched:
            lines.append(f"  {'not read':<9} {shortened(self.untouched, _UNTOUCHED)}")
        lines.append(f"  {'begins':<9} {self.beginning[:BEGINNING]!r}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same, whole, for machines."""
        parts = {p.what: {"files": list(p.files), **p.counts, "note": p.note} for p in self.parts}
        return {"source": self.source, **parts, "not read": list(self.untouched), "begins": self.beginning}


def shortened(names: Sequence[str], most: int) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
