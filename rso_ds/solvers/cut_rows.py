"""Solver state of B across a boundary where ranks cut it inside a row.

ZeRO divides flat buffers wherever the cut falls, and rules such as ``project`` need whole rows of the moments. Only
the cut rows are exchanged: at most world size - 1 of them per flat buffer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rso_ds.layers.base import SubspaceLayer
from rso_ds.layout import Layout, SolverShard
from rso_ds.solvers.carry_over import CarryOver

# Row of B -> its moments [2, r] in fp32, first and second.
CutRows = dict[int, Tensor]


def collect_cut_rows(layout: Layout, layers: Mapping[str, SubspaceLayer]) -> dict[str, CutRows]:
    """The moments of every row of B that no single rank owns whole, by layer name. All ranks call it together: one
    small sum serves all layers."""
    keys: list[tuple[str, int]] = []
    for name, layer in layers.items():
        rank = layer.subspace.rank
        keys += [(name, row) for row in sorted({c // rank for c in layout.shard_boundaries(layer) if c % rank})]
    if not keys:
        return {}
    widest = max(layers[name].subspace.rank for name, _ in keys)
    table = torch.zeros(len(keys), 2, widest, dtype=torch.float32, device=layout.device)
    for entry, (name, row) in zip(table, keys, strict=True):
        rank = layers[name].subspace.rank
        shard = layout.solver_part(layers[name].B)
        lo, hi = max(shard.start, row * rank), min(shard.stop, (row + 1) * rank)
        if shard.first is None or lo >= hi:
            continue
        for k, state in enumerate((shard.first, shard.second)):
            if state is not None:
                entry[k, lo - row * rank : hi - row * rank] = state[lo - shard.start : hi - shard.start]
    layout.sum_over_ranks(table)
    found: dict[str, CutRows] = {}
    for entry, (name, row) in zip(table, keys, strict=True):
        found.setdefault(name, {})[row] = entry[:, : layers[name].subspace.rank]
    return found


def carry_over_(rule: CarryOver, shard: SolverShard, rank: int, rotation: Tensor | None, cut: CutRows) -> None:
    """Apply ``rule`` to the moments in ``shard``, in place, completing its first and last row from ``cut``.

    ``rank``: columns of B; ``rotation`` [r, r] for a rule that needs it, else None.
    """
    if shard.first is None or shard.start == shard.stop:
        return
    states = [s for s in (shard.first, shard.second) if s is not None]
    if not rule.needs_whole_rows:
        views = [s.view(1, -1) for s in states]
        rule.rule(views[0], views[1] if len(views) > 1 else None, None)
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
            if row in cut:
                rows[row - top] = cut[row][k].to(rows)
        whole.append(rows)
    rotation = None if rotation is None else rotation.to(whole[0])
    rule.rule(whole[0], whole[1] if len(whole) > 1 else None, rotation)
    for state, rows in zip(states, whole, strict=True):
        state.copy_(rows.view(-1)[offset : offset + state.numel()])
