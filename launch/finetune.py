"""Fine-tune a classifier or a causal language model with RSO, LoRA or a full optimizer.

torchrun --nproc-per-node 8 launch/finetune.py --task classification --model FOLDER --data train.csv
deepspeed --num_gpus 8 launch/finetune.py --task causal --model FOLDER --data F.jsonl --deepspeed ds_configs/rso.json

Every flag of transformers' TrainingArguments, or of TRL's SFTConfig, works as well: --task causal --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from rso_ds.recipes.finetuning.command import main

if __name__ == "__main__":
    main()
