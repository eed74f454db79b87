"""``rso-ds report``: its flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from rso_ds.recipes.report.page import write_report
from rso_ds.recipes.report.runs import load_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of train.py, finetune.py or Trainer")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help=".html or .png [report.html]")


def run(args: argparse.Namespace) -> str:
    """Write the page; returns what to print. Raises ``RSOError``."""
    write_report(load_runs(args.runs), args.output)
    return f"{args.output}: {len(args.runs)} run{'s' if len(args.runs) > 1 else ''}"
