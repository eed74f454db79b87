"""What ``convergence.py`` has found, as tables and as a picture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any


@dataclass
class Variant:
    """``by_rates``: loss of the first seed at each (rate, multiple outside the blocks), None if it diverged;
    ``losses``: of all seeds at the best."""

    name: str
    options: dict[str, Any]
    trained: int
    best: tuple[float, float]
    by_rates: dict[tuple[float, float], float | None]
    losses: list[float] = field(default_factory=list)

    @property
    def by_rate(self) -> dict[float, float]:
        """Loss at the best multiple of those that were run with the rate."""
        found: dict[float, float] = {}
        for (lr, _), x in self.by_rates.items():
            if x is not None:
                found[lr] = min(x, found.get(lr, x))
        return found

    @property
    def by_multiple(self) -> dict[float, float]:
        """Loss at the best rate."""
        return {outside: x for (lr, outside), x in self.by_rates.items() if lr == self.best[0] and x is not None}


def variants(results: Iterable[dict[str, Any]], names: Mapping[str, str]) -> dict[str, list[Variant]]:
    """Shape, data, tokens and, where it is not the usual one, batch -> variants, in the order in which they were run.
    ``names``: options as JSON -> name."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for r in results:
        batch = f", {r['batch']} sequences a step" if "batch" in r else ""
        place = f"{r['shape']}, {Path(r['data']).name}, {r['tokens']:,} tokens{batch}"
        found.setdefault(place, {}).setdefault(json.dumps(options_of(r), sort_keys=True), []).append(r)
    return {
        place: [_variant(names.get(options, options), runs) for options, runs in by_options.items()]
        for place, by_options in found.items()
    }


def options_of(run: dict[str, Any]) -> dict[str, Any]:
    """The variant that was run, without its rates."""
    return {k: v for k, v in run["options"].items() if k != "outside"}


def rates_of(run: dict[str, Any]) -> tuple[float, float]:
    """Its rate in the matrices of the blocks, and the rest's as a multiple of it."""
    return run["lr"], float(run["options"].get("outside", 1))


def _variant(name: str, runs: list[dict[str, Any]]) -> Variant:
    seed = min(r["seed"] for r in runs)
    first = {rates_of(r): r["held_out_loss"] for r in runs if r["seed"] == seed}
    # Where the other seeds were run; until then, the best so far.
    seeds = Counter(rates_of(r) for r in runs)
    most = max(seeds.values())
    chosen = [rates for rates in first if seeds[rates] == most]
    best = min(chosen, key=lambda rates: math.inf if first[rates] is None else first[rates])
    losses = [r["held_out_loss"] for r in runs if rates_of(r) == best and r["held_out_loss"] is not None]
    return Variant(name, options_of(runs[0]), runs[0]["trained"], best, dict(sorted(first.items())), losses)


def table(results: Iterable[dict[str, Any]], names: Mapping[str, str]) -> str:
    """Mean and standard deviation over the seeds at the best rates (of the first seed), and the loss around them."""
    lines = []
    for place, found in variants(results, names).items():
        lines += [f"\n{place}\n"]
        lines += ["| | held-out loss | rate | outside | trained | by rate | by multiple outside |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for v in found:
            spread = f" ± {stdev(v.losses):.4f} ({len(v.losses)})" if len(v.losses) > 1 else ""
            shown = f"{mean(v.losses):.4f}{spread}" if v.losses else "diverged"
            cells = [v.name, shown, f"{v.best[0]:g}", f"x {v.best[1]:g}", f"{v.trained:,}"]
            cells += [", ".join(f"{k:g}: {x:.3f}" for k, x in line.items()) for line in (v.by_rate, v.by_multiple)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: Iterable[dict[str, Any]], names: Mapping[str, str], out: Path) -> None:
    """For each budget with several seeds: the loss by learning rate, and by the number of trained parameters."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    budgets = {
        place: [v for v in found if len(v.losses) > 1 and v.name.startswith("methods: ")]
        for place, found in variants(results, names).items()
    }
    budgets = {place: found for place, found in budgets.items() if found}
    colours = dict(
        zip(dict.fromkeys(v.name for found in budgets.values() for v in found), colormaps["tab20"].colors, strict=False)
    )
    figure = Figure(figsize=(13, 4.5 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 2, squeeze=False)
    for (by_rate, by_size), (place, found) in zip(panels, budgets.items(), strict=True):
        for v in found:
            shown = {
                "label": v.name.removeprefix("methods: "),
                "color": colours[v.name],
                "marker": "o",
                "markersize": 4,
            }
            by_rate.plot(list(v.by_rate), list(v.by_rate.values()), **shown)
            by_size.errorbar(v.trained / 1e6, mean(v.losses), yerr=stdev(v.losses), linestyle="", **shown)
        low = min(mean(v.losses) for v in found)
        by_rate.set(
            xscale="log", ylim=(low - 0.05, low + 0.5), xlabel="learning rate", ylabel="held-out loss, first seed"
        )
        by_size.set(xlabel="trained parameters, millions", ylabel="held-out loss, mean over seeds")
        by_rate.set_title(place)
        by_size.legend(fontsize=7)
    figure.savefig(out)


def frontier(found: Mapping[str, list[tuple[Variant, dict[str, int]]]], out: Path) -> str:
    """Loss against what a method holds. ``found``: for each place, variants with their bytes ("states", "kept").
    Returns the tables."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 2, squeeze=False, sharey="row")
    lines = []
    for panels, (place, variants_there) in zip(rows, found.items(), strict=True):
        lines += [f"\n{place}\n", "| | held-out loss | states, MB | kept for backward, MB |", "|---|---|---|---|"]
        for v, held in sorted(variants_there, key=lambda pair: mean(pair[0].losses)):
            spread = stdev(v.losses) if len(v.losses) > 1 else 0.0
            name = v.name.partition(": ")[2] or v.name
            if v.options["method"] == "rso" and not name.startswith("RSO"):
                name = f"RSO, {name}"
            states, kept = held["states"] / 1e6, held["kept"] / 1e6
            for panel, size in zip(panels, (states, states + kept), strict=True):
                panel.errorbar(size, mean(v.losses), yerr=spread, fmt="o", markersize=4)
                panel.annotate(name, (size, mean(v.losses)), xytext=(4, 4), textcoords="offset points", fontsize=7)
            lines.append(
                f"| {name} | {mean(v.losses):.3f} ± {spread:.3f} ({len(v.losses)}) | {states:.1f} | {kept:.1f} |"
            )
        for panel in panels:
            panel.margins(x=0.2)
        panels[0].set(xlabel="weights, gradients, optimizer state, P, MB", ylabel="held-out loss", title=place)
        panels[1].set(xlabel="the same and what is kept for backward, MB")
    figure.savefig(out)
    return "\n".join(lines)
