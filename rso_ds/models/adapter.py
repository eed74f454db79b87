"""LoRA adapters given as a model: their base with the adapter merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rso_ds.errors import RSOConfigError
from rso_ds.models.stored import some
from rso_ds.text import read_json

_SETTINGS = "adapter_config.json"


def adapter_base(name: str) -> str:
    """The model that the adapter in the folder ``name`` is for; ``name`` itself if it holds no adapter."""
    settings = Path(name) / _SETTINGS
    if not settings.is_file():
        return name
    content = read_json(settings, "--model")
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str) or not base:
        raise RSOConfigError(f"--model {name}: {settings} names no base_model_name_or_path.")
    return base


def merged(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """``base`` with the adapter of the folder ``name`` merged into it.

    Raises ``RSOConfigError`` without peft, and for an adapter whose tensors are not those that its settings ask for.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError:
        raise RSOConfigError(f"--model {name} is a LoRA adapter: pip install peft to merge it.") from None
    adapted: Any = PeftModel.from_pretrained(base, name)
    wanted, stored = set(get_peft_model_state_dict(adapted)), set(load_peft_weights(name, device="cpu"))
    if wanted != stored:
        raise RSOConfigError(
            f"--model {name}: its adapter is not one for {base.config.name_or_path}: of {len(wanted)} tensors"
            f" {len(wanted - stored)} are missing ({some(sorted(wanted - stored))}) and {len(stored - wanted)} are left"
            f" over ({some(sorted(stored - wanted))})."
        )
    whole: PreTrainedModel = adapted.merge_and_unload()
    return whole.requires_grad_(True)  # peft has frozen the base
