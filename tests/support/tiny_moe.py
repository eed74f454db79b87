"""Mixtures of experts small enough to train in a test, and their RSO groups as the package must form them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN, LAYERS, SEQ = 32, 2, 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = [*ATTENTION, "experts.gate_up_proj", "experts.down_proj"]
DOWN_ALONE = [*ATTENTION, "experts.down_proj"]
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "one_expert": {"num_local_experts": 1, "num_experts_per_tok": 1},  # a mixtral of which FSDP2 gives a rank nothing
}


def build(kind: str, intermediate: int = 24, vocab: int = 64, layers: int = LAYERS, **further: Any) -> torch.nn.Module:
    """In fp32; its stock experts are computed one by one, as only that works in float64."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral" if kind == "one_expert" else kind,
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **({"layer_types": ["full_attention"] * layers} if kind == "gpt_oss" else {}),
        **MODELS[kind],
        **further,
    )
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def groups(layers: int = LAYERS, dense: str | None = None) -> dict[str, list[str]]:
    """Group name -> layers that share an input, without those that end in ``dense``."""
    found = {}
    for i in range(layers):
        attention, experts = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp.experts."
        q, k, v, o = (attention + name for name in ATTENTION)
        for members in ([q, k, v], [o], [experts + "gate_up_proj"], [experts + "down_proj"]):
            if dense is None or not members[0].endswith(dense):
                found["+".join(members)] = members
    return found


def transposed(kind: str, layers: int = LAYERS) -> list[str]:
    """The layers whose weights the model stores [E, in, out]."""
    names = [name for members in groups(layers).values() for name in members]
    return [name for name in names if ".experts." in name] if kind == "gpt_oss" else []
