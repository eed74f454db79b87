"""The account of one rank: everything a training run needs in memory, before it runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOConfigError, RSOError
from rso_ds.planning.memory.kept import by_kind
from rso_ds.planning.memory.largest import largest
from rso_ds.planning.memory.layer_work import LayerWork, layer_work
from rso_ds.planning.memory.methods import Method, method
from rso_ds.planning.memory.moments import Phase, Work, phases
from rso_ds.planning.memory.states import Engine, Sizes, state_bytes
from rso_ds.planning.memory.trace import Trace, block_names, trace_evaluation, trace_training
from rso_ds.units import GIB

# Memory that a program can really use on cards of 24, 40, 80 and 141 GB, in bytes.
CARDS = {"24 GB": int(23.5 * GIB), "40 GB": int(39.4 * GIB), "80 GB": int(78.5 * GIB), "141 GB": int(139.0 * GIB)}
# CUDA context, NCCL, cuBLAS workspaces; and what the allocator cannot use for fragmentation.
RESERVE, FRAGMENTATION = GIB, 0.05
TRACED_BLOCKS, EVALUATED_BLOCKS = 4, 2  # (an evaluation keeps nothing of a block)


@dataclass
class Account:
    """Bytes of one rank under one method. ``phases``: what it holds in each phase of a run, the largest of which it
    needs; ``device``, ``host`` and ``activations`` are the parts, which are not all there at once. ``missing`` says
    what could not be counted, and why."""

    method: str
    device: dict[str, int]
    host: dict[str, int]
    activations: dict[str, int]
    trace: Trace | None
    note: str = ""
    phases: dict[str, Phase] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes on the device in the largest phase, without reserve and fragmentation; of what could be counted."""
        if self.phases:
            return max(phase.device for phase in self.phases.values())
        return sum(self.device.values()) + sum(self.activations.values())

    @property
    def largest_phase(self) -> str | None:
        return max(self.phases, key=lambda name: self.phases[name].device) if self.phases else None

    @property
    def host_total(self) -> int:
        """Bytes of the rank in host memory, in the phase that takes most of it."""
        return max((phase.host for phase in self.phases.values()), default=sum(self.host.values()))

    @property
    def needed(self) -> int:
        """``total`` with fragmentation and reserve: what the card must have."""
        return int(self.total * (1 + FRAGMENTATION)) + RESERVE

    def fits(self) -> dict[str, bool]:
        return {card: self.needed <= size for card, size in CARDS.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "device_bytes": self.device,
            "host_bytes": self.host,
            "activation_bytes": self.activations,
            "phase_bytes": {name: {"device": p.device, "host": p.host} for name, p in self.phases.items()},
            "largest_phase": self.largest_phase,
            "total_bytes": self.total,
            "needed_bytes": self.needed,
            "fits": self.fits(),
            "note": self.note,
            "missing": self.missing,
        }


class Accountant:
    """Counts a model under several methods, batch sizes and sequence lengths.

    ``build(dtype, blocks)`` returns the dense model, cut to ``blocks`` transformer blocks unless None; it is
    called under fake tensors only. ``TRACED_BLOCKS`` blocks are traced and counted as often as there are.
    """

    def __init__(
        self,
        build: Callable[[torch.dtype, int | None], nn.Module],
        config: RSOConfig,
        engine: Engine,
        checkpointing: bool = False,
    ) -> None:
        self.build, self.config, self.engine, self.checkpointing = build, config, engine, checkpointing
        self.traced = cache(self._traced)
        self.evaluated = cache(self._evaluated)
        self.sizes = cache(self._sizes)
        self.layers = cache(self._layer_work)

    def recomputing(self) -> Accountant:
        """The same with gradient checkpointing. What does not depend on it is not traced again."""
        other = copy.copy(self)
        other.checkpointing = True
        other.traced = cache(other._traced)
        return other

    def under(self, engine: Engine) -> Accountant:
        """The same model sharded otherwise, in the same precision; it is neither counted nor traced again."""
        if (engine.kind, engine.precision) != (self.engine.kind, self.engine.precision):
            raise ValueError("another kind of engine or precision needs an Accountant of its own")
        other = copy.copy(self)  # the caches stay those of the first
        other.engine = engine
        return other

    def account(self, name: str, micro_batch: int, seq_len: int) -> Account:
        """The account of method ``name`` (a key of ``METHODS``).

        A model of unknown make that cannot be counted whole yields the rest and an entry in ``missing``;
        a configuration that does not suit the model raises ``RSOError``.
        """
        chosen = method(name, self.config)
        result = Account(chosen.name, {}, {}, {}, None, chosen.note)
        if self.limit is not None and seq_len > self.limit:
            raise RSOConfigError(f"--seq-len {seq_len} exceeds the model's {self.limit} positions.")
        try:
            result.device, result.host = self.states(name)
        except RSOError:
            raise
        except Exception as error:  # a model of unknown make may fail in any way
            result.missing.append(f"parameters: {type(error).__name__}: {error}")
            return result
        try:
            result.trace = self.traced(name, micro_batch, seq_len)
            evaluation = self.evaluated(name, micro_batch, seq_len)
        except Exception as error:
            result.missing.append(f"activations: the model cannot be traced ({type(error).__name__}: {error})")
            return result
        result.activations = _activation_lines(result.trace)
        work = Work(result.trace, evaluation, self.layers(name, *self._merging()))
        states = {"device": result.device, "host": result.host}
        result.phases = phases(self.sizes(name)[0], self.engine, states, work, boundary=name == "rso")
        return result

    def largest(self, name: str, cards: Sequence[int], micro_batch: int, seq_len: int) -> list[tuple[int, int]]:
        """For each of ``cards``, bytes in ascending order: (largest micro batch at ``seq_len``, longest
        sequence at ``micro_batch``) that fit; 0 where none does. Sequences are counted in steps of 64, up to the
        positions that the model has."""
        batches = largest(lambda n: self.account(name, n, seq_len).needed, cards, micro_batch)
        lengths = largest(lambda n: self.account(name, micro_batch, n).needed, cards, seq_len, 64, self.limit)
        return list(zip(batches, lengths, strict=True))

    @cached_property
    def limit(self) -> int | None:
        """The longest sequence that the model can take; None where nothing bounds it but memory."""
        with FakeTensorMode():
            from rso_ds.models import learned_positions

            return learned_positions(self.build(torch.bfloat16, 1))

    def _model(self, chosen: Method, blocks: int | None = None) -> nn.Module:
        model = self.build(torch.bfloat16 if self.engine.itemsize == 2 else torch.float32, blocks)
        chosen.prepare(model)
        return model

    def _sizes(self, name: str) -> tuple[Sizes, int]:
        """(elements, number of transformer blocks) under method ``name``."""
        chosen = method(name, self.config)
        with FakeTensorMode():
            model = self._model(chosen)
            return chosen.count(model), len(block_names(model))

    def states(self, name: str) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes (on the device, on the host) of all but activations."""
        sizes, _ = self.sizes(name)
        moments = 1 if name == "rso" and self.config.solver == "sgd" else 2
        masters = self.config.master_weights if name == "rso" else "none"
        places = state_bytes(sizes, self.engine, moments, masters)
        return places["device"], places["host"]

    def _traced(self, name: str, micro_batch: int, seq_len: int) -> Trace:
        blocks = self.sizes(name)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trace_training(self._cut(name), micro_batch, seq_len, self._autocast, self.checkpointing, blocks)

    def _evaluated(self, name: str, micro_batch: int, seq_len: int) -> dict[str, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trace_evaluation(self._cut(name, EVALUATED_BLOCKS), micro_batch, seq_len, self._autocast)

    def _cut(self, name: str, most: int = TRACED_BLOCKS) -> Callable[[], nn.Module]:
        """Builds the model of method ``name`` with ``most`` blocks, if it has more."""
        chosen, blocks = method(name, self.config), self.sizes(name)[1]
        return lambda: self._model(chosen, most if blocks > most else None)

    @property
    def _autocast(self) -> torch.dtype | None:
        low = self.engine.kind == "fsdp2" and self.engine.precision != "fp32"
        return torch.bfloat16 if self.engine.precision == "autocast" and not low else None

    def _merging(self) -> tuple[int, bool]:
        """(ranks that divide the rows of a W to merge it, whether each holds W whole)."""
        whole = self.engine.kind == "zero" and self.engine.stage < 3
        return self.engine.gpus if not whole or self.config.master_weights != "none" else 1, whole

    def _layer_work(self, name: str, share: int, whole: bool) -> LayerWork:
        if name != "rso":
            return LayerWork()
        with FakeTensorMode():
            model = self._model(method(name, self.config))
            return layer_work(model, self.config, share, whole, self._b_dtype)

    @property
    def _b_dtype(self) -> torch.dtype:
        low = self.engine.kind == "zero" and self.engine.itemsize == 2
        return torch.bfloat16 if low else torch.float32


def model_builder(hf_config: Any, trust_remote_code: bool = False) -> Callable[[torch.dtype, int | None], nn.Module]:
    """``build(dtype, blocks)`` of an ``Accountant`` for a Hugging Face configuration."""

    def build(dtype: torch.dtype, blocks: int | None) -> nn.Module:
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(hf_config)
        if blocks is not None:
            config.num_hidden_layers = blocks
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:blocks]
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)

    return build


def check_sizes(micro_batch: int, seq_len: int, gpus: int, limit: int | None) -> None:
    """Raise ``RSOConfigError`` for sizes that no run can have; ``limit``: positions of the model, if fixed."""
    for flag, value, minimum in (("--micro-batch", micro_batch, 1), ("--seq-len", seq_len, 2), ("--gpus", gpus, 1)):
        if value < minimum:
            raise RSOConfigError(f"{flag} must be at least {minimum}, got {value}.")
    if limit is not None and seq_len > limit:
        raise RSOConfigError(f"--seq-len {seq_len} exceeds the model's {limit} positions.")


def _activation_lines(trace: Trace) -> dict[str, int]:
    if trace.checkpointing:
        lines = {"block inputs": trace.blocks * trace.block_input}
    else:
        lines = {}
        for entry_name, size in by_kind(trace.inside).items():
            kind = _kind(entry_name)
            lines[kind] = lines.get(kind, 0) + size * trace.blocks // max(1, trace.traced)
    lines["outside the blocks (loss, embedding, last norm)"] = sum(e.nbytes for e in trace.outside)
    lines["working memory of backward"] = trace.working
    return lines


def _kind(name: str) -> str:
    module, _, op = name.partition(" ")
    leaf = module.rpartition(".")[2].lower()
    if op in ("SubspaceLinear", "SharingLinear"):
        return "x P of RSO layers"
    if "norm" in leaf or leaf.startswith("ln_"):
        return "norms"
    if "attn" in module or "attention" in module:
        return "attention"
    if "mlp" in module or "fc" in leaf or "act" in leaf or "intermediate" in module:
        return "MLP"
    return "other in blocks"


__all__ = ["CARDS", "Account", "Accountant", "check_sizes", "model_builder"]
