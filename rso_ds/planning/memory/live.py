"""Bytes that live at once, counted as torch makes and frees them."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is on; ``peak`` is the most that lived at once. ``fake``: those of
    fake tensors, and no others, which real programs make fake ones beside."""

    def __init__(self, fake: bool = False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.fake = fake
        self._seen: Any = WeakIdKeyDictionary()
        self._resizing: Any = None

    def __enter__(self) -> LiveBytes:
        resize_ = torch.UntypedStorage.resize_

        def counted(storage: Any, size: int) -> Any:  # FSDP2 frees and brings back memory so, past the dispatcher
            result = resize_(storage, size)
            if storage in self._seen:
                self._seen[storage][0] += self._grow(storage.nbytes() - self._seen[storage][0])
            return result

        self._resizing = patch.object(torch.UntypedStorage, "resize_", counted)
        self._resizing.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._resizing.__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # DTensor, say: it has no memory of its own, and what it does to that comes by here
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._counts(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._seen:
                    size = [self._grow(storage.nbytes())]
                    self._seen[storage] = size
                    weakref.finalize(storage, self._free, size)
        return out

    def _counts(self, tensor: Tensor) -> bool:
        real = not (tensor.is_meta or is_traceable_wrapper_subclass(tensor))
        return real and isinstance(tensor, FakeTensor) == self.fake

    def _grow(self, size: int) -> int:
        self.live += size
        self.peak = max(self.peak, self.live)
        return size

    def _free(self, size: list[int]) -> None:
        self.live -= size[0]
