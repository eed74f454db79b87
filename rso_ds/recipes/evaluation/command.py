"""``rso-ds evaluate``: its flags, and the waiting for checkpoints."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rso_ds.errors import RSOConfigError, RSOError

if TYPE_CHECKING:
    from rso_ds.recipes.evaluation.evaluator import Evaluator

POLL_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of launch/train.py")
    parser.add_argument("--follow", action="store_true", help="wait for further checkpoints, up to the run's last step")
    parser.add_argument(
        "--patience", type=float, default=7200.0, metavar="SECONDS",
        help="with --follow: end with an error after so long without a new checkpoint [7200]",
    )  # fmt: skip
    parser.add_argument("--micro-batch", type=int, help="sequences a forward pass [as the run, else 16]")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the run's model brings with it"
    )
    parser.add_argument("--eval-tokens", type=int, help="at most so many held-out tokens [as the run itself]")


def run(args: argparse.Namespace) -> str:
    """Evaluate what is new in ``args.run``; returns what to print at the end.

    Raises ``RSOConfigError`` for a folder that is no run, ``RSOCheckpointError`` for a damaged checkpoint or one of
    other data than are there now, ``RSOError`` when ``--patience`` is at its end.
    """
    from rso_ds.recipes.evaluation.evaluator import (
        Evaluator,  # transformers take seconds, which no other command should wait for
    )

    for flag in ("micro_batch", "eval_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise RSOConfigError(f"--{flag.replace('_', '-')} must be an integer of at least 1, got {value}.")
    last_news = time.monotonic()
    evaluator: Evaluator | None = None
    while True:
        if evaluator is None and (args.run / "config.yaml").is_file():
            evaluator = Evaluator(args.run, args.micro_batch, args.eval_tokens, args.trust_remote_code)
        if evaluator is not None and evaluator.evaluate_new():
            last_news = time.monotonic()
        if not args.follow or (evaluator is not None and evaluator.complete):
            break
        if time.monotonic() - last_news > args.patience:
            raise RSOError(
                f"{args.run / 'checkpoints'}: no new checkpoint for {args.patience:g} s, and the run's last step is not"
                " among those that are there. Look whether it still trains; --patience waits longer."
            )
        time.sleep(POLL_SECONDS)
    if evaluator is None:
        raise RSOConfigError(f"{args.run / 'config.yaml'} does not exist: name the output folder of launch/train.py.")
    return evaluator.summary()
