"""The ranks of the tests themselves: what a case leaves behind is noticed, and waiting for ever ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from support import ranks
from support.process_state import differences
from support.progress import Progress, StandstillError, wait_until


def test_a_case_that_leaves_something_has_its_ranks_replaced(pools):
    before = len(pools.replaced)
    pools.run("misbehaving", "leave", 2)
    if ranks.FRESH:
        pytest.skip("ranks of their own for each worker are not replaced")
    (why,) = pools.replaced[before:]
    assert why == "misbehaving leave changed $RSO_DS_LEFT_BEHIND, torch.nn.functional.relu"
    assert pools.run("misbehaving", "look", 2) == [True, True]


def test_a_case_that_fails_on_one_rank_says_where_and_the_next_has_new_ranks(pools):
    with pytest.raises(ranks.CaseFailed, match="rank 0: was done(?s:.*)rank 1: Traceback(?s:.*)only here"):
        pools.run("misbehaving", "fail", 2)
    assert pools.run("misbehaving", "after", 2) == [0, 1]


def test_what_is_new_counts_in_the_environment_alone():
    before = {"a": 1, "b": 2, "environment": {"X": "1", "Y": "1"}}
    after = {"a": 1, "b": 3, "c": 4, "environment": {"X": "2", "Z": "1"}}
    assert differences(before, after) == ["b", "$X", "$Y", "$Z"]


def test_a_process_that_waits_is_given_up_and_one_that_works_is_not():
    waiting, working = (
        subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(60)", "while True: pass")
    )
    try:
        with pytest.raises(StandstillError, match="no progress in 3 s"):
            wait_until(lambda: waiting.poll() is not None, Progress([waiting.pid], idle=3))
        until = time.monotonic() + 4
        wait_until(lambda: time.monotonic() > until, Progress([working.pid], idle=3))
        with pytest.raises(StandstillError, match="s of CPU time and no end"):
            wait_until(lambda: False, Progress([working.pid], idle=3, most=1))
    finally:
        for process in (waiting, working):
            process.kill()
            process.wait()
