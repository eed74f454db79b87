"""Launching without a scheduler: the deepspeed launcher by pdsh and ssh, torchrun on each node, mpirun."""

import os

import pytest
from jobs import ENVIRONMENT, JOB, RANKS, flags, losses, nodes_seen
from support.exhaustive import EXHAUSTIVE
from virtual_cluster import unavailable

WHY_NOT = unavailable("sshd", "ssh-keygen", "pdsh", "mpirun")
# Every job starts torch and DeepSpeed four times.
pytestmark = [EXHAUSTIVE, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


@pytest.fixture(scope="module")
def hosts(cluster, work):
    cluster.start_ssh()
    slots = RANKS // len(cluster.nodes)
    (work / "hosts").write_text("".join(f"{node} slots={slots}\n" for node in cluster.nodes))
    return slots


def environment(work):
    path = f"{JOB['VENV']}/bin:{os.environ['PATH']}"
    return {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(work), "PATH": path}


def test_deepspeed_with_a_hostfile(cluster, work, hosts, one_node):
    output = work / "hostfile"
    # What DeepSpeed exports to the nodes beside NCCL_*, PYTHON*, UCX_*, MV2_* and MLFLOW_*.
    exported = {k: v for k, v in environment(work).items() if not k.startswith("PYTHON")}
    (work / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in exported.items()))
    command = ["deepspeed", "--hostfile", "hosts", "launch/train.py", *flags(6, output)]
    said = cluster.run("n1", command, work, timeout=240, **environment(work))
    assert losses(output) == pytest.approx(one_node, abs=1e-5), said
    assert nodes_seen(output) == len(cluster.nodes)


def test_torchrun_on_each_node(cluster, work, hosts, one_node):
    output = work / "by_hand"
    nodes = len(cluster.nodes)
    command = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={hosts}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=n1:29400", "launch/train.py", *flags(6, output)]
    started = [cluster.popen(node, command, work, **environment(work)) for node in cluster.nodes]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * nodes, "\n".join(said)
    assert losses(output) == pytest.approx(one_node, abs=1e-5)
    assert nodes_seen(output) == len(cluster.nodes)


def test_mpirun_over_ssh(cluster, work, hosts, one_node):
    output = work / "mpirun"
    exported = [f for key in environment(work) for f in ("-x", key)]
    command = ["mpirun", "--allow-run-as-root", "-np", str(RANKS), "--hostfile", "hosts", "-x", "MASTER_ADDR=n1"]
    command += [*exported, "python", "launch/train.py", *flags(6, output)]
    said = cluster.run("n1", command, work, timeout=240, **environment(work))
    assert losses(output) == pytest.approx(one_node, abs=1e-5), said
    assert nodes_seen(output) == len(cluster.nodes)
