"""fp16 without ZeRO: make the loss scale apply.

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
