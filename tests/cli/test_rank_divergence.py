"""One of two ranks finds other files, text or losses: the run goes on rightly, or ends and says what differs."""

from __future__ import annotations

import json
import time

import pytest
from support.environment import needs
from support.exhaustive import quick
from support.train_ranks import TrainRanks
from support.train_workspace import Workspace

needs("deepspeed")

DDP = ["--engine", "ddp", "--eval-interval", "0"]
LOCAL = [*DDP, "--set", "optimizer.params.communicate=boundary", "--set", "optimizer.params.interval=3"]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("divergence"))


def start(space, name, divergence="", *flags, steps=12):
    before = f"support.divergence:{divergence}" if divergence else ""
    ranks = TrainRanks(
        space.arguments(name, *flags, steps=steps), space.folder / "logs" / name / divergence, 2, {}, before
    )
    began = time.monotonic()
    return ranks.wait(), ranks, time.monotonic() - began


# (rank that tells, its words)
ENDS = {
    "own_node": (1, "ranks disagree on the training data"),
    "cannot_write": (1, "rank 0: "),
    "dies_preparing": (1, "rank 1 lost another rank while it was preparing the data: rank 0 is gone"),
    "dies_on_another_node": (0, "rank 0 lost another rank while it was preparing the data: no sign of life for 3 s"),
}


@pytest.mark.parametrize("divergence", quick(ENDS, {"own_node", "dies_preparing", "dies_on_another_node"}))
def test_the_run_ends_and_names_what_differs(space, divergence):
    codes, ranks, _ = start(space, f"ends-{divergence}", divergence, *DDP, "--timeout", "3")
    assert sorted(codes) in ([1, 1], [1, 9]), ranks.text()
    rank, words = ENDS[divergence]
    assert words in ranks.text(rank), ranks.text()
    assert "Traceback" not in ranks.text(rank)


def test_resume_auto_where_one_rank_has_no_checkpoint(space):
    codes, ranks, _ = start(space, "resume", "", *DDP, steps=6)
    assert codes == [0, 0], ranks.text()
    codes, ranks, _ = start(space, "resume", "other_output", *DDP, "--resume", "auto")
    assert codes == [1, 1], ranks.text()
    for rank in (0, 1):
        assert "resume-elsewhere" in ranks.text(rank)
    assert "rank 1: " in ranks.text(0)


@pytest.mark.parametrize("divergence", quick(["slow_preparation", "slow_end"], ["slow_preparation"]))
def test_slow_work_of_one_rank_is_waited_for(space, divergence):
    """Beyond --timeout, which is for ranks that are silent."""
    slow = Workspace(space.folder / divergence) if (space.folder / divergence).mkdir() is None else space
    codes, ranks, seconds = start(slow, divergence, divergence, *DDP, "--timeout", "3", steps=2)
    assert codes == [0, 0], ranks.text()
    assert seconds > 6
    assert (slow.folder / divergence / "model" / "config.json").is_file()


def test_a_loss_that_is_not_finite_on_one_rank_under_local_steps(space):
    codes, ranks, _ = start(space, "poisoned", "poisoned_before_a_save", *LOCAL)
    assert codes == [0, 0], ranks.text()
    states = [space.folder / "poisoned" / "checkpoints" / f"step{n}" / "rso_state.json" for n in (6, 12)]
    assert [json.loads(path.read_text())["rso"]["applied_steps"] for path in states] == [6, 12]
