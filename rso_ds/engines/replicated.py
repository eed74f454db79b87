"""The layout of engines in which every rank holds W and B in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rso_ds.engines.local_steps import average_
from rso_ds.layers import SubspaceLayer
from rso_ds.layers.partitioned import flat_memory
from rso_ds.layout import SolverShard
from rso_ds.solvers.finite import gradients_finite
from rso_ds.solvers.state import blank_state, moments, restart_step
from rso_ds.weights.masters import WeightMasters
from rso_ds.weights.merge import changed_columns, merge_, write_columns_
from rso_ds.weights.outer_momentum import OuterMomentum
from rso_ds.weights.rounding import Rounding


class ReplicatedLayout:
    """W and B whole on each rank, the solver state of each B one tensor of a torch optimizer.

    ``masters`` maps the id of each B to the fp32 copy that the solver updates, where there is one; ``precise`` so too,
    but for copies whose state the solver keeps under the model's own parameter (``ParameterMasters``);
    ``group`` is the data-parallel process group, None for a single process; ``master_weights`` is the
    configuration's key: each rank then keeps fp32 masters of an equal share of W's rows, merges those, and
    the ranks exchange the rounded rows (bytes of W once an interval).
    """

    def __init__(
        self,
        layers: Mapping[str, SubspaceLayer],
        solver: torch.optim.Optimizer,
        device: torch.device,
        masters: Mapping[int, Tensor] | None = None,
        group: Any = None,
        master_weights: str = "none",
        precise: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.solver = solver
        self.device = device
        self.masters = dict(masters or {})
        self.precise = dict(precise or {})
        self.group = group
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        low_precision = any(layer.weight.element_size() < 4 for layer in self.layers.values())
        self.replica, self.replicas = 0, 1  # above 1 where ranks take their steps apart
        self.outer: OuterMomentum | None = None
        self.dense: list[nn.Parameter] = []
        self.weight_masters = WeightMasters(master_weights) if low_precision and master_weights != "none" else None
        self.merge_sends_weights = self.weight_masters is not None and self.world_size > 1
        self.merge_sends = "rows of W between the ranks' fp32 masters" if self.merge_sends_weights else ""

    def step_apart(self, dense: Sequence[nn.Parameter], momentum: float) -> None:
        """Prepare for local steps; ``dense``: the parameters that train densely."""
        self.dense = list(dense)
        self.replica, self.replicas = self.rank, self.world_size
        if momentum:
            self.outer = OuterMomentum(momentum, {name: self.rows(x.weight) for name, x in self.layers.items()})

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of W, B or a moment that this rank holds, as the memory itself."""
        return tensor.detach()

    def begin_step(self) -> None:
        """Called before the solver's step: drop gathered copies that would not see it."""

    def finite(self, params: Iterable[Any]) -> bool:
        """Whether the gradients of a step are finite, equally answered by all ranks that step together."""
        return gradients_finite(params, agree=False)  # averaged, so equal, or each rank's own

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def average(self) -> None:
        if self.world_size > 1:
            self.average_over(self.group)

    def average_over(self, group: Any) -> None:
        """Average B and what trains densely over ``group``, in the most precise copy that there is."""
        params = [*(layer.B for layer in self.layers.values()), *self.dense]
        precise = [self.precise.get(id(p), p) for p in params]
        average_([self.rows(p) for p in precise], group)
        for param, master in zip(params, precise, strict=True):
            if master is not param:
                self.rows(param).copy_(self.rows(master))

    def merge(self, name: str, layer: SubspaceLayer, P: Tensor, decay: float, rounding: Rounding) -> None:
        weight = layer.weight.detach()
        if self.weight_masters is None:
            self.merge_rows_(name, weight, layer.B, P, decay, partial(rounding, dtype=weight.dtype, name=name))
            return
        share = -(-weight.shape[0] // self.world_size)
        mine = slice(self.rank * share, (self.rank + 1) * share)
        merged = self.weight_masters.merge(name, weight[mine], layer.B[mine], P, decay)
        rows = torch.zeros(share, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
        rows[: merged.shape[0]] = merged.to(weight.dtype)
        everyone = [rows]
        if self.world_size > 1:
            everyone = [torch.empty_like(rows) for _ in range(self.world_size)]
            dist.all_gather(everyone, rows, group=self.group)
        weight.copy_(torch.cat(everyone)[: weight.shape[0]])

    def merge_rows_(
        self, name: str, rows: Tensor, B_rows: Tensor, P: Tensor, decay: float, rounded: Callable[[Tensor], Tensor]
    ) -> None:
        """The merge of ``rows`` [..., in] of W with ``B_rows`` [..., r], in place: by way of fp32 masters, with outer
        momentum, or plainly. ``rounded``: fp32 -> the dtype of W; B_rows and P are on one device, ``rows`` anywhere."""
        keeper = self.weight_masters or self.outer
        if keeper is None:
            merge_(rows, B_rows, P, decay, rounded)
            return
        merged = keeper.merge(name, rows.to(P.device), B_rows, P, decay)
        columns = changed_columns(P, decay) if self.outer is None else None
        if columns is None:
            rows.copy_(rounded(merged))
        else:
            write_columns_(rows, columns, rounded(merged.index_select(-1, columns)))

    def zero(self, layer: SubspaceLayer) -> None:
        layer.B.zero_()

    def solver_key(self, param: Any) -> Any:
        """The tensor under which the solver keeps the state of ``param``; None if it does not train it."""
        key = self.masters.get(id(param), param)
        return key if param.requires_grad else None

    def solver_part(self, param: Any) -> SolverShard:
        key = self.solver_key(param)
        first, second = (None if m is None else flat_memory(m) for m in self.moments_of(param))
        masters = [] if key is param else [flat_memory(key)]
        masters += [flat_memory(self.precise[id(param)])] if id(param) in self.precise else []
        return SolverShard(0, param.numel(), first, second, masters)

    # -- what a checkpoint asks ----------------------------------------------------------------------

    def model_part(self, param: Any) -> tuple[int, Tensor]:
        """(index of the first element, flat memory) of what this rank holds of ``param`` itself."""
        return 0, flat_memory(param)

    def prepare_solver(self, param: Any) -> None:
        """Allocate the solver's state of ``param`` if no step has yet."""
        key = self.solver_key(param)
        if not self.solver.state.get(key):
            self.solver.state[key] = blank_state(self.solver, key, self.precise.get(id(param), key))

    def solver_step(self, param: Any) -> int | None:
        """The solver's step count of ``param``; None if it keeps none."""
        step = self.solver.state.get(self.solver_key(param), {}).get("step")
        return None if step is None else int(step)

    def set_solver_step(self, param: Any, step: int) -> None:
        state = self.solver.state.get(self.solver_key(param), {})
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step

    def holds(self) -> list[str]:
        """What of ``keeps`` there is by now: masters are made at the first boundary."""
        return [
            name for name in self.keeps() if name != "masters" or (self.weight_masters and self.weight_masters.rows)
        ]

    def forget_masters(self) -> None:
        """Before a load: masters that the checkpoint does not bring start from its W."""
        if self.weight_masters is not None:
            self.weight_masters.rows = {}

    def keeps(self) -> list[str]:
        """Names of what this configuration keeps beside W: "masters", "outer_momentum"."""
        kept = {"masters": self.weight_masters, "outer_momentum": self.outer}
        return [name for name, keeper in kept.items() if keeper is not None]

    def kept_rows(self, what: str, weight: Any) -> tuple[int, Tensor]:
        """(first element, flat fp32 memory) of what this rank keeps beside W, made from W if need be."""
        name = next(n for n, layer in self.layers.items() if layer.weight is weight)
        if what == "outer_momentum":
            assert self.outer is not None
            return self.model_part(weight)[0], flat_memory(self.outer.rows[name])
        assert self.weight_masters is not None
        rows, start, skip, length = self.merged_part(weight)
        return start, flat_memory(self.weight_masters.of(name, rows))[skip : skip + length]

    def merged_part(self, weight: Any) -> tuple[Tensor, int, int, int]:
        """(rows of W that this rank merges, index in W of its first own element, elements of the rows before that,
        number of own elements)."""
        share = -(-weight.shape[0] // self.world_size)
        rows = weight.detach()[self.rank * share : (self.rank + 1) * share]
        return rows, min(self.rank * share, weight.shape[0]) * weight[0].numel(), 0, rows.numel()

    def reloaded(self) -> None:
        """Called after a checkpoint has filled the memory that the methods above have shown."""

    def shard_boundaries(self, layer: SubspaceLayer) -> list[int]:
        return []

    def restart_step(self) -> None:
        for layer in self.layers.values():
            restart_step(self.solver.state.get(self.solver_key(layer.B), {}))

    def replicated(self, dense: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        found = [(f"{name}.weight", self.rows(layer.weight)) for name, layer in self.layers.items()]
        if self.replicas > 1:
            return found  # between two boundaries all else is each replica's own
        return found + [(name, self.rows(param)) for name, param in dense.items()] + self.replicated_moments(dense)

    def replicated_moments(self, dense: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        found = []
        for name, param in {**{f"{n}.B": layer.B for n, layer in self.layers.items()}, **dense}.items():
            first, second = self.moments_of(param)
            pair = (("first", first), ("second", second))
            found += [(f"the {which} moment of {name}", m) for which, m in pair if m is not None]
        return found

    def moments_of(self, param: Any) -> tuple[Tensor | None, Tensor | None]:
        """This rank's part of the solver's moments of ``param``, in whatever shape."""
        first, second = moments(self.solver.state.get(self.solver_key(param), {}))
        return None if first is None else self.rows(first), None if second is None else self.rows(second)

    def whole(self, checksums: Tensor) -> Tensor:
        return checksums

    def sum_over_ranks(self, tensor: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)

    def extremes_over_ranks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = values.clone(), values.clone()
        if self.world_size > 1:
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.group)
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.group)
        return low, high
