"""What autograd keeps between forward and backward: each storage once, with the module and op that keep it.

Works alike on real and on fake tensors, on any device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from rso_ds.layers import rso_layers


@dataclass
class Kept:
    """One storage kept for backward. ``module`` is the innermost module that was running when it was
    first saved, ``op`` the autograd node that saved it ("" if that node cannot be reached)."""

    module: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class _Packed:
    def __init__(self, tensor: Tensor, entry: Kept | None) -> None:
        self.tensor, self.entry = tensor, entry


class KeptRecorder:
    """Context around one forward pass of ``model``; afterwards ``entries`` lists what is kept.

    Parameters, buffers and P do not count: they exist anyway. Call ``name_ops(loss)`` before backward to
    fill in the ops. Record without gradient checkpointing: what it recomputes is not seen, and ``name_ops``
    would recompute all of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._by_storage: dict[int, Kept] = {}
        self._alive: list[Any] = []
        self._own: set[int] = set()
        self._stack: list[str] = [""]
        self._handles: list[Any] = []
        self._op: str | None = None
        self._hooks: Any = None

    @property
    def entries(self) -> list[Kept]:
        return list(self._by_storage.values())

    @property
    def total(self) -> int:
        """Bytes, each storage once."""
        return sum(entry.nbytes for entry in self._by_storage.values())

    def __enter__(self) -> KeptRecorder:
        for name, module in self.model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._enter(name), prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        self._exclude(self.model.buffers())
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        # Weights that ZeRO-3 gathers, and each P, come into being during the pass: taken out now.
        self._exclude(self.model.parameters())
        self._exclude(x.subspace.P for _, x in rso_layers(self.model) if x.subspace.P is not None)
        self._alive.clear()

    def name_ops(self, loss: Tensor) -> None:
        """Walk the graph of ``loss`` and note which node keeps each storage."""
        seen: set[Any] = set()
        todo = [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            todo += [next_node for next_node, _ in node.next_functions]
            self._op = re.sub(r"(Backward\d*)$", "", node.name()).lstrip("_")
            try:
                for attribute in dir(node):
                    if attribute.startswith("_saved_") or attribute == "saved_tensors":
                        getattr(node, attribute)
            except RuntimeError:
                continue  # freed already
            finally:
                self._op = None

    def _exclude(self, tensors: Any) -> None:
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self._own.add(key)
            self._alive.append(tensor)
            self._by_storage.pop(key, None)

    def _enter(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self._stack.append(name)

        return hook

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _pack(self, tensor: Tensor) -> _Packed:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._own or isinstance(tensor, nn.Parameter) or _is_gathered_weight(tensor):
            return _Packed(tensor, None)
        entry = self._by_storage.get(key)
        if entry is None:
            entry = Kept(self._stack[-1], "", tuple(tensor.shape), tensor.dtype, storage.nbytes())
            self._by_storage[key] = entry
            self._alive.append(storage)  # or its address could be given to another
        return _Packed(tensor, entry)

    def _unpack(self, packed: _Packed) -> Tensor:
        if self._op is not None and packed.entry is not None and not packed.entry.op:
            packed.entry.op = self._op
        return packed.tensor


def _is_gathered_weight(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def by_kind(entries: list[Kept]) -> dict[str, int]:
    """Bytes by a folded name: block indices become ``*``."""
    found: dict[str, int] = {}
    for entry in entries:
        name = f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', entry.module)} {entry.op}".strip()
        found[name] = found.get(name, 0) + entry.nbytes
    return found
