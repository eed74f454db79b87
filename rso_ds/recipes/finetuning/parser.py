"""Flags of ``launch/finetune.py``: our own, and all of TrainingArguments or SFTConfig."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from transformers import HfArgumentParser, TrainingArguments

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.finetuning.arguments import CausalArguments, ClassificationArguments, FinetuneArguments
from rso_ds.recipes.finetuning.causal import sft_config
from rso_ds.text import read_json

TASKS = ("classification", "causal")


def _json_of(deepspeed: str) -> str:
    """The DeepSpeed JSON itself: TrainingArguments cannot read a file with a byte order mark."""
    if deepspeed.lstrip().startswith("{"):
        return deepspeed.lstrip()
    config = read_json(deepspeed, "--deepspeed")
    if not isinstance(config, dict):
        raise RSOConfigError(f"--deepspeed {deepspeed} must hold a JSON object.")
    return json.dumps(config)


def parse_arguments(argv: Sequence[str]) -> tuple[FinetuneArguments, TrainingArguments]:
    """Ours, with TrainingArguments for classification and TRL's SFTConfig for causal models.

    Raises ``RSOConfigError`` for a bad value or an unknown flag.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--task", choices=TASKS, required=not {"-h", "--help"} & set(argv), default=TASKS[0])
    first.add_argument("--deepspeed")
    task, rest = first.parse_known_args(argv)
    if task.deepspeed is not None:
        rest += ["--deepspeed", _json_of(task.deepspeed)]
    if task.task == "classification":
        parser = HfArgumentParser((ClassificationArguments, TrainingArguments))  # type: ignore[arg-type]
    else:
        parser = HfArgumentParser((CausalArguments, sft_config()))  # type: ignore[arg-type]
    parser.prog, parser.description = "finetune.py --task {classification,causal}", f"Flags of --task {task.task}."
    if "--output_dir" not in " ".join(rest) and "--output-dir" not in " ".join(rest):
        rest += ["--output_dir", "runs/finetune"]
    try:
        ours, training, *unknown = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    except ValueError as error:  # TrainingArguments' own checks
        raise RSOConfigError(str(error)) from None
    if unknown and unknown[-1]:
        raise RSOConfigError(
            f"unknown flag or value: {' '.join(unknown[-1])}. --task {task.task} --help lists the flags."
        )
    return ours, training
