"""What ``rso-ds memory`` says that a rank holds, against live DeepSpeed engines on two ranks."""

from __future__ import annotations

import pytest
from support.environment import needs
from support.exhaustive import quick
from support.ranks import Cases

needs("deepspeed")


@pytest.fixture(scope="module")
def engines(pools):
    return Cases(pools, "memory_states")


STATE_CASES = [f"zero{s}-{p}" for s in range(4) for p in ("fp32", "bf16")] + [
    "zero1-bf16-sgd", "zero2-bf16-coordinate", "zero2-bf16-offload", "zero3-bf16-masters", "zero2-bf16-masters",
    "zero3-bf16-persistent", "zero3-bf16-hpz", "zero2-fp32-embeddings", "zero3-bf16-embeddings",
    *(f"zero{s}-bf16-tied" for s in range(4)),
]  # fmt: skip


QUICK = {
    "zero0-bf16", "zero1-bf16-sgd", "zero2-bf16-coordinate", "zero2-bf16-offload", "zero2-fp32-embeddings",
    "zero3-fp32", "zero3-bf16-masters", "zero3-bf16-tied", "zero3-bf16-hpz",
}  # fmt: skip


@pytest.mark.parametrize("case", quick(STATE_CASES, QUICK))
def test_states_are_those_of_a_live_engine(engines, case):
    got = engines[case]
    assert got["missing"] == []
    measured = got["measured"]
    model = {k: got["device"][k] + got["host"][k] for k in got["device"]}
    # Adam's step counts and the padding of flat buffers: a few bytes a parameter.
    near = {"rel": 0.01, "abs": 256}
    # hpZ's copies of what trains are dropped after each step and made anew in the next pass.
    parameters = sum(measured[k] for k in ("W", "B", "dense parameters")) + got["dropped"]
    assert model["weights"] + model["B or adapters"] == pytest.approx(parameters, **near)
    assert model["P"] == measured["P"]
    assert model["solver state"] == pytest.approx(measured["solver state"], **near)
    assert model["fp32 masters"] == pytest.approx(measured["masters"], **near)
    assert got["kept_model"] == pytest.approx(got["kept"], rel=0.05)


def test_profiling_does_not_undo_gradient_checkpointing(engines):
    """Naming the ops of a checkpointed graph would recompute every block at once, before backward."""
    blocks = engines["checkpointing"]["blocks"]
    assert engines["checkpointing"]["kept"] == 0
    assert engines["checkpointing"]["passes"] == [blocks, 2 * blocks]
    assert engines["zero3-fp32"]["passes"] == [blocks, blocks]
