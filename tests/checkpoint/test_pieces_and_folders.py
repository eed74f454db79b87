"""Pieces, folders and metadata of checkpoints, in one process."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import random
import shutil

import pytest
import torch
from support.resealed_checkpoints import reseal
from torch import nn

import rso_ds
from rso_ds.checkpoint import Retention
from rso_ds.checkpoint import folder as folder_module
from rso_ds.checkpoint.folder import (
    MANIFEST,
    begin,
    check_tag,
    commit,
    digests,
    find,
    has_checkpoints,
    prune,
    recover,
    tags,
    verify,
)
from rso_ds.checkpoint.pieces import Piece, boxes
from rso_ds.checkpoint.storage import StoredTensors, load_pieces, save_pieces
from rso_ds.checkpoint.transaction import read_checkpoint
from rso_ds.errors import RSOCheckpointError, RSOConfigError


def test_boxes_cover_an_interval_in_order():
    chance = random.Random(0)
    for _ in range(2000):
        shape = tuple(chance.randint(1, 4) for _ in range(chance.randint(0, 4)))
        size = math.prod(shape)
        start = chance.randint(0, size)
        stop = chance.randint(start, size)
        whole = torch.arange(size).view(shape)
        covered = []
        for offsets, sizes in boxes(shape, start, stop):
            part = whole
            for dim, (offset, length) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(dim, offset, length)
            covered += part.reshape(-1).tolist()
        assert covered == list(range(start, stop))


def test_a_matrix_interval_is_at_most_three_boxes():
    assert max(len(list(boxes((5, 7), a, b))) for a, b in itertools.combinations(range(36), 2)) == 3


def test_any_interval_reads_back_in_any_dtype(tmp_path):
    x = torch.randn(5, 7)
    save_pieces({"x": Piece((5, 7), 0, x.view(-1)), "scalar": Piece((), 0, torch.tensor([3.0]))}, tmp_path)
    stored = StoredTensors(tmp_path)
    assert torch.equal(stored.load("x"), x)
    assert stored.load("scalar").item() == 3.0
    for dtype, start, stop in ((torch.float32, 6, 26), (torch.bfloat16, 0, 35), (torch.float64, 34, 35)):
        part = torch.zeros(stop - start, dtype=dtype)
        load_pieces({"x": [Piece((5, 7), start, part)]}, tmp_path)
        assert torch.equal(part, x.view(-1)[start:stop].to(dtype))


def test_metadata_that_names_other_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RSOCheckpointError, match=r"\.metadata cannot be read: it names posix\.mkdir"):
        StoredTensors(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_metadata_that_makes_code_of_permitted_modules_is_not_run(tmp_path):
    """``dataclass`` stands in the namespace of torch's metadata module, and compiles the names of fields."""
    for name in ("dataclass", "os", "torch", "__builtins__"):
        module = b"torch.distributed.checkpoint.metadata"
        (tmp_path / ".metadata").write_bytes(b"c" + module + b"\n" + name.encode() + b"\n.")
        with pytest.raises(RSOCheckpointError, match=f"it names {module.decode()}.{name}"):
            StoredTensors(tmp_path)


def checkpoint(folder, tag, text="x"):
    temporary = begin(folder, tag)
    (temporary / "a.txt").write_text(text)
    return commit(temporary, digests(temporary, ["a.txt"]))


def test_a_checkpoint_appears_whole_and_latest_follows(tmp_path):
    checkpoint(tmp_path, "one")
    temporary = begin(tmp_path, "two")
    (temporary / "a.txt").write_text("half")  # a crash here
    assert find(tmp_path).name == "one"
    assert tags(tmp_path) == ["one"]
    checkpoint(tmp_path, "three")
    assert not temporary.exists()
    assert (find(tmp_path).name, tags(tmp_path)) == ("three", ["one", "three"])
    checkpoint(tmp_path, "one", "again")  # a tag saved once more replaces the old one
    assert (tmp_path / "one" / "a.txt").read_text() == "again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "one", "three"]


def test_a_crash_while_a_tag_is_replaced_loses_nothing(tmp_path):
    checkpoint(tmp_path, "one", "old")
    os.replace(tmp_path / "one", tmp_path / ".one.replaced")  # as commit does; a crash here
    assert has_checkpoints(tmp_path)
    recover(tmp_path)
    assert (find(tmp_path) / "a.txt").read_text() == "old"
    shutil.copytree(tmp_path / "one", tmp_path / ".one.replaced")  # a crash after the second renaming
    recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "one"]


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(RSOCheckpointError, match="logs exists and is no checkpoint of rso_ds"):
        Run().checkpoints.save(tmp_path, "logs")
    assert (tmp_path / "logs").is_dir()


def test_an_old_damaged_checkpoint_does_not_hinder_new_ones(tmp_path):
    run = Run()
    for tag, score in (("a", 2.0), ("b", float("nan")), ("c", 3.0)):
        run.checkpoints.save(tmp_path, tag, score=score)
    (tmp_path / "a" / "rso_state.json").write_text("{")
    run.checkpoints.save(tmp_path, "d", keep=Retention(1, 1))
    assert tags(tmp_path) == ["c", "d"]  # neither what cannot be read nor NaN counts as best


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    scores = {}
    for i, score in enumerate((3.0, 1.0, 2.0, 2.5, 2.6)):
        path = checkpoint(tmp_path, f"step{i}")
        os.utime(path / MANIFEST, ns=(i, i))
        scores[f"step{i}"] = score
    assert prune(tmp_path, Retention(), scores) == []
    assert prune(tmp_path, Retention(2, 1), scores) == ["step0", "step2"]
    assert tags(tmp_path) == ["step1", "step3", "step4"]
    assert prune(tmp_path, Retention(1), {}) == ["step1", "step3"]


@pytest.mark.parametrize("tag", ["", ".hidden", "a/b", "..", "latest"])
def test_tags_are_plain_names(tag):
    with pytest.raises(RSOConfigError, match="must be a plain folder name"):
        check_tag(tag)


def test_damage_is_named(tmp_path):
    path = checkpoint(tmp_path, "one")
    verify(path)
    (path / "a.txt").write_text("y")
    with pytest.raises(
        RSOCheckpointError, match=r"a\.txt is damaged: its SHA-256.*Nothing was loaded; restore the file"
    ):
        verify(path)
    (path / "a.txt").write_text("xx")
    with pytest.raises(RSOCheckpointError, match="2 bytes instead of 1"):
        verify(path)
    (path / "a.txt").unlink()
    with pytest.raises(RSOCheckpointError, match="it is missing"):
        verify(path)
    (path / "a.txt").write_text("x")
    (path / "b.txt").write_text("x")
    with pytest.raises(RSOCheckpointError, match=r"b\.txt is not part of this checkpoint"):
        verify(path)
    (path / "b.txt").unlink()
    manifest = path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"bytes": 1', '"bytes": 2'))
    with pytest.raises(RSOCheckpointError, match=r"manifest\.json is damaged: its own checksum"):
        verify(path)


class Run:
    """Two linear layers and AdamW; ``width`` 6 is another model."""

    def __init__(self, width=5, **options):
        torch.manual_seed(0)
        self.config = rso_ds.RSOConfig(rank=2, interval=3, targets=["0", "1"], **options)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))
        rso_ds.convert(self.model, self.config)
        self.optimizer = rso_ds.RSO(self.model, self.config)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.checkpoints = self.optimizer.checkpointer(scheduler=self.scheduler)

    def step(self, count, bad=()):
        for i in range(count):
            x = torch.ones(3, 4) * (i + 1)
            loss = self.model(x).square().mean() * (float("nan") if i in bad else 1.0)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return {n: p.clone() for n, p in self.model.state_dict().items()}


def test_what_a_schedule_changes_beside_the_learning_rate_comes_back(tmp_path):
    def start():
        run = Run()
        run.scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 1e-2, total_steps=20)
        run.checkpoints = run.optimizer.checkpointer(scheduler=run.scheduler)
        return run

    run = start()
    run.step(4)
    run.checkpoints.save(tmp_path, "one")
    after, again = run.step(4), start()
    again.checkpoints.load(tmp_path)
    assert all(torch.equal(p, after[n]) for n, p in again.step(4).items())


def test_a_schedule_that_would_be_lost_is_refused(tmp_path):
    Run().checkpoints.save(tmp_path, "one")
    with pytest.raises(RSOCheckpointError, match="only the checkpoint has a 'scheduler'"):
        Run().optimizer.checkpointer().load(tmp_path)


def test_empty_buffers_and_frozen_parameters_come_back(tmp_path):
    def start():
        run = Run()
        run.model.register_buffer("empty", torch.empty(0))
        run.model.register_buffer("mean", torch.zeros(3))
        run.model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        return run

    run = start()
    run.model.mean += 1
    run.model.frozen += 2
    run.checkpoints.save(tmp_path, "one")
    again = start()
    again.checkpoints.load(tmp_path)
    assert (again.model.mean.tolist(), again.model.frozen.tolist()) == ([1, 1, 1], [2, 2])


def test_skipped_steps_are_remembered(tmp_path):
    run = Run()
    run.step(2, bad=(1,))
    run.checkpoints.save(tmp_path, "one")
    again = Run()
    again.checkpoints.load(tmp_path)
    assert again.optimizer.skipped_steps == 1


def test_one_process_saves_without_process_group(tmp_path):
    run = Run()
    run.step(4)
    run.checkpoints.save(tmp_path, "one", {"epoch": 2}, wait=False)
    after = run.step(4)
    run.checkpoints.wait()
    again = Run()
    path, client = again.checkpoints.load(tmp_path)
    assert (path, client) == (tmp_path / "one", {"epoch": 2})
    assert all(torch.equal(p, after[n]) for n, p in again.step(4).items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 6}, "is of another model or rank: layer '0'"),
        ({"seed": 1}, "was trained with 'seed': 0, this run has 1"),
        ({"solver": "sgd", "carry_over": "reset"}, "was trained with solver 'adamw', this run has 'sgd'"),
    ],
)
def test_other_runs_are_refused_untouched(tmp_path, other, message):
    Run().checkpoints.save(tmp_path, "one")
    run = Run(**other)
    before = run.step(1)
    with pytest.raises(RSOCheckpointError, match=message):
        run.checkpoints.load(tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in run.model.state_dict().items())


def test_unknown_names_in_a_sealed_checkpoint_are_refused(tmp_path):
    Run().checkpoints.save(tmp_path, "one")
    state = json.loads((tmp_path / "one" / "rso_state.json").read_text())
    del state["steps"]
    (tmp_path / "one" / "rso_state.json").write_text(json.dumps(state))
    reseal(tmp_path / "one")
    with pytest.raises(RSOCheckpointError, match="damaged state, no 'steps'"):
        Run().checkpoints.load(tmp_path)


def test_client_state_must_be_plain(tmp_path):
    with pytest.raises(RSOCheckpointError, match="client_state or a schedule holds what torch.load"):
        Run().checkpoints.save(tmp_path, "one", {"model": nn.Linear(1, 1)})
    assert tags(tmp_path) == []


def test_a_failed_save_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = Run()
    run.checkpoints.save(tmp_path, "one")
    monkeypatch.setattr(folder_module, "commit", full)
    run.checkpoints.save(tmp_path, "two", wait=False)
    with pytest.raises(RSOCheckpointError, match="No space left on device"):
        run.checkpoints.wait()
    run.checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "one"]
    path, state, _ = read_checkpoint(tmp_path)
    assert (path.name, state["world_size"]) == ("one", 1)


def test_steps_with_nan_gradients_are_skipped_and_counted():
    run = Run()
    expected = Run()
    straight = expected.step(1)
    got = run.step(3, bad=(1, 2))
    assert (run.optimizer.skipped_steps, run.optimizer.boundary.applied_steps) == (2, 1)
    assert not run.optimizer.step_was_applied
    assert all(torch.equal(p, straight[n]) for n, p in got.items())


def test_a_closure_is_called_once():
    run, calls = Run(), []

    def closure():
        calls.append(1)
        run.optimizer.zero_grad()
        loss = run.model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    assert run.optimizer.step(closure) is not None
    assert len(calls) == 1
