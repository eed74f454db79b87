"""Whether stored weights are those of the model that config.json describes, name by name and shape by shape."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from rso_ds.errors import RSOConfigError
from rso_ds.models.stored import StoredWeights, some

# What wrappers put before the names of a model that was saved through them.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DDP",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
}


def skeleton(kind: Any, config: Any, trust_remote_code: bool) -> nn.Module:
    """The model of ``config`` on the meta device, whole even where ZeRO-3 is to partition it."""
    with _apart(), torch.device("meta"):
        model: nn.Module = kind.from_config(config, trust_remote_code=trust_remote_code)
    return model


def check_weights(name: str, model: Any, weights: StoredWeights, new_head: bool) -> list[str]:
    """Names of ``model``, a ``skeleton``, that ``weights`` do not have and are allowed not to: with ``new_head`` what
    lies outside the base model, and a pooler.

    transformers itself compares, so that tied tensors, conversions and what a class declares to be ignorable count as
    they do when it loads. Raises ``RSOConfigError`` for whatever else is missing, left over, or of another shape.
    """
    with _apart():
        try:
            _, info = type(model).from_pretrained(
                None, config=model.config, state_dict=dict(weights.tensors), device_map={"": "meta"},
                dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except RuntimeError:  # of its report, which is not shown
            raise RSOConfigError(
                f"--model {name}: its tensors cannot be made those of {type(model).__name__}: some that belong together"
                " (experts, parts of one matrix) are missing or of unequal shape."
            ) from None
    in_head = _head_of(model) if new_head else lambda key: False
    missing = sorted(info["missing_keys"])
    others = {"missing": [key for key in missing if not in_head(key)]}
    others["left over"] = sorted(key for key in info["unexpected_keys"] if not (new_head and _foreign(model, key)))
    shapes = sorted(info["mismatched_keys"])
    if any(others.values()):
        parts = [f"{len(names):,} {what} ({some(names)})" for what, names in others.items() if names]
        raise RSOConfigError(
            f"--model {name}: its weights are not those of the {type(model).__name__} that its config.json describes:"
            f" of {len(model.state_dict()):,} tensors, {' and '.join(parts)}.{_remedy(others['left over'])}"
        )
    if shapes:
        told = [f"{key} is {list(stored)}, and not {list(wanted)}" for key, stored, wanted in shapes]
        hint = " Give the config.json that belongs to these weights."
        if all(in_head(key) for key, _, _ in shapes):
            hint = f" Its head has other labels than the {model.config.num_labels} of --data: give the model from which"
            hint += " it was made."
        raise RSOConfigError(
            f"--model {name}: {len(shapes):,} tensors have another shape than its config.json says:"
            f" {'; '.join(told[:3])}{' and so on' if len(told) > 3 else ''}.{hint}"
        )
    _refuse_integers(name, model, weights)
    return missing


def _head_of(model: Any) -> Callable[[str], bool]:
    base = f"{model.base_model_prefix}."
    if not hasattr(model, model.base_model_prefix):
        return lambda key: False
    return lambda key: not key.startswith(base) or key.removeprefix(base).startswith("pooler.")


def _foreign(model: Any, key: str) -> bool:
    """Whether ``key`` belongs to another head: to no part of the base model, with its prefix or without."""
    base = getattr(model, model.base_model_prefix, model)
    first, _, rest = key.partition(".")
    if first == model.base_model_prefix:
        return rest.startswith("pooler.")
    wrapped = any(key.startswith(wrapper) for wrapper in _WRAPPERS)
    return not wrapped and first not in dict(base.named_children()) and first not in dict(base.named_parameters())


def _remedy(left_over: Sequence[str]) -> str:
    wrappers = (w for w in _WRAPPERS.items() if left_over and all(name.startswith(w[0]) for name in left_over))
    whose = next(wrappers, None)
    if any(".lora_A." in name or ".base_layer." in name for name in left_over):
        return " It holds adapters beside the model: merge them first (merge_and_unload) and save again."
    if whose is None:
        return " Give the folder as it was saved by save_pretrained, with the config.json that belongs to it."
    return (
        f" The names begin with '{whose[0]}', as {whose[1]} leaves them: save the model inside the wrapper, or cut that"
        " from the names."
    )


def _refuse_integers(name: str, model: nn.Module, weights: StoredWeights) -> None:
    wanted = model.state_dict()
    odd = sorted(
        key for key, tensor in weights.tensors.items()
        if key in wanted and wanted[key].is_floating_point() and not tensor.is_floating_point()
    )  # fmt: skip
    if odd:
        raise RSOConfigError(
            f"--model {name}: {len(odd):,} of its weights are integers ({some(odd)}), as quantisation leaves them, and"
            " its config.json does not say how they are meant: give the model before it was quantised."
        )


@contextmanager
def _apart() -> Iterator[None]:
    """Without transformers' report and progress bars, the random numbers of the caller, and ZeRO-3's partitioning."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    zero3 = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(zero3, "_hf_deepspeed_config_weak_ref", None)
    settings = None if reference is None else reference()
    if zero3 is not None:
        zero3.unset_hf_deepspeed_config()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if settings is not None and zero3 is not None:
            zero3.set_hf_deepspeed_config(settings)
