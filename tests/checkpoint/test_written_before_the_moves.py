"""Checkpoints that the package wrote before its modules moved: they load, and the run goes on with the same bits.

data/before_moves/run.py wrote them at commit ba60c3e, the last with the old module names, the third one in two ranks,
with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set:

    python run.py write . checkpoint
    python run.py write . state_dict
    python run.py write . zero2

losses.json holds what the same runs went on with after they had saved.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.environment import ROOT
from support.exhaustive import quick
from support.train_workspace import free_port

DATA = Path(__file__).parent / "data" / "before_moves"


def continued(kind, ranks):
    """What rank 0 prints."""
    outer = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    common = {**outer, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [{**group, "RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {} for r in range(ranks)]
    command = [sys.executable, str(DATA / "run.py"), "continue", str(DATA), kind]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env={**common, **place}, **options) for place in places]
    try:
        shown = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, shown
    return json.loads(shown[0][0].splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "ranks"), quick([("checkpoint", 1), ("state_dict", 1), ("zero2", 2)], {("checkpoint", 1)})
)
def test_the_run_goes_on(kind, ranks):
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    expected, found = json.loads((DATA / "losses.json").read_text()), continued(kind, ranks)
    if found["machine"] == expected["machine"]:
        assert found["losses"] == expected[kind]
    else:  # another processor or torch adds in another order, and eight steps carry the last bits on
        there, here = ([float.fromhex(x) for x in losses] for losses in (expected[kind], found["losses"]))
        assert here == pytest.approx(there, rel=1e-4)
