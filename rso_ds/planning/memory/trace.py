"""One training pass on fake tensors: what a model keeps and needs, in seconds and without allocating it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rso_ds.planning.memory.kept import Kept, KeptRecorder
from rso_ds.planning.memory.live import LiveBytes
from rso_ds.saved import loss as lean_loss
from rso_ds.saved.evaluation import losses_instead_of_logits
from rso_ds.subspace import projection

TRACED_CHUNKS = 3
# Of a pass: up to the head, the head with the loss, the way back.
SECTIONS = ("blocks", "head", "backward")


@dataclass(frozen=True)
class Trace:
    """Bytes of one forward and backward pass of a causal language model with its loss.

    ``inside`` are the storages first saved inside the ``traced`` transformer blocks, of which the model has
    ``blocks``; ``outside`` all others (loss, embedding, last norm, rotary tables). ``block_input`` is the
    size of the hidden states between blocks. ``above`` is what the pass holds at most beyond what it keeps, parameters
    and their gradients (temporaries, the block being recomputed), in each of ``SECTIONS``; below zero where not
    everything is kept yet.
    """

    inside: list[Kept]
    outside: list[Kept]
    blocks: int
    traced: int
    block_input: int
    above: Mapping[str, int] = field(default_factory=dict)
    checkpointing: bool = False

    @property
    def working(self) -> int:
        """The most of ``above``: what the whole pass needs for a moment beyond what it keeps."""
        return max(0, *self.above.values())

    def peak(self, section: str) -> int:
        """The most bytes that live at once in one of ``SECTIONS``, of parameters and gradients apart."""
        return max(0, self.kept + self.above[section])

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
        stack.enter_context(_no_values())
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
        with LiveBytes(fake=True) as live, _gradients_dropped(model), _sections(model, live) as peaks:
            loss = forward()
            peaks.enter("backward")
            loss.backward()
        found = split(model, recorder.entries, batch * seq_len, checkpointing)
        above = {section: peak - found.kept for section, peak in peaks.found.items()}
        return replace(found, above=above, blocks=found.traced if blocks is None else blocks)


def trace_evaluation(
    build: Callable[[], nn.Module], batch: int, seq_len: int, autocast: torch.dtype | None = None
) -> dict[str, int]:
    """The most bytes that live at once while ``build()``, as for ``trace_training``, is evaluated as the training
    program does it: in its "blocks" and in its "head"."""
    with FakeTensorMode(), ExitStack() as stack:
        model = build().eval()
        stack.enter_context(_no_values())
        stack.enter_context(_few_chunks())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", autocast, enabled=autocast is not None))
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        with LiveBytes(fake=True) as live, _sections(model, live) as peaks, losses_instead_of_logits(model):
            model(input_ids=ids, use_cache=False)
        return {"blocks": peaks.found["blocks"], "head": peaks.found["head"]}


class _Sections:
    """The peaks of a pass, section by section."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.found, self.section = live, dict.fromkeys(SECTIONS, 0), "blocks"

    def enter(self, section: str) -> None:
        self.found[self.section] = max(self.found[self.section], self.live.peak)
        self.live.peak, self.section = self.live.live, section


@contextmanager
def _sections(model: nn.Module, live: LiveBytes) -> Iterator[_Sections]:
    """The "head" begins with the head's forward pass (without one, all is "blocks"); "backward" the caller enters."""
    peaks = _Sections(live)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    handles = [] if head is None else [head.register_forward_pre_hook(lambda *_: peaks.enter("head"))]
    try:
        yield peaks
    finally:
        peaks.enter("")
        for handle in handles:
            handle.remove()


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
def _no_values() -> Iterator[None]:
    """transformers' mask builders look at values, which fake tensors do not have: they are told that no token is padded
    and each row is one sequence. Which masks that leaves depends on the attention, and is counted: none for causal
    attention by SDPA, [batch, 1, seq, seq] for a sliding window that the sequence exceeds, and for "eager"."""
    import transformers.masking_utils as masks

    with ExitStack() as stack:
        told = {"find_packed_sequence_indices": None, "fast_all": True, "is_tracing": False}
        for name, value in told.items():
            if hasattr(masks, name):  # not in every version
                stack.enter_context(patch.object(masks, name, lambda *_, value=value: value))
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
