"""Instruction tuning of causal models by TRL's SFTTrainer: loss on completions, chat templates, packing."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM

from rso_ds.errors import RSOConfigError
from rso_ds.models import ensure_padding
from rso_ds.recipes.finetuning.arguments import CausalArguments
from rso_ds.recipes.finetuning.base import Base
from rso_ds.recipes.finetuning.data import sample


def sft_config() -> Any:
    return _trl("SFTConfig")


def sft_trainer() -> Any:
    return _trl("SFTTrainer")


def _trl(name: str) -> Any:
    try:
        import trl
    except ImportError:
        raise RSOConfigError("--task causal needs TRL: pip install 'rso_ds[finetune]'.") from None
    return getattr(trl, name)


def trainer_parts(
    args: CausalArguments, training: Any, quantised: bool, rows: Dataset, held_out: Dataset
) -> dict[str, Any]:
    """Arguments of SFTTrainer. Raises ``RSOConfigError`` for a missing chat template or end-of-text token, and a model
    or tokenizer that is not there or does not fit."""
    base = Base(AutoModelForCausalLM, args, training, quantised)
    tokenizer = base.tokenizer
    _special_tokens(tokenizer, args, training)
    if args.messages_column in rows.column_names:
        if tokenizer.chat_template is None and not training.chat_template_path:
            raise RSOConfigError(
                f"--messages_column {args.messages_column}: the tokenizer has no chat template, so give"
                " --chat_template_path."
            )
        if training.completion_only_loss and not training.assistant_only_loss:
            raise RSOConfigError("--completion_only_loss is for prompts and completions: use --assistant_only_loss.")
        shape = _conversations
    else:
        shape = _pairs
    base.fits(training.max_length)
    model = base.load()
    rows = sample(rows, args.max_rows, training.seed)
    return {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": shape(rows, args),
        "eval_dataset": shape(held_out, args),
    }


def _special_tokens(tokenizer: Any, args: CausalArguments, training: Any) -> None:
    for flag in ("eos_token", "pad_token"):
        token = getattr(training, flag)
        if token is not None and token not in tokenizer.get_vocab():
            raise RSOConfigError(f"--{flag} {token}: the tokenizer of --model {args.model} has no such token.")
    if tokenizer.eos_token is None and training.eos_token is None:
        raise RSOConfigError(
            f"the tokenizer of --model {args.model} has no end-of-text token, so that completions would not end: name"
            " one of its tokens with --eos_token."
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = training.eos_token
    ensure_padding(tokenizer, args.model)


def _conversations(rows: Dataset, args: CausalArguments) -> Dataset:
    return rows.select_columns([args.messages_column]).rename_columns({args.messages_column: "messages"})


def _pairs(rows: Dataset, args: CausalArguments) -> Dataset:
    def pair(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        return {
            "prompt": [f"{text}{args.separator}" for text in batch[args.prompt_column]],
            "completion": batch[args.completion_column],
        }

    return rows.map(pair, batched=True, remove_columns=rows.column_names)
