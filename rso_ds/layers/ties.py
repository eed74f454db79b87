"""Targets that have one weight between them: an embedding and the head tied to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from rso_ds.errors import RSOConversionError


def tied_targets(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """{name: the earlier one of ``names`` that has the same weight}.

    Raises ``RSOConversionError`` if a target's weight has a use outside ``names``, if tied targets are not an
    ``nn.Embedding`` and an ``nn.Linear``, or if ``model.config`` declares a tie that has not been made.
    """
    weights = {name: model.get_submodule(name).weight for name in names}
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for leaf, param in module._parameters.items():
            if param is not None:
                owners.setdefault(id(param), []).append(f"{module_name}.{leaf}" if module_name else leaf)
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, weight in weights.items():
        partners = [o for o in owners[id(weight)] if o != f"{name}.weight"]
        partners += [o for o in _declared(model, f"{name}.weight") if o not in partners]
        for partner in partners:
            other = partner.removesuffix(".weight")
            if other not in weights:
                raise RSOConversionError(
                    f"'targets': {name}.weight is tied to {partner}: one of them would train densely what the other"
                    " freezes. Select both if they are the input embedding and the output head"
                    ' ("targets": ["default", "embeddings", "head"] trains them as one), leave the layer out of'
                    " 'targets', or untie it (config.tie_word_embeddings = False) before conversion."
                )
            if weights[other] is not weight:
                raise RSOConversionError(
                    f"'targets': config.tie_word_embeddings ties {name}.weight to {partner}, but they are two"
                    " parameters: call model.tie_weights(), or set the key to False, before conversion."
                )
            if {type(model.get_submodule(n)) for n in (name, other)} != {nn.Embedding, nn.Linear}:
                raise RSOConversionError(
                    f"'targets': {name}.weight is tied to {partner}: only an embedding and a head can be tied and"
                    " train in a subspace. Leave both out of 'targets', or untie them before conversion."
                )
        if id(weight) in first:
            ties[name] = first[id(weight)]
        first.setdefault(id(weight), name)
    return ties


def _declared(model: nn.Module, weight_name: str) -> Iterator[str]:
    """Names of the parameters to which ``model.config`` ties ``weight_name``."""
    declared = getattr(model, "_tied_weights_keys", None)
    if isinstance(declared, dict) and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        for pair in declared.items():
            if weight_name in pair:
                yield pair[1 - pair.index(weight_name)]
