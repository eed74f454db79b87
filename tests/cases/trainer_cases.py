"""The Hugging Face Trainer runs that are compared with the reference: model, data and options of each."""

from __future__ import annotations

from typing import Any

import torch
from cases.deepspeed_cases import MICRO, RSO_DEFAULTS
from support import tiny_llama
from torch.utils.data import Dataset

STEPS, WARMUP, SAVE_AT = 13, 2, 7
LR = RSO_DEFAULTS["lr"]

ACCUMULATED_BATCHES = 19  # of a rank in an epoch: a multiple of none of the accumulations below


def accumulated_cases(loop: str) -> dict[tuple[str, int], str]:
    """(engine, accumulation) -> name of the case in which ``loop`` saves between accumulations."""
    pairs = [(engine, n) for engine in ("zero0", "zero2", "zero3") for n in (2, 3, 8)]
    return {(engine, n): f"accumulated-{loop}-{engine}-{n}" for engine, n in pairs}


class Tokens(Dataset):
    """What ``tiny_llama.tokens`` gives for ``steps`` steps of ``batch`` sequences, one after the other."""

    def __init__(self, steps: int, batch: int) -> None:
        self.ids = torch.cat([tiny_llama.tokens(step, batch) for step in range(steps)])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def lr_scale(steps: int = STEPS) -> list[float]:
    """transformers' linear schedule with warm-up, at each step."""
    return [min(step / WARMUP, (steps - step) / (steps - WARMUP)) for step in range(steps)]


def deepspeed_json(stage: int, rso: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    """A JSON as a user of Trainer writes it: "auto" wherever Trainer fills in."""
    params = {**RSO_DEFAULTS, "lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", **(rso or {})}
    return {
        "optimizer": {"type": "RSO", "params": params},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, **zero},
    }


def arguments(**options: Any) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments."""
    return {
        "max_steps": STEPS,
        "per_device_train_batch_size": MICRO,
        "per_device_eval_batch_size": MICRO,
        "learning_rate": LR,
        "adam_epsilon": RSO_DEFAULTS["eps"],
        "warmup_steps": WARMUP,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "bf16": False,
        **options,
    }


FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
ENGINES: dict[str, dict[str, Any]] = {f"zero{stage}": {"stage": stage} for stage in range(4)}
ENGINES |= {"ddp": {}, "fsdp2": {"arguments": FSDP}}
RSO_KEYS = {"rank": RSO_DEFAULTS["rank"], "interval": RSO_DEFAULTS["interval"]}


def weight_decay(spec: dict[str, Any]) -> float:
    """Trainer itself spares norms, which the reference does not; DeepSpeed's JSON has one rate for all."""
    return 0.1 if "stage" in spec else 0.0


def cases() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, engine: str, tolerance: float = 2e-5, **options: Any) -> None:
        spec = ENGINES[engine]
        found[name] = {**spec, "arguments": {**spec.get("arguments", {}), **options}, "tolerance": tolerance}

    for engine in ENGINES:
        add(engine, engine)
        # FSDP2 gives the loss itself in bf16, whose last digit at 4.3 is worth 0.016.
        add(f"{engine}-bf16", engine, 2e-2 if engine == "fsdp2" else 1e-2, bf16=True)
    for engine in ("ddp", "fsdp2"):
        add(f"{engine}-compiled", engine, torch_compile=True, torch_compile_backend="eager")
    for engine in ("zero2", "ddp", "fsdp2"):
        add(f"{engine}-accumulation", engine, gradient_accumulation_steps=2)
    for engine in ("zero2", "zero3", "ddp", "fsdp2"):
        for reentrant in (True, False):
            kind = "reentrant" if reentrant else "non_reentrant"
            options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            add(f"{engine}-checkpointing-{kind}", engine, **options)
    return found
