"""The job files of launch/slurm, run by a real SLURM of virtual nodes: losses of one node, requeues, lost nodes."""

import json
import os
import signal
import subprocess
import time

import pytest
import yaml
from jobs import (
    FILES,
    JOB,
    NODES,
    RUN,
    flags,
    logs,
    losses,
    same_end,
    submit,
    wait_for_step,
    wait_until_restarted,
)
from support.exhaustive import EXHAUSTIVE
from virtual_cluster import unavailable

WHY_NOT = unavailable()
# Every job starts torch and DeepSpeed four times.
pytestmark = [EXHAUSTIVE, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]


@pytest.mark.parametrize("name", FILES)
def test_nodes_train_as_one(cluster, work, one_node, name):
    output = work / name
    job = submit(cluster, work, name, flags(6, output))
    record = cluster.wait(job, 240)
    assert record["JobState"] == "COMPLETED", logs(work, name, job)
    found = losses(output)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found == pytest.approx(one_node, abs=1e-5)
    assert {p.name for p in (work / "logs").glob(f"{name}-{job}.*")} == {
        f"{name}-{job}.{node}.log" for node in cluster.nodes
    }


@pytest.fixture(scope="module")
def undisturbed(cluster, work):
    output = work / "undisturbed"
    job = submit(cluster, work, "tasks", flags(60, output))
    assert cluster.wait(job, 240)["JobState"] == "COMPLETED", logs(work, "tasks", job)
    return output


@pytest.mark.parametrize("name", FILES)
def test_announced_end_is_requeued_and_ends_the_same(cluster, work, undisturbed, name):
    """What --signal=B:USR1 does before the time limit, at moments of the test's choice, twice."""
    output = work / f"requeued-{name}"
    job = submit(cluster, work, name, flags(60, output), DOCTOR="0")
    for restarts, step in ((0, 8), (1, 25)):
        wait_for_step(cluster, job, output, step)
        cluster.run("vctl", ["scancel", "--signal=USR1", "--batch", str(job)])
        wait_until_restarted(cluster, job, restarts + 1)
    record = cluster.wait(job, 240)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "2"), logs(work, name, job)
    assert same_end(output, undisturbed)


def test_a_killed_rank_brings_all_back_within_the_job(cluster, work, undisturbed):
    output = work / "killed"
    job = submit(cluster, work, "tasks", flags(60, output), DOCTOR="0")
    wait_for_step(cluster, job, output, 25)
    ranks = subprocess.run(["pgrep", "-f", f"^python launch/train.py .*{output}$"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    record = cluster.wait(job, 240)
    said = logs(work, "tasks", job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "0"), said
    assert "(attempt 1)" in said
    assert same_end(output, undisturbed)


def test_a_run_that_cannot_start_is_not_started_again(cluster, work):
    train = [*flags(2, work / "wrong"), "--set", "optimizer.params.rank_ratio=4.0"]
    job = submit(cluster, work, "torchrun", train, DOCTOR="0")
    record = cluster.wait(job, 120)
    said = logs(work, "torchrun", job)
    assert record["JobState"] == "FAILED", said
    assert "rank_ratio" in said
    assert "not started again" in said
    assert "(attempt 1)" not in said


@pytest.mark.skipif(NODES != 2, reason="one replica a node: two nodes")
def test_hsdp_sends_between_nodes_what_is_counted_as_such(cluster, work):
    """By the interface's own count, in a step: the gradients of what trains, a half from each rank of a node."""
    measured, counted = {}, {}
    for steps in (10, 40):
        output = work / f"hsdp-{steps}"
        before = cluster.bytes_sent("n1")
        train = [*flags(steps, output), "--engine", "fsdp2", "--replicas", "2"]
        job = submit(cluster, work, "tasks", train, DOCTOR="0")
        assert cluster.wait(job, 240)["JobState"] == "COMPLETED", logs(work, "tasks", job)
        measured[steps] = cluster.bytes_sent("n1") - before
        rows = json.loads((output / "comm.json").read_text())["traffic"]
        counted[steps] = 2 * sum(row["wire_bytes"] for row in rows if row["scope"] == "inter-node")
    # More than counted: headers, and what the ranks tell each other besides tensors.
    assert (measured[40] - measured[10]) / 30 == pytest.approx((counted[40] - counted[10]) / 30, rel=0.04)


def test_a_node_set_down_brings_the_job_back(cluster, work, undisturbed):
    output = work / "down"
    job = submit(cluster, work, "torchrun", flags(60, output), DOCTOR="0")
    wait_for_step(cluster, job, output, 25)
    cluster.run("vctl", ["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test"])
    time.sleep(2)
    cluster.run("vctl", ["scontrol", "update", "NodeName=n2", "State=RESUME"], check=False)
    record = cluster.wait(job, 300)
    assert record["JobState"] == "COMPLETED", logs(work, "torchrun", job)
    assert int(record["Restarts"]) >= 1
    assert same_end(output, undisturbed)


def test_a_sweep_runs_a_line_each(cluster, work):
    (work / "sweep.txt").write_text("--learning-rate 2e-3\n--learning-rate 1e-3\n")
    arguments = ["--array=1-2", "--nodes=1", "--gpus-per-node=2", "launch/slurm/sweep.sbatch", *RUN.split()]
    arguments += ["--data", "text.txt", "--max-steps", "2"]
    job = cluster.submit(work, *arguments, **JOB, SWEEP="sweep.txt", OUTPUT="swept", DOCTOR="0")
    for task in (1, 2):
        record = cluster.wait(f"{job}_{task}", 240)
        assert record["JobState"] == "COMPLETED", logs(work, "sweep", f"{job}_{task}")
    rates = [yaml.safe_load((work / f"swept/{task}/config.yaml").read_text())["learning_rate"] for task in (1, 2)]
    assert rates == [2e-3, 1e-3]


def test_nodes_that_cannot_train_end_the_job_before_it_starts(cluster, work):
    env = {**JOB, "NETWORK_INTERFACE": "ib7"}
    job = cluster.submit(
        work, "--nodes=2", "--gpus-per-node=2", "launch/slurm/torchrun.sbatch", *flags(2, work / "never"), **env
    )
    record = cluster.wait(job, 120)
    said = logs(work, "torchrun", job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "1:0"), said
    assert "ib7" in said
    assert "must be mended first" in said
    assert not (work / "never").exists()
