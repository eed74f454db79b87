"""``--engine deepspeed|ddp|fsdp2`` from one JSON: the same training, and what happens when a rank is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick
from support.progress import end_of
from support.train_ranks import run
from support.train_workspace import BASE, ROOT, SAVE, STEPS, Workspace, free_port

from rso_ds import defaults
from rso_ds.checkpoint.export import export_dense
from rso_ds.checkpoint.transaction import read_checkpoint

needs("deepspeed")

# The faster embedding and head learn, the further a few steps in bf16 are from fp32.
ONE_RATE = ["--set", "optimizer.params.dense_lr=null"]
LOCAL = ["--set", "optimizer.params.communicate=boundary", "--set", "optimizer.params.outer_momentum=0.3"]
# What a resumed run finds in its checkpoint.
GIVEN = ["--lr-schedule", "wsd", "--warmup", "0.25", "--decay-share", "0.25", "--final-lr", "0"]
GIVEN += ["--learning-rate", "3e-3"]
RUNS = {
    "deepspeed": [],
    "ddp": ["--engine", "ddp"],
    "fsdp2": ["--engine", "fsdp2"],
    "ddp-adamw": ["--engine", "ddp", "--deepspeed", "ds_configs/adamw.json"],
    "ddp-local": ["--engine", "ddp", *LOCAL],
    "one-rate": ONE_RATE,
    "deepspeed-bf16": ["--precision", "bf16", *ONE_RATE],
    "ddp-bf16": ["--engine", "ddp", "--precision", "bf16", *ONE_RATE],
    "fsdp2-bf16": ["--engine", "fsdp2", "--precision", "bf16", *ONE_RATE],
    "hsdp": ["--engine", "fsdp2", "--replicas", "2"],
}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("engines"))


class Finished:
    """Runs by name, each made when it is first asked for."""

    def __init__(self, space):
        self._space, self._done = space, {}

    def __getitem__(self, name):
        if name not in self._done:
            done = run(self._space, name, *GIVEN, *RUNS[name], ranks=4 if name == "hsdp" else 2)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            self._done[name] = done
        return self._done[name]


@pytest.fixture(scope="module")
def finished(space):
    return Finished(space)


def losses(space, name):
    return [m["loss"] for m in space.metrics(name)[1:]]


def rates(space, name):
    return [[m[key] for key in ("lr", "dense_lr") if key in m] for m in space.metrics(name)[1:]]


@pytest.mark.parametrize("name", ["deepspeed", "ddp", "fsdp2", "ddp-adamw", "ddp-local"])
def test_every_step_has_the_rates_of_the_schedule(space, finished, name):
    """From the first step on, for B and what trains densely: 3 steps of warm-up, 6 at the peak, 3 that go to 0."""
    assert finished[name].returncode == 0
    shares = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]
    peaks = [3e-3] if name == "ddp-adamw" else [3e-3, 3e-3 * defaults.DENSE_TIMES]
    assert rates(space, name) == [pytest.approx([peak * share for peak in peaks], rel=1e-12) for share in shares]


ALIKE = {
    ("ddp", "deepspeed", 1e-5),
    ("fsdp2", "deepspeed", 1e-5),
    ("hsdp", "deepspeed", 1e-5),
    ("ddp-bf16", "one-rate", 2e-2),
    ("fsdp2-bf16", "deepspeed-bf16", 2e-2),  # both keep W in bf16, ddp-bf16 in fp32
}


@pytest.mark.parametrize(
    ("name", "like", "tolerance"), quick(sorted(ALIKE), {a for a in ALIKE if a[0] in ("ddp", "fsdp2")})
)
def test_engines_train_alike(space, finished, name, like, tolerance):
    assert finished[name].returncode == finished[like].returncode == 0
    assert losses(space, name) == pytest.approx(losses(space, like), abs=tolerance)
    final = [space.metrics(run)[-1]["val_loss"] for run in (name, like)]
    assert final[0] == pytest.approx(final[1], abs=tolerance)


def test_local_steps_train_otherwise_and_send_once_an_interval(space, finished):
    """12 steps with interval 10: one boundary, and one meeting at the end."""
    assert finished["ddp-local"].returncode == finished["ddp"].returncode == 0
    assert losses(space, "ddp-local") != pytest.approx(losses(space, "ddp"), abs=1e-4)
    sent = {m["step"]: m["comm_bytes"] for m in space.metrics("ddp-local") if "comm_bytes" in m}
    assert all(m["gradient"] == 0 for m in sent.values())
    every_step = space.metrics("ddp")[-1]["comm_bytes"]["gradient"]
    assert sent[10]["boundary"] == pytest.approx(every_step, rel=0.01)
    assert all(m["boundary"] == 0 for step, m in sent.items() if step != 10)


def test_traffic_is_reported(space, finished):
    for name in ("deepspeed", "ddp", "hsdp"):
        assert f"sent by rank 0 in {STEPS} steps, MB" in finished[name].stdout
        details = json.loads((space.folder / name / "comm.json").read_text())
        gradient = sum(row["payload_bytes"] for row in details["traffic"] if row["kind"] == "gradient")
        assert gradient == sum(m["comm_bytes"]["gradient"] for m in space.metrics(name) if "comm_bytes" in m)
        assert details["nodes"] == 1


def test_the_form_and_its_reason_are_shown(finished):
    for name in ("deepspeed", "ddp", "fsdp2"):
        assert finished[name].stdout.count("form folded: pays from ") == 1, name
    assert "form two_path: 'communicate' needs the B of the whole subspace" in finished["ddp-local"].stdout


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "ddp-local", "ddp-adamw"])
def test_resumes_exactly(space, finished, name):
    """From the checkpoint in the middle of a subspace, in new processes."""
    copy = f"{name}-resumed"
    assert finished[name].returncode == 0
    shutil.copytree(space.folder / name, space.folder / copy)
    (space.folder / copy / "checkpoints" / "latest").write_text(f"step{SAVE}")
    done = run(space, copy, "--resume", "auto", *RUNS[name])  # rates and schedule are the checkpoint's
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(space, copy) == losses(space, name)
    assert rates(space, copy) == rates(space, name)
    assert space.metrics(copy)[-1]["val_loss"] == space.metrics(name)[-1]["val_loss"]


@pytest.mark.parametrize("name", quick(["ddp-local", "ddp-adamw", "fsdp2-bf16"], {"ddp-local", "ddp-adamw"}))
def test_exported_checkpoint_is_the_model_that_the_run_saved(space, finished, name):
    assert finished[name].returncode == 0
    export_dense(space.folder / name / "checkpoints", space.folder / f"{name}-exported")
    expected, found = (load_file(space.folder / f / "model.safetensors") for f in (f"{name}/model", f"{name}-exported"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if name == "fsdp2-bf16" else 1e-6)


def test_another_engine_continues_in_the_background(space, finished):
    """A checkpoint of DDP, by its own folder, under FSDP2, which saves while it trains."""
    assert finished["ddp"].returncode == 0
    source = str(space.folder / "ddp" / "checkpoints" / f"step{SAVE}")
    done = run(space, "crossed", "--resume", source, "--engine", "fsdp2", "--async-save")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    straight = [m["loss"] for m in space.metrics("ddp") if m["step"] > SAVE]
    assert [m["loss"] for m in space.metrics("crossed")] == pytest.approx(straight, abs=1e-5)
    read_checkpoint(space.folder / "crossed" / "checkpoints", f"step{STEPS}")


def test_deepspeeds_own_optimizers_do_not_save_in_the_background(space):
    done = run(space, "refused", "--deepspeed", "ds_configs/adamw.json", "--async-save")
    assert done.returncode != 0
    assert "--async-save: DeepSpeed writes the checkpoints of its own optimizers" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "ddp", "--precision", "fp16"], "--engine ddp has no loss scaling"),
        (["--engine", "ddp", "--replicas", "2"], "--replicas 2 divides the ranks of --engine fsdp2"),
        (["--engine", "fsdp2", "--deepspeed", "ds_configs/rso_offload.json"], "does not offload"),
        (["--engine", "fsdp1"], "invalid choice: 'fsdp1' (choose from"),
        (["--set", "optimizer.params.communicate=boundary"], "DeepSpeed reduces gradients at every step"),
    ],
)
def test_bad_flags(space, flags, message):
    done = run(space, "refused", *flags)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


LOST = {
    ("ddp", signal.SIGKILL): "rank 0 lost another rank in the middle of a collective",
    ("deepspeed", signal.SIGSTOP): "rank 0 waited in vain for another rank in the middle of a collective",
}


@EXHAUSTIVE
@pytest.mark.parametrize(("engine", "how"), LOST)
def test_a_lost_rank_ends_the_others_with_one_message(space, tmp_path, engine, how):
    """Ranks are started without a launcher, which would end the others before they can say anything."""
    command = [sys.executable, "launch/train.py", *BASE, "--engine", engine, "--timeout", "15", "--max-steps", "100000"]
    command += ["--cache", str(space.cache), "--data", str(space.data), "--output", str(tmp_path / "run")]
    common = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in (0, 1):
        with open(tmp_path / f"{rank}.log", "w") as log:
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline, (tmp_path / "0.log").read_text()[-3000:]
            assert ranks[0].poll() is None, (tmp_path / "0.log").read_text()[-3000:]
            time.sleep(0.2)
        ranks[1].send_signal(how)
        began = time.monotonic()
        assert end_of(ranks[0]) == 1
        assert time.monotonic() - began < 40
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    text = (tmp_path / "0.log").read_text()
    assert LOST[engine, how] in text
    assert "Traceback" not in text.split(LOST[engine, how])[-1]
