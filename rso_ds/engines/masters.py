"""fp32 master copies of low-precision W, touched only at boundaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rso_ds.errors import RSOCheckpointError
from rso_ds.layers import merged_weight


class WeightMasters:
    """fp32 rows of W that this rank merges; small updates add up here instead of being rounded away.

    ``location``: "device" keeps them where the merge runs, "cpu" in host memory. A copy starts as the
    low-precision W at the layer's first boundary, so it costs nothing before.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.rows: dict[str, Tensor] = {}

    def merge(self, name: str, weight_rows: Tensor, B_rows: Tensor, P: Tensor, decay: float) -> Tensor:
        """``decay * master + B P^T`` as the new master, returned in fp32 on P's device.

        Shapes: weight_rows [rows, in], B_rows [rows, r], P [in, r].
        """
        start = self.rows.get(name, weight_rows)
        merged = merged_weight(start.to(P.device), B_rows, P, decay)
        self.rows[name] = merged.to("cpu") if self.location == "cpu" else merged
        return merged

    def save(self, folder: Path, rank: int, world_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"world_size": world_size, "rows": self.rows}, folder / _file(rank))

    def load(self, folder: Path, rank: int, world_size: int) -> None:
        """Raises ``RSOCheckpointError`` if the file is missing, damaged, or of another world size."""
        path = folder / _file(rank)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RSOCheckpointError(
                f"{path} does not exist: the checkpoint has no fp32 masters; resume with 'master_weights': 'none'."
            ) from None
        except Exception as error:
            raise RSOCheckpointError(f"{path} is damaged: {error}") from None
        if state["world_size"] != world_size:
            raise RSOCheckpointError(
                f"{path} is of a run on {state['world_size']} ranks, this one has {world_size}: the fp32 masters are"
                " sharded by rank. Resume on as many ranks."
            )
        self.rows = state["rows"]


def _file(rank: int) -> str:
    return f"rso_master_weights_rank{rank}.pt"
