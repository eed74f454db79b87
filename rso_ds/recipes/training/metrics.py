"""What a run shows while it goes on, and what it leaves for machines to read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rso_ds.comm.counter import KINDS, CommCounter
from rso_ds.recipes.training.held_out import perplexity
from rso_ds.solvers.groups import IS_SUBSPACE
from rso_ds.units import MB, in_unit


def validation(loss: float) -> dict[str, float | None]:
    """A held-out loss as ``metrics.jsonl`` has it: null where it is not finite, which JSON cannot write."""
    finite = math.isfinite(loss) and math.isfinite(perplexity(loss))
    return {"val_loss": loss if finite else None, "val_ppl": perplexity(loss) if finite else None}


def rates_of(optimizer: Any) -> dict[str, float]:
    """Learning rates that the next step takes: "lr", of B where RSO trains, and then "dense_lr", of the rest."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates.setdefault("lr" if group.get(IS_SUBSPACE, True) else "dense_lr", float(group["lr"]))
    return rates


def per_step(now: Mapping[str, int], before: Mapping[str, int], steps: int) -> dict[str, int]:
    """Payload bytes of a rank in one step, by kind (``rso_ds.comm.KINDS``), averaged over ``steps`` steps."""
    return {kind: (total - before[kind]) // steps for kind, total in now.items()}


def traffic_summary(traffic: CommCounter, steps: int) -> str:
    """Table of what one rank sent in ``steps`` steps: payload and, by a ring algorithm, bytes on the wire."""
    lines = [
        f"sent by rank 0 in {steps} steps, MB:   {'payload':>12} {'a step':>12} {'on the wire':>12} {'inter-node':>12}"
    ]
    for kind in KINDS:
        payload, wire = traffic.total(kind), traffic.total(kind, wire=True)
        crossing = traffic.total(kind, "inter-node", wire=True)
        if payload:
            figures = (payload, payload / max(1, steps), wire, crossing)
            lines.append(f"  {kind:<33}" + "".join(f" {n / MB:>12,.3f}" for n in figures))
    return "\n".join(lines)


class Waits:
    """Seconds for which training stood still since the last ``take``, by reason."""

    REASONS = ("data", "evaluation", "records", "checkpoint")

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(self.REASONS, 0.0)

    @contextmanager
    def of(self, reason: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[reason] += time.monotonic() - start

    def take(self) -> dict[str, float]:
        """What has added up, rounded to microseconds; counts from zero again."""
        taken = {reason: round(seconds, 6) for reason, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self.REASONS, 0.0)
        return taken


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, appended, so that a resumed run continues the file.

    Entries from steps after ``keep_to`` (a run that went on beyond the checkpoint now resumed) are dropped.
    """

    def __init__(self, path: Path, keep_to: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if keep_to is not None and path.is_file():
            whole = path.read_text().rpartition("\n")[0]  # a crash may have left half a line
            kept = [line for line in whole.splitlines() if json.loads(line)["step"] <= keep_to]
        path.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")


class Display:
    """Progress on rank 0: a live bar on a terminal, plain lines elsewhere (log files, SLURM)."""

    def __init__(self, total_steps: int, start_step: int, active: bool) -> None:
        self.active = active
        self.console = Console(quiet=not active, soft_wrap=True, highlight=False)
        self.total = total_steps
        self._start, self._began = start_step, time.monotonic()
        self._bar: Progress | None = None
        if active and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[status]}"), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, status="")
            self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a logged step."""
        sent = sum(n for kind, n in record["comm_bytes"].items() if kind != "evaluation")
        status = (
            f"loss {_number(record['loss'], '.4f')}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tok/s"
            f"  {in_unit(sent, 'MB', ',.2f')}/step  mem {in_unit(record['peak_memory_bytes'], 'GiB', '.2f')}"
        )
        if "val_loss" in record:
            status += f"  val {_number(record['val_loss'], '.4f')} (ppl {_number(record['val_ppl'], '.2f')})"
        if record["skipped_steps"]:
            status += f"  skipped {record['skipped_steps']}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], status=status)
        else:
            self.say(f"step {record['step']}/{self.total}  {status}  ETA {self._eta(record['step'])}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int) -> str:
        done = step - self._start
        if done <= 0:
            return "-"
        seconds = int((time.monotonic() - self._began) / done * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _number(value: float | None, how: str) -> str:
    return "not finite" if value is None else format(value, how)
