"""From the DeepSpeed JSON on disk to the one the engine gets: overrides applied, every "auto" filled in."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME

from rso_ds.config import AUTO, RSOConfig
from rso_ds.errors import RSOConfigError
from rso_ds.models import begins_random
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.text import read_json as read_json_file

# With a first moment that restarts at 0 the mean step of interval 10 is 0.41 of AdamW's, that of 50 0.82 of it
# (docs/algorithm.md): a long run from random weights has five times the interval and half the rate, and both have one
# rate outside the blocks (docs/rank-and-interval.md).
_INTERVAL, _LR = RSOConfig.interval, 4e-3
_LONG_RUN, _LONG_INTERVAL, _LONG_LR = 500, 50, 2e-3
_DENSE_LR, _DENSE_TIMES = 1.6e-2, 4.0  # the latter times lr, where lr is given
_ADAMW_LR = 1e-3
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
) -> dict[str, Any]:
    """Fill every "auto" that this program knows how to, and the batch sizes. Changes and returns ``config``.

    ``steps``: those the run was first meant to have, by which interval and rates are chosen; ``schedule_steps``: those
    of the schedule, where they are others.
    Raises ``RSOConfigError`` for an "auto" it does not know and for an unknown optimizer without a rate.
    """
    micro, accumulation = batch_sizes(config, args, world_size)
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = micro * accumulation * world_size
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    of_schedule = steps if schedule_steps is None else schedule_steps
    warmup = max(2, round(args.warmup * of_schedule))
    params = config["optimizer"]["params"]
    if config["optimizer"]["type"] in ("RSO", "Adam", "AdamW"):
        params.setdefault("lr", RSOConfig.lr)  # DeepSpeed's Adam has the same default
    elif "lr" not in params:
        raise RSOConfigError(f"--deepspeed {args.deepspeed}: give optimizer.params.lr, or --learning-rate.")
    if config["optimizer"]["type"] == "RSO":
        _fill_rso(params, steps, begins_random(args.model, args.init))
    _fill(params, "lr", _ADAMW_LR)
    _fill(params, "weight_decay", 0.0)
    _fill(params, "betas", [0.9, 0.999])
    _fill(params, "eps", 1e-8)
    _fill(config, "gradient_clipping", 1.0)
    if config["optimizer"]["type"] == "RSO":
        params.setdefault("tokens_per_step", micro * accumulation * args.seq_len)
    for kind in ("bf16", "fp16"):
        block = config.setdefault(kind, {"enabled": "auto"})
        if args.precision != "auto":
            block["enabled"] = precision == kind
        _fill(block, "enabled", precision == kind)
    scheduler = config.setdefault(
        "scheduler",
        {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "cos_min_ratio": "auto",
                       "warmup_type": "linear"},
        },
    )  # fmt: skip
    for key, value in (
        ("total_num_steps", of_schedule), ("warmup_num_steps", warmup), ("cos_min_ratio", args.final_lr),
        ("warmup_max_lr", params["lr"]), ("warmup_min_lr", 0.0),
    ):  # fmt: skip
        _fill(scheduler.get("params", {}), key, value)
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer")
    if (not on_gpu or CUDA_HOME is None) and not offload and config["optimizer"]["type"] in ("RSO", "Adam", "AdamW"):
        # DeepSpeed's fused Adam is compiled first: on a CPU for nothing, without a CUDA toolkit in vain.
        params.setdefault("torch_adam", True)
    left = _autos(config)
    if left:
        raise RSOConfigError(f'--deepspeed {args.deepspeed}: no value is known for "auto" at {left[0]}.')
    return config


def _fill_rso(params: dict[str, Any], steps: int, begins_random: bool) -> None:
    """Interval and rates, where they are left open. To a rate that is given belongs the default interval, which bears
    most of them; to a long interval that is given the rate of long runs."""
    if params.get("interval", AUTO) == AUTO:
        both_rates = params.get("lr") == AUTO and params.get("dense_lr") is not None
        long = steps >= _LONG_RUN and begins_random and both_rates
        params["interval"] = _LONG_INTERVAL if long else _INTERVAL
    if params.get("lr") == AUTO:
        _fill(params, "dense_lr", _DENSE_LR)
        interval = params["interval"]
        params["lr"] = _LONG_LR if isinstance(interval, int) and interval >= _LONG_INTERVAL else _LR
    else:
        _fill(params, "dense_lr", _DENSE_TIMES * params["lr"])


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
