"""TensorBoard, Weights & Biases and CSV files, by DeepSpeed's monitor: its blocks of the JSON choose them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from rso_ds.errors import RSOConfigError

# Blocks of the JSON, with the package that each needs.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "comet": "comet_ml"}


def check_monitors(ds_json: Mapping[str, Any]) -> bool:
    """Whether ``ds_json`` enables any monitor. Raises ``RSOConfigError`` if the package of one is missing."""
    enabled = [block for block in PACKAGES if (ds_json.get(block) or {}).get("enabled")]
    for block in enabled:
        package = PACKAGES[block]
        if package is not None and importlib.util.find_spec(package) is None:
            raise RSOConfigError(f"'{block}' of the DeepSpeed JSON is enabled: pip install {package}, or disable it.")
    return bool(enabled)


class Monitor:
    """Writes what ``metrics.jsonl`` gets, number by number, to the monitors that ``ds_json`` enables.

    All ranks make one, once the engine is there, whose own monitors are used if it has some; rank 0 writes. As in
    DeepSpeed's own records the x axis is samples, of which a step has ``batch``.
    """

    def __init__(self, ds_json: Mapping[str, Any], engine: Any, batch: int) -> None:
        self._master: Any = None
        self._batch = batch
        if not check_monitors(ds_json):
            return
        self._master = getattr(engine, "monitor", None)
        if self._master is None:
            import deepspeed
            from deepspeed.monitor.config import get_monitor_config
            from deepspeed.monitor.monitor import MonitorMaster

            if not deepspeed.comm.is_initialized():
                deepspeed.init_distributed()  # torch's process group is there; DeepSpeed learns of it
            self._master = MonitorMaster(get_monitor_config(dict(ds_json)))

    def write(self, record: Mapping[str, Any]) -> None:
        """``record`` as in ``metrics.jsonl``: with "step"; nested objects become names with a slash."""
        if self._master is not None:
            samples = record["step"] * self._batch
            self._master.write_events([(name, value, samples) for name, value in _numbers(record, "rso_ds")])

    def close(self) -> None:
        """Hand over what is still on its way: ``launch/train.py`` ends without the interpreter's clean-up."""
        if getattr(self._master, "wandb_monitor", None) is not None:
            import wandb

            wandb.finish()


def _numbers(record: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}/{key}")
        elif value is not None:
            found.append((f"{prefix}/{key}", float(value)))
    return found
