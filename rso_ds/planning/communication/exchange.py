"""What ranks exchange in one optimizer step, in closed form.

The rules are those of DeepSpeed 0.19, FSDP2 and DistributedDataParallel as they were counted on live ranks
(tests/engines/test_bytes_sent.py): padding included, flags and norms of a few bytes left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOConfigError
from rso_ds.layers import rso_layers
from rso_ds.layers.form import Shape, choose_form
from rso_ds.planning.memory.states import Engine
from rso_ds.planning.memory.trace import block_names
from rso_ds.solvers import CARRY_OVER


@dataclass(frozen=True)
class Parameter:
    """``unit``: index of the transformer block that holds it, None outside; ``group``: index of the optimizer's
    parameter group, None if frozen; ``last``: of the matrix with which the block ends."""

    shape: tuple[int, ...]
    unit: int | None
    group: int | None
    last: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])


@dataclass(frozen=True)
class Exchange:
    """The model under one method. ``projections`` and ``weights``: numbers of P and of W, whose checksums are
    compared at a boundary every ``interval`` steps, with those of dense parameters and of the solver's
    ``moments`` of each; ``interval`` 0: there is none. ``config`` and ``shapes``, of W, decide how often B is merged.
    ``whole_rows``: the carry-over rule looks at whole rows of B, so that those cut between ranks are exchanged.
    ``masters``: (rows or experts, elements of each) of the W of which ranks keep fp32 copies of some each, if W is of
    low precision."""

    parameters: tuple[Parameter, ...]
    projections: int = 0
    weights: int = 0
    interval: int = 0
    config: RSOConfig | None = None
    shapes: tuple[Shape, ...] = ()
    local_steps: bool = False
    whole_rows: bool = False
    moments: int = 2
    masters: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, config: RSOConfig) -> Exchange:
        """Read off a model converted with ``config`` or a dense one, on any device; parameter groups as
        ``launch/train.py`` makes them: B, dense matrices, vectors."""
        layers = [layer for _, layer in rso_layers(model)]
        b = {id(layer.B) for layer in layers}
        unit = {id(p): i for i, name in enumerate(block_names(model)) for p in model.get_submodule(name).parameters()}
        last = {id(p) for name in block_names(model) for p in _last_matrix(model.get_submodule(name))}
        found = []
        for p in model.parameters():
            kind = 0 if id(p) in b else 1 if p.dim() > 1 else 2
            found.append(Parameter(tuple(p.shape), unit.get(id(p)), kind if p.requires_grad else None, id(p) in last))
        spaces = {id(layer.subspace) for layer in layers}
        if not layers:
            return cls(tuple(found))
        whole_rows = CARRY_OVER[config.carry_over].needs_whole_rows
        local_steps = config.communicate == "boundary"
        moments = 2 if config.solver != "sgd" else 1 if config.momentum else 0
        kept = layers if config.master_weights != "none" else []
        masters = tuple((len(layer.weight), layer.weight[0].numel()) for layer in kept)
        return cls(
            tuple(found),
            projections=len(spaces),
            weights=len(layers),
            interval=config.interval,
            config=config,
            shapes=tuple(map(Shape.of, layers)),
            local_steps=local_steps,
            whole_rows=whole_rows,
            moments=moments,
            masters=masters,
        )

    @property
    def trained(self) -> list[Parameter]:
        return [p for p in self.parameters if p.group is not None]


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in a step. ``kind`` as ``rso_ds.comm.KINDS``; ``over``: "world", "shards" or
    "replicas" (HSDP); ``payload``: bytes that a rank hands over in a step; ``calls``: about how many."""

    kind: str
    op: str
    over: str
    payload: float
    calls: float = 1.0


@dataclass(frozen=True)
class Deployment:
    """Where the state lies: an ``Engine`` of kind "zero", "ddp" or "fsdp2", over ``replicas`` copies (HSDP);
    ``hpz``: ranks that share ZeRO++'s secondary copy; ``reduce_itemsize``: bytes of a gradient element sent;
    ``checkpointing``: backward computes blocks again, for which ZeRO-3 gathers them once more."""

    engine: Engine
    replicas: int = 1
    hpz: int = 1
    reduce_itemsize: int = 4
    checkpointing: bool = False

    @classmethod
    def from_json(
        cls, config: Mapping[str, Any], gpus: int, kind: str = "zero", replicas: int = 1, checkpointing: bool = False
    ) -> Deployment:
        """From a DeepSpeed JSON. Raises ``RSOConfigError``."""
        engine = Engine.from_json(config, gpus, kind)
        if kind != "zero":  # the other engines reduce in fp32 and know no secondary copies
            return cls(engine, replicas, checkpointing=checkpointing)
        wanted = config.get("communication_data_type")
        sizes = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2, None: engine.itemsize}
        if wanted not in sizes:
            raise RSOConfigError(f"communication_data_type must be fp32, fp16 or bf16, got {wanted!r}.")
        return cls(engine, replicas, engine.hpz, sizes[wanted], checkpointing)

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.engine.gpus % self.replicas:
            raise RSOConfigError(f"--replicas {self.replicas} does not divide {self.engine.gpus} GPUs.")

    @property
    def shards(self) -> int:
        return self.engine.gpus // self.replicas


def transfers(exchange: Exchange, deployment: Deployment) -> list[Transfer]:
    """Everything a rank hands to collectives in one step; what happens once an interval, divided by it."""
    if deployment.engine.gpus == 1:
        return []
    rules: dict[str, Callable[[Exchange, Deployment], list[Transfer]]] = {"ddp": _ddp, "fsdp2": _fsdp2, "zero": _zero}
    found = rules[deployment.engine.kind](exchange, deployment)
    if exchange.local_steps:
        sharded = deployment.engine.kind == "fsdp2"
        trained = sum(_piece(p, deployment.shards) if sharded else p.numel for p in exchange.trained)
        over = "replicas" if sharded else "world"
        found.append(Transfer("boundary", "all_reduce", over, 4 * trained / exchange.interval, 1 / exchange.interval))
    if exchange.interval:
        found += (
            _checksums(exchange, deployment) + _split_rows(exchange, deployment) + _merged_rows(exchange, deployment)
        )
    return [t for t in found if t.payload]


def powersgd(exchange: Exchange, deployment: Deployment, rank: int) -> list[Transfer]:
    """Torch's PowerSGD hook under DDP, after its first dense iterations: P and Q of every matrix that they
    make smaller (``min_compression_rate`` 1), the rest as it is. Two collectives, one after the other."""
    left, right, rest = 0, 0, 0
    for p in exchange.trained:
        rows, columns = p.shape[0], p.numel // p.shape[0]
        if len(p.shape) > 1 and (rows + columns) * rank < rows * columns:
            left += rows * rank
            right += columns * rank
        else:
            rest += p.numel
    sizes = (rest, left, right)
    return [Transfer("gradient", "all_reduce", "world", 4 * n) for n in sizes if n and deployment.engine.gpus > 1]


def _ddp(exchange: Exchange, deployment: Deployment) -> list[Transfer]:
    if exchange.local_steps:
        return []
    trained = sum(p.numel for p in exchange.trained)
    buckets = max(1, 4 * trained / (25 << 20))  # DDP's default bucket
    return [Transfer("gradient", "all_reduce", "world", deployment.reduce_itemsize * trained, buckets)]


def _fsdp2(exchange: Exchange, deployment: Deployment) -> list[Transfer]:
    shards, e = deployment.shards, deployment.engine.itemsize
    gathered = reduced = 0
    units = {p.unit for p in exchange.parameters}
    for p in exchange.parameters:
        piece = _piece(p, shards)
        # Blocks are dropped after forward and gathered again in backward; the root unit stays.
        gathered += piece * (1 if p.unit is None else 2) * deployment.engine.accumulation
        if p.group is not None:
            reduced += piece * shards
    result = []
    if shards > 1:
        calls = 2 * len(units) - 1
        result.append(Transfer("weights", "all_gather", "shards", e * gathered, calls * deployment.engine.accumulation))
        result.append(Transfer("gradient", "reduce_scatter", "shards", 4 * reduced, len(units)))
    if deployment.replicas > 1 and not exchange.local_steps:
        result.append(Transfer("gradient", "all_reduce", "replicas", 4 * reduced / shards, len(units)))
    return result


def _zero(exchange: Exchange, deployment: Deployment) -> list[Transfer]:
    engine, n = deployment.engine, deployment.engine.gpus
    trained = sum(p.numel for p in exchange.trained)
    if engine.stage == 0:
        return [
            Transfer("gradient", "all_reduce", "world", deployment.reduce_itemsize * trained, _buckets(trained, 5e8))
        ]
    times = engine.accumulation if engine.stage > 1 else 1
    if engine.stage < 3:
        flat = [_flat(exchange.trained, group, n) for group in range(3)]
        calls = _buckets(trained, engine.reduce_bucket) * times
        return [
            Transfer("gradient", "all_reduce", "world", deployment.reduce_itemsize * trained * times, calls),
            Transfer("weights", "all_gather", "world", engine.itemsize * sum(flat) / n, sum(1 for f in flat if f)),
        ]
    padded = sum(-(-p.numel // n) * n for p in exchange.trained)
    result = [
        Transfer(
            "gradient",
            "reduce_scatter",
            "world",
            deployment.reduce_itemsize * padded * times,
            _buckets(trained, engine.reduce_bucket) * times,
        )
    ]
    small = [p for p in exchange.parameters if p.numel <= engine.persistence]
    large = [p for p in exchange.parameters if p.numel > engine.persistence]
    once = engine.itemsize * sum(-(-p.numel // n) for p in small)
    often = engine.itemsize * sum(-(-p.numel // n) for p in large)
    # Kept from forward to backward where it all fits; gathered anew in backward otherwise.
    twice = sum(p.numel for p in exchange.parameters) > min(engine.max_live, engine.max_reuse)
    # Checkpointing: the recomputing forward pass gathers too. What is kept all the same, trained parameters where all
    # fits, and the last matrix, with which recomputing ends and backward begins.
    again = []
    if deployment.checkpointing:
        again = [p for p in large if p.unit is not None and not p.last and (twice or p.group is None)]
    if exchange.interval:  # small parameters stay gathered: they are dropped and gathered anew around a merge
        every = _merge_every(exchange, deployment)
        result.append(Transfer("boundary", "all_gather", "world", once / every, 1 / every))
    if deployment.hpz > 1:
        gathers = {id(p): times * (2 if twice else 1) for p in large}
        gathers.update((id(p), gathers[id(p)] + times) for p in again)
        return [*result, *_with_secondary_copies(exchange, deployment, large, once, gathers)]
    result.append(Transfer("weights", "all_gather", "world", once + often * times, len(large) * times + 1))
    if twice:
        result.append(Transfer("weights", "all_gather", "world", often * times, len(large) * times))
    if again:
        more = engine.itemsize * sum(-(-p.numel // n) for p in again)
        result.append(Transfer("weights", "all_gather", "world", more * times, len(again) * times))
    return result


def _with_secondary_copies(
    exchange: Exchange, deployment: Deployment, large: Sequence[Parameter], once: float, gathers: Mapping[int, int]
) -> list[Transfer]:
    """ZeRO++ hpZ: a parameter is gathered over all ranks once after it has changed, and inside its ``hpz`` ranks
    from then on. What trains changes at every step, W at every boundary. ``gathers``: of each by id, in a step."""
    e, n = deployment.engine.itemsize, deployment.engine.gpus
    world, inner = once, 0.0
    for p in large:
        fresh = 1.0 if p.group is not None else 1 / _merge_every(exchange, deployment) if exchange.interval else 0.0
        world += e * -(-p.numel // n) * fresh
        inner += e * -(-p.numel // deployment.hpz) * (gathers[id(p)] - fresh)
    return [
        Transfer("weights", "all_gather", "world", world, len(large)),
        Transfer("weights", "all_gather", "shards", inner, sum(gathers.values())),
    ]


def _merge_every(exchange: Exchange, deployment: Deployment) -> int:
    """Steps from one merge to the next, under ZeRO, where a merge may be heard by other ranks."""
    assert exchange.config is not None
    engine = deployment.engine
    sends = ""
    if engine.stage == 3:
        uneven = any(p.group == 0 and p.rows % engine.gpus for p in exchange.parameters)
        sends = "W" if deployment.hpz > 1 or engine.offload_param else "B" if uneven else ""
    elif exchange.masters and engine.itemsize < 4:
        sends = "rows of W"
    decays = exchange.config.weight_decay > 0
    form, _ = choose_form(exchange.config, exchange.shapes, engine.itemsize < 4, decays, sends)
    return 1 if form == "folded" else exchange.interval


def _split_rows(exchange: Exchange, deployment: Deployment) -> list[Transfer]:
    """Moments of the rows of B that ZeRO cuts between ranks; at stage 3 also the B whose rows are not those of W."""
    if deployment.engine.kind != "zero" or deployment.engine.stage == 0:
        return []
    n, stage = deployment.engine.gpus, deployment.engine.stage
    ours = [p for p in exchange.parameters if p.group == 0]
    piece = _flat(exchange.trained, 0, n) // n
    rows, widest, gathered, begin = 0, 0, 0, 0
    for p in ours:
        if stage == 3:
            piece = -(-p.numel // n)
            cuts = {i * piece for i in range(1, n) if i * piece < p.numel}
            gathered += piece if p.rows % n else 0
        else:
            cuts = {i * piece - begin for i in range(1, n) if 0 < i * piece - begin < p.numel}
            begin += p.numel
        split = {cut // p.shape[-1] for cut in cuts if cut % p.shape[-1]}
        rows += len(split)
        widest = max(widest, p.shape[-1] if split else 0)
    table = 2 * 4 * rows * widest if exchange.whole_rows else 0
    per, merges = exchange.interval, _merge_every(exchange, deployment)
    return [
        Transfer("boundary", "all_reduce", "world", table / per, 1 / per),
        Transfer("boundary", "all_gather", "world", deployment.engine.itemsize * gathered / merges, len(ours) / merges),
    ]


def _merged_rows(exchange: Exchange, deployment: Deployment) -> list[Transfer]:
    """Rows of W that each rank has merged into its fp32 copies, where every rank holds W whole and in 16 bit
    (under DDP the main job keeps it in fp32)."""
    engine = deployment.engine
    if engine.itemsize == 4 or engine.kind != "zero" or engine.stage == 3:
        return []
    rows = sum(-(-rows // engine.gpus) * columns for rows, columns in exchange.masters)
    per = exchange.interval
    return [Transfer("boundary", "all_gather", "world", engine.itemsize * rows / per, len(exchange.masters) / per)]


def _checksums(exchange: Exchange, deployment: Deployment) -> list[Transfer]:
    """Minimum and maximum of one int64 for each P, and each tensor that several ranks hold."""
    zero = deployment.engine.kind == "zero"
    copies = 0
    if deployment.replicas > 1 or deployment.engine.kind == "ddp" or (zero and deployment.engine.stage < 3):
        copies = exchange.weights
        if not exchange.local_steps:
            copies += sum(1 for p in exchange.trained if p.group != 0)
            copies += exchange.moments * len(exchange.trained) if not zero or deployment.engine.stage == 0 else 0
    sent = 2 * 8 * (exchange.projections + copies)
    result = [Transfer("boundary", "all_reduce", "world", sent / exchange.interval, 2 / exchange.interval)]
    if deployment.replicas > 1 and deployment.shards > 1:
        result.append(
            Transfer("boundary", "all_reduce", "shards", 8 * copies / exchange.interval, 1 / exchange.interval)
        )
    return result


def _last_matrix(block: nn.Module) -> list[nn.Parameter]:
    """Parameters of the last layer of a block that has a matrix."""
    layers = [list(m.parameters(recurse=False)) for m in block.modules()]
    return next((found for found in reversed(layers) if any(p.dim() > 1 for p in found)), [])


def _piece(p: Parameter, shards: int) -> int:
    """Elements of the largest piece of a parameter that FSDP2 has cut by rows."""
    return -(-p.shape[0] // shards) * (p.numel // p.shape[0])


def _buckets(elements: int, size: float) -> float:
    return max(1.0, elements / size)


def _flat(params: Sequence[Parameter], group: int, ranks: int) -> int:
    """Elements of a ZeRO 1-2 group laid end to end and padded to twice the ranks."""
    total = sum(p.numel for p in params if p.group == group)
    return -(-total // (2 * ranks)) * 2 * ranks


__all__ = ["Deployment", "Exchange", "Parameter", "Transfer", "powersgd", "transfers"]
