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

(arXiv 2502.07222, outer loop of the method.) An engine supplies a ``Layout``: where W, B and the
solver state live on this rank. The boundary never communicates anything of the size of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rso_ds.comm.counter import install as traffic
from rso_ds.config import RSOConfig
from rso_ds.errors import RSOCheckpointError, RSOReplicaError, RSOUnsupportedError
from rso_ds.layers import SubspaceLayer, round_stochastically
from rso_ds.solvers.carry_over import CARRY_OVER, rotation
from rso_ds.subspace import Subspace, projection_seed


@dataclass
class SolverShard:
    """The solver state of one parameter (a B, for the boundary) that this rank owns.

    It covers the elements [start, stop) of the flattened parameter. ``first`` and ``second`` are flat views
    of that length into the solver's own tensors (None where the solver keeps none); ``masters`` are the flat
    fp32 copies that the solver updates, if the parameter itself is in low precision or partitioned.
    """

    start: int
    stop: int
    first: Tensor | None
    second: Tensor | None
    masters: list[Tensor] = field(default_factory=list)


class Layout(Protocol):
    """What an engine tells the boundary about one rank. All ranks make the same calls in the same order."""

    device: torch.device
    merge_sends_weights: bool  # whether ``merge`` exchanges rows of W between ranks
    merge_sends: str  # what it sends, or makes ranks send later, and whereto, in words; empty if nothing

    def begin(self) -> None:
        """Called before anything changes: drop gathered copies that would go stale."""

    def average(self) -> None:
        """Replace B and every densely trained parameter by its mean over the ranks that stepped apart."""

    def end(self) -> None:
        """Called after everything changed: restore what ``begin`` dropped."""

    def merge(self, name: str, layer: SubspaceLayer, P: Tensor, decay: float, rounding: Rounding) -> None:
        """W <- decay * W + B P^T on every copy of W that this rank holds."""

    def zero(self, layer: SubspaceLayer) -> None:
        """B <- 0 in the model's own copies (the boundary zeroes the masters)."""

    def solver_part(self, param: Any) -> SolverShard:
        """This rank's part of the solver state of a B."""

    def shard_boundaries(self, layer: SubspaceLayer) -> list[int]:
        """Element indices of B.flatten() at which ownership passes from one rank to another."""

    def restart_step(self) -> None:
        """Set the solver's step count of all B to zero."""

    def replicated(self, dense: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        """(name, this rank's part) of everything of which several ranks hold copies that must be equal: W, the
        ``dense`` parameters (name -> parameter), moments."""

    def whole(self, checksums: Tensor) -> Tensor:
        """Checksums of this rank's part of each of ``replicated`` -> of the whole tensor."""

    def sum_over_ranks(self, tensor: Tensor) -> None:
        """In-place sum over the ranks that share the solver state; nothing to do on one rank."""

    def extremes_over_ranks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(minimum, maximum) of an int64 vector over all data-parallel ranks."""


class Rounding:
    """How an fp32 merge result goes back into W's dtype. Replicas round alike: same layer, same step."""

    def __init__(self, kind: str, seed: int, applied_steps: int) -> None:
        self.kind, self.seed, self.applied_steps = kind, seed, applied_steps

    def __call__(self, merged: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """``name`` identifies the rows that are rounded and seeds the random bits."""
        if self.kind == "nearest" or dtype != torch.bfloat16:
            return merged.to(dtype)
        generator = torch.Generator(device=merged.device)
        generator.manual_seed(projection_seed(self.seed, "rounding:" + name, self.applied_steps))
        return round_stochastically(merged, generator)


class Boundary:
    """Counts applied steps and crosses the boundary when an interval is full.

    ``layers`` maps names to RSO layers in model order; ``decay_groups[i]`` is the index into the list of
    learning rates (see ``step_applied``) that rules layer i, with ``weight_decays[i]`` its decoupled decay.
    ``dense``: name -> parameter trained densely; the boundary only compares those between ranks.
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
        if config.merge_rounding == "stochastic" and any(x.weight.dtype == torch.float16 for x in layers.values()):
            raise RSOUnsupportedError(
                "'merge_rounding': 'stochastic' is for bf16 weights and these are fp16: use 'master_weights', or bf16."
            )
        if config.form == "folded" and layout.merge_sends_weights:
            raise RSOUnsupportedError(
                "'form': 'folded' merges at every step, and with 'master_weights' where every rank holds W whole a"
                " merge sends W: use 'form': 'two_path', ZeRO-3 or FSDP2, or 'merge_rounding': 'stochastic' in place of"
                " masters."
            )
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
        split_rows = self._collect_split_rows() if self._carry_over.needs_whole_rows else {}
        rounding = self._rounding()
        members: dict[int, list[int]] = {}
        named = list(self.layers.items())
        for i, (_, layer) in enumerate(named):
            members.setdefault(id(layer.subspace), []).append(i)
        for subspace in self.subspaces:
            first_weight = named[members[id(subspace)][0]][1].weight
            p_old = subspace.current(self.layout.device, first_weight.dtype)
            p_new = subspace.sample(self.draw + 1, self.layout.device, p_old.dtype)
            turn = rotation(p_old, p_new, subspace.in_features) if self._carry_over.needs_rotation else None
            for i in members[id(subspace)]:
                name, layer = named[i]
                self.layout.merge(name, layer, p_old, self._decay[i], rounding)
                self._carry(i, layer, turn, split_rows)
                self._zero(layer)
            subspace.move_to(self.draw + 1, p_new)
        if self._carry_over.restarts_step:
            self.layout.restart_step()
        self.draw += 1
        self._decay = [1.0] * len(self._decay)
        self.layout.end()
        self.check_replicas()

    def _carry(
        self, index: int, layer: SubspaceLayer, turn: Tensor | None, split_rows: dict[tuple[int, int], Tensor]
    ) -> None:
        shard = self.layout.solver_part(layer.B)
        if shard.first is None or shard.start == shard.stop:
            return
        rank = layer.subspace.rank
        states = [s for s in (shard.first, shard.second) if s is not None]
        if not self._carry_over.needs_whole_rows:
            views = [s.view(1, -1) for s in states]
            self._carry_over.rule(views[0], views[1] if len(views) > 1 else None, None)
            return
        # The owned interval may begin and end inside a row: widen it to whole rows, fill in what other
        # ranks own of the two outer rows, apply the rule, keep only our own elements.
        top, bottom = shard.start // rank, -(-shard.stop // rank)
        offset = shard.start - top * rank
        whole = []
        for k, state in enumerate(states):
            rows = state.new_zeros((bottom - top) * rank)
            rows[offset : offset + state.numel()] = state
            rows = rows.view(-1, rank)
            for row in {top, bottom - 1}:
                if (index, row) in split_rows:
                    rows[row - top] = split_rows[index, row][k].to(rows)
            whole.append(rows)
        turn = None if turn is None else turn.to(whole[0])
        self._carry_over.rule(whole[0], whole[1] if len(whole) > 1 else None, turn)
        for state, rows in zip(states, whole, strict=True):
            state.copy_(rows.view(-1)[offset : offset + state.numel()])

    def _collect_split_rows(self) -> dict[tuple[int, int], Tensor]:
        """(layer index, row) -> [2, r] moments of every row that no single rank owns whole.

        There are at most world size - 1 of them per flat buffer, so one small sum serves all layers.
        """
        keys: list[tuple[int, int]] = []
        for i, layer in enumerate(self.layers.values()):
            rank = layer.subspace.rank
            keys += [(i, row) for row in sorted({c // rank for c in self.layout.shard_boundaries(layer) if c % rank})]
        if not keys:
            return {}
        layers = list(self.layers.values())
        widest = max(layers[i].subspace.rank for i, _ in keys)
        table = torch.zeros(len(keys), 2, widest, dtype=torch.float32, device=self.layout.device)
        for entry, (i, row) in zip(table, keys, strict=True):
            rank = layers[i].subspace.rank
            shard = self.layout.solver_part(layers[i].B)
            lo, hi = max(shard.start, row * rank), min(shard.stop, (row + 1) * rank)
            if shard.first is None or lo >= hi:
                continue
            for k, state in enumerate((shard.first, shard.second)):
                if state is not None:
                    entry[k, lo - row * rank : hi - row * rank] = state[lo - shard.start : hi - shard.start]
        self.layout.sum_over_ranks(table)
        return {(i, row): entry[:, : layers[i].subspace.rank] for entry, (i, row) in zip(table, keys, strict=True)}

    def check_replicas(self) -> None:
        """Raise ``RSOReplicaError`` on every rank, naming the first tensor of which ranks hold different bits: a
        P, or what they hold copies of (``Layout.replicated``). One int64 a tensor is exchanged."""
        projections = [(f"P of {s.name}", s.P) for s in self.subspaces if s.P is not None]
        weights = self.layout.replicated(self._dense)
        sums = [self._checksums(projections)]
        if weights:
            sums.append(self.layout.whole(self._checksums(weights)))
        low, high = self.layout.extremes_over_ranks(torch.cat(sums))
        names = [name for name, _ in (*projections, *weights)]
        differing = [name for name, bad in zip(names, (low != high).tolist(), strict=True) if bad]
        if differing:
            raise RSOReplicaError(
                f"ranks hold different bits of {differing[0]} ({len(differing)} of {len(names)} tensors differ)"
                f" after {self.applied_steps} applied steps. Unlike hardware or thread counts can make the"
                " orthogonalisation of sampler 'haar' differ: use equal nodes, or 'gaussian' or 'coordinate'."
                " If another tensor differs, memory or network has failed or code has changed it on some ranks only:"
                " continue from the last checkpoint."
            )

    def _checksums(self, tensors: Sequence[tuple[str, Tensor]]) -> Tensor:
        return torch.stack([_checksum(t) for _, t in tensors]).to(self.layout.device)

    def average_replicas(self) -> None:
        """After local steps: average what the ranks have done since the last boundary, so that they hold one
        model. Merges nothing and counts nothing; does nothing where ranks exchange at every step."""
        if self.config.communicate == "boundary":
            with traffic().phase("boundary"):
                self.layout.begin()
                self.layout.average()
                self.layout.end()

    def materialize(self) -> None:
        """Draw the current P of every group, so that no forward pass has to."""
        for layer in self.layers.values():
            layer.subspace.current(self.layout.device, layer.weight.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Plain ints, floats and strings: all that P and the count of steps depend on."""
        return {
            "applied_steps": self.applied_steps,
            "draw": self.draw,
            "skipped_steps": self.skipped_steps,
            "decay": list(self._decay),
            "seed": self.config.seed,
            "sampler": self.config.sampler,
            "interval": self.config.interval,
            "form": self.config.form,
            "layers": {
                name: [layer.out_features, layer.in_features, layer.subspace.rank, layer.subspace.name]
                for name, layer in self.layers.items()
            },
        }

    def check_state(self, state: dict[str, Any], source: str, either_form: bool = False) -> None:
        """Raise ``RSOCheckpointError`` if ``state`` is not of this model and configuration; ``either_form``: the
        caller will ``adopt`` a state of the other form."""
        mine = self.state_dict()
        state = {"form": "two_path", **state}  # checkpoints from before there was a choice do not name it
        missing = sorted(set(mine) - set(state))
        if missing:
            raise RSOCheckpointError(f"{source}: damaged RSO state, no '{missing[0]}'.")
        if state["layers"] != mine["layers"]:
            theirs, ours = state["layers"], mine["layers"]
            name = next(n for n in [*theirs, *ours] if theirs.get(n) != ours.get(n))
            raise RSOCheckpointError(
                f"{source} is of another model or rank: layer '{name}' is [out, in, rank, group]"
                f" {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here."
            )
        for key, consequence in (
            ("seed", "P would not be the same"),
            ("sampler", "P would not be the same"),
            ("interval", "the boundaries would not be the same"),
            ("form", "its B is part of W in one form and not in the other"),
        ):
            if state[key] != mine[key] and not (either_form and key == "form"):
                raise RSOCheckpointError(
                    f"{source} was trained with '{key}': {state[key]!r}, this run has {mine[key]!r}:"
                    f" {consequence}. Restore the key."
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``'s output; ``check_state`` comes first. Redraws every P."""
        self.applied_steps = int(state["applied_steps"])
        self.draw = int(state["draw"])
        self.skipped_steps = int(state["skipped_steps"])
        self._decay = [float(d) for d in state["decay"]]
        for subspace in self.subspaces:
            subspace.move_to(self.draw)
        self.materialize()

    def adopt(self, state: dict[str, Any]) -> None:
        """After W and B have been loaded too: fold what a state of the two-path form has in B. (The other way
        nothing is to be done: B is 0.)"""
        if self.config.form == "folded" and state.get("form") != "folded":
            self.fold()


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns, as int64: cheap, and any single changed bit changes it."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
