"""What a linear layer is, and which ones can train in a subspace."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy as _is_lazy

# Subclasses whose own forward computes what nn.Linear's does: (module, class).
_EQUIVALENT = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), a linear layer whose weight is stored [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear``, its subclasses and ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_lazy(module: nn.Module) -> bool:
    """True for an ``nn.LazyLinear`` that has not seen its input."""
    weight = module._parameters.get("weight")
    return weight is not None and _is_lazy(weight)


def obstacle(module: nn.Module) -> str | None:
    """Why a linear layer cannot train in a subspace; None if it can.

    A subclass of ``nn.Linear`` can if it computes what ``nn.Linear`` does with a weight and a bias alone.
    """
    kind = type(module)
    if "forward" in vars(module):
        return "other code has replaced the forward of this one layer"
    if module._parameters.get("weight") is None:
        return "its weight is computed from other parameters (weight_norm, torch.nn.utils.parametrize)"
    held = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if held:
        return f"its class, {kind.__name__}, holds {', '.join(sorted(held))} besides weight and bias"
    own = isinstance(module, nn.Linear) and not {kind.forward, kind.__call__} <= {nn.Linear.forward, nn.Linear.__call__}
    if own and (kind.__module__, kind.__name__) not in _EQUIVALENT:
        return f"its class, {kind.__name__}, is a subclass of nn.Linear whose own forward may compute something else"
    return None
