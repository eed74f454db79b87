"""What a rank holds besides activations, in closed form.

The rules are those of DeepSpeed 0.19 (tests compare them with a live engine at every stage) and of FSDP2
with fp32 parameters and a low-precision compute dtype. T is what trains, F what is frozen, G the number of
ranks, e the bytes of an element in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rso_ds.errors import RSOConfigError


@dataclass(frozen=True)
class Sizes:
    """Elements of a model under one training method.

    ``frozen``: W and whatever else does not train. ``subspace``: B of RSO, adapters of LoRA. ``dense``: all
    other trained parameters. ``projection_bytes``: P of every layer. ``solver``: elements of Adam's moments
    of one kind (equal to what trains, except for GaLore). ``largest_block``: parameters of one transformer
    block, of which ``block_trained`` train; ``root``, ``root_trained``: of all that is in no block. ``head``: of the
    output layer; ``block_module``, ``layer``: the most of one module in a block, of one RSO layer; ``saved``: the
    dense model that is written; ``numels``: of each tensor, ``largest_frozen`` the most of one that does not train.
    """

    frozen: int
    subspace: int
    dense: int
    projection_bytes: int = 0
    solver: int | None = None
    largest_block: int = 0
    block_trained: int = 0
    numels: tuple[int, ...] = ()
    root: int = 0
    root_trained: int = 0
    head: int = 0
    block_module: int = 0
    layer: int = 0
    largest_frozen: int = 0
    w: int = 0  # elements of RSO's W, of which ``master_weights`` keeps fp32 copies

    @property
    def largest(self) -> int:
        return max(self.numels, default=0)

    @property
    def saved(self) -> int:
        return self.frozen + self.dense

    @property
    def trained(self) -> int:
        return self.subspace + self.dense


@dataclass(frozen=True)
class Engine:
    """How the state is spread: ``kind`` "zero" or "fsdp2", and the keys of the DeepSpeed JSON that matter."""

    kind: str
    stage: int
    gpus: int
    precision: str  # "fp32", "bf16", "fp16", or "autocast" (fp32 parameters, low-precision matmuls)
    accumulation: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    persistence: int = 100_000
    overlap_comm: bool = False
    contiguous: bool = True
    hpz: int = 1  # ranks that share ZeRO++'s secondary copy of the parameters at stage 3; 1: there is none

    @property
    def itemsize(self) -> int:
        return 2 if self.precision in ("bf16", "fp16") else 4

    @classmethod
    def from_json(cls, config: Mapping[str, Any], gpus: int, kind: str = "zero") -> Engine:
        """From a DeepSpeed JSON; "auto" counts as DeepSpeed's default. Raises ``RSOConfigError``."""
        if gpus < 1:
            raise RSOConfigError(f"--gpus must be at least 1, got {gpus}.")
        zero = config.get("zero_optimization") or {}
        stage = _integer(zero, "stage", 0)
        if stage not in (0, 1, 2, 3):
            raise RSOConfigError(f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}.")
        overlap = zero.get("overlap_comm")
        return cls(
            kind=kind,
            stage=stage,
            gpus=gpus,
            precision=precision_of(config),
            accumulation=_integer(config, "gradient_accumulation_steps", 1),
            offload_optimizer=_offloaded(zero, "offload_optimizer"),
            offload_param=_offloaded(zero, "offload_param"),
            reduce_bucket=_integer(zero, "reduce_bucket_size", 500_000_000),
            prefetch_bucket=_integer(zero, "stage3_prefetch_bucket_size", 50_000_000),
            max_live=_integer(zero, "stage3_max_live_parameters", 1_000_000_000),
            max_reuse=_integer(zero, "stage3_max_reuse_distance", 1_000_000_000),
            persistence=_integer(zero, "stage3_param_persistence_threshold", 100_000),
            sub_group=_integer(zero, "sub_group_size", 1_000_000_000),
            overlap_comm=stage == 3 if overlap in (None, "auto") else bool(overlap),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            hpz=max(1, _integer(zero, "zero_hpz_partition_size", 1)) if stage == 3 else 1,
        )


def precision_of(config: Mapping[str, Any]) -> str:
    """The precision that a DeepSpeed JSON selects; "auto" means on, as on a GPU."""
    for key in ("bf16", "fp16"):
        if (config.get(key) or {}).get("enabled") in (True, "auto"):
            return key
    return "autocast" if (config.get("torch_autocast") or {}).get("enabled") else "fp32"


def state_bytes(
    sizes: Sizes, engine: Engine, moments: int = 2, weight_masters: str = "none"
) -> dict[str, dict[str, int]]:
    """{"device": {kind: bytes}, "host": {...}} of one rank.

    ``moments``: tensors that the solver keeps for each trained element (Adam 2, SGD with momentum 1).
    ``weight_masters``: RSO's ``master_weights``.
    """
    kinds = ("weights", "B or adapters", "P", "gradients", "solver state", "fp32 masters", "communication")
    places = {place: dict.fromkeys(kinds, 0) for place in ("device", "host")}
    device = places["device"]
    rule = _fsdp2 if engine.kind == "fsdp2" else _zero
    rule(sizes, engine, moments, places)
    device["P"] = sizes.projection_bytes
    if weight_masters != "none" and engine.itemsize < 4:
        places["host" if weight_masters == "cpu" else "device"]["fp32 masters"] += 4 * sizes.w // engine.gpus
    return places


def _zero(sizes: Sizes, engine: Engine, moments: int, places: dict[str, dict[str, int]]) -> None:
    device, host = places["device"], places["host"]
    e, g, stage, trained = engine.itemsize, engine.gpus, engine.stage, sizes.trained
    parameters = places["host" if engine.offload_param and stage == 3 else "device"]
    states = places["host" if engine.offload_optimizer and stage else "device"]
    cut = g if stage == 3 else 1
    parameters["weights"] = e * (sizes.frozen + sizes.dense) // cut
    parameters["B or adapters"] = e * sizes.subspace // cut
    if engine.hpz > 1:
        parameters["weights"] += e * (sizes.frozen + sizes.dense) // engine.hpz
        parameters["B or adapters"] += e * sizes.subspace // engine.hpz
    share = g if stage else 1
    states["solver state"] = 4 * moments * (trained if sizes.solver is None else sizes.solver) // share
    if stage or e < 4:
        states["fp32 masters"] = 4 * trained // share
    # fp32 gradients for the update, one sub-group at a time at stage 3; on the host with offload.
    for_update = 4 * (min(trained // g, engine.sub_group) if stage == 3 else trained // share)
    if states is host:
        host["gradients"] = 4 * trained // share
    if stage == 0:
        device["gradients"] = e * trained
        device["communication"] = min(e * trained, 4 * 500_000_000)
    elif stage in (1, 2):
        whole = stage == 1 and engine.accumulation > 1
        device["gradients"] = 0 if states is host else e * trained // (1 if whole else g)
        buffers = (2 if engine.overlap_comm else 1) * engine.contiguous
        device["communication"] = buffers * e * engine.reduce_bucket
    else:
        device["gradients"] = 0 if states is host else e * trained // g
        # Small parameters stay gathered between steps.
        device["weights"] += e * sum(n for n in sizes.numels if n <= engine.persistence)
        device["communication"] = e * (engine.reduce_bucket + gathered_elements(sizes, engine))
    if states is device and e < 4:
        # Alive when the activations are gone: it takes more room only where it exceeds the buckets.
        device["communication"] = max(device["communication"], for_update)


def gathered_elements(sizes: Sizes, engine: Engine) -> int:
    """Parameters that ZeRO-3 holds gathered at once, at most: those it will use again within half the reuse
    distance (forward, then backward) and what it prefetches, up to max_live; always the layer at work."""
    everything = sizes.frozen + sizes.trained
    wanted = min(everything, engine.max_live, engine.max_reuse // 2 + engine.prefetch_bucket)
    return max(wanted, max(sizes.numels, default=0))


def _fsdp2(sizes: Sizes, engine: Engine, moments: int, places: dict[str, dict[str, int]]) -> None:
    device = places["device"]
    states = places["host" if engine.offload_optimizer or engine.offload_param else "device"]
    g, trained = engine.gpus, sizes.trained
    # One fp32 shard serves as parameter and master; what is frozen rests in the compute dtype.
    states["weights"] = (engine.itemsize * sizes.frozen + 4 * sizes.dense) // g
    states["B or adapters"] = 4 * sizes.subspace // g
    states["solver state"] = 4 * moments * (trained if sizes.solver is None else sizes.solver) // g
    # Those of several micro batches add up whole before they are reduced.
    device["gradients"] = 4 * trained // g + (4 * trained if engine.accumulation > 1 else 0)
    # The root is whole all the time, two blocks are gathered at once, the gradients of one wait to be reduced in fp32.
    gathered = engine.itemsize * (sizes.root + 2 * sizes.largest_block)
    device["communication"] = gathered + (engine.itemsize + 4) * sizes.block_trained


def _integer(block: Mapping[str, Any], key: str, default: int) -> int:
    value = block.get(key, default)
    if value in (None, "auto"):
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise RSOConfigError(f"'{key}' must be a number of at least 0, got {value!r}.")
    return int(value)


def _offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return ((zero.get(key) or {}).get("device") or "none") != "none"
