"""Merges that are refused before training starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOUnsupportedError


def refuse_merges(config: RSOConfig, dtypes: Iterable[torch.dtype], sends_weights: bool) -> None:
    """Raise ``RSOUnsupportedError`` for a rounding that the W of ``dtypes`` do not have, and where every step would
    send W; ``sends_weights``: whether a merge exchanges rows of W between ranks."""
    if config.merge_rounding == "stochastic" and torch.float16 in set(dtypes):
        raise RSOUnsupportedError(
            "'merge_rounding': 'stochastic' is for bf16 weights and these are fp16: use 'master_weights', or bf16."
        )
    if config.form == "folded" and sends_weights:
        raise RSOUnsupportedError(
            "'form': 'folded' merges at every step, and with 'master_weights' where every rank holds W whole a"
            " merge sends W: use 'form': 'two_path', ZeRO-3 or FSDP2, or 'merge_rounding': 'stochastic' in place of"
            " masters."
        )
