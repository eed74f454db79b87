"""Packed sequences, and which rank sees which of them at which step."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.description import BEGINNING
from rso_ds.recipes.data.tokenization import (
    encode,
    end_of_text_id,
    own_name,
    pieces,
    token_dtype,
    tokenizer_fingerprint,
)

logger = logging.getLogger(__name__)

_BATCH = 64
_TELL = 15.0  # seconds between two words on how far it is
_LONGEST = 1 << 22  # characters that are given to a tokenizer at once


@dataclass(frozen=True)
class TextCounts:
    """What a part of a corpus holds. ``digest``: of the text, document by document, whatever files it came from."""

    documents: int
    characters: int
    tokens: int
    digest: str
    beginning: str


def token_file(
    corpus: Corpus,
    part: str,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    limits: Sequence[int] | None = None,
) -> Path:
    """Path of the cached tokens of ``part``: documents end to end, an end-of-text token after each; with ``limits`` the
    first so many tokens of each source.

    Written once under a temporary name, then renamed, so that a crash leaves no half file and several
    nodes may do it at once. ``counts_of`` the path says what is in it. Raises ``RSOConfigError`` for a part without
    text.
    """
    key = f"{corpus.fingerprint()}-{tokenizer_fingerprint(tokenizer)}-{limits}"
    path = cache / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}-{part}.npy"
    if path.is_file() and _counts_file(path).is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    arrays, counts = _tokens(corpus, part, tokenizer, limits)
    if not counts.tokens:
        raise RSOConfigError(f"--data {corpus.source}: no text in its {part} part.")
    half = own_name(path)
    try:
        half.write_text(json.dumps(asdict(counts)), encoding="utf-8")
        os.replace(half, _counts_file(path))
        with open(half, "wb") as f:
            np.save(f, np.concatenate(arrays))
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    return path


def counts_of(path: Path) -> TextCounts:
    """What ``token_file`` has counted while it wrote ``path``."""
    return TextCounts(**json.loads(_counts_file(path).read_text(encoding="utf-8")))


def _counts_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _tokens(
    corpus: Corpus, part: str, tokenizer: PreTrainedTokenizerBase, limits: Sequence[int] | None
) -> tuple[list[np.ndarray], TextCounts]:
    dtype, end = token_dtype(tokenizer), end_of_text_id(tokenizer)
    arrays: list[np.ndarray] = []
    batch: list[str] = []
    documents = characters = tokens = 0
    digest, beginning = hashlib.sha256(), ""
    told = time.monotonic()

    def flush() -> None:
        nonlocal tokens
        for ids in encode(tokenizer, batch):
            arrays.append(np.asarray([*ids, end], dtype=dtype))
            tokens += len(ids) + 1
        batch.clear()

    for number, source in enumerate(corpus.parts(part)):
        most = None if limits is None else tokens + limits[number]
        for text in source:
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
            beginning = beginning or text[:BEGINNING]
            documents, characters = documents + 1, characters + len(text)
            if len(text) > _LONGEST:
                flush()
                ids = [i for piece in pieces(text, _LONGEST) for i in encode(tokenizer, [piece])[0]]
                arrays.append(np.asarray([*ids, end], dtype=dtype))
                tokens += len(ids) + 1
            else:
                batch.append(text)
            if len(batch) == (_BATCH if most is None else 1):
                flush()
                if time.monotonic() - told > _TELL:
                    told = time.monotonic()
                    logger.info(f"preparing the {part} part: {documents:,} documents, {tokens:,} tokens so far")
            if most is not None and tokens >= most:
                arrays[-1] = arrays[-1][: len(arrays[-1]) - (tokens - most)]
                tokens = most
                break
        flush()
    return arrays, TextCounts(documents, characters, tokens, digest.hexdigest()[:16], beginning)


class PackedTokens:
    """``tokens`` cut into sequences of ``seq_len``; the rest at the end is dropped.

    Sequence order is a permutation per epoch, a function of (seed, epoch) only, and a step takes the next entries of
    the endless stream of epochs, so a run resumes from its count of sequences and sees the same data at any world size.
    Raises ``RSOConfigError`` if the data is shorter than one sequence.
    """

    def __init__(self, path: Path, seq_len: int, seed: int = 0) -> None:
        self.path = path
        self.tokens = np.load(path, mmap_mode="r")
        self.seq_len, self.seed = seq_len, seed
        self.count = len(self.tokens) // seq_len
        if self.count == 0:
            raise RSOConfigError(
                f"--seq-len {seq_len} is longer than the data: {path.stem.rpartition('-')[2]} part has"
                f" {len(self.tokens)} tokens. Use a shorter --seq-len or more data."
            )
        self._epoch = -1
        self._order: np.ndarray = np.arange(0)

    def sequences(self, indices: np.ndarray) -> Tensor:
        """Sequences by position in the file: int64 [len(indices), seq_len]."""
        rows = [self.tokens[i * self.seq_len : (i + 1) * self.seq_len] for i in indices.tolist()]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _stream(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.count)
            self._epoch = epoch
        return int(self._order[offset])

    def micro_batches(self, first: int, accumulation: int, world_size: int, rank: int, micro: int) -> Tensor:
        """This rank's part of a step that begins with entry ``first`` of the stream: int64 [accumulation, micro,
        seq_len]. The global batch is accumulation x world_size x micro sequences."""
        size = accumulation * world_size * micro
        indices = np.asarray([self._stream(first + i) for i in range(size)])
        mine = own_entries(indices, accumulation, world_size, rank, micro)
        return self.sequences(mine).view(accumulation, micro, self.seq_len)


def own_entries(entries: np.ndarray, accumulation: int, world_size: int, rank: int, micro: int) -> np.ndarray:
    """Those of a step's ``entries`` [accumulation x world_size x micro] that ``rank`` trains on, micro batch by micro
    batch."""
    return entries.reshape(accumulation, world_size, micro)[:, rank].reshape(-1)
