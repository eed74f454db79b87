"""Which layers train in a subspace, and which of them read the same input."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from rso_ds.errors import RSOConversionError
from rso_ds.layers.bypass import weight_readers
from rso_ds.layers.stacked import StackedLinear, stacked_linears

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")

# Linear layers of the transformer blocks, by Hugging Face ``config.model_type``. Routers of
# mixture-of-experts models, poolers and task heads are left dense on purpose.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}

# Items of ``targets`` that stand for a layer by its place in the model: the method that returns it.
PLACES = {"embeddings": "get_input_embeddings", "head": "get_output_embeddings"}

# Siblings (children of one module) that are fed the same tensor, so that one P serves all.
SHARED_INPUT: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
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


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), a linear layer whose weight is stored [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module | StackedLinear) -> bool:
    return type(module) is nn.Linear or (isinstance(module, nn.Module) and is_conv1d(module))


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers of ``model`` that train in a subspace by ``targets``: ``select_targets`` without those left
    dense."""
    selected, left_dense = select_targets(model, targets)
    return [name for name in selected if name not in left_dense]


def select_targets(model: nn.Module, targets: str | Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(names of the layers of ``model`` that ``targets`` selects, in model order; those of them that cannot train in a
    subspace, since another module reads their weight, with the name of the function that does: ``weight_readers``).

    They are linear layers, experts stacked in one parameter, and the input embedding if ``targets`` has the item
    "embeddings". Raises ``RSOConversionError`` if nothing matches, if a pattern matches nothing or only layers that
    cannot train in a subspace, if 'default' is asked for a model type that has no entry in ``DEFAULT_TARGETS``, or if
    the embedding or head is of a kind that cannot train in a subspace.
    """
    names = _names(model)
    stacked = {name for name, module in names.items() if isinstance(module, StackedLinear)}
    candidates = [name for name, module in names.items() if name in stacked or is_linear(module)]
    if targets == "all-linear":
        output = _at_place(model, "head")
        selected = [n for n in candidates if names[n] is not output]
        left_dense = weight_readers(model, [n for n in selected if n not in stacked])
        _refuse_readers("all-linear", selected, left_dense)
        return selected, left_dense
    patterns: list[str] = []
    placed: set[str] = set()
    for item in ("default",) if targets == "default" else tuple(targets):
        if item in PLACES:
            placed.add(_name_at_place(model, item))
        else:
            patterns.extend(_defaults_for(model) if item == "default" else (item,))
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in candidates):
            raise RSOConversionError(
                f"'targets': no linear layer of {type(model).__name__} matches {pattern!r}."
                f" Its linear layers end in: {', '.join(_endings(candidates)) or '(it has none)'}."
                ' The token embedding is selected by the word "embeddings".'
            )
    chosen = {name for name in candidates if matches(name, patterns)} | placed
    selected = [name for name in names if name in chosen]
    left_dense = weight_readers(model, [n for n in selected if n not in stacked])
    for name in placed:
        _refuse_readers(name, [name], left_dense)
    for pattern in patterns:
        _refuse_readers(pattern, [name for name in candidates if matches(name, (pattern,))], left_dense)
    return selected, left_dense


def _names(model: nn.Module) -> dict[str, nn.Module | StackedLinear]:
    """Every module of ``model``, and every parameter that is stacked experts after the module that has it."""
    found: dict[str, nn.Module | StackedLinear] = {}
    for name, module in model.named_modules():
        found[name] = module
        found.update((f"{name}.{leaf}" if name else leaf, experts) for leaf, experts in stacked_linears(module).items())
    return found


def _refuse_readers(pattern: str, names: Sequence[str], left_dense: Mapping[str, str]) -> None:
    if names and all(name in left_dense for name in names):
        raise RSOConversionError(
            f"'targets': every layer that {pattern!r} selects ({name_some(names)}) stays dense, since"
            f" {left_dense[names[0]]} reads its weight by itself, which is W without B P^T. Select other layers (these"
            " train densely), or let that code call the layer."
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
            f" except the output head). Known types: {', '.join(sorted(DEFAULT_TARGETS))}."
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
    if not (type(module) is nn.Embedding if place == "embeddings" else is_linear(module)):
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
