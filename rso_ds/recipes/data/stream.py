"""A stream's steps for one rank, read and tokenised by processes beside training."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rso_ds.errors import RSOConfigError, RSOError
from rso_ds.recipes.data.blocks import BlockOrder
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.dataset import own_entries
from rso_ds.recipes.data.lanes import LaneReader, StreamPlan, first_places

_LANES = 128
_AHEAD = 4  # steps that are ready beforehand


def lanes_for(global_batch: int) -> int:
    """The divisor of ``global_batch`` (sequences a step) that is nearest to 128: ranks that divide it share no lane."""
    divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
    return min(divisors, key=lambda d: abs(np.log(d / _LANES)))


def plan_stream(
    corpus: Corpus, weights: Sequence[float] | None, tokenizer: Any, seq_len: int, seed: int, lanes: int
) -> StreamPlan:
    """The stream of ``corpus``: of each source by its weight, or by the size of its files.

    Raises ``RSOConfigError`` for data too small to be dealt to ``lanes`` lanes.
    """
    if not corpus.is_streamed:
        raise ValueError(
            "what is held out of a corpus is told by its documents: use those of a stream, corpus.streamed()"
        )
    members = corpus.members
    orders = [BlockOrder(m.source.train, m.encoding, lanes, seed) for m in members]
    for member, order in zip(members, orders, strict=True):
        # Decided here, once, and not by each process; and an endless stream of nothing would be read for ever.
        some = sum(1 for _ in itertools.islice(member.documents("train"), lanes))
        if not some:
            raise RSOConfigError(f"--data {member.source.name}: no text in its train part.")
        if min(some, order.count) < lanes and len(members) == 1:
            raise RSOConfigError(
                f"--data {member.source.name} has {some} documents in {order.count} blocks, and a stream for this batch"
                f" deals them to {lanes} lanes: it is too small to stream. Use --stream no."
            )
    return StreamPlan(members, corpus.shares(weights), tokenizer, seq_len, seed, lanes, orders)


def furthest(places: Sequence[np.ndarray]) -> np.ndarray:
    """The places of all lanes, of which each rank knows those that it has read."""
    result = places[0].copy()
    for other in places[1:]:
        for at in np.ndindex(result.shape[:2]):
            result[at] = max(tuple(result[at]), tuple(other[at]))
    return result


class StreamSteps:
    """This rank's part of every step of a stream, from sequence ``taken`` on.

    ``batch``: (accumulation, ranks, this rank, micro batch). ``places``: int64 [lanes, members, 4] where each lane goes
    on. ``workers``: processes that read; with 0 the calling thread does.
    """

    def __init__(
        self, plan: StreamPlan, batch: tuple[int, int, int, int], taken: int, places: np.ndarray | None, workers: int
    ) -> None:
        self._accumulation, ranks, rank, self._micro = batch
        self.plan, self.taken = plan, taken
        size = self._accumulation * ranks * self._micro
        mine = own_entries(np.arange(size), self._accumulation, ranks, rank, self._micro)
        self._places = first_places(plan.lanes, len(plan.members)) if places is None else places.copy()
        self._size, self._workers, self._count = size, workers, len(mine)
        dataset = _Parts(plan, mine, size, taken, self._places)
        options: dict[str, Any] = {}
        if workers:  # forked ones would keep the weights' old pages alive
            options = {"multiprocessing_context": "spawn", "prefetch_factor": _AHEAD}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores, if asked for
            loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_as_it_is, **options)
            with _deaf_children():
                self._parts: Any = iter(loader)  # processes start now

    def next(self) -> tuple[Tensor, np.ndarray]:
        """(int64 [accumulation, micro batch, seq_len], where each lane goes on after that as far as this rank knows:
        int64 [lanes, members, 4])."""
        tokens = np.empty((self._count, self.plan.seq_len), dtype=np.int64)
        for _ in range(max(1, self._workers)):
            try:
                part = next(self._parts)
            except RuntimeError as error:
                message = lost_reader(error)
                if message is None:
                    raise
                raise RSOError(message) from None
            if isinstance(part, RSOConfigError):
                raise part
            at, rows, lanes, places = part
            tokens[at] = rows
            self._places[lanes] = places
        self.taken += self._size
        shaped = torch.from_numpy(tokens).view(self._accumulation, self._micro, self.plan.seq_len)
        return shaped, self._places.copy()

    def close(self) -> None:
        """End the processes."""
        self._parts = None


def lost_reader(error: RuntimeError) -> str | None:
    """What to say where ``error`` is that of a reading process that died; torch raises it wherever training is."""
    if "DataLoader worker" not in str(error):
        return None
    return f"a process that reads --data is gone (out of memory?): {str(error).splitlines()[0]}"


def _end_with(parent: int) -> None:
    """Let this process end when the process ``parent`` does, however that does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes begun in here never see the signals that schedulers send to a job as a whole: the training process
    saves first, and needs its data until then."""
    resource_tracker.ensure_running()  # started in here it would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Parts(IterableDataset):
    """What one process adds to each step: (indices into the rank's sequences, ids, lanes, their places)."""

    def __init__(self, plan: StreamPlan, mine: np.ndarray, size: int, taken: int, places: np.ndarray) -> None:
        self._plan, self._mine, self._size, self._taken, self._places = plan, mine, size, taken, places
        self._parent = os.getpid()

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._steps()
        except RSOConfigError as error:  # DataLoader would put a trace around it
            yield error

    def _steps(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            _end_with(self._parent)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are for training
        # A lane keeps a file open that can only be read from its start.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        reader = LaneReader(self._plan, self._places, self._taken)
        lanes = self._plan.lanes
        period = lanes // np.gcd(lanes, self._size)
        every = self._taken + self._mine + self._size * np.arange(period)[:, None]
        turn = {int(lane): i % workers for i, lane in enumerate(np.unique(every % lanes))}
        first = self._taken
        while True:
            numbers = first + self._mine
            at = np.asarray([i for i, n in enumerate(numbers) if turn[int(n % lanes)] == worker], dtype=np.int64)
            rows = [reader.sequence(int(n)) for n in numbers[at]]
            ids = np.stack(rows) if rows else np.empty((0, self._plan.seq_len), dtype=np.int64)
            read = np.unique(numbers[at] % lanes)
            places = np.stack([reader.places(int(lane)) for lane in read]) if len(read) else self._places[:0]
            yield at, ids, read, places
            first += self._size


def _as_it_is(part: Any) -> Any:
    return part
