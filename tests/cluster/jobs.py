"""What the tests and the benchmark of the cluster run: a few steps of a small model, by the files of launch/."""

import json
import os
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from support.progress import run_command
from virtual_cluster import VirtualCluster

ROOT = Path(__file__).parents[2]
RANKS = 4
NODES = int(os.environ.get("RSO_DS_CLUSTER_NODES", "2"))
RUN = (
    "--deepspeed ds_configs/rso_zero2.json --model llama-9m --vocab-size 512 --global-batch 8 --micro-batch 2"
    " --seq-len 32 --sample-tokens 0 --log-interval 1 --eval-tokens 2000 --eval-interval 1000 --save-interval 20"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
JOB = {**ENVIRONMENT, "NETWORK_INTERFACE": "eth0", "VENV": str(Path(sys.executable).parent.parent)}
FILES = ("torchrun", "tasks", "deepspeed")


def make_work(folder: Path) -> Path:
    """A folder to submit from, as a checkout looks; jobs leave their logs there."""
    folder.mkdir(exist_ok=True)
    for name in ("launch", "rso_ds", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "text.txt").write_text("\n\n".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))))
    return folder


def flags(steps: int, output: Path, run: str = RUN) -> list[str]:
    return [*run.split(), "--data", "text.txt", "--max-steps", str(steps), "--output", str(output)]


def submit(cluster: VirtualCluster, work: Path, name: str, train: list[str], *sbatch: str, **env: str) -> int:
    """RANKS ranks over all nodes, as many as a node has GPUs by SLURM's word; the job's number."""
    nodes = len(cluster.nodes)
    a_node = RANKS // nodes
    tasks = [] if name == "torchrun" else [f"--ntasks-per-node={a_node}"]
    job = [f"--nodes={nodes}", f"--gpus-per-node={a_node}", *tasks, "--time=10", *sbatch]
    return cluster.submit(work, *job, f"launch/slurm/{name}.sbatch", *train, **JOB, **env)


def train_on_one_node(work: Path, steps: int, output: Path) -> dict[int, float]:
    """Losses of the same ranks and global batch on one node."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["launch/train.py", *flags(steps, output)]
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(work)}
    done = run_command(command, cwd=work, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(output)


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def nodes_seen(output: Path) -> int:
    """Nodes that the ranks told apart."""
    return int(json.loads((output / "comm.json").read_text())["nodes"])


def logs(work: Path, name: str, job: int | str) -> str:
    files = [*work.glob(f"{name}-{job}.out"), *work.glob(f"logs/{name}-{job}.*")]
    return "\n".join(path.read_text()[-3000:] for path in files)


def wait_for_step(cluster: VirtualCluster, job: int, output: Path, step: int, timeout: float = 200) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (output / "metrics.jsonl").exists() and max(losses(output), default=0) >= step:
            return
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        time.sleep(0.1)
    raise TimeoutError(f"step {step} of job {job} not reached")


def wait_until_restarted(cluster: VirtualCluster, job: int, restarts: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    record: dict[str, str] = {}
    while record.get("JobState") != "RUNNING" or int(record["Restarts"]) < restarts:
        assert time.monotonic() < deadline, record
        record = cluster.job(job)
        if record["JobState"] == "PENDING" and record["Reason"] == "BeginTime":
            cluster.start_soon(job)
        time.sleep(0.5)


def same_end(output: Path, undisturbed: Path) -> bool:
    """Whether losses and final weights are equal, bit for bit."""
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, undisturbed))
    same_weights = ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    return same_weights and losses(output) == losses(undisturbed)
