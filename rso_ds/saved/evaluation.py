"""Losses of an evaluation, computed without the logits of all tokens.

At [tokens, vocabulary] the logits, their fp32 copy and log-softmax are many times what training holds. Here they exist
for a chunk of tokens at a time, and the losses are those of the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rso_ds.saved import loss as lean_loss
from rso_ds.saved.apply import CAUSAL_LMS


@contextmanager
def losses_instead_of_logits(model: nn.Module) -> Iterator[None]:
    """While it is entered, ``model(input_ids=ids, ...)``, or whichever engine wraps it, returns the next-token loss of
    each sequence instead of logits: ids [batch, seq] int -> [batch] fp32, summed over seq - 1 tokens.

    ``model``: a causal language model of transformers, in evaluation mode and without gradients. Its head runs over
    chunks of tokens: inside the head's own forward pass where nothing follows it (``CAUSAL_LMS``), else by
    ``logits_to_keep``. A model that has neither makes its logits whole; the fp32 copy is of a chunk even so.
    """
    stock = model.forward
    names = inspect.signature(stock).parameters
    base: Any = getattr(model, "base_model", model)
    kind = next(k for k in type(model).__mro__ if "forward" in vars(k))  # FSDP2 gives the model a class of its own
    if kind.__module__.startswith("transformers.") and kind.__name__ in CAUSAL_LMS:
        run = _by_head
    elif "logits_to_keep" in names and base is not model:
        run = _by_positions
    else:
        run = _by_logits

    def forward(input_ids: Tensor, **options: Any) -> Tensor:
        losses = run(model, stock, input_ids, options)
        return losses.view(input_ids.shape[0], -1).sum(1)

    with _instead(model, forward):
        yield


def _by_head(model: Any, stock: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    head = model.lm_head
    logits_of = head.forward
    targets = F.pad(ids, (0, 1), value=lean_loss.IGNORED)[:, 1:].reshape(-1)

    def losses(hidden: Tensor) -> Tensor:
        # As the head's forward pass, so that engines gather its weight around all chunks together.
        flat = hidden.reshape(-1, hidden.shape[-1])
        parts = lean_loss.chunks(flat.shape[0], flat.shape[1], model.config.vocab_size)
        return _filled(targets, ((part, logits_of(flat[part])) for part in parts))

    with _instead(head, losses):
        found: Tensor = head(model.base_model(input_ids=ids, **options).last_hidden_state)
    return found


def _by_positions(model: Any, stock: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    base = model.base_model
    whole = base.forward
    once: list[Any] = []

    def body(*args: Any, **kwargs: Any) -> Any:
        if not once:
            once.append(whole(*args, **kwargs))
        return once[0]

    config = model.config.get_text_config()
    batch, seq = ids.shape
    parts = lean_loss.chunks(batch * seq, config.hidden_size, config.vocab_size, batch)
    positions = torch.arange(seq, device=ids.device)
    with _instead(base, body):
        logits = ((p, stock(input_ids=ids, logits_to_keep=positions[p], **options).logits) for p in parts)
        return _filled(F.pad(ids, (0, 1), value=lean_loss.IGNORED)[:, 1:], logits)


def _by_logits(model: Any, stock: Any, ids: Tensor, options: dict[str, Any]) -> Tensor:
    logits: Tensor = stock(input_ids=ids, **options).logits
    batch, seq, vocab = logits.shape
    parts = lean_loss.chunks(batch * seq, 1, vocab, batch)
    targets = F.pad(ids, (0, 1), value=lean_loss.IGNORED)[:, 1:]
    return _filled(targets, ((part, logits[:, part]) for part in parts))


def _filled(targets: Tensor, logits: Iterator[tuple[slice, Tensor]]) -> Tensor:
    """fp32 losses in the shape of ``targets``, of which each of ``logits`` covers a slice of the last dimension; 0 for
    a target that does not count."""
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    for part, of_part in logits:
        flat = of_part.reshape(-1, of_part.shape[-1]).float()
        found = F.cross_entropy(flat, targets[..., part].reshape(-1), ignore_index=lean_loss.IGNORED, reduction="none")
        losses[..., part] = found.view(losses[..., part].shape)
    return losses


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``forward`` in the place of the module's own, inside whatever hooks it has."""
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del module.forward  # type: ignore[attr-defined]
        else:
            module.forward = before  # type: ignore[assignment]
