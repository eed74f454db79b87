"""The engine that ``--engine`` names, around a model built for it."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn

from rso_ds.comm.failures import limit_waiting
from rso_ds.comm.outcome import agreed
from rso_ds.comm.rank_context import RankContext
from rso_ds.errors import RSOConfigError
from rso_ds.models import Start
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.recipes.training.native_checkpoints import NativeCheckpoints
from rso_ds.recipes.training.schedule import Schedule, ScheduledRates
from rso_ds.solvers.groups import decay_groups


def build_engine(
    args: TrainArguments,
    ds_json: dict[str, Any],
    start: Start,
    rows: int,
    context: RankContext,
    schedule: Schedule | None = None,
) -> Any:
    """A DeepSpeed engine, or a ``TorchEngine`` with the same methods, around the model of ``start`` with embeddings for
    ``rows`` tokens. ``ds_json`` has no "auto" left. Without a ``schedule`` the engine takes that of the JSON's
    "scheduler" block.

    The engine has ``checkpoints`` (``Checkpointer``), ``traffic`` (``CommCounter``), and ``rso`` (``Boundary``)
    where the JSON selects RSO.
    """
    if args.engine == "deepspeed":
        engine = _deepspeed_engine(args, ds_json, start, rows, schedule)
    else:
        from rso_ds.recipes.training.torch_engine import TorchEngine

        engine = TorchEngine(_model(args, start, rows), ds_json, args.engine, context, args.replicas, schedule)
    limit_waiting(timedelta(seconds=args.timeout))
    engine.traffic.learn_nodes()
    return engine


def _model(args: TrainArguments, start: Start, rows: int) -> nn.Module:
    torch.manual_seed(args.seed)
    model = agreed(lambda: start.build(rows, args.seq_len), kind=RSOConfigError)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _deepspeed_engine(
    args: TrainArguments, ds_json: dict[str, Any], start: Start, rows: int, schedule: Schedule | None
) -> Any:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from rso_ds.engines.deepspeed import count_traffic, explain_lowest_scale, skip_nonfinite_steps
    from rso_ds.engines.deepspeed import initialize as initialize_rso

    stage = (ds_json.get("zero_optimization") or {}).get("stage", 0)
    # Alive while the model is built, it makes transformers build under zero.Init, never whole on a rank.
    keep_alive = HfDeepSpeedConfig(ds_json) if stage == 3 else None
    model = _model(args, start, rows)
    is_rso = ds_json["optimizer"]["type"].upper() == "RSO"
    if args.async_save and not is_rso:
        raise RSOConfigError(
            "--async-save: DeepSpeed writes the checkpoints of its own optimizers itself: leave it out."
        )
    decay = float(ds_json["optimizer"]["params"].get("weight_decay", 0.0))
    initialize = initialize_rso if is_rso else deepspeed.initialize
    engine, *_ = initialize(
        model=model,
        model_parameters=decay_groups(model, decay),
        config=ds_json,
        lr_scheduler=None if schedule is None else partial(ScheduledRates, schedule=schedule),
    )
    del keep_alive
    if not is_rso:
        count_traffic(engine)
        explain_lowest_scale(engine)
        skip_nonfinite_steps(engine)
        engine.checkpoints = NativeCheckpoints(engine)
    return engine
