"""Pre-train or fine-tune a causal language model under DeepSpeed.

deepspeed --num_gpus 8 launch/train.py --deepspeed ds_configs/rso.json

The optimizer is the JSON's: RSO, AdamW, or any other of DeepSpeed's. Without GPUs the same command with
--num_gpus 2 trains on two CPU ranks. --help lists every flag; --config run.yaml reads them from a file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from rso_ds.recipes.training.command import run_process

if __name__ == "__main__":
    run_process()
