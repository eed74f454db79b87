"""RSO under DeepSpeed ZeRO 0-3."""

from rso_ds.engines.deepspeed.attach import count_traffic, skip_nonfinite_steps
from rso_ds.engines.deepspeed.initialize import initialize, patch_deepspeed
from rso_ds.engines.deepspeed.loss_scale import explain_lowest_scale

__all__ = ["count_traffic", "explain_lowest_scale", "initialize", "patch_deepspeed", "skip_nonfinite_steps"]
