"""Pieces to and from ``torch.distributed.checkpoint``: any world size writes, any other reads."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rso_ds.checkpoint.pieces import Piece
from rso_ds.comm.failures import failed_write
from rso_ds.errors import RSOCheckpointError


def save_pieces(pieces: Mapping[str, Piece], folder: Path, group: Any = None) -> None:
    """Write this rank's ``pieces`` (name -> piece) into ``folder``; all ranks of ``group`` call this together.

    What several ranks hold alike is written once. Raises torch's ``CheckpointException`` on every rank if one
    of them fails, or if the pieces of all ranks do not make up whole tensors.
    """
    writer = _Writer(folder, sync_files=True)
    with _quiet():
        dcp.save(dict(pieces), storage_writer=writer, planner=_SavePlanner(), process_group=group, no_dist=_alone())


def load_pieces(targets: Mapping[str, Sequence[Piece]], folder: Path, group: Any = None) -> None:
    """Fill the memory of ``targets`` (name -> pieces of this rank), converting to its dtype."""
    _read(_Reader(folder), targets, group, _alone())


class StoredTensors:
    """The tensors of a checkpoint folder, read one at a time by a single process."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        self.metadata: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.metadata

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.metadata[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self.metadata[name].properties.dtype

    def load(self, name: str) -> Tensor:
        """The whole tensor ``name`` on the CPU, as stored."""
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        target = Piece(self.shape(name), 0, tensor.view(-1))
        _read(self._reader, {name: [target]}, None, True)
        return tensor


def _read(reader: _Reader, targets: Mapping[str, Sequence[Piece]], group: Any, alone: bool) -> None:
    names = dict.fromkeys(targets)  # the planner knows the rest
    with _quiet():
        dcp.load(names, storage_reader=reader, planner=_LoadPlanner(targets), process_group=group, no_dist=alone)


def _alone() -> bool:
    return not dist.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is meant
        yield


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self.state_dict.items():
            properties = TensorProperties(dtype=piece.flat.dtype)
            for i, (offsets, sizes) in enumerate(piece.boxes()):
                chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
                data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(piece.shape))
                index = MetadataIndex(name, torch.Size(offsets), i)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        piece = self.state_dict[index.fqn]
        at = next(i for i, (offsets, _) in enumerate(piece.boxes()) if offsets == tuple(index.offset or ()))
        return piece.tensors()[at]


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, targets: Mapping[str, Sequence[Piece]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._targets = targets

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, pieces in self._targets.items():
            chunks = [
                ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
                for piece in pieces
                for offsets, sizes in piece.boxes()
            ]
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, entry, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.index is not None
        return [t for piece in self._targets[index.fqn] for t in piece.tensors()][index.index]


class _Writer(dcp.FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except Exception as error:
            raise (failed_write(error) or error) from None  # before it travels to other ranks, which loses its context


class _Reader(dcp.FileSystemReader):
    """Torch's reader, whose metadata file is a pickle: here it may name nothing but the classes of metadata."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            path = Path(str(self.path)) / ".metadata"
            try:
                metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            except (OSError, pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError) as error:
                raise RSOCheckpointError(f"{path} cannot be read: {error}.") from None
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._metadata = metadata
        return self._metadata


# By name, for a module's namespace also holds what it imports, and code can be made of that.
_METADATA = (
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
    "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_DTYPES = {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
_NAMED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *(("torch", dtype) for dtype in _DTYPES),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of checkpoint metadata")
