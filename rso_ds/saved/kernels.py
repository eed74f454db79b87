"""liger-kernel's Triton kernels, where that package is installed (extra ``liger``); they keep the same."""

from __future__ import annotations

import importlib.util

from torch import Tensor


def liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: the gradient that its backward would overwrite also flows past the norm.
    return LigerRMSNormFunction.apply(x, weight, eps, offset, "gemma" if offset else "llama", False)


def liger_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)
