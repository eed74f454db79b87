"""The tokenizer of a folder or a hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rso_ds.errors import RSOConfigError
from rso_ds.models.foreign import tokenizer_files
from rso_ds.models.remote_code import loaded
from rso_ds.models.stored import head_of
from rso_ds.text import check_pointer


def load_tokenizer(name: str, flag: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``name``, the value of ``flag``: a folder or a hub name.

    Raises ``RSOConfigError`` if there is none, if it needs code of its own without ``trust_remote_code``, and if its
    vocabulary is empty: transformers makes such a one of a folder with a config.json alone.
    """
    folder, what = Path(name), f"{flag} {name}: its tokenizer" if flag == "--model" else f"{flag} {name}"
    if folder.is_dir():
        bare = {f.name for f in folder.iterdir()}
        if {"vocab.json", "merges.txt"} <= bare and not {"tokenizer.json", "config.json"} & bare:
            from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]

            return GPT2TokenizerFast.from_pretrained(name)
        files = tokenizer_files(folder)
        if not files:
            raise RSOConfigError(f"{what} cannot be loaded: the folder holds no tokenizer.json or other vocabulary.")
        for file in files:
            check_pointer(head_of(file), f"{flag} {file}")
    elif folder.exists():
        raise RSOConfigError(f"{what} cannot be loaded: it is a file, and not a folder.")
    elif name.startswith((".", "/")) or "\\" in name:
        raise RSOConfigError(f"{flag} {name}: no such folder.")
    tokenizer: Any = loaded(lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code), what)
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise RSOConfigError(f"{what} has no tokens but its special ones: files of its vocabulary are missing.")
    return tokenizer
