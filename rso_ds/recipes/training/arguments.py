"""Flags of the main job. Every flag can also stand in a YAML file (``--config``); flags win."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rso_ds import defaults
from rso_ds.config import unknown_key
from rso_ds.errors import RSOConfigError
from rso_ds.models.fit import RESIZE_HELP
from rso_ds.models.remote_code import TRUST_HELP
from rso_ds.recipes.data.mixture import names_and_weights
from rso_ds.recipes.training import schedule
from rso_ds.text import check_encoding, read_text


def _flag(default: Any, help: str, **options: Any) -> Any:
    metadata = {"help": help, **options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainArguments:
    """Settings of one training run. A value of None means: what the DeepSpeed JSON says, or a default."""

    deepspeed: str = _flag("ds_configs/rso.json", "DeepSpeed JSON; its optimizer block chooses RSO or another.")
    engine: str = _flag(
        "deepspeed",
        "What trains: DeepSpeed, DistributedDataParallel or FSDP2; the last two take optimizer, schedule, clipping,"
        " accumulation and bf16 from the same JSON and ignore zero_optimization.",
        choices=("deepspeed", "ddp", "fsdp2"),
    )
    replicas: int = _flag(
        1, "With --engine fsdp2: copies of the sharded model (HSDP); one a node keeps W's gathers inside nodes."
    )
    timeout: int = _flag(600, "Seconds that a collective waits for a silent rank before the run ends with an error.")
    set: list[str] = _flag(
        [], "Override a JSON key: --set optimizer.params.interval=50 (repeatable).", metavar="KEY=VALUE"
    )
    model: str = _flag("llama-9m", "Named shape (llama-9m ... llama-7b), Hugging Face folder, or hub name.")
    init: str = _flag(
        "auto", "Weights of --model: random, pretrained, or whichever it has.", choices=("auto", "random", "pretrained")
    )
    resize_embeddings: bool = _flag(False, RESIZE_HELP)
    trust_remote_code: bool = _flag(False, TRUST_HELP)
    data: list[str] = _flag(
        ["stdlib"],
        "Text, jsonl, json, csv, tsv or parquet file (.xz/.gz/.zst/.bz2), pattern, folder, hub dataset"
        " [owner/]name[@revision][:subset[:split]], or 'stdlib'. Repeat it for several, with weights for a mixture:"
        " --data a:0.7 --data b:0.3.",
        metavar="NAME[:WEIGHT]",
    )
    val_data: str | None = _flag(None, "Held-out data; default: the validation split of --data, or part of it.")
    val_fraction: float = _flag(
        0.02, "Share of --data held out where it has no validation split and there is no --val-data; 0: none."
    )
    text_key: str = _flag("text", "Key or column of the text in jsonl, json, csv and parquet.")
    encoding: str = _flag("utf-8", "Of text, json and csv files: utf-16, cp1252, ...")
    stream: str = _flag(
        "auto",
        "Read and tokenise while training, not before: yes, no, or auto: hub datasets, mixtures and more than 1 GiB.",
        choices=("auto", "yes", "no"),
    )
    data_workers: int = _flag(1, "Processes a rank that read a stream; 0: a thread of the training process.")
    tokenizer: str | None = _flag(None, "Folder or hub name; default: a BPE trained on the data.")
    vocab_size: int = _flag(4096, "Size of the trained BPE.")
    seq_len: int = _flag(256, "Tokens a sequence.")
    global_batch: int | None = _flag(None, "Sequences an optimizer step, over all ranks; default: about 32.")
    micro_batch: int | None = _flag(None, "Sequences a rank and forward pass; default: at most 16.")
    max_steps: int | None = _flag(None, "Optimizer steps; default: from --train-tokens.")
    train_tokens: int | None = _flag(None, "Tokens to train on; default: one epoch.")
    learning_rate: float | None = _flag(None, "Overrides the JSON's lr.")
    weight_decay: float | None = _flag(None, "Overrides the JSON's weight_decay.")
    clip: float | None = _flag(None, "Overrides the JSON's gradient_clipping.")
    lr_schedule: str | None = _flag(
        None,
        f"After a linear warm-up: cosine, wsd (constant, then a linear decay to the end) or constant; default:"
        f" {defaults.SCHEDULE}, or the JSON's 'scheduler' block where it has one.",
        choices=schedule.KINDS,
    )
    warmup: float | None = _flag(None, f"Warm-up steps as a share of all steps; default: {defaults.WARMUP:g}.")
    decay_share: float | None = _flag(
        None, f"Of wsd: steps of the decay as a share of all steps; default: {defaults.DECAY_SHARE:g}."
    )
    final_lr: float | None = _flag(
        None, f"Learning rate at the end of cosine and wsd, as a share of the peak; default: {defaults.FINAL_LR:g}."
    )
    precision: str = _flag(
        "auto", "auto: bf16 on GPUs that have it, else fp32.", choices=("auto", "fp32", "bf16", "fp16")
    )
    gradient_checkpointing: bool = _flag(False, "Recompute each block in backward.")
    profile_memory: bool = _flag(
        False, "Measure the memory of the second step, beside the account's model; writes memory.json."
    )
    seed: int = _flag(0, "Seed of the weights and of the order of the data.")
    output: str = _flag("runs/rso", "Folder of metrics, checkpoints and the final model.")
    cache: str = _flag("~/.cache/rso_ds", "Folder of trained tokenizers and token files.")
    log_interval: int = _flag(10, "Steps between lines of metrics.jsonl.")
    eval_interval: int = _flag(
        100,
        "Steps between validations; there is one before and one after training too. 0: only those two, and rso-ds"
        " evaluate --follow does the others beside the run, from its checkpoints.",
    )
    eval_tokens: int = _flag(100_000, "At most so many held-out tokens a validation.")
    save_interval: int = _flag(500, "Steps between checkpoints; 0: only at the end.")
    max_skipped: int = _flag(
        25, "End with an error after so many steps in a row whose loss or gradients are not finite."
    )
    keep_last: int = _flag(2, "Newest checkpoints to keep; 0: all.")
    keep_best: int = _flag(0, "Besides, keep the so many of all with the lowest held-out loss.")
    async_save: bool = _flag(
        False, "Write checkpoints in the background (a copy in host memory; not DeepSpeed's AdamW)."
    )
    resume: str | None = _flag(
        None, "Checkpoint, or folder of checkpoints, to go on from; 'auto': the output folder's latest, if any."
    )
    resume_schedule: str = _flag(
        "stretch",
        "Of a resumed run with another number of steps: the schedule over all of them, or continue the old one, whose"
        " final rate then stays.",
        choices=("stretch", "continue"),
    )
    resume_new_batch: bool = _flag(
        False,
        "Allow a resumed run another batch: the data go on where they stopped, steps are counted on, and the learning"
        " rate is not scaled.",
    )
    prompt: str = _flag("", "Start of the sample printed at the end; default: the beginning of held-out text.")
    sample_tokens: int = _flag(60, "Length of that sample; 0: none.")

    def __post_init__(self) -> None:
        for key, minimum in (
            ("seq_len", 2), ("global_batch", 1), ("micro_batch", 1), ("max_steps", 1), ("train_tokens", 1),
            ("log_interval", 1), ("eval_interval", 0), ("eval_tokens", 1), ("save_interval", 0),
            ("keep_last", 0), ("keep_best", 0), ("max_skipped", 1),
            ("vocab_size", 257), ("replicas", 1), ("timeout", 1), ("seed", 0), ("sample_tokens", 0),
            ("data_workers", 0),
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise RSOConfigError(f"--{_dashed(key)} must be an integer of at least {minimum}, got {value!r}.")
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices and (value is not None or f.default is not None):
                raise RSOConfigError(f"--{_dashed(f.name)} must be one of {', '.join(choices)}, got {value!r}.")
            if f.type == "bool" and not isinstance(value, bool):
                raise RSOConfigError(f"--{_dashed(f.name)} must be true or false, got {value!r}.")
            if str(f.type).startswith("str") and not isinstance(value, str) and (value is not None or f.type == "str"):
                raise RSOConfigError(f"--{_dashed(f.name)} must be a text, got {value!r}.")
        for key, what in (("set", "KEY=VALUE"), ("data", "names")):
            value = getattr(self, key)
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise RSOConfigError(f"--{key} must be a list of {what}, got {value!r}.")
        if not self.data:
            raise RSOConfigError("--data must name something to train on.")
        check_encoding(self.encoding)
        if names_and_weights(self.data)[1] is not None and self.stream == "no":
            raise RSOConfigError("--stream no: a mixture with weights is streamed; leave out the weights, or the flag.")
        for key in ("learning_rate", "weight_decay", "clip"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise RSOConfigError(f"--{_dashed(key)} must be a number of at least 0, got {value!r}.")
        for key, top in (("warmup", 1.0), ("decay_share", 1.0), ("final_lr", 1.0), ("val_fraction", 0.5)):
            value = getattr(self, key)
            if value is None and key != "val_fraction":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= top:
                raise RSOConfigError(f"--{_dashed(key)} must lie in [0, {top:g}], got {value!r}.")
        if self.max_steps is not None and self.train_tokens is not None:
            raise RSOConfigError("--max-steps and --train-tokens are both set: keep one of them.")

        if self.resume is None:
            schedule.shape(self.lr_schedule, self.warmup, self.decay_share, self.final_lr)
        if self.keep_best and not self.eval_interval:
            raise RSOConfigError(
                "--keep-best chooses by the held-out loss, which --eval-interval 0 leaves to another process: set one."
            )

    def save(self, path: Path) -> None:
        """Write all settings as YAML that ``--config`` reads back."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None = None) -> TrainArguments:
    """Flags over YAML over defaults. Raises ``RSOConfigError`` on an unknown or ill-typed YAML key."""
    fields = {f.name: f for f in dataclasses.fields(TrainArguments)}
    parser = argparse.ArgumentParser(
        description="Pre-train or fine-tune a causal language model; the DeepSpeed JSON chooses the optimizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="YAML file with any of these settings")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    for name, f in fields.items():
        options: dict[str, Any] = {k: v for k, v in f.metadata.items() if k != "help"}
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        options["help"] = f"{f.metadata['help']} [{default}]".replace("%", "%%")
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            options["action"] = "append"
        else:
            options["type"] = _scalar_type(str(f.type))
        parser.add_argument(f"--{_dashed(name)}", dest=name, **options)
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    given.pop("local_rank", None)
    settings = _read_yaml(given.pop("config")) if "config" in given else {}
    for one, other in (("max_steps", "train_tokens"), ("train_tokens", "max_steps")):
        if one in given and other not in given:
            settings.pop(other, None)  # two ways to say how long, of which the flag's is meant
    for key, value in settings.items():
        key = str(key)
        if key not in fields:
            raise RSOConfigError(unknown_key(key, list(fields), "the training configuration"))
        settings[key] = _coerce(key, value, str(fields[key].type))
    return TrainArguments(**{**settings, **given})


def _scalar_type(annotation: str) -> type:
    return {"int": int, "float": float}.get(annotation.split(" | ")[0], str)


def _coerce(key: str, value: Any, annotation: str) -> Any:
    kind = _scalar_type(annotation)
    # YAML reads 1e-3 as a string and 1 as an integer; both are meant as floats here.
    if kind is float and value is not None and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise RSOConfigError(f"'{key}' must be a number, got {value!r}.") from None
    if key == "data" and isinstance(value, str):
        return [value]
    return value


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path, "--config"))
    except yaml.YAMLError as error:
        raise RSOConfigError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RSOConfigError(f"--config {path} must hold key: value lines.")
    return content


def _dashed(name: str) -> str:
    return name.replace("_", "-")
