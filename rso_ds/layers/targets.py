"""Which layers train in a subspace, and which of them read the same input."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from rso_ds.errors import RSOConversionError
from rso_ds.layers.bypass import weight_readers
from rso_ds.layers.default_targets import DEFAULT_TARGETS
from rso_ds.layers.left_dense import left_dense
from rso_ds.layers.linears import is_lazy, is_linear, obstacle
from rso_ds.layers.stacked import Ordinary, StackedLinear, ordinary_layer, stacked_linears

# Items of ``targets`` that stand for a layer by its place in the model: the method that returns it.
PLACES = {"embeddings": "get_input_embeddings", "head": "get_output_embeddings"}

# Siblings (children of one module) that are fed the same tensor, so that one P serves all. In cross attention query
# has another input: it has the same P, and a z of its own (``rso_ds.layers.shared_input``).
SHARED_INPUT: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value", "conv_out_layer"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("pos_proj", "pos_q_proj"),
    ("pos_key_proj", "pos_query_proj"),
    ("q_head", "k_head", "v_head"),
)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if ``name`` (dotted) is, or ends in, one of the patterns; ``*``, ``?`` and ``[...]`` are globs."""
    for pattern in patterns:
        if any(ch in pattern for ch in "*?["):
            if fnmatch.fnmatchcase(name, pattern):
                return True
        elif name == pattern or name.endswith("." + pattern):
            return True
    return False


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers of ``model`` that train in a subspace by ``targets``: ``select_targets`` without those left
    dense."""
    selected, dense = select_targets(model, targets)
    return [name for name in selected if name not in dense]


def select_targets(model: nn.Module, targets: str | Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(names of the layers of ``model`` that ``targets`` selects, in model order; {name: why} for those of
    them that stay dense).

    They are linear layers (of subclasses of ``nn.Linear`` too), experts stacked in one parameter, and the input
    embedding if ``targets`` has the item "embeddings". A layer stays dense if it cannot train in a subspace
    (``obstacle``, ``weight_readers``), or if "default" or "all-linear" alone selects it and it is a head, a pooler or a
    router (``left_dense``).

    Raises ``RSOConversionError`` if nothing matches, if a pattern matches nothing or only layers that stay dense, if
    'default' is asked for a model type that has no entry in ``DEFAULT_TARGETS``, if a layer is lazy, or if the
    embedding or head is of a kind that cannot train in a subspace.
    """
    layers = _layers(model)
    candidates = [name for name, layer in layers.items() if isinstance(layer, StackedLinear) or is_linear(layer)]
    if not candidates:
        raise RSOConversionError(f"'targets': {type(model).__name__} has no linear layer (nn.Linear, Conv1D).")
    patterns: list[str] = []
    placed: set[str] = set()
    by_rule = set(candidates) if targets == "all-linear" else set()
    for item in () if targets == "all-linear" else ("default",) if targets == "default" else tuple(targets):
        if item in PLACES:
            placed.add(_name_at_place(model, item))
        elif item == "default":
            by_rule = _defaults(model, candidates)
            by_rule |= {name for name in candidates if isinstance(layers[name], StackedLinear)}
        else:
            patterns.append(item)
    matched = {pattern: [name for name in candidates if matches(name, (pattern,))] for pattern in patterns}
    for pattern, found in matched.items():
        if not found:
            raise _nothing_matches(model, candidates, repr(pattern))
    named = placed.union(*matched.values())
    selected = [name for name in layers if name in named | by_rule]
    dense = _why_dense(model, selected, by_rule - named)
    asked = {name: [name] for name in placed} | matched
    asked["all-linear" if targets == "all-linear" else "default"] = [n for n in selected if n in by_rule]
    for pattern, names in asked.items():
        _refuse_all_dense(pattern, names, dense)
    return selected, dense


def _layers(model: nn.Module) -> dict[str, Ordinary]:
    """Every module of ``model``, and every parameter that is stacked experts after the module that has it."""
    found: dict[str, Ordinary] = {}
    for name, module in model.named_modules():
        found[name] = module
        found.update((f"{name}.{leaf}" if name else leaf, experts) for leaf, experts in stacked_linears(module).items())
    return found


def _why_dense(model: nn.Module, selected: Sequence[str], by_rule: Collection[str]) -> dict[str, str]:
    found = {name: ordinary_layer(model, name) for name in selected}
    modules = {name: layer for name, layer in found.items() if isinstance(layer, nn.Module)}
    lazy = [name for name, module in modules.items() if is_lazy(module)]
    if lazy:
        raise RSOConversionError(
            f"'targets': the size of {name_some(lazy)} is not known before its first input (nn.LazyLinear): run one"
            " batch through the model before conversion."
        )
    obstacles = {name: obstacle(module) for name, module in modules.items() if is_linear(module)}
    dense = {name: why for name, why in obstacles.items() if why is not None}
    dense |= left_dense(model, [name for name in modules if name in by_rule])
    for name, reader in weight_readers(model, [name for name in modules if name not in dense]).items():
        dense[name] = f"{reader} reads its weight by itself, which would be W without B P^T"
    return {name: dense[name] for name in selected if name in dense}


def describe_dense(dense: Mapping[str, str]) -> str:
    """``dense`` ({name: why}) in a sentence, the names of one reason together."""
    names: dict[str, list[str]] = {}
    for name, why in dense.items():
        names.setdefault(why, []).append(name)
    return "; ".join(f"{name_some(found)}: {why}" for why, found in names.items())


def _refuse_all_dense(pattern: str, names: Sequence[str], dense: Mapping[str, str]) -> None:
    if names and all(name in dense for name in names):
        raise RSOConversionError(
            f"'targets': every layer that {pattern!r} selects stays dense:"
            f" {describe_dense({name: dense[name] for name in names})}. Select other layers: these train densely."
        )


def _defaults(model: nn.Module, candidates: Sequence[str]) -> set[str]:
    # Not every model of a type has all of them: T5 is gated or not, DeepSeek has a low-rank query or not.
    patterns = _defaults_for(model)
    found = {name for name in candidates if matches(name, patterns)}
    if not found:
        raise _nothing_matches(model, candidates, f"the default of its model type ({', '.join(patterns)})")
    return found


def _nothing_matches(model: nn.Module, candidates: Sequence[str], what: str) -> RSOConversionError:
    return RSOConversionError(
        f"'targets': no linear layer of {type(model).__name__} matches {what}."
        f" Its linear layers end in: {', '.join(_endings(candidates))}."
        ' The token embedding is selected by the word "embeddings".'
    )


def name_some(names: Sequence[str], most: int = 6) -> str:
    """``names`` in a sentence, not more than ``most`` of them."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def shared_input_key(name: str) -> tuple[str, tuple[str, ...]]:
    """(parent, names of the siblings that may share the input of layer ``name``)."""
    parent, _, leaf = name.rpartition(".")
    for siblings in SHARED_INPUT:
        if leaf in siblings:
            return parent, siblings
    return parent, (leaf,)


def _defaults_for(model: nn.Module) -> tuple[str, ...]:
    model_type = _type_of(model)
    if model_type not in DEFAULT_TARGETS:
        raise RSOConversionError(
            f"'targets': no default for model type {model_type!r} ({type(model).__name__}). Name the layers,"
            ' for instance "targets": ["q_proj", "v_proj"], or use "all-linear" (every linear layer'
            f" except heads, poolers and routers). Known types: {', '.join(sorted(DEFAULT_TARGETS))}."
        )
    return DEFAULT_TARGETS[model_type]


def _type_of(model: nn.Module) -> str | None:
    """Hugging Face's type of ``model``, or of the one such model inside it (Lightning's modules hold theirs)."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if model_type is not None and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found[name] = model_type
    return next(iter(found.values())) if len(found) == 1 else None


def _at_place(model: nn.Module, place: str) -> nn.Module | None:
    getter = getattr(model, PLACES[place], None)
    try:
        return getter() if callable(getter) else None
    except NotImplementedError:  # transformers: this model has no such layer
        return None


def _name_at_place(model: nn.Module, place: str) -> str:
    module = _at_place(model, place)
    name = next((n for n, m in model.named_modules() if m is module), None)
    if module is None or name is None:
        raise RSOConversionError(
            f"'targets': {place!r}: {type(model).__name__}.{PLACES[place]}() gives no layer of the model: leave"
            f' {place!r} out of the list, or name a linear layer by a glob ("*{place}").'
        )
    wanted = "nn.Embedding" if place == "embeddings" else "nn.Linear or Conv1D"
    if not (type(module) is nn.Embedding if place == "embeddings" else is_linear(module) and obstacle(module) is None):
        raise RSOConversionError(
            f"'targets': {place!r}: {name} is of class {type(module).__name__} and only {wanted} itself can train in a"
            f" subspace: leave {place!r} out of the list."
        )
    for option, off in (("sparse", False), ("max_norm", None), ("scale_grad_by_freq", False)):
        if getattr(module, option, off) != off:
            raise RSOConversionError(
                f"'targets': 'embeddings': {name} has {option}={getattr(module, option)!r}, which a subspace does not"
                f" follow. Build the embedding with {option}={off} (the gradient of B is dense, and only rank/hidden"
                " of W's), or leave 'embeddings' out of the list."
            )
    return name


def _endings(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
