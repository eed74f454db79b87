"""Damage every file of a checkpoint in every way, and see that none of it is loaded.

    python benchmarks/reliability/corruption.py --json corruption.json

For each engine two CPU ranks save a checkpoint, go on, and try to load hundreds of damaged copies of it. Each attempt
must end in an error that names the file (for a manifest of another run: a file that does not fit the manifest), the
same on all ranks, and must leave the model (parameters, solver state, counters; compared by
SHA-256) and the checkpoint's files as they were. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.environment import prepare
from support.ranks import run_ranks

prepare()
ENGINES = {
    "ZeRO-2": ["--deepspeed", "ds_configs/rso_zero2.json"],
    "ZeRO-3": ["--deepspeed", "ds_configs/rso_zero3.json"],
    "DDP": ["--engine", "ddp"],
    "FSDP2": ["--engine", "fsdp2"],
}
LEGITIMATE = ("nothing (control)", "names the intact older checkpoint (legitimate)")


def attempts(engine: list[str], flips: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """What became of every damaged copy; see ``tests/workers/corruption.py``."""
    plan = json.dumps({"engine": engine, "flips": flips, "seed": seed})
    results: list[dict[str, Any]] = run_ranks("corruption", plan, folder)[0]
    return results


def faults(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases that did not end as they must."""
    wrong = []
    for r in results:
        if r["change"] in LEGITIMATE:
            good = r["error"] is None and not r["model_untouched"] and r["checkpoint_untouched"]
        else:
            good = (
                r["error"] is not None and not r["error"].startswith("CRASH") and r["names_the_file"]
                and r["same_words_on_all_ranks"] and r["model_untouched"] and r["checkpoint_untouched"]
            )  # fmt: skip
        if not good:
            wrong.append(r)
    return wrong


def row(name: str, results: list[dict[str, Any]]) -> str:
    damaged = [r for r in results if r["change"] not in LEGITIMATE]
    detected = [r for r in damaged if r["error"] is not None]
    files = {r["file"] for r in damaged}
    return (
        f"| {name} | {len(files)} | {len(damaged)} | {len(detected)} | {len(damaged) - len(detected)}"
        f" | {sum(r['names_the_file'] for r in detected)} | {sum(r['model_untouched'] for r in detected)}"
        f" | {len(faults(results))} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=8, help="random bit flips for each file")
    parser.add_argument("--seed", type=int, default=0, help="of their places")
    parser.add_argument("--json", type=Path, help="also write every case with its message here")
    args = parser.parse_args()
    everything = {}
    print("| engine | names at fault | damaged copies | refused | loaded | file named | model untouched | wrong |")
    print("|---|---|---|---|---|---|---|---|")
    for name, flags in ENGINES.items():
        with tempfile.TemporaryDirectory() as folder:
            everything[name] = attempts(flags, args.flips, args.seed, Path(folder))
        print(row(name, everything[name]), flush=True)
    for name, results in everything.items():
        for r in faults(results):
            print(f"\nWRONG, {name}: {json.dumps(r)}")
    if args.json:
        body = {
            "command": " ".join(["python", "benchmarks/reliability/corruption.py", *sys.argv[1:]]),
            "seed": args.seed,
        }
        args.json.write_text(json.dumps({**body, "cases": everything}, indent=1) + "\n")


if __name__ == "__main__":
    main()
