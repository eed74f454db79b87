"""A LLaMA small enough to train in a test, its data, and its RSO groups as the package must form them."""

from __future__ import annotations

import torch
from support import tiny_moe
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, HIDDEN, LAYERS, SEQ = 64, 32, 2, 16


def build(
    intermediate: int = 86,
    dtype: torch.dtype = torch.float32,
    vocab: int = VOCAB,
    tie: bool = False,
    layers: int = LAYERS,
    moe: str | None = None,
) -> torch.nn.Module:
    """Grouped-query attention. ``intermediate`` 85 and ``vocab`` 63 do not divide by two ranks. ``moe``: a key of
    ``tiny_moe.MODELS`` instead of a LLaMA."""
    if moe is not None:
        return tiny_moe.build(moe, intermediate, vocab, layers).to(dtype)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ,
        initializer_range=0.1,
        attn_implementation="eager",
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).to(dtype)


def groups(skip: str | None = None, layers: int = LAYERS) -> dict[str, list[str]]:
    """Group name -> layers that share an input; ``skip`` names a layer left dense."""
    found = {}
    for i in range(layers):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for members in (
            [attn + "q_proj", attn + "k_proj", attn + "v_proj"],
            [attn + "o_proj"],
            [mlp + "gate_proj", mlp + "up_proj"],
            [mlp + "down_proj"],
        ):
            members = [m for m in members if m != skip]
            found["+".join(members)] = members
    return found


def token_groups(tie: bool) -> dict[str, list[str]]:
    """The groups of embedding and head. A tied head has no weight of its own: the reference sees one layer."""
    return {n: [n] for n in (("model.embed_tokens",) if tie else ("model.embed_tokens", "lm_head"))}


def groups_by_shape(rank: int, intermediate: int) -> dict[str, list[str]]:
    """The same with ``share_projection: "shape"``: only the down projection has another input size."""
    layers = [name for members in groups().values() for name in members]
    down = [name for name in layers if name.endswith("down_proj")]
    others = [name for name in layers if name not in down]
    return {f"in={HIDDEN},rank={rank}": others, f"in={intermediate},rank={rank}": down}


def tokens(step: int, count: int, vocab: int = VOCAB) -> torch.Tensor:
    """[count, SEQ] token ids of a step; three different batches in turn."""
    g = torch.Generator().manual_seed(1000 + step % 3)
    return torch.randint(0, vocab, (count, SEQ), generator=g)


def loss_of(forward, ids: torch.Tensor) -> torch.Tensor:
    return forward(input_ids=ids, labels=ids, use_cache=False).loss
