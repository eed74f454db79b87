"""The same pre-training run under several DeepSpeed JSONs and learning rates, one after the other.

    python benchmarks/convergence/pretrain_comparison.py --runs adamw:2e-3 rso:4e-3 --output runs/comparison -- \
        --data ../shared/data/eltec-eng --train-tokens 8000000

RUN is NAME:LR for ds_configs/NAME.json. Everything after -- goes to launch/train.py. Model, data, tokens, seed and
schedule are the same for all runs. Writes OUTPUT/<run>/ (see launch/train.py), and prints and saves OUTPUT/table.md.
A run whose final model exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]


def train(run: str, output: Path, ranks: int, flags: list[str]) -> None:
    name, lr = run.split(":")
    if (output / "model").is_dir():
        return
    output.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "launch/train.py"]
    command += ["--deepspeed", f"ds_configs/{name}.json", "--learning-rate", lr, "--output", str(output)]
    command += ["--save-interval", "0", "--sample-tokens", "0", *flags]
    if name.startswith("rso"):  # one rate for all, as AdamW has
        command += ["--set", "optimizer.params.dense_lr=null"]
    print(" ".join(command), flush=True)
    with open(output / "log.txt", "w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def table(runs: list[str], output: Path) -> str:
    """Held-out loss by tokens, then medians of speed, gradient bytes and peak memory."""
    metrics = {r: [json.loads(x) for x in (output / r.replace(":", "-") / "metrics.jsonl").open()] for r in runs}
    curves = {r: {m["tokens"]: m["val_loss"] for m in ms if "val_loss" in m} for r, ms in metrics.items()}
    lines = ["| tokens | " + " | ".join(runs) + " |", "|" + "---|" * (len(runs) + 1)]
    for tokens in sorted(set.intersection(*(set(c) for c in curves.values()))):
        lines.append(f"| {tokens:,} | " + " | ".join(f"{curves[r][tokens]:.4f}" for r in runs) + " |")
    for key, label, scale in (
        ("tokens_per_second", "tokens/s, median", 1),
        ("comm_bytes", "gradient MB a rank and step", 1e6),
        ("peak_memory_bytes", "peak memory of rank 0, MiB", 2**20),
    ):
        values = [[_number(m[key]) / scale for m in metrics[r] if key in m] for r in runs]
        shown = [max(v) if key == "peak_memory_bytes" else median(v) for v in values]
        lines.append(f"| {label} | " + " | ".join(f"{x:,.2f}" for x in shown) + " |")
    return "\n".join(lines)


def _number(value: float | dict[str, float]) -> float:
    return value["gradient"] if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME:LR")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("flags", nargs="*", help="for launch/train.py, after --")
    args = parser.parse_args()
    for run in args.runs:
        train(run, (args.output / run.replace(":", "-")).resolve(), args.ranks, args.flags)
    text = table(args.runs, args.output)
    (args.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
