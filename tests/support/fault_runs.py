"""Runs of the tests of faults: small enough to be started often."""

from __future__ import annotations

import shutil

import faults
from support.train_workspace import Workspace

STEPS, SAVE = 24, 5
ENGINES = {
    "zero2": ["--deepspeed", "ds_configs/rso_zero2.json"],
    "ddp": ["--engine", "ddp"],
}
FLAGS = [*faults.FLAGS, "--max-steps", str(STEPS), "--save-interval", str(SAVE)]


def undisturbed_run(space: Workspace, engine: str) -> faults.Run:
    """A complete run, to compare with."""
    run = faults.Run(space, f"undisturbed-{engine}", [*FLAGS, *ENGINES[engine]])
    ranks = run.start()
    assert ranks.wait() == [0, 0], ranks.text()
    assert "beginning at step 0" in ranks.text(0)
    return run


def same(run: faults.Run, expected: faults.Run) -> bool:
    return run.digest() == expected.digest() and run.losses() == expected.losses()


def copied(run: faults.Run, space: Workspace, name: str, flags: list[str]) -> faults.Run:
    """A run in the state in which ``run`` is, to be resumed."""
    other = faults.Run(space, name, flags)
    shutil.copytree(run.output, other.output)
    return other
