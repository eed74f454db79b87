"""Checkpoints that DeepSpeed wrote itself, of AdamW on two ranks under each stage: exported and evaluated like ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.environment import needs
from support.exhaustive import EXHAUSTIVE
from support.train_ranks import run
from support.train_workspace import Workspace

from rso_ds.checkpoint.reading import open_model
from rso_ds.cli import main
from rso_ds.errors import RSOCheckpointError

pytestmark = EXHAUSTIVE

needs("deepspeed")

STEPS = 4
ADAMW = ["--deepspeed", "ds_configs/adamw.json", "--save-interval", "2", "--eval-interval", "2", "--sample-tokens", "0"]


def stage(number: int) -> list[str]:
    return ["--set", f"zero_optimization.stage={number}"]


RUNS = {
    **{f"zero{n}": stage(n) for n in range(4)},
    "zero0-bf16": [*stage(0), "--precision", "bf16"],
    "zero2-bf16": [*stage(2), "--precision", "bf16"],
}
TIED = {"zero2-tied": stage(2), "zero3-tied": stage(3)}
TOLERANCE = {"bf16": 2e-2}  # of a loss: the run evaluates in bf16 what the optimizer steps in fp32


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def runs(space):
    """Name -> output folder; two of the runs begin with a model whose head is its embedding."""
    found = {}

    def train(name: str, flags: list[str]) -> None:
        found[name] = space.folder / name
        done = run(space, name, *ADAMW, *flags, steps=STEPS)
        assert done.returncode == 0, done.stderr[-3000:]

    for name, flags in RUNS.items():
        train(name, flags)
    tied = shutil.copytree(found["zero2"] / "model", space.folder / "tied")
    (tied / "model.safetensors").unlink()
    model = space.model("zero2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    for name, flags in TIED.items():
        train(name, ["--model", str(tied), *flags])
    return found


@pytest.mark.parametrize("name", [*RUNS, *TIED])
def test_exported_weights_are_those_that_the_run_saved(runs, tmp_path, name):
    """Bit for bit; of a run in bf16 the fp32 weights of the optimizer, which round to the model's."""
    main(["export", str(runs[name] / "checkpoints"), str(tmp_path / "out")])
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(runs[name] / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    masters = name == "zero2-bf16"
    assert {t.dtype for t in found.values()} == {torch.bfloat16 if name == "zero0-bf16" else torch.float32}
    for key, tensor in found.items():
        assert torch.equal(tensor.bfloat16() if masters else tensor, expected[key]), key
    assert not masters or any(not torch.equal(t, t.bfloat16().float()) for t in found.values())


@pytest.mark.parametrize("name", [*RUNS, *TIED])
def test_evaluations_find_the_losses_of_the_run(runs, name):
    main(["evaluate", str(runs[name])])
    own = {m["step"]: m["val_loss"] for m in map(json.loads, (runs[name] / "metrics.jsonl").open()) if "val_loss" in m}
    found = [json.loads(line) for line in (runs[name] / "evaluation.jsonl").open()]
    assert [r["step"] for r in found] == [2, STEPS]
    for record in found:
        tolerance = TOLERANCE.get(name.partition("-")[2], 2e-6)
        assert record["val_loss"] == pytest.approx(own[record["step"]], abs=tolerance)
    assert len({r["val_loss"] for r in found}) == 2


def test_it_has_no_subspace_to_export(runs, tmp_path):
    with pytest.raises(SystemExit, match="--lora: .* is of a run without RSO"):
        main(["export", "--lora", str(runs["zero2"] / "checkpoints"), str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["zero0", "zero3"])
def test_what_deepspeed_cannot_read(runs, tmp_path, monkeypatch, name):
    checkpoint = Path(shutil.copytree(runs[name] / "checkpoints" / f"step{STEPS}", tmp_path / "copy"))

    def unreadable(*_, **__):
        raise ValueError("written by another version")

    monkeypatch.setattr(torch, "load", unreadable)
    with pytest.raises(RSOCheckpointError, match=r"copy/deepspeed: .* \(ValueError: written by another version\)"):
        open_model(checkpoint)
    file = next((checkpoint / "deepspeed").glob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RSOCheckpointError, match=f"{file.name} is damaged"):
        open_model(checkpoint)
