"""The ops that DeepSpeed compiles for a JSON: which, with what, and whether that has been done."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rso_ds.doctor.report import FAILED, NOT_CHECKED, OK, WARNING, Finding

_BUILDERS = {"fused_adam": "FusedAdamBuilder", "cpu_adam": "CPUAdamBuilder"}
# A shell's background jobs ignore SIGINT: the build must not, it is how it is told to clean up.
_BUILD = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from deepspeed.accelerator import get_accelerator as a; a().create_op_builder({!r}).load()"
)


def needed_ops(config: Mapping[str, Any], on_gpu: bool, toolkit: bool) -> list[str]:
    """Ops of an Adam-like optimizer, as ``launch/train.py`` chooses it; ``toolkit``: whether CUDA's is installed."""
    optimizer = config.get("optimizer") or {}
    params = optimizer.get("params") or {}
    if str(optimizer.get("type", "")).lower() not in ("rso", "adam", "adamw") or params.get("solver") == "sgd":
        return []
    offload = ((config.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("device", "none")
    if offload != "none":
        return ["cpu_adam"]
    return ["fused_adam"] if on_gpu and toolkit and not params.get("torch_adam") else []


def check_ops(config: Mapping[str, Any] | None, on_gpu: bool, folder: Path) -> list[Finding]:
    """Tools and finished builds for ``config``; ``folder``: where torch builds."""
    if config is None:
        return [Finding("ops", NOT_CHECKED, "no --deepspeed JSON given")]
    if importlib.util.find_spec("deepspeed") is None:
        return [Finding("ops", NOT_CHECKED, "DeepSpeed is not installed")]
    from torch.utils.cpp_extension import CUDA_HOME

    ops = needed_ops(config, on_gpu, CUDA_HOME is not None)
    if not ops:
        why = "torch's Adam is used: no CUDA toolkit (CUDA_HOME)" if on_gpu and CUDA_HOME is None else "none needed"
        return [Finding("ops", OK, why)]
    findings = []
    for op in ops:
        built = _built(op, folder)
        if built is not None:
            findings.append(Finding(f"op {op}", OK, f"built: {built}"))
        else:
            remedy = "rso-ds doctor --deepspeed JSON --build-ops, once on each node"
            findings.append(Finding(f"op {op}", WARNING, f"not built in {folder}: the job's first start will", remedy))
    return findings + _tools(all(_built(op, folder) for op in ops))


def build_ops(config: Mapping[str, Any] | None, on_gpu: bool, folder: Path, seconds: float) -> list[Finding]:
    """Build what is missing, in a process that is interrupted after ``seconds``, so that it takes its lock with it."""
    from torch.utils.cpp_extension import CUDA_HOME

    findings = []
    for op in needed_ops(config or {}, on_gpu, CUDA_HOME is not None):
        if _built(op, folder) is None:
            findings.append(_build(op, seconds))
    return findings


def _build(op: str, seconds: float) -> Finding:
    name = f"build {op}"
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", _BUILD.format(_BUILDERS[op])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # Python's and ninja's way to clean up
            try:
                process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            remedy = "see whether another process builds, or give more time: --build-timeout"
            return Finding(name, FAILED, f"not done after {seconds:g} s", remedy)
    if process.returncode:
        last = [line for line in output.splitlines() if "rror" in line][-1:] or output.splitlines()[-1:]
        return Finding(name, FAILED, f"{last[0][:300] if last else 'no output'}", f"see {_command(op)}")
    return Finding(name, OK, f"built in {time.monotonic() - began:.0f} s")


def _command(op: str) -> str:
    return shlex.join([Path(sys.executable).name, "-c", _BUILD.format(_BUILDERS[op])])


def _built(op: str, folder: Path) -> Path | None:
    """The op as torch has built it, or as it came with DeepSpeed."""
    spec = importlib.util.find_spec("deepspeed")
    places = [folder / op / f"{op}.so"]
    if spec is not None and spec.origin:
        places += Path(spec.origin).parent.glob(f"ops/*/{op}_op*.so")
    return next((place for place in places if place.exists()), None)


def _tools(built: bool) -> list[Finding]:
    """ninja is asked even for what is built; the compiler is not."""
    findings = []
    ninja, beside = shutil.which("ninja"), Path(sys.executable).with_name("ninja")
    if ninja is None:
        text = "is not on PATH: DeepSpeed cannot load its ops"
        remedy = f"export PATH={shlex.quote(str(beside.parent))}:$PATH" if beside.exists() else "pip install ninja"
        findings.append(Finding("ninja", FAILED, text, remedy))
    compiler = os.environ.get("CXX", "c++")
    path = shutil.which(shlex.split(compiler)[0] if compiler.strip() else "c++")
    if path is None:
        remedy = "apt-get install g++, module load gcc, or export CXX=..."
        findings.append(Finding("C++ compiler", OK if built else FAILED, f"{compiler} is not on PATH", remedy))
    return findings or [Finding("build tools", OK, f"{ninja}, {path}")]
