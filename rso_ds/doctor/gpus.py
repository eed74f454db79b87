"""GPUs of this node, and whether this rank has one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rso_ds.comm.launch import Launch
from rso_ds.doctor.report import FAILED, OK, WARNING, Finding
from rso_ds.units import GIB, in_unit


def check_gpus(launch: Launch, config: Mapping[str, Any] | None) -> list[Finding]:
    """Number and kind, or that there are none; a GPU for each rank of this node; bf16 where the JSON asks for it."""
    if not torch.cuda.is_available():
        return _none()
    count = torch.cuda.device_count()
    names = sorted({_name(i) for i in range(count)})
    text = f"{count} x {', '.join(names)}; torch for CUDA {torch.version.cuda}, driver {_driver() or 'unknown'}"
    findings = [Finding("GPUs", OK, text)]
    if launch.local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        text = f"local rank {launch.local_rank} sees {count} GPU(s) only (CUDA_VISIBLE_DEVICES={visible})"
        findings.append(Finding("GPU of this rank", FAILED, text, "start at most one rank a GPU"))
        return findings
    free, total = torch.cuda.mem_get_info(launch.local_rank)
    if free < 0.9 * total:
        text = f"GPU {launch.local_rank}: {free / GIB:.1f} of {in_unit(total, 'GiB', '.1f')} free"
        findings.append(Finding("GPU memory", WARNING, text, "see who uses it: nvidia-smi"))
    wants = (config or {}).get("bf16") or {}
    if wants.get("enabled") is True and not torch.cuda.is_bf16_supported(including_emulation=False):
        remedy = 'set "bf16": {"enabled": false} and "fp16": {"enabled": true}'
        findings.append(Finding("bf16", FAILED, "the JSON asks for bf16, which this GPU does not have", remedy))
    return findings


def gpu_uuid(local_rank: int) -> str | None:
    """Names the GPU of ``local_rank`` for good, None without one."""
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return None
    return str(getattr(torch.cuda.get_device_properties(local_rank), "uuid", local_rank))


def _name(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    bf16 = "bf16" if properties.major >= 8 else "no bf16"
    return f"{properties.name} ({in_unit(properties.total_memory, 'GiB', '.0f')}, {bf16})"


def _none() -> list[Finding]:
    driver = _driver()
    if driver is None:
        return [Finding("GPUs", OK, "none: CPU, gloo")]
    if torch.version.cuda is None:
        return [
            Finding("GPUs", WARNING, f"NVIDIA driver {driver}, but this torch is for CPUs", "install torch for CUDA")
        ]
    remedy = "nvidia-smi; then a newer driver, torch for an older CUDA, or GPUs in the job's request (--gpus-per-node)"
    return [Finding("GPUs", FAILED, f"torch for CUDA {torch.version.cuda} finds none (driver {driver})", remedy)]


def _driver() -> str | None:
    """Version of NVIDIA's kernel driver, None without one."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word[:1].isdigit() and "." in word), "unknown")
