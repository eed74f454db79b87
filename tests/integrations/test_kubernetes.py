"""launch/kubernetes: the manifest against Kubeflow Trainer's own models, and its command, run."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from support.exhaustive import EXHAUSTIVE
from support.progress import end_of
from support.train_workspace import ROOT, Workspace, free_port

models = pytest.importorskip("kubeflow_trainer_api.models")
from pydantic import BaseModel, ValidationError  # noqa: E402

KINDS = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}


def documents() -> dict[str, dict]:
    text = (ROOT / "launch" / "kubernetes" / "trainjob.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def unknown(value: object, wanted: object, where: str = "") -> list[str]:
    """Keys that the models, which ignore what they do not know, have not."""
    choices = [a for a in typing.get_args(wanted) if a is not type(None)]
    if isinstance(wanted, type) and issubclass(wanted, BaseModel) and isinstance(value, dict):
        fields = {field.alias or name: field.annotation for name, field in wanted.model_fields.items()}
        strange = [f"{where}.{key}" for key in value if key not in fields]
        return strange + [
            s for key, v in value.items() if key in fields for s in unknown(v, fields[key], f"{where}.{key}")
        ]
    if isinstance(value, list) and choices:
        return [s for i, v in enumerate(value) for s in unknown(v, choices[-1], f"{where}[{i}]")]
    if isinstance(value, dict) and typing.get_origin(wanted) is dict:
        return [s for key, v in value.items() for s in unknown(v, choices[-1], f"{where}.{key}")]
    return [s for choice in choices[:1] for s in unknown(value, choice, where)]


def check(document: dict) -> None:
    if document["apiVersion"] != "trainer.kubeflow.org/v1alpha1":
        raise ValueError(document["apiVersion"])
    model = KINDS[document["kind"]]
    if strange := unknown(document, model):
        raise ValueError(f"unknown keys {strange}")
    model.from_dict(document)


def test_the_manifest_is_what_kubeflow_trainer_reads():
    found = documents()
    assert set(found) == set(KINDS)
    for document in found.values():
        check(document)
    runtime, job = found["TrainingRuntime"], found["TrainJob"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == "TrainingRuntime"
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]


POD = "spec.template.spec.replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("TrainJob", "apiVersion", "trainer.kubeflow.org/v1"),
        ("TrainJob", "spec.trainer.numProcsPerNode", 8),
        ("TrainJob", "spec.trainer.numNodes", "2"),
        ("TrainJob", "spec.trainer.command", "bash"),
        ("TrainJob", "spec.runtimeRef", {"kind": "TrainingRuntime"}),
        ("TrainJob", "spec.trainer.resourcesPerNode.limit", {"nvidia.com/gpu": 8}),
        ("TrainingRuntime", "spec.mlPolicy.pytorch", {}),
        ("TrainingRuntime", "spec.template.spec.failurePolicy.maxRestart", 3),
        ("TrainingRuntime", f"{POD}.terminationGracePeriod", 600),
        ("TrainingRuntime", f"{POD}.volumes.1.emptyDir.size", "1Gi"),
        ("TrainingRuntime", f"{POD}.containers.0.volumeMounts.0.mountPath", 3),
    ],
)
def test_a_wrong_manifest_is_refused(kind, path, value):
    document = copy.deepcopy(documents()[kind])
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    with pytest.raises((ValueError, ValidationError)):
        check(document)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("kubernetes"))


STEPS = 150


def start(space: Workspace, output: Path, log: Path) -> subprocess.Popen:
    """The manifest's command in what stands for a pod: two ranks, no GPU, a small model."""
    command, script = (documents()["TrainJob"]["spec"]["trainer"][key] for key in ("command", "args"))
    small = "--model llama-9m --vocab-size 400 --seq-len 32 --global-batch 4 --micro-batch 2 --sample-tokens 0"
    small += f" --log-interval 1 --eval-tokens 128 --max-steps {STEPS} --data {space.data}"
    text = script[0].replace("/runs/7b", str(output)).replace("ds_configs/rso_7b_zero3.json", "ds_configs/rso.json")
    text = text.replace("--model llama-7b --data /runs/data", small)
    assert small in text
    pod = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, **pod, "PET_MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT), "PATH": path}
    with log.open("w") as out:
        return subprocess.Popen(
            [*command, text], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def steps_done(output: Path) -> int:
    file = output / "metrics.jsonl"
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


@EXHAUSTIVE
def test_a_pod_that_is_ended_has_saved_and_goes_on_when_started_again(space, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    pod = start(space, output, log)
    deadline = time.monotonic() + 120
    while steps_done(output) < 3:
        assert time.monotonic() < deadline, log.read_text()
        assert pod.poll() is None, log.read_text()
        time.sleep(0.1)
    os.kill(pod.pid, signal.SIGTERM)  # as the kubelet: the container's first process, not its children
    assert end_of(pod) != 0, log.read_text()  # a failure, which the failurePolicy answers with a restart
    assert "SIGUSR1: stopped after step" in log.read_text()
    assert steps_done(output) < STEPS
    pod = start(space, output, log)
    assert end_of(pod) == 0, log.read_text()
    assert "beginning at step 0" not in log.read_text()
    assert steps_done(output) == STEPS
    assert (output / "model" / "config.json").exists()
