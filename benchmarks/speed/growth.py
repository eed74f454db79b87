"""How a step's time and what it keeps grow with sequence length, rank, number of blocks and world size.

    python benchmarks/speed/growth.py run growth.jsonl
    python benchmarks/speed/growth.py picture growth.jsonl growth.svg
    python benchmarks/speed/growth.py table growth.jsonl

Each setting is one start of ``step_time.py``, with everything but one option as in ``COMMON``; settings that
RESULTS holds are not run again. Nothing else should run on the machine. World sizes above the number of cores share
them: what is told there is the share of AdamW's time, not the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ["AdamW", "LoRA", "RSO two-path haar", "RSO folded haar", "RSO folded coordinate"]
COMMON = {"--model": "llama-35m", "--engine": "zero2", "--batch": 2, "--seq-len": 256, "--rounds": 3, "--steps": 5}
RANKS = 2
# What grows -> its option of step_time.py, or of torchrun, and its values.
GROWTH: dict[str, tuple[str, tuple[float, ...]]] = {
    "sequence length": ("--seq-len", (128, 256, 512, 1024)),
    "rank / hidden size": ("--rank-ratio", (1 / 16, 1 / 8, 1 / 4, 1 / 2)),
    "blocks": ("--layers", (2, 4, 6, 12)),
    "ranks": ("--nproc-per-node", (1, 2, 4)),
}


def run(results: Path) -> None:
    done = {(r["grows"], r["value"]) for r in read(results)}
    for grows, (option, values) in GROWTH.items():
        for value in (v for v in values if (grows, v) not in done):
            options = {**COMMON, option: value}
            ranks = options.pop("--nproc-per-node", RANKS)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "step.json")
                told = [str(x) for item in options.items() for x in item]
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
                command += [str(Path(__file__).with_name("step_time.py")), *told, "--json", str(out)]
                command += ["--methods", *METHODS]
                subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
                found = {"grows": grows, "value": value, **json.loads(out.read_text())}
            with open(results, "a") as f:
                f.write(json.dumps(found) + "\n")


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def of_dense(found: dict[str, Any], method: dict[str, Any]) -> float:
    return statistics.median(method["seconds"]) / statistics.median(found["rows"][0]["seconds"])


def table(results: Path) -> str:
    lines = []
    for grows in GROWTH:
        rows = [r for r in read(results) if r["grows"] == grows]
        lines += [f"| {grows} | AdamW, s | " + " | ".join(f"{m}, of AdamW" for m in METHODS[1:]) + " |"]
        lines += ["|" + "---|" * (len(METHODS) + 1)]
        for r in rows:
            times = [f"{statistics.median(r['rows'][0]['seconds']):.3f}"]
            times += [f"{of_dense(r, method):.3f}" for method in r["rows"][1:]]
            lines.append(f"| {r['value']:g} | " + " | ".join(times) + " |")
        lines.append("")
    return "\n".join(lines)


def picture(results: Path, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplots(2, len(GROWTH), squeeze=False)
    for (above, below), grows in zip(panels.T, GROWTH, strict=True):
        rows = [r for r in read(results) if r["grows"] == grows]
        for i, name in enumerate(METHODS):
            values = [r["value"] for r in rows]
            methods = [r["rows"][i] for r in rows]
            quarters = [statistics.quantiles(m["seconds"], n=4) for m in methods]
            (line,) = above.plot(values, [q[1] for q in quarters], marker="o", markersize=3, label=name)
            above.fill_between(
                values, [q[0] for q in quarters], [q[2] for q in quarters], color=line.get_color(), alpha=0.15
            )
            below.plot(values, [m["kept_bytes"] / 1e6 for m in methods], marker="o", markersize=3)
        above.set(xscale="log", ylim=(0, None), ylabel="s a step, median and quartiles")
        below.set(xscale="log", ylim=(0, None), xlabel=grows, ylabel="kept for backward, MB")
        for panel in (above, below):
            panel.set_xticks([r["value"] for r in rows], [f"{r['value']:g}" for r in rows], minor=False)
            panel.minorticks_off()
    panels[0][0].legend(fontsize=8)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "table", "picture"):
        command = commands.add_parser(name)
        command.add_argument("results", type=Path)
        if name == "picture":
            command.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.results)
    elif args.command == "picture":
        picture(args.results, args.out)
    else:
        print(table(args.results))


if __name__ == "__main__":
    main()
