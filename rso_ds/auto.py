"""``import rso_ds.auto`` before training: unmodified ``deepspeed.initialize`` calls then pick RSO up from
the JSON alone, including those made by Hugging Face Trainer and Accelerate."""

from rso_ds.engines.deepspeed import patch_deepspeed

patch_deepspeed()
