"""A tokenizer from Hugging Face, or a byte-level BPE trained on the data once and cached."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rso_ds.errors import RSOConfigError
from rso_ds.models import load_tokenizer as load_existing
from rso_ds.models import rows_needed
from rso_ds.recipes.data.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
_BPE_CHARACTERS = 20_000_000  # enough for merges to settle; more only takes longer
# What a tokenizer whose inner parts cannot be written out makes of this stands for them in its fingerprint.
_PROBE = (
    "The quick\tBrown  fox's na\u00efve caf\u00e9, \uff21\uff22 \u21165 \ufb01n"
    " \u6771 \u043f 1234.5e-6\r\n\n f(x): {'a': [x]} \U0001f642"
)


def load_tokenizer(
    name: str | None, corpus: Corpus, vocab_size: int, cache: Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """``name``: folder or hub name of a tokenizer; None trains a BPE of ``vocab_size`` tokens on ``corpus``."""
    if name is not None:
        existing: PreTrainedTokenizerBase = load_existing(name, "--tokenizer", trust_remote_code)
        return existing
    folder = cache / f"bpe-{vocab_size}-{corpus.fingerprint()}"
    if not (folder / "tokenizer.json").is_file():
        half = own_name(folder)
        _train_bpe(corpus, vocab_size).save_pretrained(half)
        with contextlib.suppress(OSError):  # another node was first
            os.replace(half, folder)
        shutil.rmtree(half, ignore_errors=True)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def own_name(path: Path) -> Path:
    """A name beside ``path`` that no other process has, on this host or on another that shares the folder."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes when the tokenizer makes other tokens of a text: with its vocabulary, merges, normaliser, pre-tokeniser,
    special tokens, or the token put between documents."""
    parts = [str(end_of_text_id(tokenizer)), repr(sorted(tokenizer.special_tokens_map.items()))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        whole = json.loads(backend.to_str())
        # These two follow the last call, and not what the tokenizer is.
        parts.append(json.dumps({k: v for k, v in whole.items() if k not in ("truncation", "padding")}))
    else:
        probe = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        parts += [type(tokenizer).__name__, repr(sorted(tokenizer.get_vocab().items())), repr(probe)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id put between packed documents. Raises ``RSOConfigError`` if the tokenizer has none."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    raise RSOConfigError("the tokenizer has no end-of-text token to put between documents.")


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> type[np.unsignedinteger]:
    """The smallest in which every id can be stored."""
    return np.uint16 if rows_needed(tokenizer) <= 1 << 16 else np.uint32


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without special tokens."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    return ids


def pieces(text: str, limit: int) -> Iterator[str]:
    """``text`` in pieces of at most ``limit`` characters that end with lines where there are any: a tokenizer takes
    many times a text's size for itself."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _train_bpe(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(corpus), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def _first_characters(corpus: Corpus) -> Iterator[str]:
    left = _BPE_CHARACTERS
    for text in corpus.documents("train"):
        if left <= 0:
            return
        for start in range(0, min(len(text), left), 10_000):  # one huge document must not be one huge word list
            yield text[start : min(start + 10_000, left)]
        left -= len(text)
