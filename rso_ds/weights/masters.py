"""fp32 master copies of low-precision W, touched only at boundaries."""

from __future__ import annotations

import torch
from torch import Tensor

from rso_ds.weights.merge import merged_weight


class WeightMasters:
    """fp32 rows of W that this rank merges; small updates add up here instead of being rounded away.

    ``location``: "device" keeps them where the merge runs, "cpu" in host memory. A copy starts as the
    low-precision W at the layer's first boundary, so it costs nothing before.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.rows: dict[str, Tensor] = {}

    def merge(self, name: str, weight_rows: Tensor, B_rows: Tensor, P: Tensor, decay: float) -> Tensor:
        """``decay * master + B P^T`` as the new master, returned in fp32 on P's device: the master itself if that
        is where it is kept.

        Shapes: weight_rows [rows, in], B_rows [rows, r], P [in, r].
        """
        start = self.rows.get(name, weight_rows)
        merged = merged_weight(start.to(P.device), B_rows, P, decay, in_place=name in self.rows)
        self.rows[name] = merged.to("cpu") if self.location == "cpu" else merged
        return merged

    def of(self, name: str, weight_rows: Tensor) -> Tensor:
        """The copy of ``weight_rows``, made now if there has been no boundary yet."""
        if name not in self.rows:
            device = torch.device("cpu") if self.location == "cpu" else weight_rows.device
            self.rows[name] = weight_rows.to(device, torch.float32, copy=True)
        return self.rows[name]
