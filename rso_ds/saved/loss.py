"""Cross-entropy of a language model that never holds the logits of all tokens.

The head and the loss run over chunks of tokens. Each chunk's gradient is taken while its logits exist, so
nothing is multiplied twice: what stays for backward is one gradient of the hidden states and one of the
head's weight (of its B, if it trains in a subspace), not [tokens, vocabulary].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rso_ds.dtypes import compute_dtype
from rso_ds.subspace import add_lifted_, project

MIN_CHUNK = 256
IGNORED = -100


def chunk_rows(tokens: int, hidden: int, vocab: int) -> int:
    """Tokens a chunk: the logits of one are about as large as the hidden states of all."""
    return min(tokens, max(MIN_CHUNK, -(-tokens * hidden // vocab)))


def chunks(tokens: int, hidden: int, vocab: int, batch: int = 1) -> list[slice]:
    """One slice of ``range(tokens // batch)`` for each chunk; all but the last are of equal length. ``batch``: of as
    many sequences of ``tokens`` in all, each gives a chunk its share."""
    rows = max(1, chunk_rows(tokens, hidden, vocab) // batch)
    return [slice(start, start + rows) for start in range(0, tokens // batch, rows)]


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        B: Tensor | None,
        P: Tensor | None,
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        w, b = weight.to(dtype), None if B is None else B.to(dtype)
        want_hidden, want_weight, want_bias, _, want_b, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden, dtype=dtype) if want_hidden else None
        # Sums over all tokens: in fp32, since hundreds of bf16 additions would lose the small ones.
        d_weight, d_bias, d_b = (
            torch.zeros_like(param, dtype=wide) if param is not None and want else None
            for param, want in ((weight, want_weight), (bias, want_bias), (B, want_b))
        )
        total = hidden.new_zeros((), dtype=wide)
        for part in chunks(hidden.shape[0], hidden.shape[1], weight.shape[0]):
            h, target = hidden[part].to(dtype), targets[part]
            logits = h @ w.t() if bias is None else torch.addmm(bias.to(dtype), h, w.t())
            if b is not None:
                assert P is not None
                z = project(h, P)
                logits.addmm_(z, b.t())
            logits = logits.to(wide)
            counted = (target != IGNORED).unsqueeze(1)
            index = target.clamp(min=0).unsqueeze(1)
            norm = logits.logsumexp(1, keepdim=True)
            total = total + ((norm - logits.gather(1, index)) * counted).sum()
            if d_hidden is None and d_weight is None and d_bias is None and d_b is None:
                continue
            # softmax - one-hot, not yet divided by the number of tokens: fp16 would lose the small ones.
            d_logits = (logits - norm).exp_()
            d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1.0))
            d_logits = d_logits.mul_(counted).to(dtype)
            if d_hidden is not None:
                d_h = d_logits @ w
                d_hidden[part] = d_h if b is None or P is None else add_lifted_(d_h, d_logits @ b, P)
            if d_weight is not None:
                _add_product_(d_weight, d_logits, h)
            if d_b is not None:
                _add_product_(d_b, d_logits, z)
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0))
        ctx.save_for_backward(d_hidden, _as_kept(d_weight, weight), d_bias, _as_kept(d_b, B))
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, B)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight, d_bias, d_b = (
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return d_hidden, d_weight, d_bias, None, d_b, None


def _add_product_(total: Tensor, d_logits: Tensor, x: Tensor) -> None:
    """``total += d_logits^T x``: total [vocab, k], d_logits [rows, vocab], x [rows, k]."""
    if total.dtype == x.dtype:
        total.addmm_(d_logits.t(), x)
    else:
        total.add_(d_logits.t() @ x)


def _as_kept(total: Tensor | None, param: Tensor | None) -> Tensor | None:
    # fp16 has not the range of a sum: it stays in fp32.
    if total is None or param is None or param.dtype != torch.bfloat16:
        return total
    return total.to(param.dtype)


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    B: Tensor | None = None,
    P: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of the cross-entropy of ``softmax(hidden W^T + (hidden P) B^T + bias)``, in fp32.

    Shapes: hidden [tokens, n], weight [vocab, n], bias [vocab] or None, targets [tokens] int64 with -100
    for tokens that do not count; B [vocab, r] and P [n, r] or coordinates [r] of a head trained in a
    subspace, else None. Kept for backward: the gradients of hidden (compute dtype), weight, bias and B, where
    they are wanted; P is a constant.
    """
    return _SummedLoss.apply(hidden, weight, bias, targets, B, P)


def causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    B: Tensor | None = None,
    P: Tensor | None = None,
) -> Tensor:
    """transformers' ``ForCausalLMLoss`` from hidden states [batch, seq, n] instead of logits.

    ``labels`` [batch, seq] are shifted here, ``shift_labels`` are shifted already; the sum is divided by
    ``num_items_in_batch`` if given, else by the number of tokens that count.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    total = summed_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets, B, P)
    if num_items_in_batch is None:
        return total / (targets != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
