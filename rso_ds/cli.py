"""Console script ``rso-ds``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rso_ds.config import AUTO, RSOConfig
from rso_ds.errors import RSOConfigError, RSOError


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rso-ds", description="Randomized Subspace Optimization for DeepSpeed.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="validate the RSO block of a DeepSpeed JSON and show what it does to a model, without weights"
    )
    check.add_argument("--deepspeed", required=True, help="DeepSpeed JSON")
    check.add_argument("--model", default="llama-7b", help="named shape or folder with a config.json [llama-7b]")
    check.add_argument("--vocab-size", type=int, default=32000, help="vocabulary of a named shape [32000]")
    args = parser.parse_args(argv)
    try:
        print(_check(args.deepspeed, args.model, args.vocab_size))
    except RSOError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _check(path: str, model_name: str, vocab_size: int) -> str:
    """The start-up table of ``model_name`` under the JSON at ``path``; "auto" values count as defaults."""
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RSOConfigError(f"--deepspeed {path} cannot be read: {error}") from None
    from rso_ds.engines.deepspeed.ds_json import refuse_unsupported, rso_config
    from rso_ds.layers import convert, summary_table
    from rso_ds.training.models import load_model

    block = config.get("optimizer")
    if isinstance(block, dict) and isinstance(block.get("params"), dict):
        block["params"] = {k: v for k, v in block["params"].items() if v != AUTO}
    rso: RSOConfig = rso_config(config)
    refuse_unsupported(config)
    with torch.device("meta"):
        model = load_model(model_name, vocab_size, 2048, pretrained=False)
    convert(model, rso)
    return summary_table(model, rso)


if __name__ == "__main__":
    main()
