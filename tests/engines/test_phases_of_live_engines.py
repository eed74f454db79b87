"""The peak of each phase of a run by the account, against what two ranks really held."""

from __future__ import annotations

import pytest
from support.environment import needs
from support.exhaustive import quick
from support.ranks import Cases

from rso_ds.planning.memory.phases import PHASES

needs("deepspeed")

CASES = [f"{engine}-{precision}" for engine in ("zero2", "zero3", "fsdp2") for precision in ("bf16", "fp32")]


@pytest.mark.parametrize("case", quick([*CASES, "fsdp2-bf16-accumulated", "zero2-bf16-accumulated"], {"fsdp2-bf16"}))
def test_every_phase_within_five_percent(pools, case):
    got = Cases(pools, "memory_phases")[case]
    assert got["missing"] == []
    assert tuple(got["phases"]) == PHASES
    wrong = {name: row for name, row in got["phases"].items() if abs(row["error"]) > 0.05}
    assert not wrong
