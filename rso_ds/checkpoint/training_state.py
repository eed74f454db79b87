"""What makes a training run: which tensors and numbers are saved, and how they come back.

Names of the tensors in a checkpoint, for a parameter ``p`` of the model as it was converted:

    model.p       the most precise copy: an fp32 master where the engine keeps one, the parameter itself otherwise
    moment1.p     the solver's first moment (Adam's exp_avg, SGD's momentum)
    moment2.p     Adam's exp_avg_sq
    outer.p       momentum of merged updates, for W, with ``outer_momentum``
    rng.R.cpu     state of rank R's random generators

After local steps, what differs between replicas has ``replicaK/`` in front, and ``replicaK/steps`` holds the
solver's step counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rso_ds.boundary import Boundary
from rso_ds.checkpoint.boundary_state import check_boundary_state
from rso_ds.checkpoint.dense import dense_description
from rso_ds.checkpoint.pieces import Piece
from rso_ds.checkpoint.storage import StoredTensors
from rso_ds.checkpoint.stored_model import StoredModel
from rso_ds.comm.outcome import rank_of, ranks_of
from rso_ds.errors import RSOCheckpointError
from rso_ds.layers import rso_layers
from rso_ds.layers.kinds import ordinary_name, ordinary_shape, ordinary_weight
from rso_ds.layers.partitioned import flat_memory, full_shape
from rso_ds.layout import Layout

# What schedules change in a solver's groups.
SCHEDULED = ("lr", "betas", "momentum")


class TrainingState:
    """Parameters, solver state, boundary and random state of one engine, on this rank.

    ``module`` is the bare model; ``boundary`` None for a solver without RSO.
    """

    def __init__(self, module: nn.Module, layout: Layout, boundary: Boundary | None) -> None:
        self.module, self.layout, self.boundary = module, layout, boundary
        self._plain: dict[str, Tensor] = {}  # filled by a load: random state, step counts of replicas
        self._weights = {id(layer.weight): name for name, layer in rso_layers(module)}

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While it is entered, every rank holds its own part of the model and nothing gathered: ZeRO-3 keeps small
        parameters whole between steps, FSDP2 the root after an evaluation, in the dtype that it computes in. All
        ranks enter and leave together."""
        self.layout.begin()
        try:
            yield
        finally:
            self.layout.end()

    # -- plain values --------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Ints, floats, strings and lists of them, equal on all ranks. Call it ``at_rest``."""
        solver = self.layout.solver
        steps = {name: self.layout.solver_step(p) for name, p in self._trainable()}
        return {
            "rso": None if self.boundary is None else self.boundary.state_dict(),
            "solver": type(solver).__name__ if self.boundary is None else self.boundary.config.solver,
            "parameters": self._parameters(),
            "dense": dense_description(self.module),
            "steps": {name: step for name, step in steps.items() if step is not None},
            "groups": [{k: _plain(group[k]) for k in SCHEDULED if k in group} for group in solver.param_groups],
            "replicas": self.layout.replicas,
            "keeps": self.layout.holds(),
            "world_size": ranks_of(),
        }

    def _parameters(self) -> dict[str, list[Any]]:
        named = {n: [list(full_shape(p)), _dtype(p), p.requires_grad] for n, p in self.module.named_parameters()}
        return named | {n: [list(b.shape), _dtype(b), False] for n, b in self._buffers()}

    def check(
        self, state: dict[str, Any], mine: dict[str, Any], source: str, solver: bool = True, rates: bool = True
    ) -> None:
        """Raise ``RSOCheckpointError`` if ``state`` is not of this model, solver (which may differ if not ``solver``)
        and configuration, of which ``mine`` is what ``describe`` says; with ``rates``, of as many parameter groups."""
        missing = sorted(set(mine) - set(state))
        if missing:
            raise RSOCheckpointError(f"{source}: damaged state, no '{missing[0]}'.")
        if (state["rso"] is None) != (mine["rso"] is None):
            how = "without" if state["rso"] is None else "with"
            raise RSOCheckpointError(f"{source} was saved {how} RSO: resume with the same optimizer.")
        if self.boundary is not None:
            check_boundary_state(state["rso"], mine["rso"], source, either_form=True)
        theirs, ours = state["parameters"], mine["parameters"]
        if theirs != ours:
            name = next(n for n in [*theirs, *ours] if theirs.get(n) != ours.get(n))
            raise RSOCheckpointError(
                f"{source} is of another model or precision: '{name}' is [shape, dtype, trainable]"
                f" {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here."
            )
        if solver and state["solver"] != mine["solver"]:
            raise RSOCheckpointError(
                f"{source} was trained with solver '{state['solver']}', this run has '{mine['solver']}': use the same."
            )
        counted = {"groups": "parameter groups"} if rates else {}
        for key, what in {**counted, "replicas": "replicas that step apart"}.items():
            here, there = (x if isinstance(x, int) else len(x) for x in (mine[key], state[key]))
            if here != there:
                raise RSOCheckpointError(f"{source} has {there} {what}, this run {here}: use the same.")
        keeps = self.layout.keeps()
        lost = sorted(set(state["keeps"]) - set(keeps))
        if lost or ("outer_momentum" in keeps and "outer_momentum" not in state["keeps"]):
            raise RSOCheckpointError(
                f"{source} keeps {state['keeps'] or 'nothing'} beside W, this run {keeps or 'nothing'}: set"
                " 'master_weights' and 'outer_momentum' as they were."
            )

    # -- tensors -------------------------------------------------------------------------------------

    def pieces(self) -> dict[str, Piece]:
        """Everything that this rank has to save, as live memory. Call it ``at_rest``, between optimizer steps."""
        if self.boundary is not None:
            self.boundary.follow_loads()
        found: dict[str, Piece] = {}
        holds = self.layout.holds()
        for name, param in self.module.named_parameters():
            shape = full_shape(param)
            start, flat = self.layout.model_part(param)
            if not self._trains(param):
                kept = {what: self.layout.kept_rows(what, param) for what in holds if id(param) in self._weights}
                found[f"model.{name}"] = Piece(shape, *kept.get("masters", (start, flat)))
                if "outer_momentum" in kept:
                    found[f"outer.{name}"] = Piece(shape, *kept["outer_momentum"])
                continue
            prefix = self._prefix()
            part = self.layout.solver_part(param)
            found[f"{prefix}model.{name}"] = (
                Piece(shape, part.start, part.masters[0]) if part.masters else Piece(shape, start, flat)
            )
            for key, moment in (("moment1", part.first), ("moment2", part.second)):
                if moment is not None:
                    found[f"{prefix}{key}.{name}"] = Piece(shape, part.start, moment)
        for name, buffer in self._buffers():
            found[f"model.{name}"] = Piece(tuple(buffer.shape), 0, flat_memory(buffer))
        for name, value in (_random_state() | self._apart_steps()).items():
            found[name] = Piece(tuple(value.shape), 0, value)
        return {name: piece for name, piece in found.items() if math.prod(piece.shape)}

    def targets(self, stored: StoredTensors, solver: bool = True) -> dict[str, list[Piece]]:
        """The memory of this rank that ``stored`` is to fill. Call it ``at_rest``; it allocates solver state, and drops
        fp32 masters of W. Without ``solver`` its moments are none of it, and become zero."""
        self.layout.forget_masters()
        found: dict[str, list[Piece]] = {}
        keeps = self.layout.keeps()
        for name, param in self.module.named_parameters():
            shape = full_shape(param)
            copy = Piece(shape, *self.layout.model_part(param))
            if not self._trains(param):
                found[f"model.{name}"] = [copy]
                wider = f"model.{name}" in stored and stored.dtype(f"model.{name}").itemsize > param.element_size()
                if id(param) in self._weights and "masters" in keeps and wider:
                    found[f"model.{name}"].append(Piece(shape, *self.layout.kept_rows("masters", param)))
                if id(param) in self._weights and "outer_momentum" in keeps:
                    found[f"outer.{name}"] = [Piece(shape, *self.layout.kept_rows("outer_momentum", param))]
                continue
            prefix = self._prefix()
            if solver and f"{prefix}moment1.{name}" in stored:
                self.layout.prepare_solver(param)
            part = self.layout.solver_part(param)
            found[f"{prefix}model.{name}"] = [copy, *(Piece(shape, part.start, m) for m in part.masters)]
            for key, moment in (("moment1", part.first), ("moment2", part.second)):
                if moment is not None:
                    if solver and f"{prefix}{key}.{name}" in stored:
                        found[f"{prefix}{key}.{name}"] = [Piece(shape, part.start, moment)]
                    else:
                        moment.zero_()  # saved before the first step
        for name, buffer in self._buffers():
            found[f"model.{name}"] = [Piece(tuple(buffer.shape), 0, flat_memory(buffer))]
        self._plain = {n: v for n, v in _random_state().items() if n in stored} | self._apart_steps()
        for name, value in self._plain.items():
            found[name] = [Piece(tuple(value.shape), 0, value)]
        found = {name: pieces for name, pieces in found.items() if math.prod(pieces[0].shape)}
        for name, pieces in found.items():
            if name not in stored or stored.shape(name) != pieces[0].shape:
                raise RSOCheckpointError(
                    f"the checkpoint has no '{name}' of shape {list(pieces[0].shape)}: it is of another model."
                )
        return found

    def loaded(self, state: dict[str, Any], solver: bool, rates: bool) -> None:
        """Set the plain values, after ``targets`` have been filled, still ``at_rest``: the solver's counts of steps, or
        zero without ``solver``, and the ``rates`` of its groups."""
        trainable = self._trainable()
        steps = [state["steps"].get(name, 0) if solver else 0 for name, _ in trainable]
        if solver and self.layout.replicas > 1:
            steps = self._plain[f"{self._prefix()}steps"].tolist()
        for (_, param), step in zip(trainable, steps, strict=True):
            self.layout.set_solver_step(param, step)
        if rates:
            for group, saved in zip(self.layout.solver.param_groups, state["groups"], strict=True):
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in group})
        _set_random_state(self._plain)
        self.layout.reloaded()
        if self.boundary is not None:
            self.boundary.load_state_dict(state["rso"])
            self.boundary.check_replicas()

    @torch.no_grad()
    def start_from(self, model: StoredModel) -> None:
        """Take over the effective weights and the buffers of ``model``, and begin a run with them: the first subspace,
        B and all that the solver keeps zero. Call it ``at_rest``. Raises ``RSOCheckpointError`` before anything
        changes if ``model`` is another one."""
        layers = dict(rso_layers(self.module))
        new = {f"{name}.B" for name in layers}
        weights = {f"{name}.weight": (ordinary_name(name, layer.kind), layer.kind) for name, layer in layers.items()}
        there = {name: model.shape(name) for name in (*model.names(), *model.tied)}
        for name, param in self.module.named_parameters():
            stored, kind = weights.get(name, (name, None))
            shape = full_shape(param) if kind is None else ordinary_shape(full_shape(param), kind)
            if name not in new and there.get(stored) != shape:
                found = list(there.get(stored, ())) or "absent"
                raise RSOCheckpointError(
                    f"{model.path} is of another model: '{stored}' is {found} there and {list(shape)} here."
                )
        self.layout.forget_masters()
        for name, param in self.module.named_parameters():
            if name in new:
                value = torch.zeros(math.prod(full_shape(param)), dtype=param.dtype)
            else:
                stored, kind = weights.get(name, (name, None))
                value = model.value(stored)
                value = (value if kind is None else ordinary_weight(value, kind)).reshape(-1)
            copies = [self.layout.model_part(param)]
            if self._trains(param):
                part = self.layout.solver_part(param)
                copies += [(part.start, master) for master in part.masters]
                for moment in (part.first, part.second):
                    if moment is not None:
                        moment.zero_()
                self.layout.set_solver_step(param, 0)
            elif id(param) in self._weights and "outer_momentum" in self.layout.keeps():
                self.layout.kept_rows("outer_momentum", param)[1].zero_()
            for start, flat in copies:
                flat.copy_(value[start : start + flat.numel()])
        for name, buffer in self._buffers():
            if name in there:
                buffer.copy_(model.value(name))
        self.layout.reloaded()
        if self.boundary is not None:
            self.boundary.restart()

    def adopt(self, state: dict[str, Any]) -> None:
        """After ``loaded``, no longer ``at_rest``."""
        if self.boundary is not None:
            self.boundary.adopt(state["rso"])

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.module.named_parameters() if self._trains(p)]

    def _trains(self, param: nn.Parameter) -> bool:
        return param.requires_grad and self.layout.solver_key(param) is not None

    def _apart_steps(self) -> dict[str, Tensor]:
        if self.layout.replicas == 1:
            return {}
        steps = [self.layout.solver_step(param) or 0 for _, param in self._trainable()]
        return {f"{self._prefix()}steps": torch.tensor(steps, dtype=torch.int64)}

    def _buffers(self) -> list[tuple[str, Tensor]]:
        persistent = []
        for prefix, module in self.module.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    persistent.append((f"{prefix}.{name}" if prefix else name, buffer))
        return persistent

    def _prefix(self) -> str:
        return f"replica{self.layout.replica}/" if self.layout.replicas > 1 else ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, (tuple, list)) else float(value)


def _random_state() -> dict[str, Tensor]:
    state = {f"rng.{rank_of()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{rank_of()}.cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    if f"rng.{rank_of()}.cpu" in state:
        torch.set_rng_state(state[f"rng.{rank_of()}.cpu"])
    if f"rng.{rank_of()}.cuda" in state:
        torch.cuda.set_rng_state(state[f"rng.{rank_of()}.cuda"])
