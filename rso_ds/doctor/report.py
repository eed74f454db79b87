"""What the checks say, of one rank or of all, as a table and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

OK, WARNING, FAILED, NOT_CHECKED = "ok", "warning", "failed", "not checked"
_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """Outcome of one check. ``status``: one of the four above; ``remedy``: a command where there is one."""

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Row:
    """A finding and the ranks that share it; ``ranks`` is empty for one about all of them together."""

    finding: Finding
    ranks: tuple[int, ...] = ()
    where: str = ""
    same_elsewhere: int = 0  # further ranks where this is ok too, with other values


def merged(by_rank: Sequence[Sequence[Finding]], nodes: Sequence[str], joint: Sequence[Finding] = ()) -> list[Row]:
    """Findings of all ranks, equal ones as one row; ``nodes``: each rank's node.

    What is ok everywhere is one row even if values differ, so that a thousand ranks with unequal free memory do not
    make a thousand rows.
    """
    rows = []
    for name in dict.fromkeys(finding.name for findings in by_rank for finding in findings):
        sharing: dict[Finding, list[int]] = {}
        for rank, findings in enumerate(by_rank):
            for finding in findings:
                if finding.name == name:
                    sharing.setdefault(finding, []).append(rank)
        good = [finding for finding in sharing if finding.status == OK]
        for finding, ranks in sharing.items():
            if finding.status == OK and finding is not good[0]:
                continue
            others = sum(len(sharing[other]) for other in good[1:]) if finding.status == OK else 0
            everywhere = len(ranks) + others == len(by_rank)
            where = "all ranks" if everywhere else _where(ranks, nodes)
            rows.append(Row(finding, tuple(ranks), "" if len(by_rank) == 1 else where, others))
    return rows + [Row(finding) for finding in joint]


def failed(rows: Sequence[Row]) -> bool:
    """Whether the job should not start."""
    return any(row.finding.status == FAILED for row in rows)


def table(title: str, rows: Sequence[Row]) -> str:
    """Aligned lines; remedies stay unbroken, to be copied."""
    statuses = (FAILED, WARNING, NOT_CHECKED, OK)
    width = max((len(row.finding.name) for row in rows), default=0)
    lines = [title]
    for row in rows:
        head = f"{row.finding.status:<11}  {row.finding.name:<{width}}  "
        text = f"{row.where}: {row.finding.found}" if row.where else row.finding.found
        if row.same_elsewhere:
            text += f" (on {ranks_text(row.ranks)}; ok on {row.same_elsewhere} more, with other values)"
        wrapped = textwrap.wrap(text, max(40, _WIDTH - len(head)), break_long_words=False, break_on_hyphens=False)
        lines += [(head if i == 0 else " " * len(head)) + line for i, line in enumerate(wrapped or [""])]
        if row.finding.remedy:
            lines.append(" " * len(head) + "-> " + row.finding.remedy)
    counts = {s: sum(row.finding.status == s for row in rows) for s in statuses}
    return "\n".join([*lines, ", ".join(f"{n} {_plural(status, n)}" for status, n in counts.items())])


def as_json(title: str, rows: Sequence[Row], measured: dict[str, Any] | None = None) -> str:
    """``measured``: figures behind the findings, in SI units."""
    findings = [{**asdict(row.finding), "ranks": list(row.ranks), "where": row.where} for row in rows]
    return json.dumps(
        {"title": title, "failed": failed(rows), "findings": findings, "measured": measured or {}}, indent=2
    )


def _plural(status: str, n: int) -> str:
    return f"{status}s" if status == WARNING and n != 1 else status


def _where(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """ "ranks 0-3 on node1, rank 8 on node3"."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    return ", ".join(f"{ranks_text(members)} on {node}" for node, members in by_node.items())


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3" or "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
