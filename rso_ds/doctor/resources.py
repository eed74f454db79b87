"""Memory, open files and threads that this process may use."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from rso_ds.doctor.report import OK, WARNING, Finding
from rso_ds.units import amount

_V1 = "memory.limit_in_bytes"
_V2 = "memory.max"


def check_memory(ranks_here: int) -> list[Finding]:
    """RAM of the machine and the limit of the control group, which kills without a word."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, available = values["MemTotal"], values.get("MemAvailable", values["MemFree"])
    limit = memory_limit()
    text = f"{amount(available)} available of {amount(total)}"
    if limit is None or limit >= total:
        return [Finding("memory", OK, text)]
    text += f"; the control group allows {amount(limit)}"
    if limit < total / 2:
        remedy = "SLURM: --mem=0 for the whole node; docker: --memory; Kubernetes: resources.limits.memory"
        return [Finding("memory", WARNING, f"{text}, for {ranks_here} rank(s) here", remedy)]
    return [Finding("memory", OK, text)]


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Smallest limit in bytes of this process's control group and those above it, None without one."""
    limits = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, name = (root, _V2) if not controllers else (root / "memory", _V1)
        folder = base / inside.lstrip("/")
        # In a container the path is often that of the host, and the own group is mounted at the root.
        for level in (folder, *folder.parents):
            if level == base.parent:
                break
            try:
                text = (level / name).read_text().strip()
            except OSError:
                continue
            if text != "max" and int(text) < 2**60:
                limits.append(int(text))
    return min(limits, default=None)


def check_open_files(world_size: int) -> list[Finding]:
    """Every rank holds connections to every other, besides shards and libraries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 512 + 8 * world_size
    text = f"{soft} allowed ({hard} at most)"
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return [Finding("open files", OK, text)]
    return [Finding("open files", WARNING, f"{text}; {wanted} advised", f"ulimit -n {max(wanted, min(hard, 65536))}")]


def check_threads(ranks_here: int) -> list[Finding]:
    """Threads of all ranks of this node against the cores they may use."""
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // ranks_here)
    setting = os.environ.get("OMP_NUM_THREADS")
    where = f"{cores} core(s) for {ranks_here} rank(s) here"
    remedy = f"export OMP_NUM_THREADS={share}"
    if setting is None:
        if ranks_here == 1:
            return [Finding("threads", OK, f"OMP_NUM_THREADS is not set; {where}")]
        return [Finding("threads", WARNING, f"OMP_NUM_THREADS is not set: every rank takes all of {where}", remedy)]
    first = setting.split(",")[0]
    if not first.isdigit() or int(first) < 1:
        return [Finding("threads", WARNING, f"OMP_NUM_THREADS={setting} is not a number of threads", remedy)]
    text = f"OMP_NUM_THREADS={setting}, {where}"
    if int(first) * ranks_here > cores and int(first) > 1:
        return [Finding("threads", WARNING, f"{text}: they will wait for each other", remedy)]
    return [Finding("threads", OK, text)]
