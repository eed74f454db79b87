"""``rso_ds.initialize``: ``deepspeed.initialize`` for a JSON whose optimizer is RSO."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from torch import nn

from rso_ds.comm.agreement import agree_on_setup
from rso_ds.comm.launch import export_launch_environment
from rso_ds.comm.outcome import agreed
from rso_ds.deepspeed_json import (
    RSO_TYPE,
    inner_config,
    optimizer_type,
    refuse_unsupported,
    rso_config,
)
from rso_ds.engines.deepspeed.attach import attach, count_traffic
from rso_ds.errors import RSOConfigError, RSOConversionError, RSOUnsupportedError
from rso_ds.layers import check_conversion, convert, much_outside, rso_layers, summary_table
from rso_ds.layers.start import begin_run
from rso_ds.solvers.groups import layer_groups, solver_groups

logger = logging.getLogger(__name__)


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Same arguments and return values as ``deepspeed.initialize``.

    Reads ``"optimizer": {"type": "RSO", "params": {...}}``, converts ``model`` in place (unless
    ``rso_ds.convert`` has done so), lets DeepSpeed build the engine with the solver of the subproblem, and
    hooks the subspace boundary to the engine's applied steps. ``model_parameters`` may name the original
    weights; each stands for its B. The engine gains attributes: ``rso`` (the ``Boundary``: applied
    steps, draw index), ``rso_form`` (how layers compute, and why) and ``traffic`` (``rso_ds.comm.CommCounter``: bytes
    handed to collectives).

    Raises ``RSOConfigError`` (bad key, no RSO block, an optimizer in code besides the JSON's),
    ``RSOConversionError`` (the model does not fit), ``RSOUnsupportedError`` (a DeepSpeed feature that RSO
    does not cover), ``RSOReplicaError`` (ranks disagree).
    """
    if model is None:
        raise RSOConfigError("rso_ds.initialize needs a model.")
    ds_config = _config_of(args, config, config_params)
    rso = rso_config(ds_config)
    if optimizer is not None:
        raise RSOConfigError(
            "there is an optimizer in code and RSO in the DeepSpeed JSON: pass optimizer=None, or remove the"
            " JSON's optimizer block."
        )
    if isinstance(model, PipelineModule):
        raise RSOUnsupportedError("RSO does not support pipeline parallelism: use ZeRO data parallelism.")
    if mpu is not None and mpu.get_model_parallel_world_size() > 1:
        raise RSOUnsupportedError("RSO does not support model parallelism (mpu): use ZeRO data parallelism.")
    refuse_unsupported(ds_config)
    if rso.communicate != "every_step":
        raise RSOUnsupportedError(
            f"DeepSpeed reduces gradients at every step, so 'communicate': '{rso.communicate}' cannot come into effect:"
            " use rso_ds.RSO with DistributedDataParallel or HSDP (launch/train.py --engine ddp), or 'every_step'."
        )

    given = None if model_parameters is None else list(model_parameters)
    converted = dict(rso_layers(model))
    replaced: dict[int, nn.Parameter] = {}
    if converted:
        check_conversion(converted, rso)
    else:
        conversion = convert(model, rso)
        converted, replaced = conversion.layers, conversion.replaced
    groups = solver_groups(model.parameters() if given is None else given, converted, replaced, rso)
    _, where = layer_groups(converted, groups)
    table, warning = summary_table(model, rso), much_outside(model)  # before ZeRO takes the parameters apart

    accelerator = get_accelerator()
    if not deepspeed.comm.is_initialized():
        export_launch_environment()
    local_rank = _local_rank(args)
    if local_rank is not None:
        accelerator.set_device(local_rank)  # before the first collective: all ranks would use the first device
    deepspeed.init_distributed(
        accelerator.communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    agree_on_setup(converted, rso)
    agreed(lambda: begin_run(model, converted), kind=RSOConversionError)
    if getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)
        args.deepspeed_config = None  # the solver's configuration takes its place
    result = own_initialize()(
        args=args,
        model=model,
        model_parameters=groups,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=inner_config(ds_config, rso),
        mesh_param=mesh_param,
    )
    engine = result[0]
    engine.rso = attach(engine, converted, rso, where)
    count_traffic(engine)
    if engine.global_rank == 0:
        logger.info("%s\n%s", table, engine.rso_form)
        if warning:
            logger.warning(warning)
    return result


def _local_rank(args: Any) -> int | None:
    """The index of this rank's device as DeepSpeed finds it; None if nothing says."""
    for name in ("device_rank", "local_rank"):
        given = getattr(args, name, None)
        if given is not None and given >= 0:
            return int(given)
    return int(os.environ["LOCAL_RANK"]) if os.environ.get("LOCAL_RANK") else None


def own_initialize() -> Callable[..., Any]:
    """DeepSpeed's own ``initialize``, also where ``rso_ds.integrations.deepspeed_import`` has put ours in its place."""
    return getattr(deepspeed.initialize, "_rso_ds_own", deepspeed.initialize)


def initialize_if_selected(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A program's call of ``deepspeed.initialize(*args, **kwargs)``: ours if its JSON selects RSO, else ``own``."""
    call = inspect.signature(own).bind(*args, **kwargs).arguments
    try:
        ds_config = _config_of(call.get("args"), call.get("config"), call.get("config_params"))
    except RSOConfigError:
        return own(*args, **kwargs)  # DeepSpeed's own message for a missing or doubled config
    if optimizer_type(ds_config) != RSO_TYPE:
        return own(*args, **kwargs)
    return initialize(**call)


def _config_of(args: Any, config: Any, config_params: Any) -> dict[str, Any]:
    """The DeepSpeed JSON as a dict, from whichever of the three places it was given in."""
    from_args = getattr(args, "deepspeed_config", None)
    found = [c for c in (config if config is not None else config_params, from_args) if c is not None]
    if len(found) != 1:
        raise RSOConfigError(
            "give the DeepSpeed configuration in one place: config=..., or args.deepspeed_config"
            f" ({len(found)} were given)."
        )
    try:
        return dict(load_ds_config(found[0]))
    except ValueError as error:
        raise RSOConfigError(f"the DeepSpeed configuration cannot be read: {error}") from None
