"""z = x P once for all the layers that read one x (query, key and value; gate and up)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rso_ds.dtypes import compute_dtype


class SharedInput:
    """Hands the z of one input to each of ``members`` layers, then forgets it.

    The first layer that is called with some x computes z; the others, called with the same x and the same
    P, get the same node of the autograd graph, so z is stored once and its gradients are summed before
    P^T is applied. Nothing is held once the last member was served, or once the module around the members
    has returned (``forget``, for models that call some members only or feed them different inputs). Each
    forward pass makes its own z: several may wait for their backward.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        self._hook: RemovableHandle | None = None
        self.forget()

    def forget_after(self, parent: nn.Module) -> None:
        """Hold nothing longer than one call of ``parent``, the module around the members."""
        self._hook = parent.register_forward_hook(self.forget)

    def detach(self) -> None:
        """Undo ``forget_after``."""
        if self._hook is not None:
            self._hook.remove()

    def forget(self, *_: Any) -> None:
        """Drop what is held; has the signature of a forward hook."""
        self._x: Tensor | None = None
        self._z: Tensor | None = None
        self._P: Tensor | None = None
        self._left = 0
        self._state: tuple[Any, ...] = ()

    def take(self, x: Tensor, P: Tensor) -> Tensor | None:
        """The z [tokens, r] of x under P, or None if this is the first layer that asks."""
        z = self._z
        if z is None or self._P is not P or self._state != _state(x) or not _same(self._x, x):
            return None
        self._left -= 1
        if not self._left:
            self.forget()
        return z

    def put(self, x: Tensor, P: Tensor, z: Tensor) -> None:
        """Hold z for the other members."""
        if self.members > 1:
            self._x, self._z, self._P, self._state, self._left = x, z, P, _state(x), self.members - 1


def _state(x: Tensor) -> tuple[Any, ...]:
    return torch.is_grad_enabled(), x.requires_grad, compute_dtype(x), _version(x)


def _version(x: Tensor) -> int:
    """Number of in-place changes to x, where there is a count of them."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version


def _same(old: Tensor | None, x: Tensor) -> bool:
    """True if ``x`` is the tensor ``old``, or another view of just the same memory.

    ZeRO-3's hooks hand every layer a view of its own. ``old`` is alive, so its memory belongs to no other.
    """
    if old is x or old is None or torch.compiler.is_compiling():
        return old is x
    return (
        old.shape == x.shape
        and old.stride() == x.stride()
        and old.dtype == x.dtype
        and old.storage_offset() == x.storage_offset()
        and old.untyped_storage()._cdata == x.untyped_storage()._cdata
    )
