"""``rso-ds export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from rso_ds.checkpoint.export import Progress, export_dense
from rso_ds.checkpoint.lora import export_lora
from rso_ds.units import in_unit, parse_size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of checkpoints: then the latest is taken")
    parser.add_argument("out", help="folder for the Hugging Face model: new or empty")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="convert the weights [as they were trained]")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weights file [5GB]")
    parser.add_argument("--config", metavar="FOLDER", help="config.json and tokenizer [those in the checkpoint]")
    parser.add_argument(
        "--lora", action="store_true", help="the current subspace as a LoRA adapter (PEFT) over the model OUT/base"
    )


def run(args: argparse.Namespace) -> str:
    """What the command prints. Raises ``RSOCheckpointError`` or ``RSOConfigError``."""
    size = parse_size(args.max_shard_size, "--max-shard-size")
    export = export_lora if args.lora else export_dense
    with _bar() as progress:
        done = export(
            args.checkpoint,
            args.out,
            dtype=None if args.dtype is None else DTYPES[args.dtype],
            max_shard_size=size,
            config=args.config,
            progress=progress,
        )
    return (
        f"{args.out}: {done.tensors} tensors, {in_unit(done.bytes, 'GB', ',.3f')},"
        f" {str(done.dtype).removeprefix('torch.')}, in {len(done.files)} file{'s' if len(done.files) > 1 else ''}"
        + (f"\nadapter: {args.out}   base model: {Path(args.out) / 'base'}" if args.lora else "")
    )


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """A progress bar on a terminal, if rich is there to draw it."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checksums", total=None)
        yield lambda number, total: bar.update(task, description="tensors", completed=number, total=total)
