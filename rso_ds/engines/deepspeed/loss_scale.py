"""fp16: make the loss scale apply without ZeRO, and say in our words when it can fall no further.

DeepSpeed 0.19.8 scales the loss in ``engine.backward`` only for ZeRO optimizers, while the fp16 optimizers of
stage 0 always divide the gradients by the loss scale: they train on gradients too small by that factor, and
small ones vanish in fp16, without any message.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from rso_ds.errors import RSOError


def scale_loss_at_stage_0(engine: Any) -> None:
    """Wrap ``engine.backward`` where needed. Leaves a DeepSpeed that scales by itself as it is."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        return
    config = optimizer.loss_scale_config
    if not config.use_grad_scaling:
        return
    inner = engine.backward

    @wraps(inner)
    def backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        by_accumulation = kwargs.get("scale_wrt_gas", args[1] if len(args) > 1 else True)
        unscaled = 1.0 / engine.gradient_accumulation_steps() if by_accumulation else 1.0

        def scale(grad: Tensor) -> Tensor:
            done = grad.item() > 1.5 * unscaled
            return grad if done else grad * config.cur_scale

        handle = loss.register_hook(scale)
        try:
            return inner(loss, *args, **kwargs)
        finally:
            handle.remove()

    engine.backward = backward


def explain_lowest_scale(engine: Any) -> None:
    """Wrap ``engine.step``: DeepSpeed ends a run whose loss scale can fall no further with a bare ``Exception``.

    The wrapped step raises ``RSOError`` on every rank instead, since all have counted the same overflows.
    """
    inner = engine.step

    @wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise RSOError(
                f"gradients overflow fp16 at the lowest loss scale, at step {engine.global_steps + 1}, after"
                f" {engine.skipped_steps} skipped steps: look at the data of the last steps, lower the learning rate,"
                " or use bf16; continue from the newest checkpoint."
            ) from None

    engine.step = step
