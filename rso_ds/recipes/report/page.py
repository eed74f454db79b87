"""The pictures and the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rso_ds.errors import RSOError
from rso_ds.recipes.report.runs import Run
from rso_ds.units import GIB, MB

# Okabe and Ito's colours, told apart in any colour vision, the hardest to see on white left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>rso-ds report</title><style>
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1em 0}
td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right;vertical-align:top}
td:first-child,th:first-child{text-align:left}thead th{border-bottom:2px solid #444}</style>"""


def write_report(runs: Sequence[Run], output: Path) -> None:
    """Write ``output``, .html (pictures inside, no network) or .png.

    Raises ``RSOError`` for another ending, a missing matplotlib, and a file that cannot be written.
    """
    if output.suffix not in (".html", ".png"):
        raise RSOError(f"--output {output} must end in .html or .png.")
    picture = _draw(runs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".png":
            output.write_bytes(picture)
        else:
            output.write_text(_page(runs, picture), encoding="utf-8")
    except OSError as error:
        raise RSOError(f"--output {output} cannot be written: {error.strerror}.") from None


def _draw(runs: Sequence[Run]) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RSOError("rso-ds report draws with matplotlib: pip install 'rso_ds[plot]'.") from None
    figure = Figure(figsize=(13, 11), layout="constrained")
    grid = figure.subplots(3, 3)
    _losses(grid[0][0], runs, "tokens trained on", lambda run: run.tokens, 1)
    _losses(grid[0][1], runs, "seconds of training", lambda run: run.seconds, 1)
    _losses(grid[0][2], runs, "MB sent by rank 0", lambda run: run.sent, MB)
    _bars(grid[1][0], runs, "peak memory of rank 0, GiB", [_scaled(run.peak_memory, GIB) for run in runs])
    _bars(grid[1][1], runs, "tokens a second, median", [run.tokens_per_second for run in runs])
    _bars(grid[1][2], runs, "MB sent a step by rank 0", [_scaled(run.bytes_per_step, MB) for run in runs])
    _curves(grid[2][0], runs, "held-out loss", lambda run: run.held_out)
    _curves(grid[2][1], runs, "size of merges, ||B Pᵀ|| / ||W||", lambda run: run.merge_ratio, log=True)
    _curves(grid[2][2], runs, "gradient norm in the subspace", lambda run: run.gradient, log=True)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _losses(axes: Any, runs: Sequence[Run], label: str, where: Callable[[Run], dict[int, float]], unit: float) -> None:
    """Training loss as a thin line, held-out loss as points."""
    drawn = False
    for i, run in enumerate(runs):
        colour, place = _COLOURS[i % len(_COLOURS)], where(run)
        points = [(place[step] / unit, loss) for step, loss in run.loss if step in place]
        axes.plot(*_xy(points), color=colour, lw=1, alpha=0.75, label=run.name)
        held_out = [(place[step] / unit, loss) for step, loss in run.held_out if step in place]
        axes.plot(*_xy(held_out), color=colour, lw=0, marker="o", ms=4)
        drawn = drawn or any(x for x, _ in points)
    _finish(axes, "loss (points: held out)", label, drawn)


def _curves(
    axes: Any, runs: Sequence[Run], label: str, curve: Callable[[Run], list[tuple[int, float]]], log: bool = False
) -> None:
    drawn = False
    for i, run in enumerate(runs):
        points = curve(run)
        axes.plot(*_xy(points), color=_COLOURS[i % len(_COLOURS)], lw=1.3, marker="." if len(points) < 40 else None)
        drawn = drawn or bool(points)
    if log and drawn:
        axes.set_yscale("log")
    _finish(axes, label, "optimizer step", drawn)


def _bars(axes: Any, runs: Sequence[Run], label: str, values: Sequence[float | None]) -> None:
    known = [value or 0.0 for value in values]
    bars = axes.bar(range(len(runs)), known, color=[_COLOURS[i % len(_COLOURS)] for i in range(len(runs))], width=0.7)
    axes.bar_label(bars, ["" if value is None else _short(value) for value in values], padding=2, fontsize=9)
    axes.margins(y=0.15)
    axes.set_xticks([])
    _finish(axes, label, "", any(known))


def _finish(axes: Any, title: str, label: str, drawn: bool) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(label, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn and label:
        axes.locator_params(axis="x", nbins=6)
    if drawn:
        axes.grid(alpha=0.25)
    else:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color="#888")
        axes.set_xticks([])
        axes.set_yticks([])


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of cells, the first with the names of the runs; facts that no run has are left out."""
    rows: list[tuple[str, Callable[[Run], str | None]]] = []
    for key in dict.fromkeys(key for run in runs for key in run.facts):
        rows.append((key, lambda run, key=key: run.facts.get(key)))  # type: ignore[misc]
    rows += [
        ("steps", lambda run: f"{max(step for step, _ in run.loss):,}"),
        ("training loss, last", lambda run: f"{run.loss[-1][1]:.4f}"),
        ("held-out loss, last", lambda run: f"{run.held_out[-1][1]:.4f}" if run.held_out else None),
        ("held-out loss, best", lambda run: f"{min(x for _, x in run.held_out):.4f}" if run.held_out else None),
        ("tokens", lambda run: f"{max(run.tokens.values()):,.0f}" if run.tokens else None),
        ("seconds of training", lambda run: f"{max(run.seconds.values()):,.1f}" if run.seconds else None),
        ("tokens a second, median", lambda run: _shown(run.tokens_per_second, 1, ",.0f")),
        ("MB sent a step", lambda run: _shown(run.bytes_per_step, MB, ",.3f")),
        ("peak memory, GiB", lambda run: _shown(run.peak_memory, GIB, ".3f")),
    ]
    cells = [["", *(run.name for run in runs)]]
    for label, value in rows:
        found = [value(run) for run in runs]
        if any(cell is not None for cell in found):
            cells.append([label, *(cell or "-" for cell in found)])
    return cells


def _shown(value: float | None, unit: float, how: str) -> str | None:
    return None if value is None else format(value / unit, how)


def _page(runs: Sequence[Run], picture: bytes) -> str:
    first, *rest = table(runs)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in first)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    image = base64.b64encode(picture).decode()
    return (
        f"{_HEAD}<h1>{len(runs)} run{'s' if len(runs) > 1 else ''}</h1>"
        f'<img alt="losses, memory, speed and bytes" src="data:image/png;base64,{image}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "<p>Training loss as it was logged, the mean of the steps since the line before, without further smoothing."
        " Seconds leave evaluations and saves out. Bytes are payload of rank 0's collectives, without evaluations.</p>"
    )
