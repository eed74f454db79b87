"""What ranks send each other: counted, predicted, compressed.

``install`` and ``CommCounter`` count; ``BucketCompression`` with ``compress_hook`` and ``DenseSubspace``
with ``dense_subspace_hook`` are communication hooks for DistributedDataParallel. ``leave_process_groups`` ends
a program.
"""

from typing import Any

from rso_ds.comm.counter import KINDS, CommCounter, install
from rso_ds.comm.shutdown import leave_process_groups

_HOOKS = {
    "BucketCompression": "rso_ds.comm.compression",
    "compress_hook": "rso_ds.comm.compression",
    "DenseSubspace": "rso_ds.comm.dense_hook",
    "dense_subspace_hook": "rso_ds.comm.dense_hook",
}


def __getattr__(name: str) -> Any:
    # The hooks need layers, which come after the counter in the order of imports.
    if name in _HOOKS:
        from importlib import import_module

        return getattr(import_module(_HOOKS[name]), name)
    raise AttributeError(f"module 'rso_ds.comm' has no attribute {name!r}")


__all__ = [
    "KINDS",
    "BucketCompression",
    "CommCounter",
    "DenseSubspace",
    "compress_hook",
    "dense_subspace_hook",
    "install",
    "leave_process_groups",
]
