"""The trained model as an ordinary one: every W merged with B P^T, no trace of RSO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers import RSOLinear, dense_layer
from rso_ds.layers.partitioned import gathered, whole


@torch.no_grad()
def dense_state_dict(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """State dict of the equal dense model, on the CPU, in the dtype of the weights.

    Names and shapes are those of the model before conversion. Under ZeRO-3 and FSDP2 all ranks must
    call this together; one module is gathered at a time. Ranks with ``keep`` False take part and return {}.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, tuple[Tensor, Tensor]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        source: nn.Module = dense_layer(module) if isinstance(module, RSOLinear) else module
        params = dict(source.named_parameters(recurse=False))
        buffers = {n: b for n, b in source.named_buffers(recurse=False) if n not in source._non_persistent_buffers_set}
        with gathered(params.values()):
            for name, tensor in {**params, **buffers}.items():
                full = whole(tensor.detach())
                if not keep:
                    continue
                if id(tensor) not in copies:  # tied parameters stay one tensor
                    copies[id(tensor)] = (tensor, full.to("cpu", copy=True))
                state[prefix + name] = copies[id(tensor)][1]
    return state


def save_dense(model: nn.Module, folder: str | Path, rank: int = 0) -> None:
    """Write ``model`` as a plain Hugging Face folder that ``from_pretrained`` loads without rso_ds.

    All ranks call this together; rank 0 writes. Raises ``RSOUnsupportedError`` for a model that has no
    ``save_pretrained``.
    """
    save: Any = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise RSOUnsupportedError(
            f"{type(model).__name__} has no save_pretrained: use rso_ds.checkpoint.dense_state_dict and save that."
        )
    state = dense_state_dict(model, keep=rank == 0)
    if rank == 0:
        save(folder, state_dict=state)
