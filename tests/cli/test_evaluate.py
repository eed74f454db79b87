"""``rso-ds evaluate`` beside a run on two ranks, which does not stop for it, and the same losses within the run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.environment import needs
from support.train_ranks import run
from support.train_workspace import ROOT, STEPS, Workspace

from rso_ds.checkpoint.stored_model import StoredModel
from rso_ds.cli import main
from rso_ds.recipes.evaluation.evaluator import Evaluator
from rso_ds.recipes.report.runs import load_runs

needs("deepspeed")

EVERY = 3
COMMAND = str(Path(sys.executable).parent / "rso-ds")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def followed(space):
    """The evaluating process begins before the run has a folder. Returns what it printed."""
    beside = subprocess.Popen(
        [COMMAND, "evaluate", str(space.folder / "followed"), "--follow", "--patience", "240"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        done = run(space, "followed", "--eval-interval", "0", "--save-interval", str(EVERY), "--keep-last", "0")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        printed, _ = beside.communicate(timeout=240)
    finally:
        beside.kill()
    assert beside.returncode == 0, printed
    return printed


@pytest.fixture
def copy(space, followed, tmp_path):
    """The finished run, to be changed."""
    return Path(shutil.copytree(space.folder / "followed", tmp_path / "copy"))


def evaluations(folder):
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *arguments])
    return str(end.value)


def test_each_checkpoint_has_the_loss_that_the_run_itself_would_have_found(space, followed):
    done = run(space, "alone", "--eval-interval", str(EVERY), "--save-interval", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = {m["step"]: m for m in space.metrics("alone")}
    found = {r["step"]: r["val_loss"] for r in evaluations(space.folder / "followed")}
    assert list(found) == list(range(EVERY, STEPS + 1, EVERY))
    for step, loss in found.items():
        assert loss == pytest.approx(alone[step]["val_loss"], abs=2e-6)
        assert f"step {step}/{STEPS}: held-out loss {loss:.4f}" in followed
    assert len({round(loss, 3) for loss in found.values()}) == len(found)
    assert [m.get("loss") for m in space.metrics("followed")] == [m.get("loss") for m in alone.values()]


def test_the_run_waits_for_its_last_evaluation_only(space, followed):
    waited = {m["step"]: m["waited_seconds"]["evaluation"] for m in space.metrics("followed") if "loss" in m}
    assert [step for step, seconds in waited.items() if seconds] == [STEPS]


def test_checkpoints_of_a_run_that_does_not_evaluate_have_no_score(space, followed):
    scores = {}
    for step in range(EVERY, STEPS + 1, EVERY):
        state = json.loads((space.folder / "followed" / "checkpoints" / f"step{step}" / "rso_state.json").read_text())
        scores[step] = state["score"]
    assert scores == {3: None, 6: None, 9: None, 12: space.metrics("followed")[-1]["val_loss"]}


def test_the_report_shows_them(space, followed):
    (run,) = load_runs([space.folder / "followed"])
    assert [step for step, _ in run.held_out] == [0, 3, 6, 9, 12]


def test_a_second_time_there_is_nothing_to_do(copy, capsys):
    before = evaluations(copy)
    main(["evaluate", str(copy), "--follow"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "evaluation.jsonl: 4 checkpoints; the best is of step 12/12" in printed
    assert evaluations(copy) == before
    main(["evaluate", str(copy), "--eval-tokens", "64"])  # another figure
    assert [r["eval_tokens"] for r in evaluations(copy)] == 4 * [1500] + 4 * [64]


def test_half_a_line_and_its_checkpoint_are_done_again(copy):
    file = copy / "evaluation.jsonl"
    before = evaluations(copy)
    file.write_text(file.read_text()[:-20])
    main(["evaluate", str(copy)])
    again = evaluations(copy)
    assert again[:3] == before[:3]
    assert again[3]["val_loss"] == pytest.approx(before[3]["val_loss"], abs=2e-6)


def test_a_run_that_stopped_ends_the_waiting(copy, capsys):
    shutil.rmtree(copy / "checkpoints" / f"step{STEPS}")
    (copy / "evaluation.jsonl").write_text("")
    message = refused(capsys, str(copy), "--follow", "--patience", "0")
    assert "no new checkpoint for 0 s" in message
    assert [r["step"] for r in evaluations(copy)] == [3, 6, 9]


def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(copy, capsys, monkeypatch):
    """While it is verified (step 6), and while its tensors are read (step 9)."""
    whole, filled = Evaluator._evaluate, Evaluator._filled

    def before(self, path):
        if path.name == "step6":
            shutil.rmtree(path)
        return whole(self, path)

    def after(self, stored):
        if stored.path.name == "step9":
            shutil.rmtree(stored.path)
        return filled(self, stored)

    monkeypatch.setattr(Evaluator, "_evaluate", before)
    monkeypatch.setattr(Evaluator, "_filled", after)
    (copy / "evaluation.jsonl").unlink()
    main(["evaluate", str(copy), "--eval-tokens", "64", "--micro-batch", "3"])
    printed = capsys.readouterr().out
    assert all(f"{step} was removed before it was read" in printed for step in ("step6", "step9"))
    assert [r["step"] for r in evaluations(copy)] == [3, 12]


def test_a_damaged_checkpoint_ends_it(copy, capsys):
    (copy / "evaluation.jsonl").unlink()
    file = next((copy / "checkpoints" / "step3").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged" in refused(capsys, str(copy))
    assert evaluations(copy) == []


def test_a_checkpoint_without_a_parameter_of_the_model_ends_it(copy, capsys, monkeypatch):
    names = StoredModel.names
    monkeypatch.setattr(StoredModel, "names", lambda self: [n for n in names(self) if n != "model.norm.weight"])
    (copy / "evaluation.jsonl").unlink()
    assert "step3 holds no 'model.norm.weight'" in refused(capsys, str(copy))


def test_other_data_than_the_run_had(copy, capsys):
    other = copy.parent / "other.txt"
    other.write_text("another text\n" * 500)
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**settings, "data": str(other)}))
    (copy / "evaluation.jsonl").unlink()
    assert "the run's held-out text was {'documents': 1, " in refused(capsys, str(copy))


def test_no_run(tmp_path, capsys):
    assert f"{tmp_path / 'config.yaml'} does not exist" in refused(capsys, str(tmp_path))
    assert "--micro-batch must be an integer of at least 1" in refused(capsys, str(tmp_path), "--micro-batch", "0")
