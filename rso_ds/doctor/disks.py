"""Folders a job writes to: whether it can, how much room is left, and whose disk it is."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from rso_ds.doctor.report import FAILED, NOT_CHECKED, OK, WARNING, Finding
from rso_ds.units import GB, GIB, amount

_NETWORK = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb",
    "ceph",
    "9p",
    "afs",
    "panfs",
    "wekafs",
    "orangefs",
    "pvfs",
)
_NETWORK_FUSE = ("sshfs", "glusterfs", "juicefs", "ceph", "s3fs", "gcsfuse", "mergerfs.nfs", "beegfs")
# What a run keeps: two complete checkpoints (--keep-last), and the one that is being written.
_CHECKPOINTS = 3


def check_output(output: str | None, checkpoint: int | None) -> list[Finding]:
    """The results folder; ``checkpoint``: bytes of one checkpoint, None if not known."""
    if output is None:
        return [Finding("output", NOT_CHECKED, "no --output given")]
    if checkpoint is None:
        return size_free("output", Path(output), 0, 10 * GB)
    return size_free("output", Path(output), checkpoint, _CHECKPOINTS * checkpoint)


def check_folders() -> list[Finding]:
    """Temporary files, downloaded models and shared memory."""
    findings = size_free("temporary files", Path(tempfile.gettempdir()), 0, GIB)
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    cache = os.environ.get("HF_HOME", f"{home}/huggingface")
    findings += size_free("model cache", Path(cache).expanduser(), 0, GIB)
    return findings


def check_shared_memory(ranks_here: int, folder: str = "/dev/shm") -> list[Finding]:
    """Data loaders and NCCL's ranks of one node talk through it, and die with a bus error where it is full."""
    if not os.path.isdir(folder):
        return [Finding("shared memory", WARNING, f"{folder} does not exist", "mount a tmpfs there")]
    stat = os.statvfs(folder)
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    text = f"{folder}: {amount(free)} free of {amount(total)}"
    if total >= GB and free >= GB:
        return [Finding("shared memory", OK, text)]
    small = total <= 64 * 2**20
    remedy = "docker run --shm-size=16g, or --ipc=host; Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if not small and total >= GB:
        remedy = f"look for files that dead processes left: ls -l {folder}"
    return [Finding("shared memory", FAILED if small and ranks_here > 1 else WARNING, text, remedy)]


def size_free(name: str, folder: Path, needed: int, enough: int) -> list[Finding]:
    """Whether ``folder`` (or what is to hold it) can be written to; ``needed``, ``enough``: bytes free, or it fails,
    or warns."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return [Finding(name, FAILED, f"{folder}: {existing} is not a folder", "give another folder")]
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room" if full else "give another folder, or its permissions to this user"
        return [Finding(name, FAILED, f"{folder} cannot be written to: {error.strerror}", remedy)]
    stat = os.statvfs(existing)
    free = stat.f_bavail * stat.f_frsize
    text = f"{folder}: {amount(free)} free ({mount_of(existing)[1]})"
    if free < needed:
        return [Finding(name, FAILED, f"{text}, a checkpoint needs {amount(needed)}", "make room, or another --output")]
    if free < enough:
        why = f"{_CHECKPOINTS} checkpoints (two kept, one being written) need" if needed else "advised are"
        return [Finding(name, WARNING, f"{text}, {why} {amount(enough)}", "make room, or give another folder")]
    return [Finding(name, OK, text)]


def mount_of(path: Path, mounts: str = "/proc/mounts") -> tuple[str, str]:
    """(mount point, type) of the file system that holds ``path``; without asking it, since it may hang."""
    real = os.path.abspath(path)
    best = ("/", "unknown")
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return best
    for line in lines:
        fields = line.split()
        point = fields[1].replace("\\040", " ")
        # The last of equal mount points lies on top.
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
            best = (point, fields[2])
    return best


def on_network(kind: str) -> bool:
    """Whether nodes are likely to share a file system of this type."""
    if kind.startswith("fuse."):
        return kind.removeprefix("fuse.").startswith(_NETWORK_FUSE)
    return kind.startswith(_NETWORK)
