"""The DeepSpeed JSON: find the RSO block, refuse what RSO does not cover, write the inner solver's block."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOConfigError, RSOUnsupportedError

RSO_TYPE = "RSO"


def optimizer_type(config: Mapping[str, Any]) -> str | None:
    """``config["optimizer"]["type"]``, None without an optimizer block.

    Raises ``RSOConfigError`` for a misspelt RSO ("rso", "Rso"), which DeepSpeed would not know.
    """
    block = config.get("optimizer")
    if not isinstance(block, Mapping) or "type" not in block:
        return None
    kind = str(block["type"])
    if kind != RSO_TYPE and kind.upper() == RSO_TYPE:
        raise RSOConfigError(f'"optimizer": {{"type": "{kind}"}} is misspelt: write "{RSO_TYPE}".')
    return kind


def rso_config(config: Mapping[str, Any]) -> RSOConfig:
    """The validated RSO block of a DeepSpeed JSON. Raises ``RSOConfigError`` if there is none."""
    kind = optimizer_type(config)
    if kind != RSO_TYPE:
        found = "there is no optimizer block" if kind is None else f'its optimizer is "{kind}"'
        raise RSOConfigError(
            f'the DeepSpeed JSON does not select RSO: {found}. Set "optimizer": {{"type": "{RSO_TYPE}",'
            ' "params": {...}}, or call deepspeed.initialize for other optimizers.'
        )
    block = config["optimizer"]
    for key in block:
        if key not in ("type", "params"):
            raise RSOConfigError(f"unknown key '{key}' beside 'type' and 'params' of the RSO optimizer block.")
    return RSOConfig.from_dict(block.get("params") or {})


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise ``RSOUnsupportedError`` for DeepSpeed features under which RSO has not been proven right."""
    zero = config.get("zero_optimization") or {}
    for key in ("offload_param", "offload_optimizer"):
        offload = zero.get(key) or {}
        if offload.get("device") == "nvme":
            _refuse(f'zero_optimization.{key}.device "nvme"', 'use "cpu"')
        if offload.get("ratio", 1.0) != 1.0:
            _refuse(f"zero_optimization.{key}.ratio below 1", "leave it at 1")
    if (zero.get("offload_optimizer") or {}).get("super_offload"):
        _refuse("zero_optimization.offload_optimizer.super_offload", "remove it")
    if zero.get("zenflow"):
        _refuse("zero_optimization.zenflow", "remove it")
    if zero.get("zero_quantized_nontrainable_weights"):
        _refuse("zero_optimization.zero_quantized_nontrainable_weights (W does change)", "set it to false")
    if (config.get("checkpoint") or {}).get("load_universal"):
        _refuse(
            "checkpoint.load_universal (DeepSpeed does not restore frozen weights from universal checkpoints)",
            "resume with the world size and stage of the checkpoint",
        )
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        _refuse("tensor_parallel.autotp_size above 1", "use data parallelism")
    if (config.get("hybrid_engine") or {}).get("enabled"):
        _refuse("hybrid_engine", "disable it")
    if (config.get("compile") or {}).get("deepcompile"):
        _refuse("compile.deepcompile", "disable it")


def _refuse(feature: str, remedy: str) -> None:
    raise RSOUnsupportedError(f"RSO does not support {feature}: {remedy}.")


def inner_config(config: Mapping[str, Any], rso: RSOConfig) -> dict[str, Any]:
    """The JSON that DeepSpeed itself gets: the RSO block replaced by the solver of the subproblem, so that
    DeepSpeed chooses its implementation (FusedAdam, CPUAdam, torch) as for any other training."""
    offload = ((config.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("device", "none")
    if offload != "none" and (rso.solver == "sgd" or rso.torch_adam):
        raise RSOUnsupportedError(
            "zero_optimization.offload_optimizer needs DeepSpeed's CPU Adam: use solver adamw or adam, and"
            " 'torch_adam': false."
        )
    inner = copy.deepcopy(dict(config))
    params: dict[str, Any] = {"lr": rso.lr, "weight_decay": 0.0}
    if rso.solver == "sgd":
        kind = "SGD"
        params["momentum"] = rso.momentum
        inner["zero_allow_untested_optimizer"] = True  # torch's SGD is elementwise: safe on flat partitions
    else:
        kind = "AdamW" if rso.solver == "adamw" else "Adam"
        params |= {"betas": list(rso.betas), "eps": rso.eps}
        if rso.solver == "adam":
            params["adam_w_mode"] = False
        if rso.torch_adam:
            params["torch_adam"] = True
    inner["optimizer"] = {"type": kind, "params": params}
    return inner
