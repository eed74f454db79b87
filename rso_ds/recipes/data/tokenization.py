"""A tokenizer from Hugging Face, or a byte-level BPE trained on the data once and cached."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
_BPE_CHARACTERS = 20_000_000  # enough for merges to settle; more only takes longer


def load_tokenizer(name: str | None, corpus: Corpus, vocab_size: int, cache: Path) -> PreTrainedTokenizerBase:
    """``name``: folder or hub name of a tokenizer; None trains a BPE of ``vocab_size`` tokens on ``corpus``."""
    if name is not None:
        return _existing(name)
    folder = cache / f"bpe-{vocab_size}-{corpus.fingerprint()}"
    if not (folder / "tokenizer.json").is_file():
        half = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        _train_bpe(corpus, vocab_size).save_pretrained(half)
        with contextlib.suppress(OSError):  # another node was first
            os.replace(half, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes when any token or its id does."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id put between packed documents. Raises ``RSOConfigError`` if the tokenizer has none."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    raise RSOConfigError("the tokenizer has no end-of-text token to put between documents.")


def _existing(name: str) -> PreTrainedTokenizerBase:
    folder = Path(name)
    if folder.is_dir():
        bare = {f.name for f in folder.iterdir()}
        if {"vocab.json", "merges.txt"} <= bare and not {"tokenizer.json", "config.json"} & bare:
            from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]

            return GPT2TokenizerFast.from_pretrained(name)
    elif name.startswith((".", "/")) or "\\" in name:
        raise RSOConfigError(f"--tokenizer {name}: no such folder.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RSOConfigError(f"--tokenizer {name} cannot be loaded: {error}") from None


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
