"""RSO under DeepSpeed ZeRO 0-3."""

from rso_ds.engines.deepspeed.attach import count_traffic, skip_nonfinite_steps
from rso_ds.engines.deepspeed.initialize import initialize
from rso_ds.engines.deepspeed.loss_scale import explain_lowest_scale

__all__ = ["count_traffic", "explain_lowest_scale", "initialize", "skip_nonfinite_steps"]
