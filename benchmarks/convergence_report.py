"""What ``benchmarks/convergence.py`` has found, as tables and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any


@dataclass
class Variant:
    """``by_rate``: loss of the first seed at each rate, None if it diverged; ``losses``: of all seeds at the best."""

    name: str
    trained: int
    best: float
    by_rate: dict[float, float | None]
    losses: list[float] = field(default_factory=list)


def variants(results: Iterable[dict[str, Any]], names: Mapping[str, str]) -> dict[tuple[str, str, int], list[Variant]]:
    """(shape, data, tokens) -> variants, in the order in which they were run. ``names``: options as JSON -> name."""
    found: dict[tuple[str, str, int], dict[str, list[dict[str, Any]]]] = {}
    for r in results:
        place = (r["shape"], Path(r["data"]).name, r["tokens"])
        found.setdefault(place, {}).setdefault(json.dumps(r["options"], sort_keys=True), []).append(r)
    return {
        place: [_variant(names.get(options, options), runs) for options, runs in by_options.items()]
        for place, by_options in found.items()
    }


def _variant(name: str, runs: list[dict[str, Any]]) -> Variant:
    seed = min(r["seed"] for r in runs)
    first = {r["lr"]: r["held_out_loss"] for r in runs if r["seed"] == seed}
    best = min(first, key=lambda lr: math.inf if first[lr] is None else first[lr])
    losses = [r["held_out_loss"] for r in runs if r["lr"] == best and r["held_out_loss"] is not None]
    return Variant(name, runs[0]["trained"], best, dict(sorted(first.items())), losses)


def table(results: Iterable[dict[str, Any]], names: Mapping[str, str]) -> str:
    """Mean and standard deviation over the seeds at the best rate (of the first seed), and the loss at every rate."""
    lines = []
    for (shape, data, tokens), found in variants(results, names).items():
        lines += [f"\n{shape}, {data}, {tokens:,} tokens\n"]
        lines += ["| | held-out loss | lr | trained | loss by rate, first seed |", "|---|---|---|---|---|"]
        for v in found:
            spread = f" ± {stdev(v.losses):.4f} ({len(v.losses)})" if len(v.losses) > 1 else ""
            shown = f"{mean(v.losses):.4f}{spread}" if v.losses else "diverged"
            rates = ", ".join(f"{lr:g}: {'-' if x is None else f'{x:.4f}'}" for lr, x in v.by_rate.items())
            lines.append(f"| {v.name} | {shown} | {v.best:g} | {v.trained:,} | {rates} |")
    return "\n".join(lines)


def picture(results: Iterable[dict[str, Any]], names: Mapping[str, str], out: Path) -> None:
    """For each budget: the loss by learning rate, and the loss by the number of trained parameters."""
    from matplotlib.figure import Figure

    budgets = variants(results, names)
    figure = Figure(figsize=(13, 4.5 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 2, squeeze=False)
    for (by_rate, by_size), ((shape, data, tokens), found) in zip(panels, budgets.items(), strict=True):
        for v in (v for v in found if v.losses and v.name.startswith("methods: ")):
            name = v.name.removeprefix("methods: ")
            rates = {lr: x for lr, x in v.by_rate.items() if x is not None}
            by_rate.plot(list(rates), list(rates.values()), marker="o", markersize=3, label=name)
            spread = stdev(v.losses) if len(v.losses) > 1 else 0.0
            by_size.errorbar(v.trained / 1e6, mean(v.losses), yerr=spread, fmt="o", markersize=4, label=name)
        low = min((mean(v.losses) for v in found if v.losses), default=0.0)
        by_rate.set(
            xscale="log", ylim=(low - 0.05, low + 0.8), xlabel="learning rate", ylabel="held-out loss, first seed"
        )
        by_size.set(xlabel="trained parameters, millions", ylabel="held-out loss, mean over seeds")
        by_rate.set_title(f"{shape}, {data}, {tokens:,} tokens")
        by_size.legend(fontsize=7)
    figure.savefig(out)
