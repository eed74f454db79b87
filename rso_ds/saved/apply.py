"""Which Hugging Face modules become lean, and back.

A lean module is the same object with the same parameters, hooks and name; only its class is replaced by a
subclass of that class with another ``forward``. Taking the class back restores the stock module.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from rso_ds.errors import RSOConversionError
from rso_ds.saved.activations import activation, gated
from rso_ds.saved.kernels import liger_installed
from rso_ds.saved.loss import causal_lm_loss

# Classes of transformers with one and the same forward: (attribute of eps, offset added to the weight).
NORMS: dict[str, tuple[str, float]] = {
    "LlamaRMSNorm": ("variance_epsilon", 0.0),
    "MistralRMSNorm": ("variance_epsilon", 0.0),
    "Qwen2RMSNorm": ("variance_epsilon", 0.0),
    "Qwen3RMSNorm": ("variance_epsilon", 0.0),
    "GemmaRMSNorm": ("eps", 1.0),
    "Gemma2RMSNorm": ("eps", 1.0),
}
# down_proj(act_fn(gate_proj(x)) * up_proj(x))
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP")
# Activations that the gated MLPs may hold; those marked True keep more than their input in stock form.
ACTIVATION_CLASSES: dict[str, tuple[str, bool]] = {
    "SiLUActivation": ("silu", False),
    "GELUActivation": ("gelu", False),
    "GELUTanh": ("gelu_tanh", False),
    "NewGELUActivation": ("gelu_tanh", True),
    "FastGELUActivation": ("gelu_tanh", True),
    "QuickGELUActivation": ("quick_gelu", True),
}
# Causal language models whose loss is lm_head, then ForCausalLMLoss, with nothing in between.
CAUSAL_LMS = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM",
    "GPT2LMHeadModel", "OPTForCausalLM",
)  # fmt: skip


# What a rule proposes: (module, new forward, settings that the forward reads).
Plan = list[tuple[nn.Module, Any, dict[str, Any]]]


def apply_lean(model: nn.Module, pieces: str | Sequence[str]) -> dict[str, int]:
    """Make the modules of ``model`` lean, in place; returns how many modules each piece replaced.

    ``pieces``: "all" (whatever the model has), "none", or some of "norm", "activation", "loss" (each must
    find a module) and "liger" (liger-kernel's kernels on CUDA, where installed; demanded by name, the
    package must be there). Raises ``RSOConversionError`` where a demanded piece has nothing to act on.
    """
    if pieces == "none":
        return {}
    demanded = () if pieces == "all" else tuple(pieces)
    if "liger" in demanded and not liger_installed():
        raise RSOConversionError("'lean': \"liger\" needs the package liger-kernel: pip install 'rso_ds[liger]'.")
    liger = ("liger" in demanded or pieces == "all") and liger_installed()
    plans: dict[str, Plan] = {}
    for piece, rule in _RULES.items():
        if pieces != "all" and piece not in demanded:
            continue
        plans[piece] = [step for module in model.modules() for step in rule(module, liger)]
        if piece in demanded and not plans[piece]:
            raise RSOConversionError(
                f"'lean': nothing in {type(model).__name__} for {piece!r}: leave it out of the list, or use \"all\"."
            )
    for plan in plans.values():
        for module, forward, settings in plan:
            replace_forward(module, forward, settings)
    return {piece: len(plan) for piece, plan in plans.items()}


def replace_forward(module: nn.Module, forward: Any, settings: dict[str, Any]) -> None:
    """Let ``module`` compute with ``forward(self, ...)``, which finds ``settings`` in ``self._lean``, until
    ``remove_lean``. A module whose forward has been replaced gets the new settings alone."""
    if getattr(type(module), "_lean_forward", None) is not forward:
        module.__class__ = _lean_class(type(module), forward)  # type: ignore[arg-type]
    module.__dict__["_lean"] = settings


def pass_on(old: nn.Module, new: nn.Module) -> None:
    """Make ``new``, which takes the place of ``old``, lean if ``old`` is (a head trained in a subspace)."""
    if hasattr(type(old), "_lean_stock"):
        kind: Any = type(new)
        new.__class__ = _lean_class(kind, type(old)._lean_forward)  # type: ignore[attr-defined,assignment]
        new.__dict__["_lean"] = old.__dict__["_lean"]


def remove_lean(model: nn.Module) -> None:
    """Give every lean module its stock class again."""
    for module in model.modules():
        stock = getattr(type(module), "_lean_stock", None)
        if stock is not None:
            module.__class__ = stock
            module.__dict__.pop("_lean", None)


@cache
def _lean_class(stock: type, forward: Any) -> type:
    # The stock name stays: transformers writes it into saved configurations. The stock signature too:
    # Hugging Face's Trainer reads it to find the columns that a model takes.
    @wraps(stock.forward)  # type: ignore[attr-defined]
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A new object of this class (type(model).from_pretrained(...)) has not been made lean.
        return (stock.forward if self._lean is None else forward)(self, *args, **kwargs)  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # Pickle looks a class up by its name, and would find the stock one.
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _new_lean, (stock, forward), *state

    body = {
        "forward": run, "_lean": None, "_lean_stock": stock, "_lean_forward": forward, "__reduce_ex__": reduce,
        "__module__": stock.__module__,
    }  # fmt: skip
    made: Any = type(stock.__name__, (stock,), body)
    return made  # type: ignore[no-any-return]


def _new_lean(stock: type, forward: Any) -> Any:
    kind: Any = _lean_class(stock, forward)
    return kind.__new__(kind)


def _is(module: nn.Module, names: Sequence[str] | dict[str, Any]) -> bool:
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__ in names and not hasattr(kind, "_lean_stock")


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    from rso_ds.saved.norms import rms_norm

    return rms_norm(hidden_states, self.weight, **self._lean)


def _lean_norm(module: Any, liger: bool) -> Plan:
    if not _is(module, NORMS):
        return []
    attribute, offset = NORMS[type(module).__name__]
    return [(module, _norm_forward, {"eps": getattr(module, attribute), "offset": offset, "liger": liger})]


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), **self._lean))


def _activation_forward(self: Any, input: Tensor) -> Tensor:
    return activation(input, **self._lean)


def _lean_activation(module: Any, liger: bool) -> Plan:
    if _is(module, GATED_MLPS):
        kind, _ = ACTIVATION_CLASSES.get(type(module.act_fn).__name__, (None, False))
        return [(module, _gated_forward, {"kind": kind, "liger": liger})] if kind else []
    if _is(module, ACTIVATION_CLASSES):
        kind, keeps_more = ACTIVATION_CLASSES[type(module).__name__]
        return [(module, _activation_forward, {"kind": kind})] if keeps_more else []
    return []


def _head_forward(self: Any, hidden: Tensor, labels: Tensor | None = None, **loss_options: Any) -> Tensor:
    # The head computes the loss itself, so that ZeRO-3 gathers its weight around both.
    if labels is None and not loss_options:
        return self._lean_stock.forward(self, hidden)
    B = getattr(self, "B", None)  # of a head trained in a subspace
    P = None if B is None else self.projection()
    return causal_lm_loss(hidden, self.weight, self.bias, labels, B=B, P=P, **loss_options)


def _causal_lm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    kwargs.update(zip(self._lean["names"], args, strict=False))
    # What neither the blocks nor the lean loss know is for the stock loss: ignore_index, for one.
    unknown = set(kwargs) - self._lean["known"]
    some = kwargs.get("logits_to_keep")
    wants_logits = isinstance(some, Tensor) or some or kwargs.get("return_dict") is False or unknown
    no_labels = kwargs.get("labels") is None and kwargs.get("shift_labels") is None
    if not self.training or no_labels or wants_logits:
        return self._lean_stock.forward(self, **kwargs)
    options = {k: kwargs.pop(k) for k in ("labels", "shift_labels", "num_items_in_batch") if k in kwargs}
    labels = options.pop("labels", None)
    kwargs.pop("logits_to_keep", None)
    outputs = self.base_model(**kwargs)
    loss = self.lm_head(outputs.last_hidden_state, labels=labels, **options)
    return CausalLMOutputWithPast(
        loss=loss,
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def _lean_loss(module: Any, liger: bool) -> Plan:
    if not _is(module, CAUSAL_LMS) or type(module.lm_head) is not nn.Linear:
        return []
    if getattr(module, "loss_type", None) not in (None, "ForCausalLM") or "_loss_function" in vars(module):
        return []  # the caller has set a loss of his own
    from transformers.utils import TransformersKwargs

    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
    known = {*names, "shift_labels", "num_items_in_batch", *TransformersKwargs.__annotations__}
    return [
        (module.lm_head, _head_forward, {}),
        (module, _causal_lm_forward, {"names": names, "known": known}),
    ]


_RULES = {"norm": _lean_norm, "activation": _lean_activation, "loss": _lean_loss}
