"""How exactly runs go on from a checkpoint: same ranks, other ranks, other ZeRO stage, other engine.

    python benchmarks/reliability/resume_matrix.py --json resume_matrix.json

Runs the cases of tests/checkpoint/test_resume.py (13 steps, an interval of 3, saved after step 7 in the
middle of a subspace, two and four gloo ranks, new processes to continue) and prints the largest differences of losses
and weights from the
uninterrupted run as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS))

from cases.resume_cases import CHAINS, CROSSINGS, SAVE, four_rank_cases, two_rank_cases
from support.environment import prepare
from support.ranks import run_ranks

prepare()
PHASES = {"first": 1, "save": 2, "resume": 2, "save4": 4, "resume4": 4, "last": 1}


def difference(straight: dict[str, Any], losses: list[float], weights: dict[str, Any]) -> dict[str, float]:
    tail = straight["losses"][-len(losses) :]
    gaps = [(w.double() - weights[n].double()).abs().max().item() for n, w in straight["weights"].items()]
    return {"loss": max(abs(a - b) for a, b in zip(tail, losses, strict=True)), "weight": max(gaps)}


def matrix(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Row -> largest absolute differences of loss and of weights."""
    rows = {}
    for name in (*two_rank_cases(), *four_rank_cases()):
        saving, resuming = ("save", "resume") if name in found["save"] else ("save4", "resume4")
        resumed = found[resuming][name]
        rows[f"{name}, {PHASES[saving]} ranks"] = difference(found[saving][name], resumed["losses"], resumed["weights"])
    for source, target in CROSSINGS:
        resumed = found["resume"][f"{source} -> {target}"]
        rows[f"{source} -> {target}, 2 ranks"] = difference(
            found["save"][source], resumed["losses"], resumed["weights"]
        )
    for chain in CHAINS:
        parts = [found[phase][f"chain {chain}"] for phase in ("first", "save", "save4", "last")]
        losses = [loss for part in parts for loss in part["losses"]]
        name = " -> ".join(f"{engine}@{ranks}" for engine, ranks in zip(CHAINS[chain], (1, 2, 4, 1), strict=True))
        rows[name] = difference(found["save"]["zero1"], losses, parts[-1]["weights"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for phase, ranks in PHASES.items():
            run_ranks("resume", Path(folder), ranks, PHASE=phase)
            found[phase] = torch.load(Path(folder) / f"{phase}.pt", weights_only=False)
    rows = matrix(found)
    print(f"\n| saved after step {SAVE} by, continued by | loss | weight |\n|---|---|---|")
    for name, gap in rows.items():
        print(f"| {name} | " + " | ".join(f"{gap[k]:.1e}" if gap[k] else "0" for k in ("loss", "weight")) + " |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
