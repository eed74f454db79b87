"""``rso-ds comm``: the closed form (live ranks: tests/engines/test_bytes_sent.py) and the time model."""

from __future__ import annotations

import json

import pytest
import torch
from support.environment import ROOT, needs

import rso_ds
from rso_ds.cli import main
from rso_ds.comm.ring import rounds, wire_bytes
from rso_ds.layers import convert, parameter_counts
from rso_ds.planning.communication.exchange import Deployment, Transfer
from rso_ds.planning.communication.network import Network
from rso_ds.planning.memory.states import Engine

needs("transformers")

JSON = str(ROOT / "ds_configs" / "rso_zero2.json")


def run(capsys, *flags: str) -> dict:
    main(["comm", "--deepspeed", JSON, "--model", "llama-60m", "--json", *flags])
    out = json.loads(capsys.readouterr().out)
    return {row["method"]: row for row in out["methods"]}


def test_table_names_every_method(capsys):
    main(["comm", "--deepspeed", JSON, "--model", "llama-9m", "--gpus", "16", "--nodes", "4", "--link", "1Gbit"])
    text = capsys.readouterr().out
    for name in ("AdamW", "GaLore", "PowerSGD (DDP)", "LoRA", "RSO", "leaves a node", "ZeRO-2, 16 GPUs on 4 nodes"):
        assert name in text


def test_rso_sends_what_trains_and_galore_what_adamw_sends(capsys):
    from rso_ds.models import llama_config, random_model

    rows = run(capsys, "--engine", "ddp", "--gpus", "4")
    with torch.device("meta"):
        model = random_model(llama_config("llama-60m"))
    dense = sum(p.numel() for p in model.parameters())
    convert(model, rso_ds.RSOConfig())
    assert rows["AdamW"]["payload_bytes"]["gradient"] == 4 * dense
    assert rows["GaLore"]["payload_bytes"] == rows["AdamW"]["payload_bytes"]
    assert rows["RSO"]["payload_bytes"]["gradient"] == 4 * parameter_counts(model)["communicated"]


def test_time_between_nodes_is_bytes_over_the_link_plus_latencies(capsys):
    rows = run(capsys, "--engine", "ddp", "--gpus", "8", "--nodes", "4", "--link", "1Gbit", "--latency", "0")
    payload = rows["AdamW"]["payload_bytes"]["gradient"]
    assert rows["AdamW"]["node_bytes"] == pytest.approx(2 * 7 / 8 * payload)
    assert rows["AdamW"]["seconds"] == pytest.approx(rows["AdamW"]["node_bytes"] / 125e6)


def test_hsdp_keeps_gathers_inside_nodes(capsys):
    """One replica a node: only gradients of what trains leave it, an eighth of them from each GPU."""
    flat = run(capsys, "--engine", "fsdp2", "--gpus", "16", "--nodes", "2")["RSO"]
    hybrid = run(capsys, "--engine", "fsdp2", "--gpus", "16", "--nodes", "2", "--replicas", "2")["RSO"]
    trained = run(capsys, "--engine", "ddp", "--gpus", "16", "--nodes", "2")["RSO"]["payload_bytes"]["gradient"]
    assert hybrid["node_bytes"] == pytest.approx(trained, rel=0.01)  # 2 (N - 1) / N = 1 for two nodes
    assert flat["node_bytes"] > 2 * hybrid["node_bytes"]


def test_one_gpu_sends_nothing(capsys):
    rows = run(capsys, "--gpus", "1")
    assert all(row["seconds"] == 0 for row in rows.values())


def test_latency_counts_rounds():
    deployment = Deployment(Engine("ddp", 0, 4, "fp32"))
    network = Network(4, link=1e9, intra_link=1e11, latency=1e-3)
    transfer = Transfer("gradient", "all_reduce", "world", 0.0, calls=5)
    assert network.seconds([transfer], deployment) == pytest.approx(5 * 6e-3)
    assert rounds("all_gather", 4) == 3


@pytest.mark.parametrize(("op", "bytes_sent"), [("all_reduce", 150), ("reduce_scatter", 75), ("all_gather", 300)])
def test_ring_bytes(op, bytes_sent):
    assert wire_bytes(op, 100, 4) == bytes_sent


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--link", "fast"], "'fast' is not a rate"),
        (["--link", "0Gbit"], "'0Gbit' is not a rate"),
        (["--gpus", "6", "--nodes", "4"], "--nodes 4 must divide --gpus 6"),
        (["--replicas", "2"], "--replicas 2 is for --engine fsdp2"),
        (["--engine", "fsdp2", "--replicas", "3"], "--replicas 3 does not divide 8 GPUs"),
        (["--model", "llama-8m"], "Did you mean"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(SystemExit, match=message):
        main(["comm", "--deepspeed", JSON, *flags])
