"""What happens at a subspace boundary. The same code for every engine.

After every ``interval`` applied optimizer steps, for every layer:

    B <- mean of B over the ranks  only where they took their steps apart (``communicate: "boundary"``)
    W <- decay * W + B P^T       merged in fp32, rounded once
    B <- 0
    solver state of B carried over by the chosen rule
    draw <- draw + 1, P redrawn

With ``form: "folded"`` the first two of these (W <- W + B P^T, B <- 0) happen after every other applied step as
well: W then always holds B P^T. A step of Adam or SGD does not depend on the B it starts from, so both forms take the
same steps, up to rounding.

(arXiv 2502.07222, outer loop of the method.) An engine supplies a ``Layout`` (``rso_ds.layout``):
where W, B and the solver state live on this rank. The boundary never communicates anything of the size of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rso_ds.comm.counter import install as traffic
from rso_ds.comm.replicas import check_replicas
from rso_ds.config import RSOConfig
from rso_ds.errors import RSOCheckpointError
from rso_ds.layers.base import SubspaceLayer
from rso_ds.layers.partitioned import local_part
from rso_ds.layout import Layout
from rso_ds.solvers.carry_over import CARRY_OVER, rotation
from rso_ds.solvers.cut_rows import carry_over_, collect_cut_rows
from rso_ds.subspace import GENERATOR_VERSIONS, Subspace
from rso_ds.weights.refusals import refuse_merges
from rso_ds.weights.rounding import Rounding


class Boundary:
    """Counts applied steps and crosses the boundary when an interval is full.

    ``layers`` maps names to RSO layers in model order; ``lr_groups[i]`` is the index into the list of
    learning rates (see ``step_applied``) that rules layer i, with ``weight_decays[i]`` its decoupled decay.
    ``dense``: name -> parameter trained densely; the boundary only compares those between ranks.

    Raises ``RSOUnsupportedError`` for merges that would lose updates or send W at every step.
    """

    def __init__(
        self,
        config: RSOConfig,
        layers: dict[str, SubspaceLayer],
        layout: Layout,
        weight_decays: Sequence[float],
        lr_groups: Sequence[int],
        dense: Mapping[str, Any] | None = None,
    ) -> None:
        refuse_merges(config, [layer.weight.dtype for layer in layers.values()], layout.merge_sends_weights)
        self.config = config
        self.layers = layers
        self.layout = layout
        self.applied_steps = 0
        self.draw = 0
        self.skipped_steps = 0  # gradients not finite: neither applied nor counted towards the interval
        self._weight_decays = list(weight_decays)
        self._lr_groups = list(lr_groups)
        self._dense = dict(dense or {})
        self._decay = [1.0] * len(layers)
        self._carry_over = CARRY_OVER[config.carry_over]
        self.before_merge: Callable[[], None] | None = None  # for those who watch: B is full, W still without it
        self.subspaces: list[Subspace] = list({id(x.subspace): x.subspace for x in layers.values()}.values())

    def step_applied(self, lrs: Sequence[float]) -> bool:
        """Count one optimizer step that really changed the parameters, taken with learning rates ``lrs``
        (one per optimizer group). Crosses the boundary when due, and says whether it did."""
        self.applied_steps += 1
        for i, (wd, group) in enumerate(zip(self._weight_decays, self._lr_groups, strict=True)):
            self._decay[i] *= 1.0 - lrs[group] * wd
        if self.applied_steps % self.config.interval == 0:
            self.cross()
            return True
        if self.config.form == "folded":
            self.fold()
        return False

    @torch.no_grad()
    def fold(self) -> None:
        """Merge and zero B, and stay in the subspace with the solver's state as it is."""
        with traffic().phase("boundary"):
            self.layout.begin()
            rounding = self._rounding()
            for i, (name, layer) in enumerate(self.layers.items()):
                P = layer.subspace.current(self.layout.device, layer.weight.dtype)
                self.layout.merge(name, layer, P, self._decay[i], rounding)
                self._zero(layer)
            self._decay = [1.0] * len(self._decay)
            self.layout.end()

    def _rounding(self) -> Rounding:
        return Rounding(self.config.merge_rounding, self.config.seed, self.applied_steps)

    def _zero(self, layer: SubspaceLayer) -> None:
        for master in self.layout.solver_part(layer.B).masters:
            master.zero_()
        self.layout.zero(layer)

    @torch.no_grad()
    def cross(self) -> None:
        """Average (after local steps), merge, zero, carry over, redraw: now."""
        with traffic().phase("boundary"):
            self._cross()

    def _cross(self) -> None:
        self.layout.begin()
        if self.config.communicate == "boundary":
            self.layout.average()
        if self.before_merge is not None:
            self.before_merge()
        cut_rows = collect_cut_rows(self.layout, self.layers) if self._carry_over.needs_whole_rows else {}
        rounding = self._rounding()
        members: dict[int, list[tuple[float, str, SubspaceLayer]]] = {}
        for decay, (name, layer) in zip(self._decay, self.layers.items(), strict=True):
            members.setdefault(id(layer.subspace), []).append((decay, name, layer))
        for subspace in self.subspaces:
            sharing = members[id(subspace)]
            p_old = subspace.current(self.layout.device, sharing[0][2].weight.dtype)
            p_new = subspace.sample(self.draw + 1, self.layout.device, p_old.dtype)
            turn = rotation(p_old, p_new, subspace.in_features) if self._carry_over.needs_rotation else None
            for decay, name, layer in sharing:
                self.layout.merge(name, layer, p_old, decay, rounding)
                shard = self.layout.solver_part(layer.B)
                carry_over_(self._carry_over, shard, subspace.rank, turn, cut_rows.get(name, {}))
                self._zero(layer)
            subspace.move_to(self.draw + 1, p_new)
        if self._carry_over.restarts_step:
            self.layout.restart_step()
        self.draw += 1
        self._decay = [1.0] * len(self._decay)
        self.layout.end()
        self.check_replicas()

    def check_replicas(self) -> None:
        """Raise ``RSOReplicaError`` on every rank if they do not hold the same P, and the same copies of what several
        hold."""
        check_replicas(self.layout, self.subspaces, self._dense, self.applied_steps)

    def average_replicas(self) -> None:
        """After local steps: average what the ranks have done since the last boundary, so that they hold one
        model. Merges nothing and counts nothing; does nothing where ranks exchange at every step."""
        if self.config.communicate == "boundary":
            with traffic().phase("boundary"):
                self.layout.begin()
                self.layout.average()
                self.layout.end()

    @torch.no_grad()
    def follow_loads(self) -> None:
        """Before a step: where ``load_state_dict`` of the model has replaced W, B and its masters start at zero and
        fp32 copies of W anew. Raises ``RSOCheckpointError`` for a B that came without its optimizer's state."""
        for name, layer in self.layers.items():
            if layer.was_loaded == "raw" and bool(local_part(layer.B).any()):
                raise RSOCheckpointError(
                    f"the state dict of the model had a B for layer '{name}', and nothing says of which subspace: load"
                    " the optimizer's state that was saved with it too."
                )
            if layer.was_loaded:
                self._zero(layer)
                if self.layout.weight_masters is not None:
                    self.layout.weight_masters.rows.pop(name, None)
                layer.was_loaded = ""

    def materialize(self) -> None:
        """Draw the current P of every group, so that no forward pass has to."""
        for layer in self.layers.values():
            layer.subspace.current(self.layout.device, layer.weight.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, all that P and the count of steps depend on: see ``rso_ds.checkpoint.boundary_state``."""
        return {
            "applied_steps": self.applied_steps,
            "draw": self.draw,
            "skipped_steps": self.skipped_steps,
            "decay": list(self._decay),
            "seed": self.config.seed,
            "sampler": self.config.sampler,
            "generator": GENERATOR_VERSIONS[self.config.sampler],
            "interval": self.config.interval,
            "form": self.config.form,
            "layers": {
                name: [layer.rows, layer.in_features, layer.subspace.rank, layer.subspace.name]
                for name, layer in self.layers.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``'s output; ``check_boundary_state`` comes first. Redraws every P."""
        self.applied_steps = int(state["applied_steps"])
        self.draw = int(state["draw"])
        self.skipped_steps = int(state["skipped_steps"])
        self._decay = [float(d) for d in state["decay"]]
        for layer in self.layers.values():
            layer.was_loaded = ""
        for subspace in self.subspaces:
            subspace.move_to(self.draw)
        self.materialize()

    def restart(self) -> None:
        """Begin a run: no step has been applied, the subspaces are the first. W and B are as they are."""
        fresh = {"applied_steps": 0, "draw": 0, "skipped_steps": 0, "decay": [1.0] * len(self.layers)}
        self.load_state_dict(fresh)

    def adopt(self, state: dict[str, Any]) -> None:
        """After W and B have been loaded too: fold what a state of the two-path form has in B. (The other way
        nothing is to be done: B is 0.)"""
        if self.config.form == "folded" and state.get("form") != "folded":
            self.fold()
