"""Held-out loss and a sample of text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rso_ds.comm.rank_context import RankContext
from rso_ds.models import learned_positions
from rso_ds.recipes.data.dataset import PackedTokens
from rso_ds.saved.evaluation import losses_instead_of_logits


@torch.no_grad()
def held_out_loss(model: nn.Module, data: PackedTokens, tokens: int, micro: int, context: RankContext) -> float:
    """Mean next-token loss (nats) over the first ``tokens`` held-out tokens, the same set at any world size.

    Ranks take turns over the sequences; a rank that has run out repeats the first one with weight 0, since
    under ZeRO-3 every rank must run every forward pass.
    """
    was_training = model.training
    model.eval()
    count = max(1, min(data.count, tokens // data.seq_len))
    rounds = -(-count // (micro * context.world_size))
    total = torch.zeros(2, dtype=torch.float64, device=context.device)
    for i in range(rounds):
        first = (i * context.world_size + context.rank) * micro
        indices = np.arange(first, first + micro)
        valid = indices < count
        ids = data.sequences(np.where(valid, indices, 0)).to(context.device)
        with losses_instead_of_logits(getattr(model, "module", model)):
            losses = model(input_ids=ids, use_cache=False)
        weight = torch.from_numpy(valid).to(losses)
        total[0] += (losses * weight).sum()
        total[1] += weight.sum() * (data.seq_len - 1)
    if dist.is_initialized():
        dist.all_reduce(total)
    model.train(was_training)
    return (total[0] / total[1]).item()


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond floating point."""
    return math.inf if loss > 700 else math.exp(loss)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, new_tokens: int, seed: int) -> str:
    """``prompt`` continued by ``new_tokens`` tokens at temperature 0.8. Where ``model`` has learned fewer positions,
    the beginning of ``prompt`` and the end of the sample give way."""
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    limit = learned_positions(model)
    if limit is not None:
        new_tokens = min(new_tokens, limit - 1)
        ids = ids[:, -(limit - new_tokens) :]
    model.eval()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        pad_token_id=0,
    )
    return tokenizer.decode(out[0])
