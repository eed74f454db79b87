"""Bytes per step and rank, counted at the collectives, against the closed form: 2 and 4 real ranks.

``rso-ds comm`` prints this closed form. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import pytest
from cases.comm_cases import INTERVAL, cases
from support.environment import needs
from support.exhaustive import quick
from support.ranks import Cases

needs("deepspeed")

CASES = [(world, name) for world in (2, 4) for name in cases(world)]


@pytest.fixture(scope="module")
def results(pools):
    """By number of ranks, then by name."""
    return {world: Cases(pools, "comm_bytes", world) for world in (2, 4)}


QUICK = {(2, name) for name in (
    "zero0-rso", "zero1-rso", "zero2-rso", "zero3-rso", "ddp-rso", "fsdp2-rso", "zero2-rso-h16-tokens",
    "fsdp20-rso-h16-tokens", "ddp-lora", "ddp-local", "ddp-gas2", "fsdp2-gas2",
    "zero2-gas2", "zero2-folded", "zero2-overlap", "zero3-overlap",
    "ddp-overlap", "fsdp2-overlap", "zero1-bf16-masters", "ddp-bf16-masters",
)} | {(4, name) for name in (
    "fsdp2-rso", "hsdp-rso", "hsdp-local", "zero3-hpz-rso", "zero3-hpz-adamw",
)}  # fmt: skip


@pytest.mark.parametrize(("world", "name"), quick(CASES, QUICK))
def test_counted_bytes_are_the_closed_form(results, world, name):
    got = results[world][name]
    measured, predicted = got["measured"], got["predicted"]
    print(f"\n{world} {name:22}", *(f"{k} {measured[k]:,.0f} / {predicted[k]:,.0f}" for k in measured))
    assert measured == predicted


def test_between_nodes_hsdp_sends_gradients_of_what_trains_and_nothing_else(results):
    """Ranks 0-1 and 2-3 are two nodes: half of the (padded) trainable elements cross, no weights."""
    crossing, flat = results[4]["hsdp-rso"]["inter_node"], results[4]["fsdp2-rso"]["measured"]
    assert crossing["weights"] == 0
    assert crossing["gradient"] == flat["gradient"] / 2
    assert results[4]["fsdp2-rso"]["inter_node"] == flat  # every group of plain FSDP2 spans both nodes


def test_between_nodes_hpz_sends_w_once_an_interval(results):
    """AdamW's parameters change at every step and are gathered over all ranks as often."""
    rso, adamw = results[4]["zero3-hpz-rso"]["inter_node"], results[4]["zero3-hpz-adamw"]["inter_node"]
    assert adamw["weights"] * 4 == results[4]["zero3-hpz-adamw"]["measured"]["gradient"]
    trained = results[4]["zero3-hpz-rso"]["measured"]["gradient"] / 4
    w_of_two_blocks = 2 * (4 * 128 * 128 + 3 * 128 * 352)
    assert rso["weights"] == trained + w_of_two_blocks / INTERVAL  # 4 bytes / 4 ranks an element


@pytest.mark.parametrize("engine", ["zero2", "zero3", "ddp", "fsdp2"])
def test_gradients_of_later_blocks_are_sent_while_earlier_ones_are_in_backward(results, engine):
    """Bytes on their way when backward has come to the input of the first of four blocks."""
    sent = results[2][f"{engine}-overlap"]["during_backward"]
    print(engine, sent)
    assert 0.4 * sent["in_all"] < sent["by_then"] < sent["in_all"]
