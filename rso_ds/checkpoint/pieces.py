"""A tensor as the ranks of any engine hold it: intervals of its elements, saved under its own name and shape.

DDP holds tensors whole, FSDP2 rows of them, ZeRO-1 to 3 any interval of the flattened tensor. All of these are
``Piece``s. ``torch.distributed.checkpoint`` stores boxes of n-dimensional tensors, and an interval of a matrix
is at most three of them, so that a checkpoint written by one engine is read by any other, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # (offsets, sizes)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + flat.numel()) of a tensor of ``shape``, flattened; ``flat`` is the memory itself."""

    shape: tuple[int, ...]
    start: int
    flat: Tensor

    def boxes(self) -> list[Box]:
        return list(boxes(self.shape, self.start, self.start + self.flat.numel()))

    def tensors(self) -> list[Tensor]:
        """The memory of each of ``boxes``, in its shape."""
        views, at = [], 0
        for _, sizes in self.boxes():
            size = math.prod(sizes)
            views.append(self.flat[at : at + size].view(sizes))
            at += size
        return views


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements [start, stop) of a flattened tensor of ``shape`` as boxes, in the order of the elements."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    top, bottom = -(-start // inner), stop // inner
    if start % inner:
        row = start // inner
        yield from _inside(row, boxes(shape[1:], start % inner, min(inner, stop - row * inner)))
    if bottom > top:
        yield (top, *(0,) * (len(shape) - 1)), (bottom - top, *shape[1:])
    if stop % inner and bottom >= top:
        yield from _inside(bottom, boxes(shape[1:], 0, stop % inner))


def _inside(row: int, parts: Iterator[Box]) -> Iterator[Box]:
    for offsets, sizes in parts:
        yield (row, *offsets), (1, *sizes)
