"""RSO's own part of a checkpoint: a small JSON file beside the engine's files.

It holds ints, floats and names only. P is not stored: it follows from the seed and the draw index.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rso_ds.errors import RSOCheckpointError

STATE_FILE = "rso_state.json"
FORMAT = 1


def write_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` into ``folder`` (made if missing) under a temporary name, then rename it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (STATE_FILE + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump({"format": FORMAT, **state}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, folder / STATE_FILE)


def read_state(folder: str | Path) -> dict[str, Any]:
    """Raises ``RSOCheckpointError`` naming the file if it is missing, damaged or of another format."""
    path = Path(folder) / STATE_FILE
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
