"""Which launcher started this process, and the process's place among the ranks, from environment variables alone."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rso_ds.errors import RSOError

# Below the ports that Linux gives to outgoing connections (32768 and up).
_FIRST_PORT, _PORTS = 15000, 15000


@dataclass(frozen=True)
class Launch:
    """``launcher``: "torchrun", "deepspeed", "environment" (RANK set by something else), "SLURM" (srun), "Open MPI",
    "MPI (PMI)" (MPICH, Intel MPI), "MVAPICH" or "none" (alone). ``local_rank``: index on this node, which is also that
    of the GPU among those that the process sees. ``local_world_size``: ranks on this node, None if not known.
    ``master_addr``, ``master_port``: where rank 0 listens."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    master_addr: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """What torch.distributed and DeepSpeed read."""
        known = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        return {key: str(value) for key, value in known.items() if value is not None}


def export_launch_environment() -> Launch:
    """``find_launch`` of this process, exporting what it found, over what an earlier job may have left behind.

    Call it before ``torch.distributed.init_process_group`` or ``deepspeed.init_distributed``; ``rso_ds.initialize``
    and ``launch/train.py`` do. Raises ``RSOError`` as ``find_launch`` does.
    """
    launch = find_launch(os.environ)
    os.environ.update(launch.variables())
    return launch


def find_launch(environ: Mapping[str, str]) -> Launch:
    """Read the variables of torchrun, deepspeed, srun, Open MPI, MPICH, Intel MPI and MVAPICH, in this order.

    MASTER_ADDR and MASTER_PORT count wherever they are set. Otherwise, under srun, rank 0 listens on the step's first
    node, on a port made from the job's and the step's number; under MPI the ranks must share a node, sit in a SLURM
    job, or have mpi4py to tell each other.

    Raises ``RSOError`` if several processes were started and the variables do not say how they find each other.
    """
    if "RANK" in environ:
        return _from_rank(environ)
    # mpirun inside a job starts its daemons by srun: then Open MPI's own variables say more.
    by_mpirun = "OMPI_COMM_WORLD_RANK" in environ
    if "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1 and not by_mpirun:
        return _from_slurm(environ)
    for launcher, keys in _MPI.items():
        if _number(environ, keys[0], 1) > 1:
            return _from_mpi(environ, launcher, *keys)
    if "SLURM_STEP_ID" not in environ and _number(environ, "SLURM_NTASKS", 1) > 1:
        raise RSOError(
            f"SLURM_NTASKS={environ['SLURM_NTASKS']}, but this process was not started by srun and would train alone."
            " Start it with srun, torchrun or the deepspeed launcher; alone on purpose: unset SLURM_NTASKS."
        )
    for key, alone in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        if environ.get(key) and _number(environ, key) != alone:
            raise RSOError(
                f"{key}={environ[key]} is set, but RANK is not: nothing says which of the ranks this process is. Alone:"
                f" unset {key}. Among others: start with torchrun, deepspeed or srun, or export RANK, LOCAL_RANK,"
                " WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process."
            )
    port = _number(environ, "MASTER_PORT", 0) or _free_port()
    return Launch("none", 0, 0, 1, 1, environ.get("MASTER_ADDR", "127.0.0.1"), port)


# Number of ranks, rank, rank on the node, ranks on the node.
_MPI = {
    "Open MPI": (
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH": (
        "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI (PMI)": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}  # fmt: skip


def _from_rank(environ: Mapping[str, str]) -> Launch:
    missing = [key for key in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environ.get(key)]
    if "LOCAL_RANK" not in environ and environ.get("WORLD_SIZE") != "1":
        missing.append("LOCAL_RANK")
    if missing:
        raise RSOError(
            f"RANK={environ['RANK']} is set, but {', '.join(missing)} not: export all of RANK, LOCAL_RANK (0 with one"
            " process a node), WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start with torchrun or deepspeed."
        )
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "environment"
    if launcher == "environment" and "CROSS_RANK" in environ:
        launcher = "deepspeed"
    local = _number(environ, "LOCAL_WORLD_SIZE", 0) or _number(environ, "LOCAL_SIZE", 0) or None
    return Launch(
        launcher,
        _number(environ, "RANK"),
        _number(environ, "LOCAL_RANK", 0),
        _number(environ, "WORLD_SIZE"),
        local,
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"),
    )


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    world = _number(environ, "SLURM_STEP_NUM_TASKS")
    counts = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environ, "SLURM_NODEID", 0)
    local_rank = _number(environ, "SLURM_LOCALID")
    if len(environ.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and environ.get("CUDA_VISIBLE_DEVICES"):
        local_rank = 0  # --gpus-per-task, --gpu-bind: the task sees its own GPU alone
    address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
    if not address:
        raise RSOError("SLURM_STEP_NODELIST is not set: export MASTER_ADDR, the host of the step's first task.")
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    port = _number(environ, "MASTER_PORT", 0) or _FIRST_PORT + (job * 31 + step) % _PORTS
    local = counts[node] if node < len(counts) else None
    return Launch("SLURM", _number(environ, "SLURM_PROCID"), local_rank, world, local, address, port)


def _from_mpi(
    environ: Mapping[str, str], launcher: str, size_key: str, rank_key: str, local_key: str, local_size_key: str
) -> Launch:
    world, local = _number(environ, size_key), _number(environ, local_size_key, 0) or None
    rank = _number(environ, rank_key)
    if local_key not in environ and local != world:
        raise RSOError(
            f"{rank_key}={rank} is set, but {local_key} not: export LOCAL_RANK and RANK, WORLD_SIZE, MASTER_ADDR,"
            " MASTER_PORT for each process."
        )
    local_rank = _number(environ, local_key, rank)
    # A number that the processes of one mpirun share and those of another do not.
    job = environ.get("PMIX_NAMESPACE") or environ.get("PMI_JOBID") or environ.get("SLURM_JOB_ID") or ""
    port = _number(environ, "MASTER_PORT", 0) or _FIRST_PORT + sum(n * ord(c) for n, c in enumerate(job, 7)) % _PORTS
    address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_JOB_NODELIST", ""))
    if not address and local == world:
        address = "127.0.0.1"
    if not address:
        address, port = _told_by_rank_0(launcher)
    return Launch(launcher, rank, local_rank, world, local, address, port)


def _told_by_rank_0(launcher: str) -> tuple[str, int]:
    try:
        from mpi4py import MPI
    except ImportError:
        raise RSOError(
            f"{launcher} started ranks on several nodes, and nothing says where rank 0 is: export MASTER_ADDR for all"
            " ranks (mpirun -x MASTER_ADDR=host, the host of rank 0), or install mpi4py."
        ) from None
    mine: tuple[str, int] = (socket.gethostname(), _free_port())
    told: tuple[str, int] = MPI.COMM_WORLD.bcast(mine, root=0)
    return told


def first_host(nodelist: str) -> str:
    """``n03`` of SLURM's ``n[03-05,9],m1``; "" of ""."""
    name, bracket = "", ""
    for char in nodelist:
        if bracket:
            bracket += char
            if char == "]":
                found = re.match(r"\[(\d+)", bracket)
                name, bracket = name + (found[1] if found else ""), ""
        elif char == "[":
            bracket = char
        elif char == ",":
            break
        else:
            name += char
    return name


def tasks_per_node(text: str) -> list[int]:
    """[2, 2, 1] of SLURM's ``2(x2),1``."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts


def _number(environ: Mapping[str, str], key: str, default: int | None = None) -> int:
    value: Any = environ.get(key, default)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise RSOError(f"the environment variable {key} must be a number, got {value!r}.") from None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port
