"""The DeepSpeed JSON of a candidate, and the commands that train with it."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

from rso_ds import defaults
from rso_ds.config import AUTO, RSOConfig
from rso_ds.deepspeed_json import refuse_unsupported, rso_config
from rso_ds.errors import RSOConfigError
from rso_ds.planning.memory.command import read_rso_json
from rso_ds.planning.memory.states import precision_of
from rso_ds.text import read_json

# ds_configs/rso_7b_zero3.json without what a plan fills in.
DEFAULT_BASE: dict[str, Any] = {
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "RSO",
        "params": {
            "lr": defaults.LARGE.lr,
            "weight_decay": AUTO,
            "interval": defaults.LARGE.interval,
            "sampler": defaults.LARGE_SAMPLER,
            "carry_over": defaults.CARRY_OVER,
            "master_weights": defaults.LARGE_MASTERS,
        },
    },
    "zero_optimization": {
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "steps_per_print": 1_000_000_000,
}


def base_json(path: str | None, precision: str) -> dict[str, Any]:
    """What all candidates have in common: the file ``path`` or ``DEFAULT_BASE``, in ``precision`` "bf16" or
    "fp32". "auto" stays where the training program fills it in. Raises ``RSOConfigError``."""
    if path is None:
        config = copy.deepcopy(DEFAULT_BASE)
        if precision == "fp32":
            del config["optimizer"]["params"]["master_weights"]
    else:
        checked = read_rso_json(path, "--base")
        for block in ("bf16", "fp16", "zero_optimization"):
            if not isinstance(checked.get(block, {}), dict):
                raise RSOConfigError(f"--base {path}: '{block}' must be a block {{...}}, got {checked[block]!r}.")
        refuse_unsupported(checked)
        if rso_config(checked).communicate == "boundary":
            raise RSOConfigError(
                "--base: 'communicate': 'boundary' is not for DeepSpeed, which a plan is for: remove the key."
            )
        config = read_json(path, "--base")
        if (config.get("fp16") or {}).get("enabled") is True:
            raise RSOConfigError("--base: fp16 is not planned: remove the block, and choose --precision bf16 or fp32.")
    config["bf16"] = {**(config.get("bf16") or {}), "enabled": precision == "bf16"}
    if "fp16" in config:
        config["fp16"]["enabled"] = False
    if precision_of(config) != precision:
        raise RSOConfigError(f"--base: its torch_autocast contradicts --precision {precision}: remove the block.")
    return config


def rso_of(config: dict[str, Any]) -> RSOConfig:
    """The RSO block, in which "auto" counts as the default."""
    block = config["optimizer"]
    params = {k: v for k, v in (block.get("params") or {}).items() if v != AUTO}
    return rso_config({**config, "optimizer": {**block, "params": params}})


def own_rank(base: dict[str, Any]) -> bool:
    """Whether ``base`` itself says what rank to use."""
    params = base["optimizer"].get("params") or {}
    return any(params.get(key) not in (None, AUTO) for key in ("rank", "rank_ratio"))


def candidate_json(
    base: dict[str, Any], stage: int, hpz: int, ratio: float | None, micro_batch: int, accumulation: int, gpus: int
) -> dict[str, Any]:
    """``base`` at a ZeRO stage, with a rank (None: its own) and batch sizes. hpz 1: no secondary copies."""
    config: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * gpus,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    config = {**config, **{k: v for k, v in copy.deepcopy(base).items() if k not in config}}
    zero = {k: v for k, v in (config.get("zero_optimization") or {}).items() if k != "zero_hpz_partition_size"}
    if stage < 3:
        zero = {k: v for k, v in zero.items() if not k.startswith("stage3_")}
    config["zero_optimization"] = {"stage": stage, **{k: v for k, v in zero.items() if k != "stage"}}
    if hpz > 1:
        config["zero_optimization"]["zero_hpz_partition_size"] = hpz
    if ratio is not None:
        config["optimizer"]["params"] = {
            **{k: v for k, v in (config["optimizer"].get("params") or {}).items() if k not in ("rank", "rank_ratio")},
            "rank_ratio": ratio,
        }
    return config


def train_flags(
    model: str, vocab_size: int | None, seq_len: int, config: dict[str, Any], checkpointing: bool
) -> list[str]:
    """Flags of launch/train.py besides --deepspeed; ``vocab_size`` None: the model's own."""
    flags = ["--model", model]
    if vocab_size is not None:
        flags += ["--vocab-size", str(vocab_size)]
    flags += ["--seq-len", str(seq_len), "--micro-batch", str(config["train_micro_batch_size_per_gpu"])]
    flags += ["--global-batch", str(config["train_batch_size"])]
    if checkpointing:
        flags.append("--gradient-checkpointing")
    return [*flags, "--output", f"runs/{Path(model).name}"]


def sbatch(nodes: int, gpus_per_node: int, json_path: str, flags: list[str]) -> str:
    """The command that submits the job; everything after the script's name goes to launch/train.py."""
    head = ["sbatch", f"--nodes={nodes}", f"--gpus-per-node={gpus_per_node}", "launch/slurm/torchrun.sbatch"]
    return shlex.join([*head, "--deepspeed", json_path, *flags])


def single_node(gpus: int, json_path: str, flags: list[str]) -> str:
    """The same without a scheduler, on one node."""
    return shlex.join(["deepspeed", "--num_gpus", str(gpus), "launch/train.py", "--deepspeed", json_path, *flags])
