"""Which cases of a table the quick suite runs; the rest is marked ``exhaustive`` (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(names: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """``names`` (strings or tuples), for ``pytest.mark.parametrize``: only ``chosen`` are in the quick suite.

    Raises ``ValueError`` for a chosen name that there is not.
    """
    names = list(names)
    if unknown := set(chosen) - set(names):
        raise ValueError(f"no such cases: {sorted(map(str, unknown))}")
    return [
        pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=() if name in chosen else EXHAUSTIVE)
        for name in names
    ]


EXHAUSTIVE = pytest.mark.exhaustive
