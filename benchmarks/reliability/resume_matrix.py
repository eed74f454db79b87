"""How exactly runs go on from a checkpoint: same ranks, other ranks, other ZeRO stage, other engine.

    python benchmarks/reliability/resume_matrix.py --json resume_matrix.json

Runs the cases of tests/checkpoint/test_resume.py (13 steps, an interval of 3, saved after step 7 in the middle of a
subspace, two and four gloo ranks, new processes to continue) and prints the largest differences of losses and weights
from the uninterrupted run as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS))

from cases.resume_cases import CHAINS, CROSSINGS, SAVE, WORLDS, four_rank_cases, two_rank_cases
from support.environment import prepare
from support.ranks import Pools
from support.resumed_runs import Runs

prepare()


def difference(straight: dict[str, Any], losses: list[float], weights: dict[str, Any]) -> dict[str, float]:
    tail = straight["losses"][-len(losses) :]
    gaps = [(w.double() - weights[n].double()).abs().max().item() for n, w in straight["weights"].items()]
    return {"loss": max(abs(a - b) for a, b in zip(tail, losses, strict=True)), "weight": max(gaps)}


def matrix(runs: Runs) -> dict[str, dict[str, float]]:
    """Row -> largest absolute differences of loss and of weights."""
    rows = {}
    for cases, ranks in ((two_rank_cases(), 2), (four_rank_cases(), 4)):
        for name in cases:
            resumed = runs.resumed(name)
            rows[f"{name}, {ranks} ranks"] = difference(runs.saved(name), resumed["losses"], resumed["weights"])
    for source, target in CROSSINGS:
        resumed = runs.resumed(source, target)
        row = f"{source} -> {target}, 2 ranks"
        rows[row] = difference(runs.saved(source), resumed["losses"], resumed["weights"])
    for chain, engines in CHAINS.items():
        parts = runs.chain(chain)
        losses = [loss for part in parts for loss in part["losses"]]
        name = " -> ".join(f"{engine}@{ranks}" for engine, ranks in zip(engines, WORLDS, strict=True))
        rows[name] = difference(runs.saved("zero1"), losses, parts[-1]["weights"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pools = Pools(Path(folder))
        rows = matrix(Runs(pools))
        pools.close()
    print(f"\n| saved after step {SAVE} by, continued by | loss | weight |\n|---|---|---|")
    for name, gap in rows.items():
        print(f"| {name} | " + " | ".join(f"{gap[k]:.1e}" if gap[k] else "0" for k in ("loss", "weight")) + " |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
