"""A checkpoint into an ordinary Hugging Face model, offline and tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rso_ds.checkpoint.folder import MANIFEST, sync
from rso_ds.checkpoint.model_files import CONFIG, copy_model_files, model_files
from rso_ds.checkpoint.published import Published
from rso_ds.checkpoint.reading import DenseModel, open_model
from rso_ds.checkpoint.weights_file import Entry, write_weights
from rso_ds.errors import RSOCheckpointError, RSOConfigError
from rso_ds.units import GB

SHARD_SIZE = 5 * GB
Progress = Callable[[int, int], None]  # (number of the tensor that comes next, of how many)


@dataclass(frozen=True)
class Exported:
    """What was written: ``config`` is the content of config.json."""

    tensors: int
    bytes: int
    files: list[str]
    dtype: torch.dtype
    config: dict[str, Any]


def export_dense(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = SHARD_SIZE,
    config: str | Path | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the model of ``checkpoint`` as a folder ``out`` that ``from_pretrained`` loads without rso_ds.

    Weights are W + B P^T, computed in fp32 and rounded once to W's dtype: those of ``dense_state_dict``, bit for
    bit on the kind of device and number of CPU threads that trained; elsewhere LAPACK rounds the P of ``haar``
    otherwise in its last digit. ``dtype`` converts them afterwards. Memory: a few times the largest tensor.
    ``config``: folder with config.json and tokenizer, for a checkpoint without them. ``progress`` is called
    before every tensor.

    Of DeepSpeed's own checkpoints (dense runs) it writes the weights that the optimizer steps, in fp32, and at stage 0
    those of the model.

    Raises ``RSOCheckpointError`` for a damaged checkpoint and a full disk;
    ``RSOConfigError`` if ``out`` is not empty or there is no config.json. ``out`` appears whole or not at all.
    """
    with new_folder(Path(out)) as folder:
        model = open_model(Path(checkpoint))
        return write_model(model, folder, True, dtype, max_shard_size, config, progress)


def write_model(
    model: DenseModel,
    folder: Path,
    merged: bool,
    dtype: torch.dtype | None,
    max_shard_size: int,
    config: str | Path | None,
    progress: Progress | None,
) -> Exported:
    """Weights, config.json and tokenizer into ``folder``; ``merged`` False leaves B P^T out of the weights."""
    files = model_files(model.path, None if config is None else Path(config))
    names = model.names()
    floating = next((model.dtype(n) for n in names if model.dtype(n).is_floating_point), torch.float32)
    published = Published(next(file for file in files if file.name == CONFIG))
    source: dict[str, str] = {}
    entries = []
    for name in names:
        for part, shape in published.shapes(name, model.shape(name)).items():
            source[part] = name
            entries.append(Entry(part, shape, converted_dtype(model.dtype(name), dtype)))

    @lru_cache(maxsize=1)  # the parts of a tensor are written one after the other
    def parts(name: str) -> dict[str, Tensor]:
        return published.parts(name, converted(model.value(name, merged), name, dtype))

    done = 0

    def value(part: str) -> Tensor:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(entries))
        return parts(source[part])[part]

    written = write_weights(folder, entries, value, max_shard_size)
    kind = converted_dtype(floating, dtype)
    content = copy_model_files(files, folder, str(kind).removeprefix("torch."))
    return Exported(len(entries), sum(e.bytes for e in entries), written, kind, content)


def converted_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """``wanted`` for floating-point tensors, if there is a wish."""
    return wanted if wanted is not None and own.is_floating_point else own


def converted(tensor: Tensor, name: str, wanted: torch.dtype | None) -> Tensor:
    """``tensor`` in ``converted_dtype``. Raises ``RSOConfigError`` if that cannot hold its values."""
    result = tensor.to(converted_dtype(tensor.dtype, wanted))
    if wanted == torch.float16 and result.is_floating_point() and (result.isinf() & ~tensor.isinf()).any():
        raise RSOConfigError(
            f"--dtype fp16: '{name}' reaches {tensor.abs().max():.3g}, beyond what fp16 holds: use bf16 or fp32."
        )
    return result


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder of another name that becomes ``out`` when the block ends well, and is removed when it does not."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RSOConfigError(f"{out} exists and is not empty: name a new folder, or empty it.")
    if any((parent / MANIFEST).is_file() for parent in out.parents):
        raise RSOConfigError(f"{out} lies inside a checkpoint, which would count as damaged then: name another place.")
    temporary = out.with_name(f".{out.name}.exporting")
    try:
        if temporary.exists():  # a crash left it
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, out)
        sync(out.parent)
    except OSError as error:
        raise RSOCheckpointError(f"{out} was not written: {type(error).__name__}: {error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
