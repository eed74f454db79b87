"""The main job behind ``launch/train.py``: data, tokenizer, model, loop, metrics. Needs the extra [train]."""
