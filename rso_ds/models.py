"""Models by name or from a Hugging Face configuration or checkpoint."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rso_ds.errors import RSOConfigError

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


def model_config(name: str, vocab_size: int, seq_len: int) -> Any:
    """The configuration of a key of ``LLAMA_SHAPES``, a folder with a ``config.json``, or a hub name.

    Raises ``RSOConfigError`` for an unknown name or a model that is not a language model.
    """
    if name in LLAMA_SHAPES:
        return llama_config(name, vocab_size, seq_len)
    folder = Path(name)
    if not folder.exists():
        near = difflib.get_close_matches(name, LLAMA_SHAPES, n=1)
        if name.startswith((".", "/")) or (near and "/" not in name):
            hint = f" Did you mean '{near[0]}'?" if near else f" Named shapes: {', '.join(LLAMA_SHAPES)}."
            raise RSOConfigError(f"--model {name}: no such shape, folder or hub name.{hint}")
    elif not (folder / "config.json").is_file():
        raise RSOConfigError(f"--model {name}: {folder / 'config.json'} does not exist.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise RSOConfigError(f"--model {name} cannot be loaded: {error}") from None
    if not hasattr(config, "vocab_size"):
        raise RSOConfigError(f"--model {name} ({config.model_type}) is not a language model.")
    return config


def has_weights(name: str) -> bool:
    """Whether ``name``, as in ``model_config``, has weights: a hub name is taken to, a folder may hold some."""
    if name in LLAMA_SHAPES:
        return False
    folder = Path(name)
    return not folder.is_dir() or any(p.suffix in (".safetensors", ".bin") for p in folder.iterdir())


def load_model(name: str, vocab_size: int, seq_len: int, pretrained: bool | None = None) -> PreTrainedModel:
    """A causal LM in fp32, random or pretrained; ``name`` as in ``model_config``.

    ``pretrained`` None means: weights where the folder or hub repository has them. Raises
    ``RSOConfigError`` for an unknown name, and if the tokenizer has more tokens than the model has embeddings.
    """
    config = model_config(name, vocab_size, seq_len)
    if name in LLAMA_SHAPES:
        if pretrained:
            raise RSOConfigError(f"--model {name} is a shape without weights: drop '--init pretrained'.")
        return _random(config)
    if config.vocab_size < vocab_size:
        raise RSOConfigError(
            f"--model {name} has {config.vocab_size} embeddings and the tokenizer {vocab_size} tokens: give the"
            " model's own tokenizer with --tokenizer."
        )
    if not (has_weights(name) if pretrained is None else pretrained):
        return _random(config)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def _random(config: Any) -> PreTrainedModel:
    # from_config partitions while it builds where a ZeRO-3 HfDeepSpeedConfig is alive.
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
