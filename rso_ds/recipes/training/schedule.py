"""The learning rate of each step, under every engine: warm-up, then cosine, a plateau with a decay, or a constant.

Step k (from 1, applied steps only) of a run of T has the peak rate of its parameter group times

- k / w in a warm-up of w steps, so that the first has 1/w of it and the w-th all of it;
- "constant": 1 after that;
- "cosine": f + (1 - f) (1 + cos(pi p)) / 2 with p = (k - 1 - w) / (T - w);
- "wsd" (warm-up, stable, decay; MiniCPM, arXiv 2404.06395): 1, and in the last d steps f + (1 - f) (1 - p) with
  p = (k - 1 - (T - d)) / d (linear, one of the decays compared in arXiv 2405.18392).

A decay begins at the full rate, and f is that of the step after the last, which a run that goes on keeps: no step of a
run has a rate of 0, whatever f is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rso_ds import defaults
from rso_ds.errors import RSOConfigError

KINDS = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class ScheduleShape:
    """A schedule of any length. ``warmup``, ``decay_share``: shares of all steps; ``final_lr``: share of the peak."""

    kind: str
    warmup: float
    decay_share: float | None
    final_lr: float | None

    def of_length(self, steps: int) -> Schedule:
        """For a run of ``steps`` steps; shares are rounded to steps."""
        warmup = round(self.warmup * steps)
        decay = 0
        if self.kind == "cosine":
            decay = steps - warmup
        elif self.decay_share is not None:
            decay = min(round(self.decay_share * steps), steps - warmup)
        return Schedule(self.kind, steps, warmup, decay, 1.0 if self.final_lr is None else self.final_lr)


def shape(
    kind: str | None,
    warmup: float | None,
    decay_share: float | None,
    final_lr: float | None,
    before: Mapping[str, Any] | None = None,
) -> ScheduleShape:
    """What the flags say; None is what a resumed run had (``before``: its shape), or the default.

    Raises ``RSOConfigError`` for a flag that the kind does not have, and for shares above 1 in all.
    """
    known = before or {}
    kind = kind or known.get("kind") or defaults.SCHEDULE
    for flag, value, kinds in (("--decay-share", decay_share, ("wsd",)), ("--final-lr", final_lr, ("cosine", "wsd"))):
        if value is not None and kind not in kinds:
            raise RSOConfigError(
                f"{flag} {value:g} is of --lr-schedule {' and '.join(kinds)}, and this run's is {kind}: drop the flag,"
                " or choose the schedule."
            )

    def chosen(value: float | None, key: str, default: float) -> float:
        old = known.get(key)
        return value if value is not None else default if old is None else float(old)

    found = ScheduleShape(
        kind,
        chosen(warmup, "warmup", defaults.WARMUP),
        chosen(decay_share, "decay_share", defaults.DECAY_SHARE) if kind == "wsd" else None,
        None if kind == "constant" else chosen(final_lr, "final_lr", defaults.FINAL_LR),
    )
    if found.warmup + (found.decay_share or 0.0) > 1.0:
        raise RSOConfigError(
            f"--warmup {found.warmup:g} and --decay-share {found.decay_share:g} are more than all steps: lower one."
        )
    return found


@dataclass(frozen=True)
class Schedule:
    """A schedule of a run: ``steps``, ``warmup`` and ``decay`` in steps, ``final`` as a share of the peak."""

    kind: str
    steps: int
    warmup: int
    decay: int
    final: float

    def ratio(self, step: int) -> float:
        """Share of the peak rate that applied step ``step`` (from 1) has; after the last step it stays."""
        if step <= self.warmup:
            return step / self.warmup
        done = step - 1 - (self.steps - self.decay)
        if self.decay == 0 or done <= 0:
            return 1.0
        progress = min(1.0, done / self.decay)
        left = (1.0 + math.cos(math.pi * progress)) / 2.0 if self.kind == "cosine" else 1.0 - progress
        return self.final + (1.0 - self.final) * left

    def __str__(self) -> str:
        decay = f", decay in the last {self.decay}" if self.kind == "wsd" else ""
        end = "" if self.kind == "constant" else f", to {self.final:g} of the peak"
        return f"{self.kind}, warm-up {self.warmup} of {self.steps} steps{decay}{end}"


class ScheduledRates:
    """Sets the rate of every parameter group of ``optimizer`` to its own peak times ``schedule``; the peaks are the
    groups' rates when this is made.

    Methods and state are those of DeepSpeed's schedules, whose checkpoints it goes on from.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_batch_iteration = -1  # index of the last applied step
        self.step(-1)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """After an applied step, whose index (from 0) may be given: set the rates of the next."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        ratio = self.schedule.ratio(last_batch_iteration + 2)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * ratio

    def get_last_lr(self) -> list[float]:
        """Rates of the next step, by group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """How far it has come; the schedule itself is the run's."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of ``state_dict``, or of a schedule of DeepSpeed's."""
        self.last_batch_iteration = int(state["last_batch_iteration"])


def scheduler_of_json(optimizer: torch.optim.Optimizer, block: Mapping[str, Any]) -> Any:
    """The schedule of a "scheduler" block of the DeepSpeed JSON: DeepSpeed's own or torch's, as DeepSpeed makes it.
    None for an empty block. Raises ``RSOConfigError``."""
    from deepspeed.runtime import lr_schedules

    if not block:
        return None
    kind, params = str(block.get("type")), block.get("params") or {}
    found = None
    if kind in lr_schedules.VALID_LR_SCHEDULES:
        found = getattr(lr_schedules, kind)
    elif isinstance(getattr(torch.optim.lr_scheduler, kind, None), type):
        found = getattr(torch.optim.lr_scheduler, kind)
    if found is None:
        raise RSOConfigError(
            f"scheduler.type of the DeepSpeed JSON must be one of {', '.join(lr_schedules.VALID_LR_SCHEDULES)}, or of"
            f" torch.optim.lr_scheduler, got {kind!r}. Without the block --lr-schedule chooses."
        )
    try:
        inspect.signature(found).bind(optimizer, **params)
        return found(optimizer, **params)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise RSOConfigError(f"scheduler.params of the DeepSpeed JSON do not fit {kind}: {error}.") from None


def follow(scheduler: Any, changed: bool) -> None:
    """After a checkpoint, which has the rate of its own schedule, set that of the next step by this one.

    Raises ``RSOConfigError`` for torch's schedules, which keep what the checkpoint has, where it has ``changed``.
    """
    if hasattr(scheduler, "last_batch_iteration"):
        scheduler.step(scheduler.last_batch_iteration)
    elif changed:
        raise RSOConfigError(
            f"scheduler.type {type(scheduler).__name__} of the DeepSpeed JSON is torch's, which keeps its own length"
            " and rates: resume with the same number of steps and lr, or with another schedule."
        )


def check_rates(ds_json: Mapping[str, Any], schedule: Schedule | None, first: int, last: int) -> str:
    """Lines about the rates of the steps ``first`` to ``last`` of a run, with how many of the first have none.

    ``schedule`` None: that of the JSON's "scheduler" block. Raises ``RSOConfigError`` if no step has a rate, and for a
    block that cannot be made.
    """
    params = ds_json["optimizer"]["params"]
    told = [f"{key} {params[key]:g}" for key in ("lr", "dense_lr") if params.get(key) is not None]
    told += [f"interval {params['interval']}"] if "interval" in params else []
    rates = ", ".join(told)
    block = ds_json.get("scheduler") or {}
    whose = f"that of the JSON, {block.get('type')}" if schedule is None else str(schedule)
    still = _steps_without_rate(ds_json, schedule, first, last)
    if 0 < last - first + 1 == still:
        raise RSOConfigError(
            f"no step of this run has a learning rate ({rates}; schedule: {whose}): it would train nothing. Give a rate"
            " above 0 (--learning-rate), or a schedule that has one at these steps (--lr-schedule, --final-lr,"
            " --resume-schedule, or the JSON's 'scheduler')."
        )
    text = f"learning rates of {ds_json['optimizer']['type']}: {rates}; schedule: {whose}"
    if still:
        text += f"\nThe first {still} steps have no learning rate by that schedule, and train nothing."
    return text


def _steps_without_rate(ds_json: Mapping[str, Any], schedule: Schedule | None, first: int, last: int) -> int:
    """How many steps from ``first`` on leave every parameter group without a rate."""
    params, block = ds_json["optimizer"]["params"], ds_json.get("scheduler") or {}
    peaks = [params["lr"]] if params.get("dense_lr") is None else [params["lr"], params["dense_lr"]]
    lists = [len(value) for value in (block.get("params") or {}).values() if isinstance(value, list)]
    peaks = [params["lr"]] * lists[0] if lists else peaks  # one for each parameter group
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": float(peak)} for peak in peaks]
    optimizer = torch.optim.AdamW(groups)
    optimizer.step()  # of nothing: torch's schedules want it before their own
    scheduler: Any = scheduler_of_json(optimizer, block) if schedule is None else ScheduledRates(optimizer, schedule)
    for step in range(1, last + 1):
        if step >= first and any(group["lr"] > 0 for group in optimizer.param_groups):
            return step - first
        if scheduler is not None:
            scheduler.step()
    return last - first + 1
