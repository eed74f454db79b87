"""RSO under DeepSpeed ZeRO 0-3."""

from rso_ds.engines.deepspeed.initialize import initialize, patch_deepspeed

__all__ = ["initialize", "patch_deepspeed"]
