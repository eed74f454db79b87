"""Launchers, time limits, a lost node and bytes between nodes, under a real SLURM of virtual nodes on one machine.

    python benchmarks/reliability/cluster.py --parts launchers limit down bytes collectives \
        --nodes 2 4 --json cluster.json

Needs root and the packages of tests/cluster/install.sh. Four ranks share all nodes in every part.

launchers: each job file of launch/slurm on ``--nodes`` nodes, losses against the same ranks on one node.
limit: jobs with a time limit of a minute, requeued until they end, against an undisturbed run; times to resume.
down: a node set DOWN in the middle, the same.
bytes: what leaves a node in a step by the interface's own count (two runs of 10 and 40 steps, their difference),
    beside the closed form of ``rso-ds comm``.
collectives: the same for single collectives of gloo, beside a ring's, on which the closed form rests.

Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests" / "cluster", ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))

from cases.comm_cases import LARGE
from jobs import FILES, JOB, RANKS, RUN, flags, logs, losses, make_work, nodes_seen, same_end, submit, train_on_one_node
from virtual_cluster import VirtualCluster, unavailable

from rso_ds.deepspeed_json import rso_config
from rso_ds.models import model_config
from rso_ds.planning.communication.exchange import Deployment, Exchange, transfers
from rso_ds.planning.communication.network import Network
from rso_ds.planning.memory.account import model_builder
from rso_ds.planning.memory.command import read_rso_json
from rso_ds.planning.memory.methods import method

PARTS = ("launchers", "limit", "down", "bytes", "collectives")
STEPS = {"launchers": 6, "limit": 700, "down": 150}
# As a model too large to stay gathered: every parameter is gathered for forward and for backward.
ZERO3 = {"stage": 3, **LARGE}
HPZ = {**ZERO3, "zero_hpz_partition_size": 2}
# Changes to ds_configs/rso_zero3.json, --engine and --replicas.
LAYOUTS: dict[str, tuple[dict[str, Any], str, int]] = {
    "FSDP2": ({}, "fsdp2", 1),
    "HSDP 2x2": ({}, "fsdp2", 2),
    "ZeRO-3": ({"zero_optimization": ZERO3}, "zero", 1),
    "ZeRO-3, hpZ 2": ({"zero_optimization": HPZ}, "zero", 1),
}
ALL_LAYERS = ["default", "embeddings", "head"]
METHODS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "RSO h/4": {},
    "RSO h/16, embeddings and head too": {"rank_ratio": 1 / 16, "targets": ALL_LAYERS},
}


def launchers(cluster: VirtualCluster, work: Path) -> list[dict[str, Any]]:
    expected = train_on_one_node(work, STEPS["launchers"], work / "one-node")
    rows = []
    for name in FILES:
        output = work / name
        began = time.monotonic()
        finished(cluster, work, name, submit(cluster, work, name, flags(STEPS["launchers"], output)))
        found = losses(output)
        worst = max(abs(found[step] - expected[step]) for step in expected)
        assert nodes_seen(output) == len(cluster.nodes)
        rows.append(
            {
                "launcher": name,
                "nodes": len(cluster.nodes),
                "seconds": time.monotonic() - began,
                "largest loss difference": worst,
            }
        )
    return rows


def finished(cluster: VirtualCluster, work: Path, name: str, job: int, timeout: float = 600) -> dict[str, str]:
    record = cluster.wait(job, timeout)
    if record["JobState"] != "COMPLETED":
        sys.exit(f"job {job} ended as {record['JobState']}\n{logs(work, name, job)}")
    return record


def undisturbed(cluster: VirtualCluster, work: Path, steps: int) -> Path:
    output = work / f"undisturbed-{steps}"
    if not output.exists():
        finished(cluster, work, "tasks", submit(cluster, work, "tasks", flags(steps, output), DOCTOR="0"))
    return output


def limit(cluster: VirtualCluster, work: Path) -> list[dict[str, Any]]:
    rows = []
    for name in FILES:
        output = work / f"limit-{name}"
        train = flags(STEPS["limit"], output)
        job = submit(cluster, work, name, train, "--time=1", "--signal=B:USR1@20", DOCTOR="0")
        starts = watch(cluster, work, name, job, output)
        rows.append(
            {
                "launcher": name,
                "requeues": int(finished(cluster, work, name, job)["Restarts"]),
                "bitwise equal": same_end(output, undisturbed(cluster, work, STEPS["limit"])),
                "starts": starts,
                **pauses(starts),
            }
        )
    return rows


def down(cluster: VirtualCluster, work: Path) -> list[dict[str, Any]]:
    rows = []
    for name in FILES:
        output = work / f"down-{name}"
        job = submit(cluster, work, name, flags(STEPS["down"], output), DOCTOR="0")
        while steps_done(output) < STEPS["down"] // 3:
            time.sleep(0.1)
        lost = time.time()
        at = steps_done(output)
        cluster.run("vctl", ["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=benchmark"])
        time.sleep(2)
        cluster.run("vctl", ["scontrol", "update", "NodeName=n2", "State=RESUME"], check=False)
        starts = watch(cluster, work, name, job, output)
        rows.append(
            {
                "launcher": name,
                "requeues": int(finished(cluster, work, name, job)["Restarts"]),
                "bitwise equal": same_end(output, undisturbed(cluster, work, STEPS["down"])),
                "steps when lost": at,
                "DOWN to running s": starts[-1]["running"] - lost,
                "running to first step s": starts[-1]["first step"] - starts[-1]["running"],
            }
        )
    return rows


def watch(cluster: VirtualCluster, work: Path, name: str, job: int, output: Path) -> list[dict[str, Any]]:
    """Each start of the job until its end, in seconds of time.time(): "running" (the launcher's start), "first step"
    (a line in metrics.jsonl of this start; seen to 0.2 s), "signal" and "ended", where there was one. Of the two
    minutes that SLURM holds a requeued job back, all but three seconds are skipped."""
    starts: list[dict[str, Any]] = []
    while True:
        record = cluster.job(job)
        if record["JobState"] == "PENDING" and record["Reason"] == "BeginTime":
            cluster.start_soon(job)
        events = job_events(work / f"{name}-{job}.out")
        for count, event, at in events:
            while len(starts) <= count:
                starts.append({})
            starts[count].setdefault(event, at)
        now = time.time()
        if starts and "running" in starts[-1] and "first step" not in starts[-1]:
            metrics = output / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_mtime > starts[-1]["running"] and has_step(metrics):
                starts[-1]["first step"] = now
        if starts:
            starts[-1]["steps"] = steps_done(output)
        if record["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            return starts
        time.sleep(0.2)


def has_step(metrics: Path) -> bool:
    last = metrics.read_text().rpartition("\n")[0].rpartition("\n")[2]
    return bool(last) and json.loads(last)["step"] > 0


def job_events(out: Path) -> list[tuple[int, str, float]]:
    """(start, event, time) of the lines that job.sh writes."""
    known = {"running on": "running", "SIGUSR1:": "signal", "ended with": "ended"}
    found = []
    for line in out.read_text().splitlines() if out.exists() else []:
        match = re.match(r"(\S+T\S+) job \S+, start (\d+): (.*)", line)
        for text, event in known.items():
            if match and match[3].startswith(text):
                found.append((int(match[2]), event, datetime.fromisoformat(match[1]).timestamp()))
    return found


def steps_done(output: Path) -> int:
    return max(losses(output), default=0) if (output / "metrics.jsonl").exists() else 0


def pauses(starts: list[dict[str, Any]]) -> dict[str, float]:
    """Medians in seconds over the requeues."""
    pairs = list(itertools.pairwise(starts))
    return {
        "signal to saved and ended s": statistics.median(a["ended"] - a["signal"] for a, _ in pairs),
        "ended to running s": statistics.median(b["running"] - a["ended"] for a, b in pairs),
        "running to first step s": statistics.median(b["first step"] - b["running"] for _, b in pairs),
    }


def bytes_between(cluster: VirtualCluster, work: Path) -> list[dict[str, Any]]:
    base = json.loads((ROOT / "ds_configs" / "rso_zero3.json").read_text()) | {"bf16": {"enabled": False}}
    rows = []
    for deployment, (changes, engine, replicas) in LAYOUTS.items():
        for name, params in METHODS.items():
            rso = {"type": "RSO", "params": base["optimizer"]["params"] | (params or {})}
            config = base | changes | {"optimizer": rso}
            adamw = {"type": "AdamW", "params": {"lr": 1e-3}}
            asked, file = work / "asked.json", work / "bytes.json"
            asked.write_text(json.dumps(config))
            file.write_text(json.dumps(config if params is not None else config | {"optimizer": adamw}))
            more = ["--engine", engine, "--replicas", str(replicas)] if engine != "zero" else []
            sent = {}
            for steps in (10, 40):
                output = work / re.sub(r"\W+", "-", f"bytes-{deployment}-{name}-{steps}")
                run = RUN.replace("ds_configs/rso_zero2.json", str(file))
                before = cluster.bytes_sent("n1")
                train = [*flags(steps, output, run), *more]
                finished(cluster, work, "tasks", submit(cluster, work, "tasks", train, DOCTOR="0"))
                sent[steps] = cluster.bytes_sent("n1") - before
            ring, gloo = predict(asked, engine, replicas, "adamw" if params is None else "rso")
            measured = (sent[40] - sent[10]) / 30
            rows.append({"layout": deployment, "method": name, "measured": measured, "ring": ring, "gloo": gloo})
            rows[-1]["of gloo"] = measured / gloo
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def collectives(cluster: VirtualCluster, work: Path) -> list[dict[str, Any]]:
    found = work / "collectives.json"
    command = ["srun", f"--nodes={len(cluster.nodes)}", f"--ntasks={RANKS}", JOB["VENV"] + "/bin/python"]
    command += [str(Path(__file__).with_name("cluster_worker.py")), str(found)]
    cluster.run("vctl", command, work, 120, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1")
    rows: list[dict[str, Any]] = json.loads(found.read_text())
    return [{**row, "of a ring": row["measured"] / row["ring"]} for row in rows]


def predict(file: Path, engine: str, replicas: int, name: str) -> tuple[float, float]:
    """Bytes that leave a node in a step: with ring collectives, and with gloo's reduce_scatter, which sends twice that
    (see the part collectives)."""
    config = read_rso_json(str(file))
    rso = rso_config(config)
    deployment = Deployment.from_json(config, RANKS, engine, replicas)
    chosen = method(name, rso)
    with FakeTensorMode():
        model = model_builder(model_config("llama-9m", 512, 2048))(torch.float32, None)
        chosen.prepare(model)
        sent = transfers(Exchange.of(model, rso), deployment)
    network = Network(nodes=2, link=1.0, intra_link=1.0)
    ring = network.crossing(sent, deployment)
    return ring, ring + network.crossing([t for t in sent if t.op == "reduce_scatter"], deployment)


def table(rows: list[dict[str, Any]]) -> str:
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            f"{v:,.4g}" if isinstance(v, float) and abs(v) < 1000 else f"{v:,.0f}" if isinstance(v, float) else str(v)
            for v in (row[c] for c in columns)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4], help="for launchers; the other parts have two")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if why := unavailable():
        sys.exit(why)
    actions = {"launchers": launchers, "limit": limit, "down": down, "bytes": bytes_between, "collectives": collectives}
    found: dict[str, list[dict[str, Any]]] = {}
    for part in args.parts:
        for nodes in args.nodes if part == "launchers" else [2]:
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                with VirtualCluster(root / "cluster", nodes) as cluster:
                    found.setdefault(part, []).extend(actions[part](cluster, make_work(root / "work")))
        print(f"\n## {part}\n\n{table(found[part])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
