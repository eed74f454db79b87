"""What a run starts from: named shapes, what folders and hub repositories hold, and whether a tokenizer fits."""

from rso_ds.models.configuration import model_config
from rso_ds.models.fit import check_length, check_tokens, ensure_padding, learned_positions, rows_needed
from rso_ds.models.shapes import LLAMA_SHAPES, llama_config
from rso_ds.models.start import Start, begins_random, find_start, random_model
from rso_ds.models.tokenizers import load_tokenizer

__all__ = [
    "LLAMA_SHAPES",
    "Start",
    "begins_random",
    "check_length",
    "check_tokens",
    "ensure_padding",
    "find_start",
    "learned_positions",
    "llama_config",
    "load_tokenizer",
    "model_config",
    "random_model",
    "rows_needed",
]
