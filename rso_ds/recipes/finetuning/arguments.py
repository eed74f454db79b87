"""What the flags of ``launch/finetune.py`` that are our own mean; ``parser`` reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from rso_ds.deepspeed_json import RSO_TYPE, optimizer_type
from rso_ds.errors import RSOConfigError
from rso_ds.models.fit import RESIZE_HELP
from rso_ds.models.remote_code import TRUST_HELP
from rso_ds.text import UTF8, check_encoding, read_json

METHODS = ("rso", "full", "lora")


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class FinetuneArguments:
    """What both tasks have in common."""

    model: str = field(metadata={"help": "Hugging Face folder or hub name; a LoRA adapter's is merged into its base."})
    data: str = field(metadata={"help": "csv, tsv, json, jsonl or parquet file, folder of them, or hub name[:subset]."})
    eval_data: str | None = _flag(
        None, "Held-out data, in the same forms (of a folder or hub name its validation split, else test, else all)."
    )
    eval_fraction: float = _flag(0.1, "Share of --data held out without --eval_data and a validation split.")
    encoding: str = _flag(UTF8, "How the text of csv, tsv and JSON files is encoded: utf-8, utf-16, cp1252, ...")
    max_rows: int | None = _flag(None, "Train on a random choice of so many rows (by --seed); default: all.")
    method: str | None = _flag(
        None, "rso, lora, or full (the optimizer that --optim names); default: rso, or what the DeepSpeed JSON selects."
    )
    rso: list[str] = field(
        default_factory=list,
        metadata={"help": "Keys of RSO without DeepSpeed: --rso rank_ratio=0.25 interval=10 (docs/configuration.md)."},
    )
    resize_embeddings: bool = _flag(False, RESIZE_HELP)
    lora_rank: int = _flag(16, "Rank of LoRA's adapters, on the layers that RSO would train in a subspace.")
    lora_alpha: float = _flag(32.0, "LoRA's scale is alpha / rank.")

    def __post_init__(self) -> None:
        if self.method not in (None, *METHODS):
            raise RSOConfigError(f"--method must be one of {', '.join(METHODS)}, got '{self.method}'.")
        check_encoding(self.encoding)
        if not 0 < self.eval_fraction < 1:
            raise RSOConfigError(f"--eval_fraction must lie between 0 and 1, got {self.eval_fraction}.")
        for name in ("max_rows", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RSOConfigError(f"--{name} must be at least 1, got {value}.")

    def columns(self, present: Sequence[str]) -> dict[str, str]:
        """Flag -> name of each column that the task reads from rows with the columns ``present``."""
        raise NotImplementedError

    def rso_keys(self) -> dict[str, Any]:
        """``--rso`` as keys and values; values are JSON where they can be read as such. Raises ``RSOConfigError``."""
        keys: dict[str, Any] = {}
        for item in self.rso:
            key, equals, text = item.partition("=")
            if not equals:
                raise RSOConfigError(f"--rso {item}: write KEY=VALUE.")
            try:
                keys[key] = json.loads(text)
            except ValueError:
                keys[key] = text
        return keys

    def settle_method(self, training: TrainingArguments) -> str:
        """The method, in agreement with the DeepSpeed JSON if there is one. Raises ``RSOConfigError``."""
        if training.deepspeed is None:
            method = self.method or "rso"
        else:
            config = training.deepspeed
            if not isinstance(config, dict):
                config = read_json(config, "--deepspeed")
            by_json = "rso" if optimizer_type(config) == RSO_TYPE else "full"
            method = self.method or by_json
            if (method == "rso") != (by_json == "rso"):
                raise RSOConfigError(
                    f"--method {method}, but the optimizer block of the DeepSpeed JSON selects"
                    f" {optimizer_type(config)}: with DeepSpeed the JSON chooses RSO."
                )
            if method == "rso" and self.rso:
                raise RSOConfigError("--rso is for runs without DeepSpeed: write these keys into the JSON's optimizer.")
        if method != "rso" and self.rso:
            raise RSOConfigError(f"--rso has no effect with --method {method}: remove it.")
        return method


@dataclass
class ClassificationArguments(FinetuneArguments):
    text_column: str = _flag("text", "Column of the text.")
    pair_column: str | None = _flag(None, "Column of a second text, for pairs.")
    label_column: str = _flag("label", "Column of the label; names and numbers both do.")
    max_length: int | None = _flag(
        None, "Longer texts are cut to so many tokens; default: 128, or the model's positions where these are fewer."
    )
    trust_remote_code: bool = _flag(False, TRUST_HELP)  # of causal models it is SFTConfig's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise RSOConfigError(f"--max_length must be at least 1, got {self.max_length}.")

    def columns(self, present: Sequence[str]) -> dict[str, str]:
        pair = {} if self.pair_column is None else {"--pair_column": self.pair_column}
        return {"--text_column": self.text_column, **pair, "--label_column": self.label_column}


@dataclass
class CausalArguments(FinetuneArguments):
    prompt_column: str = _flag("prompt", "Column of the prompt, on which there is no loss.")
    completion_column: str = _flag("completion", "Column of the completion.")
    separator: str = _flag("\n", "Put between prompt and completion.")
    messages_column: str = _flag(
        "messages", "Column of conversations (lists of role and content), where there is one; needs a chat template."
    )

    def columns(self, present: Sequence[str]) -> dict[str, str]:
        if self.messages_column in present:
            return {"--messages_column": self.messages_column}
        return {"--prompt_column": self.prompt_column, "--completion_column": self.completion_column}
