"""The largest size that fits, by bisection on the account itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

CLOSE = 0.01  # of an answer: a size that fits is the largest if one that is so much larger does not


def largest(
    need: Callable[[int], int], cards: Sequence[int], start: int, unit: int = 1, limit: int | None = None
) -> list[int]:
    """For each of ``cards`` (bytes) a multiple of ``unit``, at most ``limit``, of which ``need`` (bytes, growing) fits:
    the largest, to within ``CLOSE``; 0 where none does. ``start``: a size to begin with.

    Every answer has been counted, and so has a size just above it that does not fit. Between the two that are known a
    line says where to look next, since what grows with the square of a size is nearly straight over a short way.
    """
    counted = cache(lambda units: need(units * unit))
    bound = None if limit is None else limit // unit
    known = sorted({1, max(1, min(start // unit, bound or start))})
    for units in known:
        counted(units)
    found = []
    for card in cards:
        fits = max((n for n in known if counted(n) <= card), default=0)
        while fits:
            above = min((n for n in known if counted(n) > card), default=None)
            if fits == bound or (above is not None and above - fits <= max(1, CLOSE * fits)):
                break
            units = _next(counted, known, fits, above, card)
            units = units if bound is None else min(units, bound)
            known = sorted({*known, units})
            if counted(units) <= card:
                fits = units
        found.append(fits * unit)
    return found


def _next(counted: Callable[[int], int], known: Sequence[int], fits: int, above: int | None, card: int) -> int:
    """A size strictly between ``fits`` and ``above``, or above ``fits``, by the line through two known points."""
    other = above if above is not None else max((n for n in known if n < fits), default=None)
    if other is None:
        return 2 * fits
    slope = (counted(other) - counted(fits)) / (other - fits)
    guess = fits + (card - counted(fits)) / slope if slope > 0 else 2 * fits
    step = max(1, int(CLOSE * fits))
    if above is None:
        return min(max(fits + step, int(guess)), 16 * fits)
    # Beside the answer as the line sees it, so that the next size closes the bracket from the other side.
    near = int(guess) if guess - fits >= step else fits + step
    return min(max(fits + 1, near), above - 1)
