"""The weights that a folder or a hub repository holds: which files, and names, shapes and dtypes in them."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from rso_ds.errors import RSOConfigError
from rso_ds.models.remote_code import loaded
from rso_ds.text import HEAD, check_pointer, read_json
from rso_ds.units import in_unit

# In the order in which transformers looks for them.
LOADABLE = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_INDEX = ".index.json"


@dataclass(frozen=True)
class StoredWeights:
    """``tensors``: on the meta device, by their names in the files."""

    files: Sequence[Path]
    tensors: Mapping[str, Tensor]

    def text(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self.tensors.values())
        where = self.files[0].name if len(self.files) == 1 else f"{len(self.files)} files"
        unit = "GB" if size >= 1e8 else "MB"
        return f"{len(self.tensors)} tensors, {in_unit(size, unit, ',.2f')} in {where}"

    def digest(self) -> str:
        """Equal for the same names, shapes and dtypes."""
        told = sorted((n, tuple(t.shape), str(t.dtype)) for n, t in self.tensors.items())
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def has_weights(name: str) -> bool:
    """Whether ``name`` may have weights: a hub name is taken to, a folder has if it holds one of ``LOADABLE``."""
    folder = Path(name)
    return not folder.is_dir() or any((folder / file).is_file() for file in LOADABLE)


def stored_weights(name: str, config: Any) -> StoredWeights | None:
    """What ``from_pretrained(name)`` loads, None if there is nothing; of a hub name it is downloaded.

    Reads names and shapes alone. Raises ``RSOConfigError``, with the file, for what is missing, cut, or not weights.
    """
    own = getattr(config, "transformers_weights", None)
    found = next((path for file in ([own] if own else LOADABLE) if (path := _file(name, file))), None)
    if found is None:
        return None
    files = _listed(name, found) if found.name.endswith(_INDEX) else [found]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(file)
    if not tensors:
        raise RSOConfigError(f"--model {name}: {found} holds no tensors.")
    return StoredWeights(files, tensors)


def _file(name: str, file: str) -> Path | None:
    found = loaded(lambda: cached_file(name, file, _raise_exceptions_for_missing_entries=False), f"--model {name}")
    return None if found is None else Path(found)


def _listed(name: str, index: Path) -> list[Path]:
    content = read_json(index, "--model")
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise RSOConfigError(f'--model {name}: {index} has no "weight_map" of names and files.')
    found = {shard: _file(name, shard) for shard in sorted(set(places.values()))}
    absent = [shard for shard, path in found.items() if path is None]
    if absent:
        raise RSOConfigError(
            f"--model {name}: {index.name} lists {len(found)} files, and {len(absent)} of them are not"
            f" there: {some(absent)}. Fetch them again."
        )
    return [path for path in found.values() if path is not None]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        head = head_of(file)
        check_pointer(head, f"--model {file}")
        if not head:
            raise RSOConfigError(f"--model {file} is empty: fetch it again.")
        return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    except OSError as error:
        raise RSOConfigError(f"--model {file} cannot be read: {error.strerror or error}.") from None


def head_of(file: Path) -> bytes:
    """The bytes that decide what ``file`` holds."""
    with open(file, "rb") as stream:
        return stream.read(HEAD)


def _safetensors(file: Path) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                part = stored.get_slice(name)
                shape = part.get_shape()
                some = part[:0] if shape else stored.get_tensor(name)
                tensors[name] = torch.empty(shape, dtype=some.dtype, device="meta")
    except SafetensorError as error:
        raise RSOConfigError(f"--model {file} is cut or damaged ({error}): fetch it again.") from None
    return tensors


def _pickled(file: Path) -> dict[str, Tensor]:
    try:
        mapped = {"mmap": True} if zipfile.is_zipfile(file) else {}
        content = torch.load(file, map_location="meta", weights_only=True, **mapped)
    except pickle.UnpicklingError:
        raise RSOConfigError(
            f"--model {file} is no state dict: it is damaged, or holds Python objects beside tensors, which are not"
            " loaded, since they may run code. Save the model with save_pretrained."
        ) from None
    except Exception as error:  # torch and zip each have their own
        first = str(error).partition("\n")[0].partition(". ")[0]
        raise RSOConfigError(f"--model {file} is cut or damaged ({first}): fetch it again.") from None
    if not isinstance(content, Mapping):
        raise RSOConfigError(f"--model {file} holds {type(content).__name__}, and not a state dict.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def some(names: Sequence[str]) -> str:
    """The first three of ``names``."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
