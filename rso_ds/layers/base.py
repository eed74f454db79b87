"""What all layers that train in a random subspace have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rso_ds.config import RSOConfig
from rso_ds.errors import RSOUnsupportedError
from rso_ds.layers.kinds import ordinary_name, ordinary_weight
from rso_ds.layers.partitioned import is_partitioned, local_part, partition_as
from rso_ds.layers.state_dict import effective_weight, zero_b
from rso_ds.subspace import Subspace


class SubspaceLayer(nn.Module):
    """A layer with the effective weight W + B P^T. What it computes with it is for the subclass to say.

    Parameters of the module:
        weight [out, in]: W, frozen; only a subspace boundary changes it.
        B [out, rank]: trainable, 0 at the start of every subspace.
        bias [out] or None: trained densely.
    Of E stacked experts weight is [E, out, in] and B [E, out, rank]: E * out ``rows`` that have one P.
    ``subspace`` holds P [in, rank]. Boundary, engines, checkpoints and the account know a layer by these
    attributes alone. Tied layers have one weight, one B and one subspace between them.

    ``state_dict`` gives the ordinary layer's entries, with the effective weight and without B; ``load_state_dict``
    takes them, and sets B to zero. (A state that has a B, as rso_ds wrote it once, is loaded as it is.)
    """

    form = "two_path"  # or "folded": between two steps W holds B P^T and B is 0
    kind: str  # of the ordinary layer: rso_ds.layers.kinds
    weight: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    was_meta = False  # memory has been given to it since, which somebody has to fill
    was_loaded = ""  # "dense" or "raw" (with a B): load_state_dict was called since the optimizer last looked
    converted_with: RSOConfig | None = None
    tied_to: SubspaceLayer | None = None  # held past nn.Module, whose child it is not
    _copied: int | None = None  # in a deep copy, the version of its B then

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        in_features: int,
        out_features: int,
        subspace: Subspace,
        B: nn.Parameter | None = None,
        experts: int | None = None,
    ) -> None:
        """``B``: that of the layer to which this one is tied; a new one, zero, if None. ``experts``: E of stacked
        experts, else None."""
        super().__init__()
        self.experts = experts
        self.in_features = in_features
        self.out_features = out_features
        self.subspace = subspace
        self.weight = weight
        self.weight.requires_grad_(False)
        self.bias = bias
        if B is None:
            shape = (*(() if experts is None else (experts,)), out_features, subspace.rank)
            B = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            B = partition_as(B, weight)
        self.B = B

    @property
    def rows(self) -> int:
        """Rows of W, and of B, over all experts."""
        return self.out_features * (self.experts or 1)

    def reset_parameters(self) -> None:
        """W and bias as the ordinary layer begins, B zero: for models made on the meta device."""
        raise NotImplementedError

    def projection(self) -> Tensor:
        """P [in, rank] in W's dtype and on its device, or its coordinates [rank]."""
        if self._copied is not None:
            self._refuse_averages()
        return self.subspace.projection(self.weight.device, self.weight.dtype)

    def current_projection(self) -> Tensor:
        """P as the last forward pass used it, whose dtype may be another than that of W at rest (FSDP2)."""
        if self._copied is not None:
            self._refuse_averages()
        return self.subspace.current(self.weight.device, self.weight.dtype)

    def stock(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """The ordinary module with this ``weight`` [out, in] and ``bias``."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.weight.is_meta:
            # Whatever the memory held. B starts at zero; W is for its owner to fill, and must not pass for filled.
            with torch.no_grad():
                local_part(self.B).zero_()
                local_part(self.weight).fill_(torch.nan)
            self.was_meta = True
        if self._copied is not None:
            self._copied = self.B._version
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SubspaceLayer:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        made._copied = made.B._version
        return made

    def _refuse_averages(self) -> None:
        # Who averages the parameters of models (AveragedModel, EMA callbacks) writes into a deep copy.
        if self.B._version != self._copied and self.B.any():
            raise RSOUnsupportedError(
                "the B of a copied model has been written to, as averages of weights (AveragedModel, EMA) do: B of"
                ' different subspaces cannot be averaged. Train with "form": "folded", where W holds everything'
                " between two steps, or average rso_ds.checkpoint.dense_state_dict(model)."
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "B"]
        name = ordinary_name(prefix.removesuffix("."), self.kind)
        shown: Tensor = destination[prefix + "weight"]  # W itself if B is zero, detached or not as was asked for
        if name != prefix + "weight":
            del destination[prefix + "weight"]
        if is_partitioned(self.weight):
            destination[name] = shown  # an empty place-holder, as of any parameter under ZeRO-3
            return
        weight = effective_weight(self.weight, self.B, self.current_projection, self.subspace.draw)
        destination[name] = ordinary_weight(shown if weight is self.weight else weight, self.kind)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        weight, raw = state_dict.get(prefix + "weight"), prefix + "B" in state_dict
        if weight is not None and not raw:
            state_dict = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
            weight = state_dict[prefix + "weight"] = ordinary_weight(weight, self.kind)
            state_dict[prefix + "B"] = zero_b(self.B, weight)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self.was_loaded = "raw" if raw else "dense"
        if self._copied is not None:
            self._copied = self.B._version

    def detach(self) -> None:
        """Take off what conversion has hung on other modules for this layer."""


def subspace_modules(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer]]:
    """(name, module) of every RSO module of ``model``, in model order; tied ones are several."""
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLayer):
            yield name, module


def rso_layers(model: nn.Module) -> Iterator[tuple[str, SubspaceLayer]]:
    """(name, layer) of every RSO layer of ``model``, in model order: each B once, under its first name."""
    seen: set[int] = set()
    for name, module in subspace_modules(model):
        if id(module.B) not in seen:
            seen.add(id(module.B))
            yield name, module
