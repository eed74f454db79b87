"""Packed sequences, and which rank sees which of them at which step."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.tokenization import end_of_text_id, tokenizer_fingerprint

_BATCH = 64


def token_file(corpus: Corpus, part: str, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Path:
    """Path of the cached tokens of ``part``: documents end to end, an end-of-text token after each.

    Written once under a temporary name, then renamed, so that a crash leaves no half file and several
    nodes may do it at once.
    """
    key = f"{corpus.fingerprint()}-{tokenizer_fingerprint(tokenizer)}"
    path = cache / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}-{part}.npy"
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    end = end_of_text_id(tokenizer)
    pieces: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] if batch else ():
            pieces.append(np.asarray([*ids, end], dtype=dtype))
        batch.clear()

    for text in corpus.documents(part):
        batch.append(text)
        if len(batch) == _BATCH:
            flush()
    flush()
    if not pieces:
        raise RSOConfigError(f"--data {corpus.source}: no text in its {part} part.")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        np.save(f, np.concatenate(pieces))
    os.replace(temporary, path)
    return path


class PackedTokens:
    """``tokens`` cut into sequences of ``seq_len``; the rest at the end is dropped.

    Sequence order is a permutation per epoch, a function of (seed, epoch) only. Step s of a run with a
    global batch of G sequences uses entries [s G, (s + 1) G) of the endless stream of epochs, so a run
    resumes from its step count and sees the same data at any world size.
    Raises ``RSOConfigError`` if the data is shorter than one sequence.
    """

    def __init__(self, path: Path, seq_len: int, seed: int = 0) -> None:
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

    def micro_batches(self, step: int, accumulation: int, world_size: int, rank: int, micro: int) -> Tensor:
        """This rank's part of step ``step``: [accumulation, micro, seq_len]. The global batch is
        accumulation x world_size x micro sequences."""
        size = accumulation * world_size * micro
        indices = np.asarray([self._stream(step * size + i) for i in range(size)])
        mine = indices.reshape(accumulation, world_size, micro)[:, rank].reshape(-1)
        return self.sequences(mine).view(accumulation, micro, self.seq_len)
