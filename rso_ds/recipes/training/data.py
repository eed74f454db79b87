"""What a run trains on and validates with, prepared by one rank a node, agreed on by all."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rso_ds.comm.decisions import first_on_each_node
from rso_ds.comm.outcome import agreed, gathered
from rso_ds.comm.rank_context import RankContext
from rso_ds.errors import RSOConfigError, RSOError
from rso_ds.models import begins_random
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.dataset import PackedTokens, TextCounts, counts_of, token_file
from rso_ds.recipes.data.description import BEGINNING, DataDescription, PartDescription
from rso_ds.recipes.data.mixture import names_and_weights
from rso_ds.recipes.data.read_ahead import read_ahead
from rso_ds.recipes.data.stream import StreamSteps, furthest, lanes_for, plan_stream
from rso_ds.recipes.data.tokenization import encode, load_tokenizer, tokenizer_fingerprint
from rso_ds.recipes.training.arguments import TrainArguments

BatchShape = tuple[int, int, int, int]  # accumulation, ranks, this rank, micro batch


def corpus_of(args: TrainArguments) -> Corpus:
    """The corpus that the flags name. Raises ``RSOConfigError``."""
    names, _ = names_and_weights(args.data)
    corpus = Corpus(names, args.val_fraction, args.val_data, args.text_key, args.encoding)
    return corpus.streamed() if streams(args, corpus) else corpus


def streams(args: TrainArguments, corpus: Corpus) -> bool:
    """Whether a run reads its training text while it trains."""
    weights = names_and_weights(args.data)[1]
    return weights is not None or corpus.large if args.stream == "auto" else args.stream == "yes"


def held_out_tokens(args: TrainArguments, corpus: Corpus, tokenizer: Any) -> PackedTokens | None:
    """What a run validates with, None if nothing is held out. Of a stream, and of several sources, as much as a
    validation looks at, of each source its share."""
    if not corpus.validates:
        return None
    limits = None
    if corpus.is_streamed or len(corpus.names) > 1:
        shares = [1.0] if corpus.held_out_member else corpus.shares(names_and_weights(args.data)[1])
        limits = [math.ceil(share * (args.eval_tokens + args.seq_len)) for share in shares]
    path = token_file(corpus, "held_out", tokenizer, Path(args.cache).expanduser(), limits)
    return PackedTokens(path, args.seq_len)


def identity_of(tokens: PackedTokens | None, streamed: bool, corpus: Corpus, part: str) -> dict[str, Any] | None:
    """A text as it is told from another, by content and not by place: that of ``tokens``, or of a stream's files."""
    if streamed:
        size = {"bytes": corpus.size} if part == "train" else {}
        return {**size, "digest": corpus.fingerprint(part)}
    if tokens is None:
        return None
    counts = counts_of(tokens.path)
    return {"documents": counts.documents, "characters": counts.characters, "digest": counts.digest}


class RunData:
    """Tokenizer, training text and held-out tokens of a run.

    ``tokenizer``: folder or hub name, None for a BPE trained on the corpus; ``accept`` sees it before it is used.
    Raises ``RSOConfigError`` for data that cannot be used.
    """

    def __init__(
        self, args: TrainArguments, corpus: Corpus, tokenizer: str | None, accept: Callable[[Any], object] | None = None
    ) -> None:
        self.corpus, self._args = corpus, args
        self._weights = names_and_weights(args.data)[1]
        self.streamed = streams(args, corpus)
        cache = Path(args.cache).expanduser()
        self.tokenizer = load_tokenizer(tokenizer, corpus, args.vocab_size, cache, args.trust_remote_code)
        if accept is not None:
            accept(self.tokenizer)
        self.held_out = held_out_tokens(args, corpus, self.tokenizer)
        self.packed: PackedTokens | None = None
        if not self.streamed:
            self.packed = PackedTokens(token_file(corpus, "train", self.tokenizer, cache), args.seq_len, args.seed)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to see the text that it would have seen: by content, not by place."""
        train = identity_of(self.packed, self.streamed, self.corpus, "train") or {}
        return {
            "streamed": self.streamed,
            "training text": {**train, "weights": self._weights} if self.streamed else train,
            "held-out text": identity_of(self.held_out, self.streamed, self.corpus, "held_out"),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    def to_agree_on(self) -> dict[str, Any]:
        """What ranks compare before they train: they read files of their own."""
        return {
            "training data (tokens)": None if self.packed is None else _of_tokens(self.packed),
            "held-out data (tokens)": None if self.held_out is None else _of_tokens(self.held_out),
            **self.identity,
        }

    def beginning(self, count: int) -> list[int]:
        """The first tokens of the held-out text, or of the training text where nothing is held out."""
        some = self.held_out or self.packed
        if some is not None:
            return some.tokens[:count].tolist()
        return encode(self.tokenizer, [next(self.corpus.documents("train"))[:BEGINNING]])[0][:count]

    @cached_property
    def description(self) -> DataDescription:
        """The first lines of the program."""
        members = self.corpus.members
        files = [f.name if len(members) == 1 else f.url for m in members for f in m.source.train]
        counts = counts_of(self.packed.path) if self.packed else None
        sizes = {"bytes": self.corpus.size} if counts is None else _amounts(counts)
        parts = [PartDescription("trains", files, sizes, "streamed" if self.streamed else "")]
        if self.held_out is None:
            parts.append(PartDescription("held out", (), {}, "there will be no validation"))
        else:
            held_out = counts_of(self.held_out.path)
            own = self.corpus.held_out_files
            note = "" if own else self._share(counts, held_out)
            parts.append(PartDescription("held out", [f.name for f in own or ()], _amounts(held_out), note))
        untouched = [name for m in members for name in m.source.untouched]
        beginning = counts.beginning if counts else next(self.corpus.documents("train"), "")[:BEGINNING]
        return DataDescription(self.corpus.source, parts, untouched, beginning)

    def _share(self, train: TextCounts | None, held_out: TextCounts) -> str:
        if train is None:
            return f"the first of {self.corpus.held_out:.1%} of the documents"
        return f"{held_out.characters / (held_out.characters + train.characters):.1%} of the text"

    def batches(self, shape: BatchShape, position: dict[str, Any] | None, device: torch.device) -> Batches:
        """The steps from ``position`` (``Batches.position``) on, None: from the start. All ranks call this together."""
        accumulation, ranks, _, micro = shape
        if self.packed is not None:
            return Batches(self.packed, shape, (position or {}).get("sequences", 0), device)
        streams = (position or {}).get("stream") or {}
        lanes = int(streams.get("lanes", lanes_for(accumulation * ranks * micro)))
        args = self._args
        plan = agreed(
            lambda: plan_stream(self.corpus, self._weights, self.tokenizer, args.seq_len, args.seed, lanes),
            kind=RSOConfigError,
        )
        places = streams["places"].numpy() if streams else None
        taken = (position or {}).get("sequences", 0)
        return Batches(StreamSteps(plan, shape, taken, places, args.data_workers), shape, taken, device)


class Batches:
    """Step after step of a run's data, the next one read while one trains: int64 [accumulation, micro, seq_len]."""

    def __init__(self, source: PackedTokens | StreamSteps, shape: BatchShape, taken: int, device: torch.device) -> None:
        accumulation, ranks, rank, micro = shape
        self._size, self._taken = accumulation * ranks * micro, taken
        self._places: dict[int, np.ndarray] = {}
        self._lanes = source.plan.lanes if isinstance(source, StreamSteps) else 0

        def read(first: int) -> Tensor:
            if isinstance(source, PackedTokens):
                return source.micro_batches(first, accumulation, ranks, rank, micro)
            tokens, self._places[first + self._size] = source.next()
            return tokens

        self._source = source
        self._ahead: Generator[Tensor, None, None] = read_ahead(read, taken, device, self._size)

    def __next__(self) -> Tensor:
        tokens = next(self._ahead)
        self._places.pop(self._taken, None)
        self._taken += self._size
        return tokens

    def close(self) -> None:
        """End the thread and the processes that read."""
        self._ahead.close()
        if isinstance(self._source, StreamSteps):
            self._source.close()

    def position(self) -> dict[str, Any]:
        """Where the data go on after the steps given out: for a checkpoint. All ranks call this together."""
        stream = None
        if self._lanes:
            places = furthest(gathered(self._places[self._taken]))
            stream = {"lanes": self._lanes, "places": torch.from_numpy(places)}
        return {"sequences": self._taken, "stream": stream}


def prepare(
    args: TrainArguments, corpus: Corpus, context: RankContext, accept: Callable[[Any], object] | None = None
) -> RunData:
    """The run's data on every rank. One rank a node makes what is missing while the others wait. ``accept`` sees the
    tokenizer before anything is made with it."""

    def load() -> RunData:
        try:
            return RunData(args, corpus, _tokenizer_name(args), accept)
        except RSOError:
            raise
        except Exception as error:
            raise RSOConfigError(
                f"--data {corpus.source} cannot be prepared: {type(error).__name__}: {error}"
            ) from error

    return first_on_each_node(load, "preparing the data", args.timeout, context.local_rank, RSOConfigError)


def _tokenizer_name(args: TrainArguments) -> str | None:
    """``--tokenizer``, else the model's own where its weights are used, else None (train a BPE)."""
    if args.tokenizer is not None or begins_random(args.model, args.init):
        return args.tokenizer
    return args.model


def _amounts(counts: TextCounts) -> dict[str, int]:
    return {"documents": counts.documents, "characters": counts.characters, "tokens": counts.tokens}


def _of_tokens(data: PackedTokens) -> list[int]:
    """Length and a checksum of a share of the tokens, without reading all of a large file."""
    tokens = data.tokens
    some = tokens[:: max(1, len(tokens) // 100_000)]
    return [len(tokens), zlib.crc32(some.tobytes())]
