"""safetensors files written one tensor at a time.

The package's own writer wants all tensors of a file in memory. The format does not: its header follows from names,
shapes and dtypes, which are known beforehand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rso_ds.checkpoint.folder import write_text
from rso_ds.errors import RSOCheckpointError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path, entries: Sequence[Entry], value: Callable[[str], Tensor], max_shard_size: int, stem: str = "model"
) -> list[str]:
    """Write ``stem.safetensors``, or numbered shards of at most ``max_shard_size`` bytes and their index.

    ``value(name)`` is called once for every entry and must return a tensor of its shape and dtype. A tensor
    above the limit has a shard of its own. Returns the names of the files.
    """
    shards = _shards(entries, max_shard_size)
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", entries, value)
        return [f"{stem}.safetensors"]
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, value)
    index = {
        "metadata": {"total_size": sum(e.bytes for e in entries)},
        "weight_map": {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard},
    }
    write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    return names


def _shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def write_file(path: Path, entries: Iterable[Entry], value: Callable[[str], Tensor]) -> None:
    """One safetensors file, flushed to the disk. Raises ``RSOCheckpointError`` for a dtype unknown to the format."""
    ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)  # readers want every tensor aligned to its dtype
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in ordered:
        if entry.dtype not in _DTYPES:
            raise RSOCheckpointError(f"'{entry.name}' is of {entry.dtype}, which safetensors files do not hold.")
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at := at + entry.bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = value(entry.name)
            assert tensor.shape == entry.shape, entry.name
            assert tensor.dtype == entry.dtype, entry.name
            if tensor.numel():
                f.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        f.flush()
        os.fsync(f.fileno())
