"""``import rso_ds.auto`` before training: unmodified ``deepspeed.initialize`` calls then pick RSO up from
the JSON alone. Saves other than ``rso_ds.checkpoint.save_dense`` write W without the current B P^T."""

from rso_ds.engines.deepspeed import patch_deepspeed

patch_deepspeed()
