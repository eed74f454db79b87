"""The most that a rank holds in each phase of a run, modelled moment by moment.

T, F, e and G are as in ``rso_ds.planning.memory.states``. Nothing here is traced: what passes of the model, merges and
saves need beside the state comes from ``trace`` and ``layer_work``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rso_ds.planning.memory.layer_work import LayerWork
from rso_ds.planning.memory.states import Engine, Sizes
from rso_ds.planning.memory.trace import Trace

_HELD = ("weights", "B or adapters", "P", "solver state", "fp32 masters")


@dataclass(frozen=True)
class Phase:
    """``moments``: (bytes on the device, bytes of the rank in host memory) at some moments, the fullest among them."""

    moments: tuple[tuple[int, int], ...]

    @property
    def device(self) -> int:
        return max(device for device, _ in self.moments)

    @property
    def host(self) -> int:
        return max(host for _, host in self.moments)

    @property
    def together(self) -> int:
        """Where the device is the CPU, and both are one memory."""
        return max(device + host for device, host in self.moments)


@dataclass(frozen=True)
class Work:
    """What is traced: a training pass, the ``evaluation`` ("blocks", "head"), and what merging and saving take."""

    training: Trace
    evaluation: Mapping[str, int]
    layers: LayerWork


def phases(
    sizes: Sizes, engine: Engine, states: Mapping[str, Mapping[str, int]], work: Work, boundary: bool
) -> dict[str, Phase]:
    """Phase -> its moments; ``states`` as ``state_bytes`` gives them. ``boundary``: whether the method has one."""
    rule = _FSDP2 if engine.kind == "fsdp2" else _Zero3 if engine.stage == 3 else _Zero
    run = rule(sizes, engine, states["device"], states["host"], work)
    found = {"start": run.start(), "evaluation": run.evaluation(), "training": run.training()}
    if boundary:
        found["boundary"] = run.boundary()
    found["save"] = run.save()
    return {name: Phase(tuple((round(d), round(h)) for d, h in moments)) for name, moments in found.items()}


Moments = Iterable[tuple[float, float]]


class _Zero:
    """ZeRO 0 to 2: weights whole, gradients reduced in buckets while backward goes on."""

    permanent: float = 0  # buffers that stay between passes

    def __init__(
        self, sizes: Sizes, engine: Engine, device: Mapping[str, int], host: Mapping[str, int], work: Work
    ) -> None:
        self.sizes, self.engine, self.work, self.states = sizes, engine, work, device
        self.e, self.g, self.trained = engine.itemsize, engine.gpus, sizes.trained
        self.all = sizes.frozen + sizes.trained
        overlapped = (2 if engine.overlap_comm else 1) * engine.contiguous
        whole = device["communication"] if engine.stage == 0 else overlapped * engine.itemsize * engine.reduce_bucket
        self.buckets: float = whole
        self.held = sum(device[k] for k in _HELD)
        self.on_host = sum(host.values())
        self.for_update = 4 * self.trained / (engine.gpus if engine.stage else 1)
        if engine.offload_optimizer:
            self.for_update = 0
        self.dense_copy = self.e * sizes.saved
        self.rest = self.held + self.permanent
        # Of the micro batches before, while a pass goes on; with one alone gradients come as activations go.
        self.before = self.rest + (device["gradients"] if engine.accumulation > 1 and not self.permanent else 0)

    def start(self) -> Moments:
        e, everything = self.e, self.all
        yield 0, 4 * everything  # built on the CPU in fp32
        if e < 4:
            yield 0, 4 * everything + e * self.sizes.largest
        copies = 2 * self.for_update if self.engine.stage or e < 4 else 0  # masters, and gradients that are zero
        yield e * everything + (e * self.trained if self.engine.stage else 0), 0  # flat, beside what is flattened
        yield e * everything + copies, 2 * self.on_host / 3

    def evaluation(self) -> Moments:
        yield self.rest + max(self.work.evaluation.values()), self.on_host

    def training(self) -> Moments:
        trace, gradients = self.work.training, self.states["gradients"]
        yield self.before + max(trace.peak("blocks"), trace.peak("head")), self.on_host
        yield self.before + self.buckets + trace.peak("backward"), self.on_host
        yield self.rest + gradients + self.buckets, self.on_host
        yield self.rest + 2 * gradients + (self.for_update if self.e < 4 else 0), self.on_host

    def boundary(self) -> Moments:
        left = self.states["gradients"] if self.engine.stage == 0 else 0
        yield self.rest + left + self.work.layers.merge, self.on_host

    def save(self) -> Moments:
        last = self.e * self.sizes.head
        yield self.rest, self.on_host + self.dense_copy  # rank 0 puts a dense model together in host memory
        yield self.rest + self.work.layers.dense, self.on_host + self.dense_copy - last
        yield self.rest, self.on_host + self.sizes.largest * 4 / self.g  # a checkpoint: one tensor after the other


class _Zero3(_Zero):
    """ZeRO-3: weights cut, gathered module by module, those to come with them (the prefetch bucket)."""

    def __init__(
        self, sizes: Sizes, engine: Engine, device: Mapping[str, int], host: Mapping[str, int], work: Work
    ) -> None:
        self.permanent = device["gradients"] + engine.itemsize * engine.reduce_bucket
        super().__init__(sizes, engine, device, host, work)
        cut = sum(n for n in sizes.numels if n > engine.persistence)
        self.persistent = self.e * sum(n for n in sizes.numels if n <= engine.persistence)
        ahead = engine.prefetch_bucket
        self.in_flight = self.e * min(cut, ahead + sizes.largest)  # in one all-gather
        self.of_blocks = self.e * (min(cut, ahead + sizes.block_module) + min(sizes.largest, max(ahead, 1)))
        self.of_head = self.e * sizes.head

    def start(self) -> Moments:
        e, weights = self.e, self.e * self.all / self.g
        if self.engine.offload_param:
            weights = 0
        yield weights + 4 * self.sizes.largest, 0  # built and cut parameter by parameter
        copies = self.for_update + self.states["gradients"] + e * self.engine.reduce_bucket
        yield weights + copies + e * self.sizes.largest, 2 * self.on_host / 3

    def evaluation(self) -> Moments:
        found = self.work.evaluation
        yield self.rest + 2 * self.in_flight, self.on_host  # gathered pieces, and the parameters made of them
        yield self.rest + self.of_blocks + found["blocks"], self.on_host
        yield self.rest + self.of_head + found["head"], self.on_host

    def training(self) -> Moments:
        trace = self.work.training
        yield self.rest + 2 * self.in_flight, self.on_host
        yield self.rest + self.of_blocks + trace.peak("blocks"), self.on_host
        yield self.rest + self.of_head + trace.peak("head"), self.on_host
        yield self.rest + max(self.of_blocks, self.of_head) + trace.peak("backward"), self.on_host
        yield self.rest + min(self.for_update, 4 * self.engine.sub_group), self.on_host

    def boundary(self) -> Moments:
        yield self.rest - self.persistent + self.work.layers.merge, self.on_host
        yield self.rest + self.work.layers.draw, self.on_host

    def save(self) -> Moments:
        held = self.rest - self.persistent  # every rank holds its own part alone
        yield held + self.of_head, self.on_host + self.dense_copy
        gathered = self.e * self.sizes.layer
        yield held + gathered + self.work.layers.dense, self.on_host + self.dense_copy - self.of_head
        # A checkpoint: torch's writer keeps the copies of masters and moments, parts of flat tensors, to the end.
        yield held + self.persistent, self.on_host + 3 * 4 * self.trained / self.g


class _FSDP2(_Zero):
    """FSDP2 as the training program wraps it: each block a unit, the rest the root, whole from the first forward pass
    to the last backward. A unit's parameters are gathered into one buffer and copied out of it; the buffer of the unit
    before is freed only then."""

    def __init__(
        self, sizes: Sizes, engine: Engine, device: Mapping[str, int], host: Mapping[str, int], work: Work
    ) -> None:
        super().__init__(sizes, engine, device, host, work)
        self.root, self.block = self.e * sizes.root, self.e * sizes.largest_block
        self.shards = device["weights"] + device["B or adapters"]
        if engine.accumulation > 1:
            self.before = self.rest + 4 * self.trained  # not reduced before the last micro batch
        # The dense model is made of fp32 shards of what trains, and of W.
        self.dense_copy = self.e * (sizes.saved - sizes.dense) + 4 * sizes.dense

    def start(self) -> Moments:
        e, sizes = self.e, self.sizes
        yield 0, 4 * self.all  # built on the CPU in fp32
        if e < 4:
            yield 0, 4 * self.all + e * sizes.largest_frozen
        whole = e * sizes.frozen + 4 * self.trained
        block = e * (sizes.largest_block - sizes.block_trained) + 4 * sizes.block_trained
        yield block / self.g, whole  # cut on the device, unit by unit, the root last
        root = e * (sizes.root - sizes.root_trained) + 4 * sizes.root_trained
        yield self.shards + root, 0

    def evaluation(self) -> Moments:
        found = self.work.evaluation
        yield self.rest + 2 * self.root + 2 * self.block, self.on_host
        yield self.rest + self.root + 2 * self.block + found["blocks"], self.on_host
        yield self.rest + self.root + self.block + found["head"], self.on_host

    def training(self) -> Moments:
        trace, sizes = self.work.training, self.sizes
        shards = 4 * self.trained / self.g
        yield self.before + 2 * self.root + 2 * self.block, self.on_host
        yield self.before + self.root + 2 * self.block + trace.peak("blocks"), self.on_host
        yield self.before + self.root + self.block + trace.peak("head"), self.on_host
        of_block = (self.e + 4 + 4 / self.g) * sizes.block_trained  # its gradients, copied to be reduced in fp32
        yield self.before + self.root + 2 * self.block + of_block + trace.peak("backward"), self.on_host
        of_root = (self.e + 4) * sizes.root_trained
        yield self.rest + self.root + of_root + shards, self.on_host
        yield self.rest + 2 * shards, self.on_host  # torch's Adam takes its square roots of all parameters at once

    def boundary(self) -> Moments:
        yield self.rest + 4 * self.trained / self.g + self.work.layers.merge, self.on_host

    def save(self) -> Moments:
        head = 4 * self.sizes.head
        yield self.rest + head, self.on_host + self.dense_copy
        gathered = self.e * self.sizes.layer
        yield self.rest + gathered + self.work.layers.dense, self.on_host + self.dense_copy - head
        yield self.rest, self.on_host + self.sizes.largest * 4 / self.g
