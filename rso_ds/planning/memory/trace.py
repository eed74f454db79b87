"""One training pass on fake tensors: what a model keeps and needs, in seconds and without allocating it."""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from rso_ds.planning.memory.kept import Kept, KeptRecorder
from rso_ds.saved import loss as lean_loss
from rso_ds.subspace import projection

TRACED_CHUNKS = 3


@dataclass(frozen=True)
class Trace:
    """Bytes of one forward and backward pass of a causal language model with its loss.

    ``inside`` are the storages first saved inside the ``traced`` transformer blocks, of which the model has
    ``blocks``; ``outside`` all others (loss, embedding, last norm, rotary tables). ``block_input`` is the
    size of the hidden states between blocks. ``working`` is what the pass needs for a moment beyond what it
    keeps, parameters and their gradients: temporaries, the block being recomputed.
    """

    inside: list[Kept]
    outside: list[Kept]
    blocks: int
    traced: int
    block_input: int
    working: int = 0
    checkpointing: bool = False

    @property
    def per_block(self) -> float:
        """Bytes one block keeps, without gradient checkpointing."""
        return sum(e.nbytes for e in self.inside) / max(1, self.traced)

    @property
    def kept(self) -> int:
        """Bytes kept between forward and backward."""
        block = self.block_input if self.checkpointing else self.per_block
        return sum(e.nbytes for e in self.outside) + round(self.blocks * block)


def trace_training(
    build: Callable[[], nn.Module],
    batch: int,
    seq_len: int,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    blocks: int | None = None,
) -> Trace:
    """Trace one training step of the causal language model that ``build()`` returns, without its update.

    ``build`` runs under fake tensors, so it may make a model of any size; it also converts it. If it makes
    one with fewer blocks than the model really has, ``blocks`` is the real number.
    """
    with FakeTensorMode(), ExitStack() as stack:
        model = build().train()
        stack.enter_context(_no_materialised_mask())  # only now: building imports the model's module
        stack.enter_context(_few_chunks())
        ids = torch.zeros(batch, seq_len, dtype=torch.long)

        def forward() -> Tensor:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            return loss

        with KeptRecorder(model) as recorder:
            loss = forward()
        recorder.name_ops(loss)
        del loss
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        with LiveBytes() as live, _gradients_dropped(model):
            forward().backward()
        found = split(model, recorder.entries, batch * seq_len, checkpointing)
        working = max(0, live.peak - found.kept)
        return replace(found, working=working, blocks=found.traced if blocks is None else blocks)


def split(model: nn.Module, entries: list[Kept], tokens: int, checkpointing: bool = False) -> Trace:
    """``entries`` sorted into those of the transformer blocks and the rest.

    What only one block saves (rotary tables, made before the first and used by all) counts as outside.
    """
    names = block_names(model)
    block_of = {id(e): n for e in entries for n in names if e.module == n or e.module.startswith(n + ".")}
    found: dict[Any, set[str]] = {}
    for e in entries:
        if id(e) in block_of:
            found.setdefault(_alike(e, block_of[id(e)]), set()).add(block_of[id(e)])
    inside = [
        e for e in entries if id(e) in block_of and (len(names) == 1 or len(found[_alike(e, block_of[id(e)])]) > 1)
    ]
    ours = {id(e) for e in inside}
    outside = [e for e in entries if id(e) not in ours]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    block_input = tokens * config.hidden_size * embedding.weight.element_size()
    return Trace(inside, outside, len(names), len(names), block_input, checkpointing=checkpointing)


def _alike(entry: Kept, block: str) -> tuple[Any, ...]:
    """Equal for what equal blocks keep in the same place."""
    return entry.module.removeprefix(block), entry.op, entry.shape, entry.dtype


def block_names(model: nn.Module) -> list[str]:
    """Names of the transformer blocks: the items of the longest list of equal modules."""
    lists = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
    ]
    if not lists:
        return []
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{i}" for i in range(len(longest))]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is on; ``peak`` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._seen:
                    self._count(storage)
        return out

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@contextmanager
def _gradients_dropped(model: nn.Module) -> Iterator[None]:
    """Free each parameter's gradient when it is complete: gradients are counted by the engine's own rule."""

    def drop(param: Tensor) -> None:
        param.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_materialised_mask() -> Iterator[None]:
    """transformers' mask builders look at values, which fake tensors do not have; where no token is padded
    they return None, and so do these."""
    import transformers.masking_utils as masks

    builders = [n for n, _ in inspect.getmembers(masks, inspect.isfunction) if re.fullmatch(r"create_\w+_mask", n)]
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("transformers.models."):
                for name in builders:
                    if name in vars(module):
                        stack.enter_context(patch.object(module, name, lambda *_, **__: None))
        yield


@contextmanager
def _few_chunks() -> Iterator[None]:
    """A small model's loss has hundreds of equal chunks, and a product with a projection that is no matrix has several
    equal pieces, on an accelerator. Each needs what the second does, which still finds what the first has left."""
    every, pieces = lean_loss.chunks, projection.pieces
    with (
        patch.object(lean_loss, "chunks", lambda *sizes: every(*sizes)[:TRACED_CHUNKS]),
        patch.object(projection, "pieces", lambda rows, n, _: pieces(rows, n, "cuda")[:TRACED_CHUNKS]),
    ):
        yield
