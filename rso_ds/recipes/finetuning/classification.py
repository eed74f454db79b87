"""Sequence classification: accuracy and macro F1."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction, TrainingArguments

from rso_ds.errors import RSOConfigError
from rso_ds.models import ensure_padding
from rso_ds.recipes.finetuning.arguments import ClassificationArguments
from rso_ds.recipes.finetuning.base import Base
from rso_ds.recipes.finetuning.data import sample

_MAX_LENGTH = 128  # tokens of a text, where the flags say nothing


def trainer_parts(
    args: ClassificationArguments, training: TrainingArguments, quantised: bool, rows: Dataset, held_out: Dataset
) -> dict[str, Any]:
    """Arguments of Trainer. The labels are those of all ``rows``, however few are trained on.

    Raises ``RSOConfigError`` for one label only, a held-out label that no training row has, and a model or tokenizer
    that is not there or does not fit.
    """
    labels = sorted(set(rows[args.label_column]), key=_numbers_first)
    if len(labels) < 2:
        raise RSOConfigError(f"--label_column {args.label_column}: {args.data} has one label only, {labels[0]}.")
    ids = {label: i for i, label in enumerate(labels)}
    unknown = sorted(set(held_out[args.label_column]) - set(ids))
    if unknown:
        raise RSOConfigError(f"the held-out rows have the label '{unknown[0]}', which no training row has.")
    rows = sample(rows, args.max_rows, training.seed)
    base = Base(
        AutoModelForSequenceClassification, args, training, quantised,
        num_labels=len(labels), label2id=ids, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    tokenizer = base.tokenizer
    ensure_padding(tokenizer, args.model)  # the classification head of a decoder reads the last token before it
    base.fits(args.max_length)
    max_length = args.max_length or min(_MAX_LENGTH, base.start.positions or _MAX_LENGTH)
    model: Any = base.load()
    model.config.pad_token_id = tokenizer.pad_token_id

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[args.text_column]]
        if args.pair_column is not None:
            texts.append(batch[args.pair_column])
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        encoded["labels"] = [ids[label] for label in batch[args.label_column]]
        return encoded

    return {
        "model": model,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "train_dataset": rows.map(encode, batched=True, remove_columns=rows.column_names),
        "eval_dataset": held_out.map(encode, batched=True, remove_columns=held_out.column_names),
        "compute_metrics": scores,
    }


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    truth, chosen = np.asarray(prediction.label_ids), np.argmax(logits, axis=-1)
    f1 = []
    for label in np.union1d(truth, chosen):
        hits = int(((truth == label) & (chosen == label)).sum())
        f1.append(2 * hits / int((truth == label).sum() + (chosen == label).sum()))
    return {"accuracy": float((truth == chosen).mean()), "f1_macro": float(np.mean(f1))}


def _numbers_first(label: str) -> tuple[bool, float, str]:
    number = re.fullmatch("-?[0-9]+", label) is not None
    return (not number, float(label) if number else 0.0, label)
