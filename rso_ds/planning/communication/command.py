"""``rso-ds comm``: bytes and time of a step's exchange, for RSO beside other methods, without a cluster."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rso_ds.config import RSOConfig
from rso_ds.deepspeed_json import refuse_unsupported, rso_config
from rso_ds.errors import RSOConfigError
from rso_ds.planning.communication.exchange import Deployment, Exchange, Transfer, powersgd, transfers
from rso_ds.planning.communication.network import Network
from rso_ds.planning.memory.account import model_builder
from rso_ds.planning.memory.command import read_rso_json, trust_flag
from rso_ds.planning.memory.methods import method
from rso_ds.units import MB, parse_rate

_TITLES = {"adamw": "AdamW", "galore": "GaLore", "powersgd": "PowerSGD (DDP)", "lora": "LoRA", "rso": "RSO"}
_ENGINES = ("zero", "ddp", "fsdp2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deepspeed", required=True, help="DeepSpeed JSON with an RSO optimizer block")
    parser.add_argument("--model", default="llama-7b", help="named shape or folder with a config.json [llama-7b]")
    parser.add_argument("--vocab-size", type=int, default=32000, help="vocabulary of a named shape [32000]")
    trust_flag(parser)
    parser.add_argument("--gpus", type=int, default=8, help="ranks [8]")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that the ranks are spread over [1]")
    parser.add_argument("--link", default="10Gbit", help="rate of a node's link to the others, each way [10Gbit]")
    parser.add_argument("--intra-link", default="200GB/s", help="rate between two GPUs of a node [200GB/s]")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds a round between nodes [20]")
    parser.add_argument("--engine", choices=_ENGINES, default="zero", help="what trains [zero, at the JSON's stage]")
    parser.add_argument("--replicas", type=int, default=1, help="with fsdp2: copies of the sharded model (HSDP) [1]")
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="blocks are computed again, for which ZeRO-3 gathers them again",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> str:
    """What the command prints. Raises ``RSOConfigError`` for bad input."""
    from rso_ds.models import model_config  # transformers takes seconds to import

    config = read_rso_json(args.deepspeed)
    rso = rso_config(config)
    refuse_unsupported(config)
    if args.gpus < 1 or args.nodes < 1 or args.gpus % args.nodes:
        raise RSOConfigError(f"--nodes {args.nodes} must divide --gpus {args.gpus}, and both be at least 1.")
    if args.replicas > 1 and args.engine != "fsdp2":
        raise RSOConfigError(f"--replicas {args.replicas} is for --engine fsdp2.")
    if rso.communicate == "boundary" and args.engine == "zero":
        raise RSOConfigError(
            "'communicate': 'boundary' is not for DeepSpeed: use --engine ddp, or fsdp2 with replicas."
        )
    deployment = Deployment.from_json(config, args.gpus, args.engine, args.replicas, args.gradient_checkpointing)
    link, intra_link = parse_rate(args.link, "--link"), parse_rate(args.intra_link, "--intra-link")
    network = Network(args.nodes, link, intra_link, latency=args.latency * 1e-6)
    hf_config = model_config(args.model, args.vocab_size, 2048, args.trust_remote_code)
    build = model_builder(hf_config, args.trust_remote_code)
    rows = [_row(name, sent, where, network) for name, sent, where in _methods(build, rso, deployment)]
    title = (
        f"{args.model}, {_engine_name(deployment)}, {args.gpus} GPUs on {args.nodes} nodes,"
        f" {deployment.engine.precision};"
        f" links {args.link} between nodes, {args.intra_link} inside"
    )
    if args.json:
        return json.dumps({"title": title, "network": vars(network), "methods": rows}, indent=2)
    return _table(title, rows, network)


def _methods(build: Any, rso: RSOConfig, deployment: Deployment) -> list[tuple[str, list[Transfer], Deployment]]:
    found: list[tuple[str, list[Transfer], Deployment]] = []
    low = deployment.engine.itemsize == 2
    for name in ("adamw", "galore", "powersgd", "lora", "rso"):
        chosen = method(name if name != "powersgd" else "adamw", rso)
        with FakeTensorMode():
            model = build(torch.bfloat16 if low else torch.float32, None)
            chosen.prepare(model)
            exchange = Exchange.of(model, rso)
        if name == "powersgd":
            where = replace(deployment, engine=replace(deployment.engine, kind="ddp"), replicas=1, hpz=1)
            found.append((name, powersgd(exchange, where, _rank(rso, exchange)), where))
        else:
            found.append((name, transfers(exchange, deployment), deployment))
    return found


def _rank(rso: RSOConfig, exchange: Exchange) -> int:
    """RSO's rank in the blocks: that of a square layer of the model's width."""
    if rso.rank is not None:
        return rso.rank
    width = max((p.shape[-1] for p in exchange.parameters if len(p.shape) == 1), default=1)
    return max(1, int((rso.rank_ratio or 0.0) * width))


def _row(name: str, sent: list[Transfer], deployment: Deployment, network: Network) -> dict[str, Any]:
    kinds = {kind: sum(t.payload for t in sent if t.kind == kind) for kind in ("gradient", "weights", "boundary")}
    return {
        "method": _TITLES[name],
        "payload_bytes": kinds,
        "node_bytes": network.crossing(sent, deployment),
        "seconds": network.seconds(sent, deployment),
    }


def _engine_name(deployment: Deployment) -> str:
    if deployment.engine.kind == "zero":
        return f"ZeRO-{deployment.engine.stage}"
    return {
        "ddp": "DDP",
        "fsdp2": "FSDP2" if deployment.replicas == 1 else f"HSDP with {deployment.replicas} replicas",
    }[deployment.engine.kind]


def _table(title: str, rows: list[dict[str, Any]], network: Network) -> str:
    columns = ("gradients", "weights", "boundary", "leaves a node", "time", "AdamW = 1")
    lines = [title, "MB a rank hands to collectives in a step; time if nothing hides behind computation"]
    lines.append(f"  {'':<16}" + "".join(f"{name:>14}" for name in columns))
    base = rows[0]["seconds"]
    for row in rows:
        figures = [f"{n / MB:,.2f}" for n in (*row["payload_bytes"].values(), row["node_bytes"])]
        figures += [f"{row['seconds'] * 1e3:,.1f} ms", f"{row['seconds'] / base:.3f}" if base else "-"]
        lines.append(f"  {row['method']:<16}" + "".join(f"{figure:>14}" for figure in figures))
    lines.append(
        f"Model: ring collectives, {network.latency * 1e6:g} us a round between nodes and"
        f" {network.intra_latency * 1e6:g} us inside, bytes over the slower of the two links. GaLore projects after the"
        " reduction, so it sends what AdamW sends. Weights: ZeRO 1-2 send updated parameters back, ZeRO 3 and FSDP2"
        " gather parameters for every pass."
    )
    return "\n".join(lines)
