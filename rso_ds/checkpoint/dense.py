"""The trained model as an ordinary one: every W merged with B P^T, no trace of RSO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rso_ds.checkpoint.model_files import write_code
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers import SubspaceLayer, dense_layer, rso_layers
from rso_ds.layers.kinds import ordinary_name
from rso_ds.layers.partitioned import gathered, whole
from rso_ds.layers.wrappers import without_compile


@torch.no_grad()
def dense_state_dict(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """State dict of the equal dense model, on the CPU, in the dtype of the weights.

    Names and shapes are those of the model before conversion. Under ZeRO-3 and FSDP2 all ranks must
    call this together; one module is gathered at a time. Ranks with ``keep`` False take part and return {}.
    """
    model = without_compile(model)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()  # after an evaluation the root is gathered still, in the dtype that it computes in
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor | None] = {}  # by the id of the model's own tensor: what is tied stays one tensor
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        if isinstance(module, SubspaceLayer):
            del own["B"]
        own |= {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        new = {n: t for n, t in own.items() if id(t) not in copies}
        source = dense_layer(module) if isinstance(module, SubspaceLayer) and "weight" in new else module
        with gathered(p for p in new.values() if source is module and isinstance(p, nn.Parameter)):
            for name, tensor in new.items():
                full = whole(getattr(source, name).detach())
                copies[id(tensor)] = full.to("cpu", copy=True) if keep else None
        for name, tensor in own.items():
            copy = copies[id(tensor)]
            if copy is not None:
                weight = isinstance(module, SubspaceLayer) and name == "weight"
                state[ordinary_name(module_name, module.kind) if weight else prefix + name] = copy
    return state


def dense_description(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What has to be known, beside the tensors, to make ``dense_state_dict`` of them without ``model``.

    layers   RSO layer -> [kind (rso_ds.layers.kinds), dtype of the P that the last forward pass used]
    tied     further name of a tensor -> [the name under which ``named_parameters`` has it, whether
             transformers ties the two by itself when it loads the model]
    """
    layers = {}
    for name, layer in rso_layers(model):
        p = layer.subspace.P
        dtype = p.dtype if p is not None and p.is_floating_point() else layer.weight.dtype
        layers[name] = [layer.kind, str(dtype).removeprefix("torch.")]
    declared = getattr(model, "all_tied_weights_keys", {})
    first = {id(param): name for name, param in model.named_parameters()}
    tied = {
        name: [first[id(param)], declared.get(name) == first[id(param)]]
        for name, param in model.named_parameters(remove_duplicate=False)
        if first[id(param)] != name
    }
    return {"layers": layers, "tied": tied}


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
    if rank != 0:
        return
    kind: Any = type(model)
    if not isinstance(model, FSDPModule) or getattr(kind, "_auto_class", None) is None:
        save(folder, state_dict=state)
        return
    kind._auto_class = None  # transformers would save the code of the class that fully_shard has made of the model's
    try:
        save(folder, state_dict=state)
    finally:
        del kind._auto_class
    write_code(model, Path(folder))
