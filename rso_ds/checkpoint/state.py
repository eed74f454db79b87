"""The plain part of a checkpoint: ``rso_state.json``, ints, floats and names only.

    format        of this file
    rso           the boundary's: draw index, applied steps, decay since the boundary, seed, sampler, interval, layers
    solver        "adamw", "adam", "sgd", or the class of a solver without RSO
    parameters    name -> [shape, dtype at rest, trainable]
    dense         what becomes of them in the dense model: rso_ds.checkpoint.dense.dense_description
    steps         name -> the solver's step count
    groups        of the solver: lr, betas, momentum, which schedules change
    replicas      copies of the trainable parameters, above 1 where ranks step apart
    ...

P is not stored: it follows from the seed and the draw index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rso_ds.checkpoint.folder import write_text
from rso_ds.errors import RSOCheckpointError

STATE_FILE = "rso_state.json"
FORMAT = 3


def write_state(folder: Path, state: dict[str, Any]) -> None:
    write_text(folder / STATE_FILE, json.dumps({"format": FORMAT, **state}, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """Raises ``RSOCheckpointError`` naming the file if it is missing, damaged or of another format."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise RSOCheckpointError(
            f"{path} does not exist: this is not a checkpoint of an RSO run, or its folder is incomplete."
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RSOCheckpointError(f"{path} is damaged ({error}): restore it or use another checkpoint.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RSOCheckpointError(f"{path} is not of format {FORMAT}: it was written by another version of rso_ds.")
    return state
