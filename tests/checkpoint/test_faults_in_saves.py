"""A save without room, checkpoints that are damaged or not there: what is kept, what is said, what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest
from support.environment import needs
from support.exhaustive import EXHAUSTIVE
from support.fault_runs import ENGINES, FLAGS, SAVE, copied, faults, same, undisturbed_run
from support.train_ranks import TrainRanks
from support.train_workspace import Workspace

# isort: split
import corruption  # pytest has benchmarks/reliability on its path

needs("deepspeed")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def undisturbed(space):
    return {"ddp": undisturbed_run(space, "ddp")}


# -- disk ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(space):
    """A run that was ended after its checkpoints of steps 5 and 10."""
    run = faults.Run(space, "half", [*FLAGS, *ENGINES["ddp"]])
    ranks = run.start()
    deadline = time.monotonic() + 60
    while not (run.output / "checkpoints" / f"step{2 * SAVE}" / "manifest.json").is_file():
        assert time.monotonic() < deadline, ranks.text()
        time.sleep(0.005)
    time.sleep(0.05)  # 'latest' is written just after
    ranks.stop()
    return run


def resumed(run: faults.Run, expected: faults.Run) -> str:
    ranks = run.start()
    assert ranks.wait() == [0, 0], ranks.text()
    assert same(run, expected)
    return ranks.text(0)


def no_room(run: faults.Run, before: str, cause: str) -> None:
    ranks = TrainRanks([*run.flags, "--resume", "auto"], run.logs, before=before)
    assert ranks.wait() == [1, 1], ranks.text()
    for rank in (0, 1):
        error = [line for line in ranks.text(rank).splitlines() if line.startswith("RSO") and "Error" in line]
        assert len(error) == 1, ranks.text(rank)
        assert error[0].startswith("RSOCheckpointError")
        assert cause in error[0]
        assert "what was saved before is as it was" in error[0]
        assert "Traceback" not in ranks.text(rank)
    assert (run.output / "checkpoints" / "latest").read_text() == f"step{2 * SAVE}"
    assert not run.saving()


def test_a_file_system_that_takes_no_more(space, undisturbed, half):
    run = copied(half, space, "file-too-large", half.own)
    no_room(run, "support.train_ranks:limit_files", "File too large")
    assert f"after step {2 * SAVE}" in resumed(run, undisturbed["ddp"])


@EXHAUSTIVE
def test_a_full_disk(space, undisturbed, half):
    run = faults.Run(space, "disk-full", half.own)
    checkpoints = run.output / "checkpoints"
    checkpoints.mkdir(parents=True)
    used = sum(f.stat().st_size for f in (half.output / "checkpoints").rglob("*") if f.is_file())
    size = f"size={used + used // 4}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", checkpoints], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system of one's own to fill: {mounted.stderr.strip()}")
    try:
        shutil.copytree(half.output, run.output, dirs_exist_ok=True)
        no_room(run, "", "No space left on device")
        subprocess.run(["mount", "-o", f"remount,size={4 * used}", checkpoints], check=True)
        assert f"after step {2 * SAVE}" in resumed(run, undisturbed["ddp"])
    finally:
        subprocess.run(["umount", "-l", checkpoints], check=True)


# -- what --resume auto finds ----------------------------------------------------------------------------


def refused(run: faults.Run) -> str:
    ranks = run.start()
    assert ranks.wait() == [1, 1], ranks.text()
    errors = [line for line in ranks.text(0).splitlines() if line.startswith("RSOCheckpointError")]
    assert len(errors) == 1, ranks.text()
    assert errors[0] in ranks.text(1)
    return errors[0]


def test_a_damaged_checkpoint_is_named_with_an_older_one_that_can_be_given(space, undisturbed, half):
    run = copied(half, space, "damaged", half.own)
    file = run.output / "checkpoints" / f"step{2 * SAVE}" / "__1_0.distcp"
    os.truncate(file, file.stat().st_size - 7)
    error = refused(run)
    assert f"{file} is damaged" in error
    assert f"use another checkpoint (step{SAVE})" in error
    ranks = TrainRanks([*run.flags, "--resume", str(run.output / "checkpoints" / f"step{SAVE}")], run.logs)
    assert ranks.wait() == [0, 0], ranks.text()
    assert f"after step {SAVE}" in ranks.text(0)
    assert same(run, undisturbed["ddp"])


def test_a_missing_latest_means_the_newest_complete_checkpoint(space, undisturbed, half):
    run = copied(half, space, "no-latest", half.own)
    (run.output / "checkpoints" / "latest").unlink()
    text = resumed(run, undisturbed["ddp"])
    assert f"latest does not exist; going on from the newest complete checkpoint, step{2 * SAVE}" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x81\x82", "latest is damaged: it names"),
        (b"", "latest is damaged: it names ''"),
        (b"step7", "latest names 'step7', which is no complete checkpoint"),
    ],
)
def test_a_latest_that_names_no_checkpoint_is_refused(space, half, content, words):
    run = copied(half, space, f"latest-{content.hex()}", half.own)
    (run.output / "checkpoints" / "latest").write_bytes(content)
    error = refused(run)
    assert words in error
    assert f"step{SAVE}, step{2 * SAVE}" in error


def test_a_folder_without_any_complete_checkpoint_is_refused(space, half):
    run = copied(half, space, "incomplete", half.own)
    for step in (SAVE, 2 * SAVE):
        (run.output / "checkpoints" / f"step{step}" / "manifest.json").unlink()
    assert "Complete ones there: none" in refused(run)
    (run.output / "checkpoints" / "latest").unlink()
    assert "latest does not exist" in refused(run)


@pytest.mark.parametrize("left", [[], [".step5.saving"]])
def test_a_folder_in_which_nothing_was_ever_saved_begins_anew_and_says_so(space, left):
    run = faults.Run(space, f"nothing-saved{len(left)}", [*FLAGS, *ENGINES["ddp"]])
    (run.output / "checkpoints").mkdir(parents=True)
    for name in left:
        (run.output / "checkpoints" / name).mkdir()
    ranks = run.start()
    ranks.wait_for(run.output / "metrics.jsonl", 1)
    ranks.stop()
    assert f"--resume auto: no checkpoint in {run.output / 'checkpoints'} yet, beginning at step 0" in ranks.text(0)
    if left:
        assert "a save was cut short there, .step5.saving is incomplete and will be removed" in ranks.text(0)


def test_no_damaged_file_is_loaded(tmp_path):
    results = corruption.attempts(corruption.ENGINES["DDP"], 1, 5, tmp_path)
    assert len(results) > 60
    assert corruption.faults(results) == []


def test_a_crash_between_the_renames_of_a_checkpoint_saved_again(space, undisturbed, half):
    run = copied(half, space, "replaced", half.own)
    checkpoints = run.output / "checkpoints"
    (checkpoints / f"step{2 * SAVE}").rename(checkpoints / f".step{2 * SAVE}.replaced")
    assert f"after step {2 * SAVE}" in resumed(run, undisturbed["ddp"])
