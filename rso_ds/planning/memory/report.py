"""Accounts as text, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rso_ds.errors import RSOConfigError
from rso_ds.planning.memory.account import CARDS, FRAGMENTATION, GIB, RESERVE, Account

Largest = dict[str, tuple[int, int]]


def text_report(title: str, accounts: Sequence[Account], largest: Largest, limit: int | None = None) -> str:
    """The table that ``rso-ds memory`` prints: the first account line by line, all of them in total. ``limit``: of the
    model's positions, if it has one."""
    first = accounts[0]
    lines = [title, "", f"{first.method}, one rank, GiB on the device{_on_host(first.host)}"]
    for name, size in first.device.items():
        host = first.host.get(name, 0)
        if size or host:
            lines.append(f"  {name:<50} {_gib(size)}" + (f"   {_gib(host)}" if any(first.host.values()) else ""))
    if first.activations:
        lines.append(f"  {'activations':<50} {_gib(sum(first.activations.values()))}")
        lines += [f"    {name:<48} {_gib(size)}" for name, size in first.activations.items()]
    lines += _phase_lines(first)
    lines += [
        f"  {_total_name(first):<50} {_gib(first.total)}",
        f"  {f'with {FRAGMENTATION:.0%} fragmentation and {RESERVE / GIB:.0f} GiB reserve':<50} {_gib(first.needed)}",
        "",
        f"{'':<10} {'weights':>9} {'B, P':>9} {'gradients':>9} {'solver':>9} {'buffers':>9} {'activat.':>9}"
        f" {'total':>9} {'host':>9}   fits in",
    ]
    for account in accounts:
        d = account.device
        if not d:
            continue
        groups = (
            d["weights"], d["B or adapters"] + d["P"], d["gradients"], d["solver state"] + d["fp32 masters"],
            d["communication"], sum(account.activations.values()), account.total, account.host_total,
        )  # fmt: skip
        fits = ", ".join(card for card, ok in account.fits().items() if ok) or "none of " + ", ".join(CARDS)
        lines.append(f"{account.method:<10} " + " ".join(_gib(g) for g in groups) + f"   {fits}")
    lines += [f"  {a.method}: {a.note}" for a in accounts if a.note]
    for card, (batch, seq) in largest.items():
        lines.append(f"  {first.method} in {card}: micro batch up to {batch:,}, or sequences up to {seq:,}")
    if limit is not None and any(seq > limit // 64 * 64 - 64 for _, seq in largest.values()):
        lines.append(f"  (the model has {limit:,} positions, and no sequence can be longer)")
    for account in accounts:
        lines += [f"  NOT COUNTED {reason}" for reason in account.missing]
    return "\n".join(lines)


def json_report(title: str, accounts: Sequence[Account], largest: Largest) -> dict[str, Any]:
    """The same as plain types, in bytes."""
    return {
        "run": title,
        "accounts": [a.to_dict() for a in accounts],
        "largest": {card: {"micro_batch": b, "seq_len": s} for card, (b, s) in largest.items()},
    }


def plot(path: Path, title: str, accounts: Sequence[Account]) -> None:
    """Stacked bars, one for each account, with lines at the sizes of cards. Needs the extra ``plot``."""
    accounts = [a for a in accounts if a.device]
    if not accounts:
        raise RSOConfigError("--plot: nothing could be counted, so there is nothing to draw.")
    try:
        import matplotlib
    except ImportError:
        raise RSOConfigError("--plot needs matplotlib: pip install 'rso_ds[plot]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(accounts), 5), layout="constrained")
    names = [a.method for a in accounts]
    bottom = [0.0] * len(accounts)
    for part in (*accounts[0].device, "activations"):
        heights = [(sum(a.activations.values()) if part == "activations" else a.device.get(part, 0)) for a in accounts]
        if any(heights):
            axes.bar(names, [h / GIB for h in heights], bottom=bottom, label=part, width=0.6)
            bottom = [b + h / GIB for b, h in zip(bottom, heights, strict=True)]
    for card, size in CARDS.items():
        usable = (size - RESERVE) / (1 + FRAGMENTATION) / GIB
        if usable < 1.3 * max(bottom):
            axes.axhline(usable, color="grey", linewidth=0.8, linestyle="--")
            axes.text(-0.45, usable, f"{card} card", va="bottom", fontsize=8, color="grey")
    axes.set_ylabel("GiB a rank")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RSOConfigError(f"--plot {path} cannot be written: {error}") from None
    pyplot.close(figure)


def _phase_lines(account: Account) -> list[str]:
    if not account.phases:
        return []
    lines = [f"  {'the most at once, in each phase of a run':<50} {'device':>9}   {'host':>9}"]
    return lines + [f"    {name:<48} {_gib(p.device)}   {_gib(p.host)}" for name, p in account.phases.items()]


def _total_name(account: Account) -> str:
    return f"total: {account.largest_phase}, the largest" if account.phases else "total"


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f}"


def _on_host(host: dict[str, int]) -> str:
    return " and (second column) in host memory" if any(host.values()) else ""
