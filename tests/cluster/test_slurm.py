"""The job files of launch/slurm, run by a real SLURM of two virtual nodes: losses of one node, requeues, lost nodes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from virtual_cluster import VirtualCluster, unavailable

ROOT = Path(__file__).parents[2]
WHY_NOT = unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

RUN = (
    "--deepspeed ds_configs/rso_zero2.json --model llama-9m --vocab-size 512 --global-batch 8 --micro-batch 2"
    " --seq-len 32 --sample-tokens 0 --log-interval 1 --eval-tokens 2000 --eval-interval 1000 --save-interval 20"
)
JOB = {
    "RANKS_PER_NODE": "2",
    "NETWORK_INTERFACE": "eth0",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "VENV": str(Path(sys.executable).parent.parent),
}
# One task a node for torchrun, one a rank for the others.
FILES = {"torchrun": [], "tasks": ["--ntasks-per-node=2"], "deepspeed": ["--ntasks-per-node=2"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with VirtualCluster(tmp_path_factory.mktemp("cluster"), 2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder to submit from, as a checkout looks; jobs leave their logs there."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("launch", "rso_ds", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "text.txt").write_text("\n\n".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))))
    return folder


def flags(steps: int, output: Path) -> list[str]:
    return [*RUN.split(), "--data", "text.txt", "--max-steps", str(steps), "--output", str(output)]


def submit(cluster, work, name, steps, output, **env):
    return cluster.submit(
        work, "--nodes=2", *FILES[name], "--time=10", f"launch/slurm/{name}.sbatch", *flags(steps, output), **JOB, **env
    )


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def logs(work: Path, name: str, job: int | str) -> str:
    return "\n".join(
        p.read_text()[-3000:] for p in [*work.glob(f"{name}-{job}.out"), *work.glob(f"logs/{name}-{job}.*")]
    )


@pytest.fixture(scope="module")
def one_node(work):
    """The same ranks and global batch on one node."""
    output = work / "one_node"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "launch/train.py"]
    env = {**os.environ, **JOB, "PYTHONPATH": str(work)}
    done = subprocess.run([*command, *flags(6, output)], cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(output)


@pytest.mark.parametrize("name", FILES)
def test_two_nodes_train_as_one(cluster, work, one_node, name):
    output = work / name
    job = submit(cluster, work, name, 6, output)
    record = cluster.wait(job, 240)
    assert record["JobState"] == "COMPLETED", logs(work, name, job)
    found = losses(output)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found == pytest.approx(one_node, abs=1e-5)
    assert {p.name for p in (work / "logs").glob(f"{name}-{job}.*")} == {f"{name}-{job}.n{i}.log" for i in (1, 2)}


@pytest.fixture(scope="module")
def undisturbed(cluster, work):
    output = work / "undisturbed"
    job = submit(cluster, work, "tasks", 60, output)
    assert cluster.wait(job, 240)["JobState"] == "COMPLETED", logs(work, "tasks", job)
    return output


def wait_for_step(cluster, job: int, output: Path, step: int, timeout: float = 200) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (output / "metrics.jsonl").exists() and max(losses(output), default=0) >= step:
            return
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        time.sleep(0.1)
    raise TimeoutError(f"step {step} of job {job} not reached")


def wait_until_restarted(cluster, work, name, job: int, restarts: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    record = {}
    while record.get("JobState") != "RUNNING" or int(record["Restarts"]) < restarts:
        assert time.monotonic() < deadline, f"{record}\n{logs(work, name, job)}"
        cluster.start_now(job)
        time.sleep(0.5)
        record = cluster.job(job)


def assert_same_end(output: Path, undisturbed: Path) -> None:
    assert losses(output) == losses(undisturbed)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("name", FILES)
def test_announced_end_is_requeued_and_ends_the_same(cluster, work, undisturbed, name):
    """What --signal=B:USR1 does before the time limit, at moments of the test's choice, twice."""
    output = work / f"requeued-{name}"
    job = submit(cluster, work, name, 60, output, DOCTOR="0")
    for restarts, step in ((0, 8), (1, 25)):
        wait_for_step(cluster, job, output, step)
        cluster.run("vctl", ["scancel", "--signal=USR1", "--batch", str(job)])
        wait_until_restarted(cluster, work, name, job, restarts + 1)
    record = cluster.wait(job, 240)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "2"), logs(work, name, job)
    assert_same_end(output, undisturbed)


def test_a_node_set_down_brings_the_job_back(cluster, work, undisturbed):
    output = work / "down"
    job = submit(cluster, work, "torchrun", 60, output, DOCTOR="0")
    wait_for_step(cluster, job, output, 25)
    cluster.run("vctl", ["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test"])
    time.sleep(2)
    cluster.run("vctl", ["scontrol", "update", "NodeName=n2", "State=RESUME"], check=False)
    record = cluster.wait(job, 300)
    assert record["JobState"] == "COMPLETED", logs(work, "torchrun", job)
    assert int(record["Restarts"]) >= 1
    assert_same_end(output, undisturbed)


def test_a_sweep_runs_a_line_each(cluster, work):
    (work / "sweep.txt").write_text("--learning-rate 2e-3\n--learning-rate 1e-3\n")
    arguments = ["--array=1-2", "--nodes=1", "launch/slurm/sweep.sbatch", *RUN.split()]
    arguments += ["--data", "text.txt", "--max-steps", "2"]
    job = cluster.submit(work, *arguments, **JOB, SWEEP="sweep.txt", OUTPUT="swept", DOCTOR="0")
    for task in (1, 2):
        record = cluster.wait(f"{job}_{task}", 240)
        assert record["JobState"] == "COMPLETED", logs(work, "sweep", f"{job}_{task}")
    rates = [yaml.safe_load((work / f"swept/{task}/config.yaml").read_text())["learning_rate"] for task in (1, 2)]
    assert rates == [2e-3, 1e-3]


def test_nodes_that_cannot_train_end_the_job_before_it_starts(cluster, work):
    job = cluster.submit(
        work, "--nodes=2", "launch/slurm/torchrun.sbatch", *flags(2, work / "never"),
        **{**JOB, "NETWORK_INTERFACE": "ib7"},
    )  # fmt: skip
    record = cluster.wait(job, 120)
    said = logs(work, "torchrun", job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "1:0"), said
    assert "ib7" in said
    assert "must be mended first" in said
    assert not (work / "never").exists()
