"""The search for the fastest configuration that fits, by the models of memory and communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rso_ds.errors import RSOConfigError
from rso_ds.layers import convert
from rso_ds.planning.communication.exchange import Deployment, Exchange, Transfer, transfers
from rso_ds.planning.communication.network import Network
from rso_ds.planning.memory.account import Account, Accountant
from rso_ds.planning.plan.config_json import candidate_json, rso_of

Build = Callable[[torch.dtype, int | None], nn.Module]
# Candidates this much slower than the fastest count as equal: the models are not better than that.
NEAR_TIE = 0.02
RANK_RATIOS = (0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Task:
    """``gpus`` GPUs with ``memory`` bytes and ``tflops`` sustained 1e12 FLOP/s each, joined by ``network``, and
    the step they are to take: ``global_batch`` sequences of ``seq_len`` tokens."""

    gpus: int
    memory: int
    tflops: float
    network: Network
    global_batch: int
    seq_len: int

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.network.nodes

    @property
    def share(self) -> int:
        """Sequences of a rank in a step."""
        return self.global_batch // self.gpus


@dataclass(frozen=True)
class Candidate:
    """One configuration. ``config``: its DeepSpeed JSON; ``compute`` and ``communication``: seconds of a step."""

    config: dict[str, Any]
    deployment: Deployment
    checkpointing: bool
    micro_batch: int
    account: Account
    transfers: tuple[Transfer, ...]
    compute: float
    communication: float

    @property
    def stage(self) -> int:
        return self.deployment.engine.stage

    @property
    def hpz(self) -> int:
        return self.deployment.hpz

    @property
    def accumulation(self) -> int:
        return self.deployment.engine.accumulation

    @property
    def needed(self) -> int:
        """Bytes that the GPU must have, fragmentation and reserve included."""
        return self.account.needed

    @property
    def seconds(self) -> float:
        """Of a step in which nothing hides behind anything."""
        return self.compute + self.communication

    @property
    def complexity(self) -> tuple[int, bool, bool, int]:
        """Smaller is simpler. Large micro batches come first: GPUs like them, which the model does not see."""
        return self.stage, self.hpz > 1, self.checkpointing, self.accumulation


@dataclass(frozen=True)
class Plan:
    """``candidates``: all that were looked at with the rank of ``chosen``; ``too_large``: of each larger rank,
    of which none fits, the candidate that needs least."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]


class NothingFits(Exception):
    """``least``: of each rank tried, the candidate that needs least."""

    def __init__(self, least: Sequence[Candidate]) -> None:
        super().__init__("nothing fits")
        self.least = tuple(least)


def make_plan(build: Build, base: dict[str, Any], task: Task, ratios: Sequence[float | None]) -> Plan:
    """The fastest candidate of the first of ``ratios`` (None: the rank of ``base``) of which one fits.

    ``build`` as for ``Accountant``. Raises ``NothingFits``, and ``RSOConfigError`` for a model that cannot be
    counted.
    """
    too_large: list[Candidate] = []
    for ratio in ratios:
        found = tuple(candidates(build, base, task, ratio))
        chosen = choose(found, task.memory)
        if chosen is not None:
            return Plan(chosen, found, tuple(too_large))
        too_large.append(min(found, key=lambda c: c.needed))
    raise NothingFits(too_large)


def choose(found: Sequence[Candidate], memory: int) -> Candidate | None:
    """The simplest of those that fit in ``memory`` bytes and take at most ``NEAR_TIE`` longer than the fastest."""
    fitting = [c for c in found if c.needed <= memory]
    if not fitting:
        return None
    fastest = min(c.seconds for c in fitting)
    return min((c for c in fitting if c.seconds <= fastest * (1 + NEAR_TIE)), key=lambda c: (c.complexity, c.seconds))


def candidates(build: Build, base: dict[str, Any], task: Task, ratio: float | None) -> Iterator[Candidate]:
    """Every stage, with and without hpZ and checkpointing, with micro batches up to the first that fits nowhere:
    a larger one needs more. (Stage 1 needs less where nothing accumulates, but never less than stage 2.)"""
    shapes = list(_shapes(base, task))
    first = candidate_json(base, *shapes[0], ratio, 1, task.share, task.gpus)
    rso, engine = rso_of(first), Deployment.from_json(first, task.gpus).engine
    if rso.tokens_per_step is None:
        rso = replace(rso, tokens_per_step=task.share * task.seq_len)
    with FakeTensorMode():
        model = build(torch.bfloat16 if engine.itemsize == 2 else torch.float32, None)
        convert(model, rso)
        exchange = Exchange.of(model, rso)
    plain = Accountant(build, rso, engine)
    for checkpointing, accountant in ((False, plain), (True, plain.recomputing())):
        for micro_batch in (m for m in range(1, task.share + 1) if task.share % m == 0):
            fits = False
            for stage, hpz in shapes:
                accumulation = task.share // micro_batch
                config = candidate_json(base, stage, hpz, ratio, micro_batch, accumulation, task.gpus)
                deployment = Deployment.from_json(config, task.gpus, checkpointing=checkpointing)
                account = accountant.under(deployment.engine).account("rso", micro_batch, task.seq_len)
                if account.missing:
                    raise RSOConfigError(
                        f"--model: it cannot be counted, so it cannot be planned: {account.missing[0]}"
                    )
                sent = tuple(transfers(exchange, deployment))
                yield Candidate(
                    config,
                    deployment,
                    checkpointing,
                    micro_batch,
                    account,
                    sent,
                    compute_seconds(exchange, task, checkpointing),
                    task.network.seconds(sent, deployment),
                )
                fits = fits or account.needed <= task.memory
            if not fits:
                break


def compute_seconds(exchange: Exchange, task: Task, checkpointing: bool) -> float:
    """6 FLOP a dense parameter and token, 8 where blocks are computed twice; attention's scores are left out, and
    so is what RSO saves in weight gradients."""
    dense = sum(p.numel for p in exchange.parameters if p.group != 0)
    tokens = task.global_batch * task.seq_len
    return (8 if checkpointing else 6) * dense * tokens / (task.tflops * 1e12 * task.gpus)


def _shapes(base: dict[str, Any], task: Task) -> Iterator[tuple[int, int]]:
    """(stage, ranks that share hpZ's copy) of all candidates: what ``base`` offloads wants stages that can."""
    zero = base.get("zero_optimization") or {}
    offloads = {
        key for key in ("offload_optimizer", "offload_param") if (zero.get(key) or {}).get("device", "none") != "none"
    }
    for stage in range(3 if "offload_param" in offloads else 1 if offloads else 0, 4):
        yield stage, 1
    if task.network.nodes > 1 and task.gpus_per_node > 1 and "offload_param" not in offloads:
        yield 3, task.gpus_per_node
