"""The configuration of a model: of a named shape, or the config.json of a folder or a hub repository."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rso_ds.errors import RSOConfigError
from rso_ds.models.foreign import advice
from rso_ds.models.remote_code import loaded
from rso_ds.models.shapes import LLAMA_SHAPES, llama_config


def model_config(name: str, vocab_size: int, seq_len: int, trust_remote_code: bool = False, **changes: Any) -> Any:
    """The configuration of a key of ``LLAMA_SHAPES``, a folder with a ``config.json``, or a hub name.

    ``vocab_size`` and ``seq_len`` are of a named shape, ``changes`` attributes of the others. Raises ``RSOConfigError``
    for an unknown name, for a configuration that needs code of its own without ``trust_remote_code``, and for a model
    that is not a language model.
    """
    if name in LLAMA_SHAPES:
        return llama_config(name, vocab_size, seq_len)
    folder = Path(name)
    if not folder.exists():
        near = difflib.get_close_matches(name, LLAMA_SHAPES, n=1)
        if name.startswith((".", "/")) or (near and "/" not in name):
            hint = f" Did you mean '{near[0]}'?" if near else f" Named shapes: {', '.join(LLAMA_SHAPES)}."
            raise RSOConfigError(f"--model {name}: no such shape, folder or hub name.{hint}")
    elif not folder.is_dir():
        raise RSOConfigError(f"--model {name} is a file: name the folder that holds it, with its config.json.")
    elif not (folder / "config.json").is_file():
        raise RSOConfigError(f"--model {name}: {folder / 'config.json'} does not exist.{advice(folder)}")
    config = loaded(
        lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **changes), f"--model {name}"
    )
    if not hasattr(config, "vocab_size"):
        raise RSOConfigError(f"--model {name} ({config.model_type}) is not a language model.")
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and padding >= config.vocab_size:
        raise RSOConfigError(
            f"--model {name}: its config.json says pad_token_id {padding}, and the vocabulary has {config.vocab_size}"
            " tokens: correct one of them."
        )
    return config
