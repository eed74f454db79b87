"""LLaMA shapes by name."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

# (hidden, intermediate, layers, heads): the LLaMA shapes of the C4 pre-training benchmark introduced with
# GaLore (arXiv 2403.03507). The names count parameters with a vocabulary of 32000.
LLAMA_SHAPES: dict[str, tuple[int, int, int, int]] = {
    "llama-9m": (128, 352, 4, 4),
    "llama-20m": (256, 688, 4, 4),
    "llama-35m": (384, 1024, 6, 8),
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 24, 16),
    "llama-1b": (2048, 5461, 24, 32),
    "llama-7b": (4096, 11008, 32, 32),
}


def llama_config(name: str, vocab_size: int = 32000, seq_len: int = 2048, **special: Any) -> LlamaConfig:
    """Configuration of a named shape. ``special``: token ids (bos_token_id, eos_token_id, ...)."""
    hidden, intermediate, layers, heads = LLAMA_SHAPES[name]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(seq_len, 1024),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **special,
    )
