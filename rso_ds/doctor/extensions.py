"""The folder DeepSpeed's ops are built in, and locks that killed builds left there.

torch holds a file ``lock`` open while it builds; whoever finds it waits until it is gone, for ever if the builder was
killed. Nothing here imports DeepSpeed, which may start to wait at once, and nothing is deleted.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from rso_ds.doctor.disks import mount_of, on_network, size_free
from rso_ds.doctor.report import FAILED, OK, WARNING, Finding
from rso_ds.units import GIB

# A builder on another node, or another user's, is out of sight: so many seconds are its due.
_PATIENCE = 1800


def extensions_folder() -> Path:
    """Where torch builds extensions here: TORCH_EXTENSIONS_DIR, or its default for this Python and this torch."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    import sys

    import torch
    from torch.utils.cpp_extension import get_default_build_root

    kind = "cpu"
    if torch.version.hip is not None:
        kind = f"rocm{torch.version.hip.replace('.', '')}"
    elif torch.version.cuda is not None:
        kind = f"cu{torch.version.cuda.replace('.', '')}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{kind}"


def check_extensions(folder: Path) -> list[Finding]:
    """The locks in ``folder``, and the file system it is on."""
    findings = [_lock(lock) for lock in sorted(folder.glob("*/lock"))]
    if not findings:
        findings = [Finding("build locks", OK, f"none in {folder}")]
    findings += size_free("extensions folder", folder, needed=0, enough=GIB)
    mount, kind = mount_of(folder)
    if on_network(kind):
        findings.append(
            Finding(
                "extensions shared",
                WARNING,
                f"{folder} is on {kind} ({mount}), which nodes share: they wait for each other's builds, and a lock"
                " left by one stops all",
                "build once before the job, or export TORCH_EXTENSIONS_DIR=/tmp/torch_extensions_$USER",
            )
        )
    return findings


def holders(lock: Path) -> list[int]:
    """Processes of this machine that hold ``lock`` open, as far as this user may see.

    Compilers do not count: those of a killed build run on, but only the process that made the lock removes it.
    """
    target = os.stat(lock)
    return [int(p.name) for p in _processes() if any(os.path.samestat(opened, target) for opened in _opened(p))]


def _lock(lock: Path) -> Finding:
    name = f"lock of {lock.parent.name}"
    try:
        stat = lock.stat()
        age = time.time() - stat.st_mtime
        pids = holders(lock)
    except FileNotFoundError:
        return Finding(name, OK, "a build has just ended")
    if pids:
        return Finding(name, OK, f"being built, by process {', '.join(map(str, pids))}")
    text = f"{lock} is {_ago(age)} old and no process seen here is building: DeepSpeed would wait for it without a word"
    remedy = f"rm {shlex.quote(str(lock))}"
    _, kind = mount_of(lock)
    hidden = "another node" if on_network(kind) else "another user" if os.geteuid() not in (0, stat.st_uid) else ""
    if age < _PATIENCE and hidden:
        return Finding(name, WARNING, f"{text}, unless {hidden} builds", f"if none does: {remedy}")
    return Finding(name, FAILED, text, remedy)


def _processes() -> Iterator[Path]:
    return (path for path in Path("/proc").iterdir() if path.name.isdigit())


def _opened(process: Path) -> Iterator[os.stat_result]:
    try:
        for link in (process / "fd").iterdir():
            try:
                yield link.stat()
            except OSError:
                continue
    except OSError:
        return


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
