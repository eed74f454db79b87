"""``rso-ds plan``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rso_ds.errors import RSOConfigError
from rso_ds.planning.communication.network import Network
from rso_ds.planning.memory.account import check_sizes, model_builder
from rso_ds.planning.memory.command import positions, trust_flag
from rso_ds.planning.plan.config_json import base_json, own_rank, rso_of, sbatch, single_node, train_flags
from rso_ds.planning.plan.reasons import nothing_fits, reasons, shape_name
from rso_ds.planning.plan.search import RANK_RATIOS, Candidate, NothingFits, Plan, Task, make_plan
from rso_ds.units import in_unit, parse_memory, parse_rate

# Sustained 1e12 FLOP/s of a GPU where nobody says: assumptions.
_TFLOPS = {"bf16": 100.0, "fp32": 10.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-7b", help="named shape or folder with a config.json [llama-7b]")
    parser.add_argument("--vocab-size", type=int, default=32000, help="vocabulary of a named shape [32000]")
    trust_flag(parser)
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a sequence [2048]")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the job")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of a node [8, or --gpus if fewer]")
    parser.add_argument("--gpu-memory", required=True, help="memory of a GPU that a program can use: 40GB, 79GiB")
    parser.add_argument("--link", default="10Gbit", help="rate of a node's link to the others, each way [10Gbit]")
    parser.add_argument("--intra-link", default="200GB/s", help="rate between two GPUs of a node [200GB/s]")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds a round between nodes [20]")
    parser.add_argument("--global-batch", type=int, default=256, help="sequences an optimizer step, all ranks [256]")
    parser.add_argument(
        "--rank-ratio", type=float, help="rank as a share of the width [1/4; 1/8 or 1/16 where nothing else fits]"
    )
    parser.add_argument(
        "--gpu-tflops", type=float, help="TFLOP/s that a GPU sustains [assumed: 100 in bf16, 10 in fp32]"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of weights and compute [bf16]")
    parser.add_argument("--base", metavar="JSON", help="DeepSpeed JSON to start from; its RSO block is kept")
    parser.add_argument("--out", metavar="FOLDER", help="write rso.json and job.sh there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> str:
    """What the command prints; with ``--out``, the files are written. Raises ``RSOConfigError`` for bad input and
    where nothing fits."""
    from rso_ds.models import LLAMA_SHAPES, model_config  # transformers takes seconds to import

    task = _task(args)
    base = base_json(args.base, args.precision)
    ratios, given = _ratios(args, base)
    hf_config = model_config(args.model, args.vocab_size, args.seq_len, args.trust_remote_code)
    check_sizes(1, args.seq_len, args.gpus, positions(hf_config))
    build = model_builder(hf_config, args.trust_remote_code)
    try:
        plan = make_plan(build, base, task, ratios)
    except NothingFits as failure:
        raise RSOConfigError(nothing_fits(failure, build, task)) from None
    why = reasons(plan, task, getattr(hf_config, "hidden_size", None), given)
    chosen = plan.chosen
    vocab_size = args.vocab_size if args.model in LLAMA_SHAPES else None
    flags = train_flags(args.model, vocab_size, args.seq_len, chosen.config, chosen.checkpointing)
    if args.trust_remote_code:
        flags.append("--trust-remote-code")
    name = "rso.json" if args.out is None else str(Path(args.out) / "rso.json")
    commands = [sbatch(task.network.nodes, task.gpus_per_node, name, flags)]
    if task.network.nodes == 1:
        commands.append(single_node(task.gpus, name, flags))
    if args.out is not None:
        _write(Path(args.out), chosen.config, task, flags)
    title = (
        f"{args.model}, {task.gpus} GPUs of {args.gpu_memory} on {task.network.nodes} nodes, {args.precision},"
        f" {args.global_batch} sequences of {args.seq_len} a step; links {args.link} between nodes, {args.intra_link}"
        f" inside; {task.tflops:g} TFLOP/s a GPU{' (assumed)' if args.gpu_tflops is None else ''}"
    )
    if args.json:
        return json.dumps(_report(title, plan, task, why, commands), indent=2)
    return _text(title, chosen, why, commands)


def _task(args: argparse.Namespace) -> Task:
    for flag, value, minimum in (("--gpus", args.gpus, 1), ("--vocab-size", args.vocab_size, 1)):
        if value < minimum:
            raise RSOConfigError(f"{flag} must be at least {minimum}, got {value}.")
    per_node = min(8, args.gpus) if args.gpus_per_node is None else args.gpus_per_node
    if per_node < 1 or args.gpus % per_node:
        raise RSOConfigError(f"--gpus-per-node {per_node} must divide --gpus {args.gpus}: nodes are taken to be equal.")
    batch = args.global_batch
    if batch < args.gpus:
        raise RSOConfigError(
            f"--global-batch {batch} is fewer than a sequence for each of {args.gpus} GPUs: raise it or lower --gpus."
        )
    if batch % args.gpus:
        lower = batch // args.gpus * args.gpus
        raise RSOConfigError(
            f"--global-batch {batch} does not divide among {args.gpus} GPUs: use {lower} or {lower + args.gpus}."
        )
    if not (math.isfinite(args.latency) and args.latency >= 0):
        raise RSOConfigError(f"--latency must be a number of microseconds of at least 0, got {args.latency!r}.")
    tflops = _TFLOPS[args.precision] if args.gpu_tflops is None else args.gpu_tflops
    if not (math.isfinite(tflops) and tflops > 0):
        raise RSOConfigError(f"--gpu-tflops must be a number above 0, got {args.gpu_tflops!r}.")
    link, intra_link = parse_rate(args.link, "--link"), parse_rate(args.intra_link, "--intra-link")
    network = Network(args.gpus // per_node, link, intra_link, latency=args.latency * 1e-6)
    return Task(args.gpus, parse_memory(args.gpu_memory, "--gpu-memory"), tflops, network, batch, args.seq_len)


def _ratios(args: argparse.Namespace, base: dict[str, Any]) -> tuple[tuple[float | None, ...], str | None]:
    """(ratios in order of preference, what fixed them); a ratio of None is the base's own rank."""
    if args.rank_ratio is not None:
        if not 0 < args.rank_ratio <= 1:
            raise RSOConfigError(f"--rank-ratio must lie in (0, 1], got {args.rank_ratio!r}.")
        if own_rank(base):
            raise RSOConfigError("--rank-ratio contradicts the rank of --base: drop one of them.")
        return (args.rank_ratio,), "--rank-ratio"
    if own_rank(base):
        return (None,), "--base"
    return RANK_RATIOS, None


def _write(folder: Path, config: dict[str, Any], task: Task, flags: list[str]) -> None:
    """``rso.json`` and ``job.sh``. Raises ``RSOConfigError`` where a file with another content is in the way."""
    command = sbatch(task.network.nodes, task.gpus_per_node, "HERE/rso.json", flags)
    job = (
        "#!/usr/bin/env bash\n"
        "# Run it in the root of the checkout; further arguments (--data ...) go to launch/train.py.\n"
        'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)\n'
        f'exec {command.replace("HERE/rso.json", chr(34) + "$here/rso.json" + chr(34))} "$@"\n'
    )
    contents = {"rso.json": json.dumps(config, indent=2) + "\n", "job.sh": job}
    try:
        for name, content in contents.items():
            path = folder / name
            if path.exists() and path.read_text(encoding="utf-8") != content:
                raise RSOConfigError(f"--out: {path} exists and differs: move it away or choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RSOConfigError(f"--out {folder} cannot be written: {error}") from None


def _report(title: str, plan: Plan, task: Task, why: dict[str, list[str]], commands: list[str]) -> dict[str, Any]:
    return {
        "run": title,
        "memory_bytes": task.memory,
        "chosen": _figures(plan.chosen),
        "deepspeed": plan.chosen.config,
        "commands": commands,
        "reasons": why,
        "candidates": [{**_figures(c), "fits": c.needed <= task.memory} for c in (*plan.too_large, *plan.candidates)],
    }


def _figures(candidate: Candidate) -> dict[str, Any]:
    rso = rso_of(candidate.config)
    return {
        "stage": candidate.stage,
        "hpz": candidate.hpz,
        "rank": rso.rank,
        "rank_ratio": rso.rank_ratio,
        "gradient_checkpointing": candidate.checkpointing,
        "micro_batch": candidate.micro_batch,
        "accumulation": candidate.accumulation,
        "total_bytes": candidate.account.total,
        "needed_bytes": candidate.needed,
        "host_bytes": candidate.account.host_total,
        "phase_bytes": {name: phase.device for name, phase in candidate.account.phases.items()},
        "largest_phase": candidate.account.largest_phase,
        "compute_seconds": candidate.compute,
        "communication_seconds": candidate.communication,
        "seconds": candidate.seconds,
    }


def _text(title: str, chosen: Candidate, why: dict[str, list[str]], commands: list[str]) -> str:
    lines = [
        title,
        f"Plan: ZeRO {shape_name(chosen)}, micro batch {chosen.micro_batch} x {chosen.accumulation}, gradient"
        f" checkpointing {'on' if chosen.checkpointing else 'off'}, {in_unit(chosen.needed, 'GB', '.1f')} a GPU,"
        f" {chosen.seconds:.2f} s a step (modelled, not measured)",
        "",
    ]
    for subject, found in why.items():
        lines += [f"  {subject if i == 0 else '':<14} {line}" for i, line in enumerate(found)]
    lines += ["", json.dumps(chosen.config, indent=2), "", *commands]
    return "\n".join(lines)
