"""Which launcher started a process, from the variables that each really sets."""

import os
import sys

import pytest

from rso_ds.comm.launch import export_launch_environment, find_launch, first_host, tasks_per_node
from rso_ds.errors import RSOError

# As srun of SLURM 22.05 sets them for the second task of the second of two nodes.
SRUN = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_NODEID": "1", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
RANK = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def place(environ):
    launch = find_launch(environ)
    return launch.launcher, launch.rank, launch.local_rank, launch.world_size, launch.local_world_size


def test_srun():
    assert place(SRUN) == ("SLURM", 3, 1, 4, 2)
    launch = find_launch(SRUN)
    assert launch.master_addr == "n1"
    assert 15000 <= launch.master_port < 30000
    assert find_launch({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port == launch.master_port
    assert find_launch({**SRUN, "SLURM_STEP_ID": "3"}).master_port != launch.master_port
    assert find_launch({**SRUN, "MASTER_ADDR": "x", "MASTER_PORT": "7"}).variables()["MASTER_PORT"] == "7"


def test_srun_with_a_gpu_a_task_uses_the_only_gpu_it_sees():
    assert find_launch({**SRUN, "CUDA_VISIBLE_DEVICES": "1"}).local_rank == 0
    assert find_launch({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1"}).local_rank == 1


def test_torchrun_and_deepspeed_inside_srun_win():
    one_task = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", **RANK}
    assert place({**one_task, "TORCHELASTIC_RUN_ID": "17", "LOCAL_WORLD_SIZE": "2"}) == ("torchrun", 5, 1, 8, 2)
    assert place({**one_task, "CROSS_RANK": "1", "LOCAL_SIZE": "4"}) == ("deepspeed", 5, 1, 8, 4)
    assert place(RANK) == ("environment", 5, 1, 8, None)


def test_mpi():
    assert place({**MPIRUN, "MASTER_ADDR": "n1"}) == ("Open MPI", 3, 1, 4, 2)
    assert place({**HYDRA}) == ("MPI (PMI)", 1, 1, 2, 2)
    assert find_launch(HYDRA).master_addr == "127.0.0.1"
    assert find_launch({**MPIRUN, "SLURM_JOB_NODELIST": "m7,n[1-2]"}).master_addr == "m7"
    # mpirun in a job of several nodes starts its daemons by srun
    assert find_launch({**SRUN, **MPIRUN, "MASTER_ADDR": "n1"}).launcher == "Open MPI"


def test_alone():
    assert place({}) == ("none", 0, 0, 1, 1)
    assert place({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})[0] == "none"
    assert find_launch({"MASTER_PORT": "123"}).master_port == 123


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "not started by srun"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT, LOCAL_RANK not"),
        ({**RANK, "WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID must be a number"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "export MASTER_ADDR"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "MPI_LOCALRANKID not"),
    ],
)
def test_refused(environ, says):
    with pytest.raises(RSOError, match=says):
        find_launch(environ)


def test_mpi_on_several_nodes_needs_an_address(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RSOError, match="mpirun -x MASTER_ADDR"):
        find_launch(MPIRUN)


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, {"LOCAL_RANK": "3"}])
def test_what_an_earlier_job_left_behind_is_refused(left):
    (key,) = left
    with pytest.raises(RSOError, match=rf"{key}=\d is set, but RANK is not.*unset {key}"):
        find_launch(left)


def test_adopt_exports_what_is_missing(monkeypatch):
    for key in (*RANK, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(key, "")  # restored afterwards, also what adopt() sets
        monkeypatch.delenv(key)
    for key, value in SRUN.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MASTER_PORT", "4242")
    export_launch_environment()
    assert {k: os.environ[k] for k in (*RANK, "LOCAL_WORLD_SIZE")} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
        "MASTER_PORT": "4242",
    }  # fmt: skip
    assert export_launch_environment().launcher == "environment"  # a second call finds what the first exported


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n[03-05,9],m1", "n03"), ("n1,n2", "n1"), ("n7", "n7"), ("r[1-2]n[10-12]-ib,x", "r1n10-ib"), ("", "")],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
