"""Runs that are saved by some ranks and continued by others (tests/workers/resume.py)."""

from __future__ import annotations

from typing import Any

from cases.resume_cases import WORLDS, four_rank_cases
from support.ranks import Cases, Pools

FOUR = four_rank_cases()


class Runs:
    """What saves and what resumes are never the same processes."""

    def __init__(self, pools: Pools) -> None:
        folder = pools.folder_of("resume")
        self._saving = {n: Cases(pools, "resume", n, "saving", folder) for n in (1, 2, 4)}
        self._resuming = {n: Cases(pools, "resume", n, "resuming", folder) for n in (1, 2, 4)}

    def saved(self, name: str) -> dict[str, Any]:
        """The uninterrupted run, which leaves a checkpoint on its way."""
        return self._saving[4 if name in FOUR else 2][f"save {name}"]

    def resumed(self, source: str, target: str | None = None) -> dict[str, Any]:
        """The rest of ``source``, under another case if one is named."""
        self.saved(source)
        name = source if target is None else f"{source} -> {target}"
        return self._resuming[4 if source in FOUR else 2][f"resume {name}"]

    def partly(self, act: str, source: str, target: str) -> dict[str, Any]:
        """What of ``source`` is taken into a run of ``target``: "weights", or all "unsolved", without the solver's."""
        self.saved(source)
        return self._resuming[2][f"{act} {source} -> {target}"]

    def schedule(self, source: str) -> dict[str, Any]:
        self.saved(source)
        return self._resuming[2][f"schedule {source}"]

    def chain(self, name: str) -> list[dict[str, Any]]:
        """The parts of a run, one after the other, each in other processes than the one before."""
        return [
            (self._resuming if part % 2 else self._saving)[world][f"{part} of {name}"]
            for part, world in enumerate(WORLDS)
        ]
