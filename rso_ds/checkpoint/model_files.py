"""What a checkpoint keeps beside the tensors so that an export needs nothing else: config.json and the tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rso_ds.checkpoint.folder import sync, write_text
from rso_ds.errors import RSOCheckpointError, RSOConfigError

MODEL_FILES = "hf"  # the subfolder of a checkpoint
CONFIG, GENERATION = "config.json", "generation_config.json"
# What a folder given by --config may hold beside weights of its own.
_KNOWN = (
    CONFIG, GENERATION, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template*", "*.py",
)  # fmt: skip


def write_model_files(module: nn.Module, more: Callable[[Path], object] | None, folder: Path) -> None:
    """Write config.json and generation_config.json of a Hugging Face model, the code that came with it, and whatever
    ``more(folder)`` writes."""
    _write_config(module, folder)
    write_code(module, folder)
    if more is not None:
        more(folder)


def _write_config(module: nn.Module, folder: Path) -> None:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_json_file"):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(module).__name__.removeprefix("FSDP")]  # fully_shard renames the class
    # Not save_pretrained: it validates, and a doubtful generation setting must not cost a checkpoint.
    config.to_json_file(folder / CONFIG)
    generation: Any = getattr(module, "generation_config", None)
    if hasattr(generation, "to_json_file"):
        generation.to_json_file(folder / GENERATION)


def write_code(module: nn.Module, folder: Path) -> None:
    """Copy the files of a model that was loaded with ``trust_remote_code``, which config.json goes on naming."""
    for kind in (*type(module).__mro__, *type(getattr(module, "config", None)).__mro__):
        # transformers imports such code from a folder of its own, in which there is nothing else.
        origin = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if kind.__module__.startswith("transformers_modules.") and origin is not None:
            for file in Path(origin).parent.glob("*.py"):
                if file.name != "__init__.py":
                    shutil.copyfile(file, folder / file.name)


def model_files(checkpoint: Path, given: Path | None) -> list[Path]:
    """The files that belong into an exported model: of the folder ``given``, else of the checkpoint.

    Raises ``RSOConfigError`` if there is no config.json among them.
    """
    if given is not None:
        found = sorted({p for pattern in _KNOWN for p in given.glob(pattern) if p.is_file()})
        if not any(p.name == CONFIG for p in found):
            raise RSOConfigError(f"--config {given} holds no {CONFIG}: name the folder of a Hugging Face model.")
        return found
    found = sorted(p for p in (checkpoint / MODEL_FILES).glob("*") if p.is_file())
    if not any(p.name == CONFIG for p in found):
        raise RSOConfigError(
            f"{checkpoint / MODEL_FILES / CONFIG} does not exist: the run's model was none of Hugging Face's. Name a"
            " folder with its config.json and tokenizer by --config FOLDER."
        )
    return found


def copy_model_files(files: list[Path], folder: Path, dtype: str) -> dict[str, Any]:
    """Copy ``files`` into ``folder``, with ``dtype`` in config.json; returns what that holds."""
    for file in files:
        if file.name != CONFIG:
            shutil.copyfile(file, folder / file.name)
            sync(folder / file.name)
    source = next(file for file in files if file.name == CONFIG)
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
        config["dtype"] = dtype
    except (ValueError, TypeError) as error:
        raise RSOCheckpointError(f"{source} is no configuration of a model: {error}.") from None
    if "torch_dtype" in config:  # the same key in transformers before version 5
        config["torch_dtype"] = dtype
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return dict(config)
