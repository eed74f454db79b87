"""What must hold of a converted model at its start: whatever came before, a run begins with B = 0, and its first step
has a gradient for every B."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from rso_ds.errors import RSOConversionError
from rso_ds.layers.base import SubspaceLayer, subspace_modules
from rso_ds.layers.partitioned import local_part
from rso_ds.layers.targets import name_some


def begin_run(model: nn.Module, layers: Mapping[str, SubspaceLayer]) -> None:
    """Bring the RSO layers of ``model`` to the start of a run: the first draw of every subspace.

    ``layers``: those of ``rso_layers(model)``. Raises ``RSOConversionError`` for layers without memory, weights that
    nobody has initialised since they left the meta device, ties that were lost on the way, and a B that is not zero.
    Looks at this rank's part alone: ranks must agree on the outcome.
    """
    for name, layer in layers.items():
        if layer.weight.is_meta or layer.B.is_meta:
            raise RSOConversionError(
                f"layer '{name}' is on the meta device: model.to_empty(device=...) and initialise or load the weights"
                " before the optimizer is made."
            )
        if layer.was_meta and bool(torch.isnan(local_part(layer.weight)).any()):
            raise RSOConversionError(
                f"the weight of layer '{name}' has not been initialised since to_empty: load a state dict, or call its"
                " reset_parameters(). An init function that looks for nn.Linear passes RSO layers by."
            )
        B = local_part(layer.B)
        if bool(B.any()) and layer.was_loaded != "raw":  # else of a state dict, whose optimizer's state is to follow
            raise RSOConversionError(
                f"a run begins with B = 0, and that of layer '{name}' has values up to {B.abs().max().item():.3g}. If"
                " they are from an earlier run, keep what it learned by rso_ds.to_dense(model), then convert anew; if"
                " they are what memory held, B.data.zero_() of every layer."
            )
    for name, module in subspace_modules(model):
        if module.tied_to is not None and module.tied_to.B is not module.B:
            raise RSOConversionError(
                f"layer '{name}' was tied to another when the model was converted and has a B of its own now, as"
                " to_empty and moves between devices leave it: give it the other's weight and B, or convert later."
            )
        module.was_meta = False
        module._copied = None
        if module.subspace.draw:
            module.subspace.move_to(0)


def refuse_untrained(
    model: nn.Module, layers: Mapping[str, SubspaceLayer], has_gradient: Callable[[SubspaceLayer], bool]
) -> None:
    """Raise ``RSOConversionError`` if a layer that trains has no gradient of B in a first step.

    Its W is frozen, so that nothing would train it, then or later. A pass may rightly go by an expert to which no token
    was routed, and by a layer that is dropped at random. Looks at this rank alone: ranks must agree on the outcome.
    """
    config = getattr(model, "config", None)
    if any(getattr(config, f"{part}layerdrop", 0) for part in ("", "encoder_", "decoder_")):
        return
    idle = [name for name, layer in layers.items() if layer.B.requires_grad and not has_gradient(layer)]
    idle = [name for name in idle if "expert" not in name.lower()]
    if idle:
        raise RSOConversionError(
            f"the first step has no gradient for {name_some(idle)}: either the loss does not depend on"
            f" {'them' if len(idle) > 1 else 'it'}, or other code reads the weight by itself, which is frozen. Leave"
            f" {'them' if len(idle) > 1 else 'it'} out of 'targets', and whatever uses the weight trains it densely."
        )
