"""``launch/finetune.py``: fine-tuning by Hugging Face's Trainer and TRL's SFTTrainer, with RSO or without."""
