"""RSO under DeepSpeed ZeRO 0-3."""

from rso_ds.engines.deepspeed.attach import count_traffic, skip_nonfinite_steps
from rso_ds.engines.deepspeed.initialize import initialize, patch_deepspeed

__all__ = ["count_traffic", "initialize", "patch_deepspeed", "skip_nonfinite_steps"]
