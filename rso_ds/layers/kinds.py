"""The kinds of ordinary layers that train in a subspace, and how an ordinary model stores the weight of each.

    kind            weight in the ordinary model   under the name
    "linear"        [out, in]                      layer.weight
    "embedding"     [vocabulary, hidden]           layer.weight
    "conv1d"        [in, out]                      layer.weight
    "experts"       [E, out, in]                   layer, a parameter of the module around it
    "experts_t"     [E, in, out]                   layer, so too

Here W is [out, in], or [E, out, in], of every kind.
"""

from __future__ import annotations

from torch import Tensor

STACKED = ("experts", "experts_t")
_TURNED = ("conv1d", "experts_t")


def is_turned(kind: str) -> bool:
    """Whether the ordinary weight has its two last dimensions the other way round than W."""
    return kind in _TURNED


def ordinary_name(layer: str, kind: str) -> str:
    """The name of the weight of ``layer`` in the ordinary model."""
    return layer if kind in STACKED else f"{layer}.weight" if layer else "weight"


def ordinary_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape of the ordinary weight for that of W, and the other way round."""
    return (*shape[:-2], shape[-1], shape[-2]) if is_turned(kind) else shape


def ordinary_weight(weight: Tensor, kind: str) -> Tensor:
    """W as the ordinary model has it, and the other way round: a view."""
    return weight.mT if is_turned(kind) else weight
