"""Cross-entropy of a language model that never holds the logits of all tokens.

The head and the loss run over chunks of tokens. Each chunk's gradient is taken while its logits exist, so
nothing is multiplied twice: what stays for backward is one gradient of the hidden states and one of the
head's weight, not [tokens, vocabulary].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rso_ds.dtypes import compute_dtype

MIN_CHUNK = 256
IGNORED = -100


def chunk_rows(tokens: int, hidden: int, vocab: int) -> int:
    """Tokens a chunk: the logits of one are about as large as the hidden states of all."""
    return min(tokens, max(MIN_CHUNK, -(-tokens * hidden // vocab)))


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        w = weight.to(dtype)
        want_hidden, want_weight, want_bias, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden, dtype=dtype) if want_hidden else None
        # Sums over all tokens: in fp32, since hundreds of bf16 additions would lose the small ones.
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and want_bias else None
        total = hidden.new_zeros((), dtype=wide)
        rows = chunk_rows(hidden.shape[0], hidden.shape[1], weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            h, target = hidden[part].to(dtype), targets[part]
            logits = h @ w.t() if bias is None else torch.addmm(bias.to(dtype), h, w.t())
            logits = logits.to(wide)
            counted = (target != IGNORED).unsqueeze(1)
            index = target.clamp(min=0).unsqueeze(1)
            norm = logits.logsumexp(1, keepdim=True)
            total = total + ((norm - logits.gather(1, index)) * counted).sum()
            if d_hidden is None and d_weight is None and d_bias is None:
                continue
            # softmax - one-hot, not yet divided by the number of tokens: fp16 would lose the small ones.
            d_logits = (logits - norm).exp_()
            d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1.0))
            d_logits = d_logits.mul_(counted).to(dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ w
            if d_weight is not None:
                if dtype == wide:
                    d_weight.addmm_(d_logits.t(), h)
                else:
                    d_weight.add_(d_logits.t() @ h)
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0))
        if d_weight is not None and weight.dtype == torch.bfloat16:
            d_weight = d_weight.to(weight.dtype)  # fp16 has not the range of a sum: it stays in fp32
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], scaled[2], None


def summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of ``softmax(hidden W^T + bias)``, in fp32.

    Shapes: hidden [tokens, n], weight [vocab, n], bias [vocab] or None, targets [tokens] int64 with -100
    for tokens that do not count. Kept for backward: the gradients of hidden (compute dtype), weight and
    bias, where they are wanted.
    """
    return _SummedLoss.apply(hidden, weight, bias, targets)


def causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """transformers' ``ForCausalLMLoss`` from hidden states [batch, seq, n] instead of logits.

    ``labels`` [batch, seq] are shifted here, ``shift_labels`` are shifted already; the sum is divided by
    ``num_items_in_batch`` if given, else by the number of tokens that count.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    total = summed_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets)
    if num_items_in_batch is None:
        return total / (targets != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
