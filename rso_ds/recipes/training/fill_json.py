"""From the DeepSpeed JSON on disk to the one the engine gets: overrides applied, every "auto" filled in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME

from rso_ds import defaults
from rso_ds.config import AUTO
from rso_ds.errors import RSOConfigError
from rso_ds.models import begins_random
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.text import read_json as read_json_file

_MICRO_BATCH, _GLOBAL_BATCH = 16, 32


def read_json(args: TrainArguments) -> dict[str, Any]:
    """The file of ``--deepspeed`` with ``--set`` and the overriding flags applied.

    Where it leaves RSO's lr "auto" and the model begins with random weights, ``dense_lr`` is "auto" too.
    """
    path = Path(args.deepspeed)
    config = read_json_file(path, "--deepspeed")
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("optimizer"), dict)
        or "type" not in config["optimizer"]
    ):
        raise RSOConfigError(f'--deepspeed {path}: it needs an "optimizer" block with a "type".')
    for block in ("bf16", "fp16", "scheduler", "zero_optimization"):
        if not isinstance(config.get(block, {}), dict):
            raise RSOConfigError(f"--deepspeed {path}: '{block}' must be a block {{...}}, got {config[block]!r}.")
    if not isinstance(config["optimizer"].setdefault("params", {}), dict):
        raise RSOConfigError(f"--deepspeed {path}: 'params' of the optimizer must be a block {{...}}.")
    params = config["optimizer"]["params"]
    if config["optimizer"]["type"] == "RSO" and params.get("lr") == AUTO and begins_random(args.model, args.init):
        params.setdefault("dense_lr", AUTO)
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RSOConfigError(f"--set {item}: write it as optimizer.params.interval=50.")
        _put(config, key, value)
    for flag, key in (
        (args.learning_rate, "optimizer.params.lr"),
        (args.weight_decay, "optimizer.params.weight_decay"),
        (args.clip, "gradient_clipping"),
    ):
        if flag is not None:
            _put(config, key, flag)
    return config


def batch_sizes(config: dict[str, Any], args: TrainArguments, world_size: int) -> tuple[int, int]:
    """(micro batch, accumulation steps) from the JSON's numbers and the flags.

    Without either, a step has about 32 sequences: as near as the number of ranks divides. Raises
    ``RSOConfigError`` if a flag contradicts a number of the JSON, or the sizes do not fit together.
    """
    micro = _agreed(config, "train_micro_batch_size_per_gpu", "--micro-batch", args.micro_batch)
    total = _agreed(config, "train_batch_size", "--global-batch", args.global_batch)
    accumulation = _agreed(config, "gradient_accumulation_steps", "", None)
    if total is None and not (micro and accumulation):
        unit = world_size * (micro or 1) * (accumulation or 1)
        total = max(1, round(_GLOBAL_BATCH / unit)) * unit
    if micro is None and total is not None:
        share = total // (world_size * (accumulation or 1))
        largest = share if accumulation else _MICRO_BATCH
        micro = max((m for m in range(1, largest + 1) if share and share % m == 0), default=1)
    assert micro is not None
    if accumulation is None:
        assert total is not None
        accumulation = max(1, total // (micro * world_size))
    if total is not None and total != micro * accumulation * world_size:
        raise RSOConfigError(
            f"--global-batch {total} is not micro batch {micro} x ranks {world_size} x accumulation {accumulation}:"
            " change --global-batch or --micro-batch."
        )
    return micro, accumulation


def _agreed(config: dict[str, Any], key: str, flag: str, value: int | None) -> int | None:
    number = config.get(key, "auto")
    if number == "auto":
        return value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise RSOConfigError(f"'{key}' of the DeepSpeed JSON must be a whole number or \"auto\", got {number!r}.")
    if value is not None and value != number:
        raise RSOConfigError(f"{flag} {value} contradicts '{key}': {number} of the DeepSpeed JSON: drop one of them.")
    return number


def fill(
    config: dict[str, Any],
    args: TrainArguments,
    world_size: int,
    steps: int,
    on_gpu: bool,
    schedule_steps: int | None = None,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fill every "auto" that this program knows how to, and the batch sizes. Changes and returns ``config``.

    ``steps``: those the run was first meant to have, by which interval and rates are chosen; ``schedule_steps``: those
    of the schedule, where they are others; ``before``: ``recipe_of`` the run that is resumed, which keeps its own.
    Raises ``RSOConfigError`` for an "auto" it does not know, for an unknown optimizer without a rate, and for flags
    that the JSON's "scheduler" block contradicts.
    """
    micro, accumulation = batch_sizes(config, args, world_size)
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = micro * accumulation * world_size
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    of_schedule = steps if schedule_steps is None else schedule_steps
    params = config["optimizer"]["params"]
    scheduler = _scheduler_block(config, args)
    if config["optimizer"]["type"] in ("RSO", "Adam", "AdamW"):
        params.setdefault("lr", defaults.PRETRAINED.lr)  # DeepSpeed's Adam has the same default
    elif "lr" not in params:
        raise RSOConfigError(f"--deepspeed {args.deepspeed}: give optimizer.params.lr, or --learning-rate.")
    if config["optimizer"]["type"] == "RSO":
        _fill_rso(params, steps, begins_random(args.model, args.init), before or {})
    _fill(params, "lr", (before or {}).get("lr", defaults.ADAMW_LR))
    _fill(params, "weight_decay", defaults.WEIGHT_DECAY)
    _fill(params, "betas", list(defaults.BETAS))
    _fill(params, "eps", defaults.EPS)
    _fill(config, "gradient_clipping", defaults.CLIPPING)
    if config["optimizer"]["type"] == "RSO":
        params.setdefault("tokens_per_step", micro * accumulation * args.seq_len)
    for kind in ("bf16", "fp16"):
        block = config.setdefault(kind, {"enabled": "auto"})
        if args.precision != "auto":
            block["enabled"] = precision == kind
        _fill(block, "enabled", precision == kind)
    one_rate = params.get("dense_lr") is None  # "warmup_max_lr": null is the rate of each parameter group
    warmup = max(2, round(_or(args.warmup, defaults.WARMUP) * of_schedule))
    for key, value in (
        ("total_num_steps", of_schedule), ("warmup_num_steps", warmup),
        ("cos_min_ratio", _or(args.final_lr, defaults.FINAL_LR)),
        ("warmup_max_lr", params["lr"] if one_rate else None), ("warmup_min_lr", 0.0),
    ):  # fmt: skip
        _fill(scheduler, key, value)
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer")
    if (not on_gpu or CUDA_HOME is None) and not offload and config["optimizer"]["type"] in ("RSO", "Adam", "AdamW"):
        # DeepSpeed's fused Adam is compiled first: on a CPU for nothing, without a CUDA toolkit in vain.
        params.setdefault("torch_adam", True)
    left = _autos(config)
    if left:
        raise RSOConfigError(f'--deepspeed {args.deepspeed}: no value is known for "auto" at {left[0]}.')
    return config


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``fill`` chose, or was given, of all that depends on how a run begins."""
    params = config["optimizer"]["params"]
    return {key: params[key] for key in ("lr", "dense_lr", "interval") if key in params}


def _scheduler_block(config: dict[str, Any], args: TrainArguments) -> dict[str, Any]:
    """Parameters of the JSON's "scheduler" block, which goes before our own schedule; empty without one.

    A flag that would not come into effect is refused; a peak rate in the block is the optimizer's.
    """
    if "scheduler" not in config:
        return {}
    params = config["scheduler"].setdefault("params", {}) if config["scheduler"] else {}
    if not isinstance(params, dict):
        raise RSOConfigError(f"--deepspeed {args.deepspeed}: 'params' of the scheduler must be a block {{...}}.")
    for flag, value, key in (
        ("--lr-schedule", args.lr_schedule, ""), ("--decay-share", args.decay_share, ""),
        ("--warmup", args.warmup, "warmup_num_steps"), ("--final-lr", args.final_lr, "cos_min_ratio"),
    ):  # fmt: skip
        if value is not None and params.get(key) != AUTO:
            remedy = f'set its "{key}" to "auto", ' if key in params else ""
            raise RSOConfigError(
                f"{flag} {value} would not come into effect: --deepspeed {args.deepspeed} has a 'scheduler' block,"
                f" which says it otherwise: {remedy}remove the block, or drop the flag."
            )
    peak, own = params.get("warmup_max_lr", AUTO), config["optimizer"]["params"]
    if isinstance(peak, (int, float)):
        if args.learning_rate not in (None, peak):
            raise RSOConfigError(
                f"--learning-rate {args.learning_rate:g} contradicts 'warmup_max_lr': {peak:g} of the scheduler in"
                f' --deepspeed {args.deepspeed}: set that to "auto", or drop the flag.'
            )
        if own.get("lr", AUTO) == AUTO:
            own["lr"] = peak
        if own.get("dense_lr") == AUTO:
            del own["dense_lr"]
        elif own.get("dense_lr") is not None:
            raise RSOConfigError(
                f"--deepspeed {args.deepspeed}: 'warmup_max_lr': {peak:g} of the scheduler is one rate for all"
                " parameters, and 'dense_lr' would not come into effect: set 'warmup_max_lr' to \"auto\"."
            )
    return params


def _fill_rso(params: dict[str, Any], steps: int, begins_random: bool, before: Mapping[str, Any]) -> None:
    """Interval and rates, where they are left open: as ``before`` had them, or by ``defaults``. To a rate that is given
    belongs the short interval, which bears most of them; to a long interval that is given the rate of long runs."""
    chosen, short = defaults.rates(begins_random, steps), defaults.rates(begins_random, 0)
    if params.get("interval", AUTO) == AUTO:
        both_rates = params.get("lr") == AUTO and params.get("dense_lr") is not None
        params["interval"] = before.get("interval", (chosen if both_rates else short).interval)
    if params.get("lr") == AUTO:
        _fill(params, "dense_lr", before.get("dense_lr", chosen.dense_lr))
        long, interval = defaults.rates(begins_random, defaults.LONG_RUN), params["interval"]
        params["lr"] = before.get("lr", (long if isinstance(interval, int) and interval >= long.interval else short).lr)
    else:
        _fill(params, "dense_lr", defaults.DENSE_TIMES * params["lr"])


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _fill(block: dict[str, Any], key: str, value: Any) -> None:
    if block.get(key) == "auto":
        block[key] = value


def _put(config: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise RSOConfigError(f"--set {dotted}: '{parent}' is not a block of the JSON.")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # a bare word is a string
            value = json.loads(value)
    config[leaf] = value


def _autos(block: Any, at: str = "") -> list[str]:
    if isinstance(block, dict):
        return [p for k, v in block.items() for p in _autos(v, f"{at}.{k}" if at else k)]
    return [at] if block == "auto" else []
