"""Several ``--data`` with weights: ``--data books:0.7 --data web:0.3``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rso_ds.errors import RSOConfigError


def names_and_weights(data: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """What each ``--data`` names, and the share of each; None where no weight is given.

    Only of several a number behind the last colon is a weight: of one it may be the subset of a hub dataset. Raises
    ``RSOConfigError`` if some have a weight and some have none, for a weight that is not above 0, and for a name that
    is there twice.
    """
    if len(data) == 1:
        return [data[0]], None
    names, weights = [], []
    for item in data:
        name, _, last = item.rpartition(":")
        weight = _number(last) if name and not Path(item).exists() else None
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise RSOConfigError(f"--data {item}: a weight must be a number above 0.")
        names.append(item if weight is None else name)
        weights.append(weight)
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise RSOConfigError(f"--data {double} is there twice: give it once, with a larger weight.")
    given = [w for w in weights if w is not None]
    if given and len(given) < len(weights):
        without = data[weights.index(None)]
        raise RSOConfigError(
            f"--data {without} has no weight, and others have: write {without}:1, say, or none at all."
        )
    return names, [w / sum(given) for w in given] if given else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
