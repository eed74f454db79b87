"""One of two ranks differs: what ``TrainRanks`` does before a rank starts, by ``before="support.divergence:NAME"``.

Each takes the flags of ``launch/train.py`` and returns those with which this rank is started.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

SLOW = 6.0  # seconds that slow work takes, beyond a --timeout of 3


def _odd() -> bool:
    return os.environ["RANK"] == "1"


def _with(argv: list[str], flag: str, value: str) -> list[str]:
    return [*argv, flag, value]  # the last one counts


def other_output(argv: list[str]) -> list[str]:
    """A disk of its own, on which the checkpoints of the others are not."""
    output = argv[argv.index("--output") + 1]
    return _with(argv, "--output", f"{output}-elsewhere") if _odd() else argv


def longer_data(argv: list[str]) -> list[str]:
    if not _odd():
        return argv
    data = Path(argv[argv.index("--data") + 1])
    other = data.with_name("other.txt")
    other.write_text(data.read_text() + "ten more bottles\n" * 600)
    return [*_with(argv, "--data", str(other)), "--cache", f"{argv[argv.index('--cache') + 1]}-of-its-own"]


def own_node(argv: list[str]) -> list[str]:
    """``longer_data`` on another node: each of the two prepares its own."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return longer_data(argv)


def slow_preparation(argv: list[str]) -> list[str]:
    import rso_ds.recipes.training.data as data

    inner = data.load_tokenizer

    def slow(*args: Any, **kwargs: Any) -> Any:
        if not _odd():
            time.sleep(SLOW)
        return inner(*args, **kwargs)

    data.load_tokenizer = slow
    return argv


def slow_end(argv: list[str]) -> list[str]:
    import rso_ds.recipes.training.loop as loop

    inner = loop.sample

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW)
        return inner(*args, **kwargs)

    loop.sample = slow
    return argv


def dies_preparing(argv: list[str]) -> list[str]:
    import rso_ds.recipes.training.data as data

    def die(*_: Any, **__: Any) -> Any:
        os._exit(9)

    if not _odd():
        data.load_tokenizer = die
    return argv


def dies_on_another_node(argv: list[str]) -> list[str]:
    """Rank 1 prepares the data of its own node, and dies; the store that tells of it stays."""
    import rso_ds.recipes.training.data as data

    def die(*_: Any, **__: Any) -> Any:
        os._exit(9)

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if _odd():
        data.load_tokenizer = die
    return argv


def poisoned_before_a_save(argv: list[str]) -> list[str]:
    """Rank 1's loss is NaN in the step after which a checkpoint is due; each step has one micro batch of a rank."""
    from rso_ds.recipes.training.loop import Job

    inner, taken = Job._train_step, [0]

    def step(job: Job, number: int) -> float:
        taken[0] += 1
        forward = job._forward
        if _odd() and taken[0] == 6:
            job._forward = lambda micro: forward(micro) * float("nan")  # type: ignore[method-assign]
        try:
            return inner(job, number)
        finally:
            job._forward = forward  # type: ignore[method-assign]

    Job._train_step = step  # type: ignore[method-assign]
    return argv


def cannot_write(argv: list[str]) -> list[str]:
    """Rank 0, which writes the run's settings, finds a file where the folder is to be."""
    output = Path(argv[argv.index("--output") + 1])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("in the way")
    return argv
