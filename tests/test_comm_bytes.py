"""Bytes per step and rank, counted at the collectives, against the closed form: 2 and 4 real ranks.

``rso-ds comm`` prints this closed form. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import pytest
import torch
from comm_cases import cases
from ranks import run_ranks

pytest.importorskip("deepspeed")
CASES = [(world, name) for world in (2, 4) for name in cases(world)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("comm_bytes")
    found = {}
    for world in (2, 4):
        run_ranks("comm_bytes", out, world)
        saved = torch.load(out / f"comm_bytes{world}.pt", weights_only=False)
        found |= {(world, name): result for name, result in saved.items()}
    return found


@pytest.mark.parametrize(("world", "name"), CASES)
def test_counted_bytes_are_the_closed_form(results, world, name):
    got = results[world, name]
    assert "error" not in got, got.get("error")
    measured, predicted = got["measured"], got["predicted"]
    print(f"\n{world} {name:22}", *(f"{k} {measured[k]:,.0f} / {predicted[k]:,.0f}" for k in measured))
    assert measured == predicted
