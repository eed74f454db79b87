"""Which layers train in a subspace, and which of them read the same input."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from rso_ds.errors import RSOConversionError

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


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the linear layers of ``model`` that ``targets`` selects, in model order.

    Raises ``RSOConversionError`` if nothing matches, if a pattern matches nothing, or if 'default' is
    asked for a model type that has no entry in ``DEFAULT_TARGETS``.
    """
    candidates = [name for name, module in model.named_modules() if is_linear(module)]
    if targets == "all-linear":
        output = _output_layer(model)
        return [n for n in candidates if model.get_submodule(n) is not output]
    patterns: list[str] = []
    for item in ("default",) if targets == "default" else tuple(targets):
        patterns.extend(_defaults_for(model) if item == "default" else (item,))
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in candidates):
            raise RSOConversionError(
                f"'targets': no linear layer of {type(model).__name__} matches {pattern!r}."
                f" Its linear layers end in: {', '.join(_endings(candidates)) or '(it has none)'}."
            )
    return [name for name in candidates if matches(name, patterns)]


def shared_input_key(name: str) -> tuple[str, tuple[str, ...]]:
    """(parent, names of the siblings that may share the input of layer ``name``)."""
    parent, _, leaf = name.rpartition(".")
    for siblings in SHARED_INPUT:
        if leaf in siblings:
            return parent, siblings
    return parent, (leaf,)


def _defaults_for(model: nn.Module) -> tuple[str, ...]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise RSOConversionError(
            f"'targets': no default for model type {model_type!r} ({type(model).__name__}). Name the layers,"
            ' for instance "targets": ["q_proj", "v_proj"], or use "all-linear" (every linear layer'
            f" except the output head). Known types: {', '.join(sorted(DEFAULT_TARGETS))}."
        )
    return DEFAULT_TARGETS[model_type]


def _output_layer(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _endings(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
