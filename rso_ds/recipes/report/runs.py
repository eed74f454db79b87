"""What a run has left: of ``launch/train.py``, or of Hugging Face's Trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rso_ds.errors import RSOError


@dataclass
class Run:
    """One run. Curves are lists of points (step, value); ``tokens``, ``seconds`` and ``sent`` tell, for each logged
    step, what had been trained on, how long it had trained (without evaluations and saves), and how many bytes rank 0
    had handed to collectives; empty where the run did not record it."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    loss: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    merge_ratio: list[tuple[int, float]] = field(default_factory=list)
    gradient: list[tuple[int, float]] = field(default_factory=list)
    tokens: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    sent: dict[int, float] = field(default_factory=dict)
    peak_memory: float | None = None
    tokens_per_second: float | None = None
    bytes_per_step: float | None = None


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in ``folders``, with names that tell them apart. Raises ``RSOError`` for one that is none."""
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise RSOError(f"{paths[i]} is named twice.")
    depth = 1
    while len({_tail(path, depth) for path in resolved}) < len(resolved):
        depth += 1
    return [_load(path, _tail(real, depth)) for path, real in zip(paths, resolved, strict=True)]


def _tail(path: Path, depth: int) -> str:
    return "/".join(path.parts[-depth:])


def _load(folder: Path, name: str) -> Run:
    if (folder / "metrics.jsonl").is_file():
        run = _of_train(folder, name)
    elif (folder / "trainer_state.json").is_file():
        run = _of_trainer(folder, name)
    else:
        raise RSOError(
            f"{folder} holds neither metrics.jsonl (launch/train.py) nor trainer_state.json (Hugging Face's Trainer):"
            " name the output folder of a run."
        )
    if not run.loss:
        raise RSOError(f"{folder}: not one step has been logged yet.")
    return run


def _of_train(folder: Path, name: str) -> Run:
    run = Run(name)
    seconds = sent = 0.0
    before = tokens_before = 0
    drawn = 0
    speeds: list[float] = []
    for record in _lines(folder / "metrics.jsonl"):
        step = int(record["step"])
        if record.get("val_loss") is not None:
            run.held_out.append((step, record["val_loss"]))
        if "loss" not in record:
            run.tokens[step] = run.seconds[step] = run.sent[step] = 0.0
            continue
        if record["loss"] is not None:
            run.loss.append((step, record["loss"]))
        speeds.append(record["tokens_per_second"])
        seconds += (record["tokens"] - tokens_before) / record["tokens_per_second"]
        a_step = sum(n for kind, n in record["comm_bytes"].items() if kind != "evaluation")
        sent += a_step * (step - before)
        run.tokens[step], run.seconds[step], run.sent[step] = record["tokens"], seconds, sent
        before, tokens_before = step, record["tokens"]
        run.peak_memory = max(run.peak_memory or 0, record["peak_memory_bytes"])
        if "subspace_grad_norm" in record:
            run.gradient.append((step, record["subspace_grad_norm"]))
        if "merge_ratio" in record and record["draw"] != drawn:  # told in each line until the next boundary
            run.merge_ratio.append((step, record["merge_ratio"]))
            drawn = record["draw"]
    evaluated = folder / "evaluation.jsonl"  # of rso-ds evaluate: steps at which the run itself did not stop
    if evaluated.is_file():
        known = {step for step, _ in run.held_out}
        beside = {int(r["step"]): r["val_loss"] for r in _lines(evaluated) if r["val_loss"] is not None}
        run.held_out = sorted([*run.held_out, *((step, x) for step, x in beside.items() if step not in known)])
    if before:
        run.bytes_per_step = sent / before
        run.tokens_per_second = sorted(speeds)[len(speeds) // 2]
    run.facts = _facts(folder)
    return run


def _facts(folder: Path) -> dict[str, str]:
    """What the effective configuration says."""
    facts: dict[str, str] = {}
    json_file, yaml_file = folder / "deepspeed.json", folder / "config.yaml"
    if yaml_file.is_file():
        settings = yaml.safe_load(yaml_file.read_text(encoding="utf-8"))
        facts |= {key: str(settings[key]) for key in ("model", "engine", "seq_len", "seed") if key in settings}
    if json_file.is_file():
        config = json.loads(json_file.read_text(encoding="utf-8"))
        params = config["optimizer"].get("params", {})
        facts["optimizer"] = config["optimizer"]["type"]
        if facts.get("engine") == "deepspeed":
            facts["ZeRO stage"] = str((config.get("zero_optimization") or {}).get("stage", 0))
        for key in ("lr", "rank", "rank_ratio", "interval", "sampler", "carry_over", "targets"):
            if params.get(key) is not None:
                facts[key] = f"{params[key]:g}" if isinstance(params[key], float) else str(params[key])
    return facts


def _of_trainer(folder: Path, name: str) -> Run:
    path = folder / "trainer_state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        history = state["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise RSOError(f"{path} is damaged: {type(error).__name__}: {error}.") from None
    run = Run(name, {"trainer": "Hugging Face"})
    sent = 0.0
    before = drawn = 0
    for entry in history:
        step = int(entry["step"])
        for curve, key in ((run.loss, "loss"), (run.held_out, "eval_loss"), (run.gradient, "subspace_grad_norm")):
            if key in entry:
                curve.append((step, float(entry[key])))
        if "merge_ratio" in entry and entry["draw"] != drawn:
            run.merge_ratio.append((step, float(entry["merge_ratio"])))
            drawn = entry["draw"]
        if "comm_bytes_per_step" in entry:  # rso_ds.integrations.logs
            sent += entry["comm_bytes_per_step"] * (step - before)
            run.sent[step], before = sent, step
            run.bytes_per_step = sent / step
        if "peak_memory_bytes" in entry:
            run.peak_memory = max(run.peak_memory or 0, entry["peak_memory_bytes"])
        if "num_input_tokens_seen" in entry:
            run.tokens[step] = float(entry["num_input_tokens_seen"])
    results = folder / "results.json"
    if results.is_file():  # launch/finetune.py
        told = json.loads(results.read_text(encoding="utf-8"))
        run.facts |= {key: str(told[key]) for key in ("method", "learning_rate", "seed") if key in told}
        run.peak_memory = told.get("peak_memory_bytes")
        run.bytes_per_step = float(sum(told.get("comm_bytes_per_step", {}).values()))
        per_step = told.get("seconds_per_step")
        for step, _ in run.loss if per_step else ():
            run.seconds[step] = step * per_step
            run.sent.setdefault(step, step * run.bytes_per_step)
    return run


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records; a last line without end is what a crash left, and goes. Raises ``RSOError`` for other damage."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
            records[-1]["step"]
        except (ValueError, KeyError, TypeError):
            raise RSOError(f"{path}: line {number} is damaged: remove it, or name another run.") from None
    return records
