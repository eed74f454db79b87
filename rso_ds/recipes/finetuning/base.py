"""The weights and the tokenizer that a fine-tuning starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from rso_ds.errors import RSOConfigError
from rso_ds.text import read_json


def load_tokenizer(name: str) -> Any:
    """The tokenizer of ``--model``. Raises ``RSOConfigError`` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RSOConfigError(f"--model {name}: its tokenizer cannot be loaded: {error}") from None


def load_pretrained(kind: Any, name: str, **options: Any) -> PreTrainedModel:
    """``kind.from_pretrained(name)`` in fp32; a folder with a LoRA adapter becomes its base with the adapter merged.

    Raises ``RSOConfigError`` if it cannot be loaded.
    """
    adapter = Path(name) / "adapter_config.json"
    try:
        if not adapter.is_file():
            return kind.from_pretrained(name, dtype=torch.float32, **options)
        base = read_json(adapter, "--model")["base_model_name_or_path"]
        try:
            from peft import PeftModel
        except ImportError:
            raise RSOConfigError(f"--model {name} is a LoRA adapter: pip install peft to merge it.") from None
        adapted = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32, **options), name)
        merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
        return merged.requires_grad_(True)  # peft has frozen the base
    except (OSError, ValueError, KeyError) as error:
        raise RSOConfigError(f"--model {name} cannot be loaded: {error}") from None
