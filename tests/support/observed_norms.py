"""What ``rso_ds.engines.observer`` saw of a run, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
from reference.rso import Result


def as_run(spec: dict[str, Any], got: dict[str, Any]) -> dict[str, Any]:
    """``spec`` with the form that ``got`` took, which it may choose if it was told none."""
    told = spec["rso"]["form"]
    assert got["form"] in (("two_path", "folded") if told is None else (told,))
    return {**spec, "rso": {**spec["rso"], "form": got["form"]}}


def check_observed(observed: list[dict[str, Any]], expected: Result, rso: dict[str, Any], tolerance: float):
    """Norms of B's gradient to ``tolerance``, sizes of merges too, but for the gaussian's expected ones. ``rso``: the
    configuration."""
    interval, gaussian = rso["interval"], rso.get("sampler") == "gaussian"
    assert len(observed) == len(expected.gradient_norms)
    for step, (record, norm) in enumerate(zip(observed, expected.gradient_norms, strict=True)):
        assert record["subspace_grad_norm"] == pytest.approx(norm, rel=tolerance), step
        crossed = (step + 1) // interval
        assert record["draw"] == crossed
        if crossed:
            ratio = expected.merge_ratios[crossed - 1]
            assert record["merge_ratio"] == pytest.approx(ratio, rel=0.1 if gaussian else tolerance), step
        else:
            assert "merge_ratio" not in record
