"""Bytes per step and rank, counted at the collectives and beside the closed form, for every engine and method.

    python benchmarks/network/comm_bytes.py --ranks 2 4 --json comm_bytes.json

Starts real gloo ranks on this machine; with four, ranks 0-1 and 2-3 count as two nodes. The model is the
llama-9m shape with a vocabulary of 4096, one sequence of 16 tokens a rank (bytes do not depend on tokens).
Rows whose package is not installed (galore-torch) say so. Prints Markdown.
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

from cases.comm_cases import full_cases
from support.environment import prepare
from support.ranks import CaseFailed, Cases, Pools

prepare()


def count(ranks: int, only: str) -> dict[str, dict[str, Any]]:
    """Case name -> measured, predicted and inter-node payload bytes a step, or "error"."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pools = Pools(Path(folder))
        cases = Cases(pools, "comm_bytes", ranks)
        for name in full_cases(ranks):
            if only in name:
                try:
                    found[name] = cases[name]
                except CaseFailed as failed:
                    found[name] = {"error": str(failed)}
        pools.close()
    return found


def row(name: str, got: dict[str, Any]) -> str:
    where, what = name.split(" | ")
    if "error" in got:
        return f"| {where} | {what} | {got['error'].strip().splitlines()[-1]} |" + " |" * 4
    kinds = ("gradient", "weights", "boundary")
    equal = "yes" if got["measured"] == got["predicted"] else f"predicted {got['predicted']}"
    figures = " | ".join(f"{got['measured'][k]:,.0f}" for k in kinds)
    return f"| {where} | {what} | {figures} | {sum(got['inter_node'].values()):,.0f} | {equal} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=(2, 4))
    parser.add_argument("--only", default="", help="only rows that contain this text")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    everything = {}
    for ranks in args.ranks:
        found = everything[ranks] = count(ranks, args.only)
        print(f"\n{ranks} ranks, payload bytes a rank and step\n")
        print("| engine | method | gradients | weights | boundary | between nodes | equals the closed form |")
        print("|---|---|---|---|---|---|---|")
        for name, got in found.items():
            print(row(name, got))
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
