"""Which gradients a step has used: those that came later are in no checkpoint.

Programs differ in when they drop gradients, before a backward pass or after the step, so that their being there tells
nothing. What a step has seen carries a mark, which a later backward pass leaves behind: it makes another tensor, or
adds to this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.distributed.tensor import DTensor

from rso_ds.errors import RSOUnsupportedError

UNUSED = (
    "there are gradients of micro batches that no optimizer step has used yet, and gradients are not saved: save after"
    " the step that they make up."
)


def mark_used(params: Iterable[Any]) -> None:
    """A step has used the gradients of ``params``, or skipped them."""
    for grad in _gradients(params):
        grad._rso_used = grad._version


def refuse_unused(params: Iterable[Any]) -> None:
    """Raise ``RSOUnsupportedError`` if ``params`` have gradients that no step has used."""
    for grad in _gradients(params):
        if getattr(grad, "_rso_used", None) != grad._version and bool(grad.any()):
            raise RSOUnsupportedError(UNUSED)


def _gradients(params: Iterable[Any]) -> Iterable[Any]:
    """This rank's parts, as the memory that backward passes write to."""
    grads = (param.grad for param in params if param.grad is not None)
    return (grad._local_tensor if isinstance(grad, DTensor) else grad for grad in grads)
