"""What a run starts from, found and checked before any data are prepared: pretrained weights or random ones."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from rso_ds.errors import RSOConfigError
from rso_ds.models.adapter import adapter_base, merged
from rso_ds.models.comparison import check_weights, skeleton
from rso_ds.models.configuration import model_config
from rso_ds.models.fit import grow_embeddings, learned_positions
from rso_ds.models.foreign import advice, looks_trained
from rso_ds.models.remote_code import loaded
from rso_ds.models.shapes import LLAMA_SHAPES, llama_config
from rso_ds.models.stored import LOADABLE, StoredWeights, has_weights, some, stored_weights


@dataclass(frozen=True)
class Start:
    """``name``: what --model says; ``base``: the model of an adapter, else ``name``. ``config``: None for a named
    shape, whose vocabulary is that of the tokenizer. ``weights``: None for random ones. ``new``: names that the weights
    do not have and that begin at random. ``positions``: how many the model has learned embeddings for, None if it
    computes them."""

    name: str
    base: str
    kind: Any = field(repr=False)
    config: Any = field(repr=False)
    weights: StoredWeights | None = field(repr=False)
    new: Sequence[str]
    positions: int | None
    trust_remote_code: bool

    def text(self) -> str:
        """The first line of a program."""
        if self.weights is None:
            return f"model: {self.name}, random weights"
        what = (
            f"the weights of {self.base} with the adapter {self.name} merged" if self.base != self.name else self.name
        )
        new = f"; new, with random weights: {some(self.new)}" if self.new else ""
        return f"model: {what}, pretrained ({self.weights.text()}){new}"

    def mark(self) -> str:
        """Equal where ranks start from the same configuration and the same tensors."""
        config = {} if self.config is None else self.config.to_dict()
        config.pop("_name_or_path", None)
        told = json.dumps(config, sort_keys=True, default=str)
        if self.weights is None:
            return f"random, {hashlib.sha256(told.encode()).hexdigest()[:16]}"
        return f"pretrained, {hashlib.sha256((told + self.weights.digest()).encode()).hexdigest()[:16]}"

    def build(self, rows: int, seq_len: int = 2048) -> PreTrainedModel:
        """The model in fp32, with embeddings for at least ``rows`` tokens, partitioned where ZeRO-3's configuration is
        alive. ``seq_len`` is of a named shape. Raises ``RSOConfigError`` if it cannot be loaded."""
        config = llama_config(self.name, rows, seq_len) if self.config is None else copy.deepcopy(self.config)
        if self.weights is None:
            text = config.get_text_config()
            text.vocab_size = max(rows, text.vocab_size)
            return random_model(config, self.kind, self.trust_remote_code)

        def pretrained() -> PreTrainedModel:
            model: PreTrainedModel
            model, info = self.kind.from_pretrained(
                self.base, config=config, dtype=torch.float32, trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )  # fmt: skip
            absent = sorted(set(info["missing_keys"]) - set(self.new))
            if absent and not _is_quantised(config):  # ZeRO-3 finds names by rules of its own
                raise RSOConfigError(
                    f"--model {self.name}: {len(absent):,} of its tensors have not been loaded ({some(absent)}): save"
                    " it again with save_pretrained, which writes the names that are looked for."
                )
            grow_embeddings(model, rows)
            return model if self.base == self.name else merged(model, self.name)

        # Under ZeRO-3 ranks load together, and the loss of one of them, a RuntimeError, is told by who waits for it.
        return loaded(pretrained, f"--model {self.name}", (RuntimeError,) if is_deepspeed_zero3_enabled() else ())


def find_start(
    name: str, kind: Any = AutoModelForCausalLM, init: str = "auto", trust_remote_code: bool = False,
    new_head: bool = False, quantised: bool = False, **changes: Any,
) -> Start:  # fmt: skip
    """What ``kind.from_pretrained(name)`` would start from; nothing but names and shapes is read.

    ``name`` as in ``model_config``, or the folder of a LoRA adapter with ``init`` "pretrained". ``init`` "auto":
    weights where there are some. ``new_head``: the task's head may be new. ``quantised``: a quantised model will do.
    ``changes``: attributes of the configuration.

    Raises ``RSOConfigError`` for an unknown name, for a folder that holds something like weights or a tokenizer but
    nothing that can be loaded, for files that are missing or damaged, and for weights of another model.
    """
    if name in LLAMA_SHAPES:
        if init == "pretrained":
            raise RSOConfigError(f"--model {name} is a shape without weights: give a folder or hub name that has some.")
        return Start(name, name, kind, None, None, (), None, trust_remote_code)
    base = adapter_base(name) if init == "pretrained" else name
    config = model_config(base, 0, 0, trust_remote_code, **changes)
    weights = None if begins_random(base, init) else stored_weights(base, config)
    if weights is None and init != "random":
        _refuse_without_weights(base, init)
    if weights is not None and _is_quantised(config):
        if not quantised:
            raise RSOConfigError(
                f"--model {name} is quantised ({_method(config)}), and what is trained is added to its weights, which"
                " would be rounded away: give the model before it was quantised."
            )
        return Start(name, base, kind, config, weights, (), None, trust_remote_code)
    model = loaded(lambda: skeleton(kind, config, trust_remote_code), f"--model {name}")
    new = () if weights is None else check_weights(base, model, weights, new_head)
    return Start(name, base, kind, config, weights, new, learned_positions(model), trust_remote_code)


def begins_random(name: str, init: str) -> bool:
    """Whether a run of ``find_start`` begins with random weights."""
    return name in LLAMA_SHAPES or init == "random" or (init == "auto" and not has_weights(name))


def random_model(
    config: Any, kind: Any = AutoModelForCausalLM, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of ``config`` with random weights; partitioned where a ZeRO-3 HfDeepSpeedConfig is alive."""
    model: PreTrainedModel = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model


def _is_quantised(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _method(config: Any) -> str:
    told = config.quantization_config
    return str(told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", "unknown"))


def _refuse_without_weights(name: str, init: str) -> None:
    folder = Path(name)
    found = looks_trained(folder) if folder.is_dir() else []
    if init == "auto" and folder.is_dir() and not found:
        return
    there = f", but {some(found)}" if found else ""
    mend = ""
    if init == "auto":
        mend = " To start from random weights all the same, give --init random (and --tokenizer)."
    raise RSOConfigError(
        f"--model {name} holds none of {', '.join(LOADABLE)}{there}: there are no weights that could be loaded."
        f"{advice(folder) if found else ''}{mend}"
    )
