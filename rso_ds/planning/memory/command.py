"""``rso-ds memory``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rso_ds.config import AUTO
from rso_ds.deepspeed_json import refuse_unsupported, rso_config
from rso_ds.errors import RSOConfigError
from rso_ds.layers.targets import DEFAULT_TARGETS
from rso_ds.planning.memory.account import CARDS, Accountant, check_sizes, model_builder
from rso_ds.planning.memory.methods import METHODS
from rso_ds.planning.memory.report import json_report, plot, text_report
from rso_ds.planning.memory.states import Engine
from rso_ds.text import read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deepspeed", required=True, help="DeepSpeed JSON with an RSO optimizer block")
    parser.add_argument("--model", default="llama-7b", help="named shape or folder with a config.json [llama-7b]")
    parser.add_argument("--vocab-size", type=int, default=32000, help="vocabulary of a named shape [32000]")
    trust_flag(parser)
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a sequence [2048]")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences a rank and forward pass [1]")
    parser.add_argument("--gpus", type=int, default=8, help="ranks that share the state [8]")
    parser.add_argument("--engine", choices=("zero", "fsdp2"), default="zero", help="how the state is sharded [zero]")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute each block in backward")
    parser.add_argument("--compare", action="store_true", help="also AdamW, LoRA and GaLore, same rank, same sharding")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", metavar="OUT.png", help="write a stacked-bar picture")


def trust_flag(parser: argparse.ArgumentParser) -> None:
    """``--trust-remote-code`` of every command that builds a model."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that the model's folder brings")


def run(args: argparse.Namespace) -> str:
    """What the command prints. Raises ``RSOConfigError`` for bad input."""
    from rso_ds.models import model_config  # transformers takes seconds to import

    config = read_rso_json(args.deepspeed)
    rso = rso_config(config)
    refuse_unsupported(config)
    hf_config = model_config(args.model, args.vocab_size, args.seq_len, args.trust_remote_code)
    check_sizes(args.micro_batch, args.seq_len, args.gpus, positions(hf_config))
    engine = Engine.from_json(config, args.gpus, args.engine)

    accountant = Accountant(model_builder(hf_config, args.trust_remote_code), rso, engine, args.gradient_checkpointing)
    unknown = "default" in rso.targets and hf_config.model_type not in DEFAULT_TARGETS
    names: tuple[str, ...] = METHODS if args.compare else METHODS[:1]
    accounts = [accountant.account(n, args.micro_batch, args.seq_len) for n in (("adamw",) if unknown else names)]
    if unknown:
        accounts[0].missing.append(
            f"RSO, LoRA, GaLore: no default 'targets' for model type '{hf_config.model_type}': name the layers in the"
            ' JSON, or use "all-linear".'
        )
    largest = {}
    if accounts[0].trace is not None:
        name = "adamw" if unknown else "rso"
        found = accountant.largest(name, list(CARDS.values()), args.micro_batch, args.seq_len)
        largest = dict(zip(CARDS, found, strict=True))
    sharding = f"ZeRO-{engine.stage}" if engine.kind == "zero" else "FSDP2"
    title = (
        f"{args.model}, {sharding}, {args.gpus} ranks, {engine.precision}, micro batch {args.micro_batch}, sequence"
        f" {args.seq_len}{', gradient checkpointing' if args.gradient_checkpointing else ''}"
    )
    if args.plot:
        plot(Path(args.plot), title, accounts)
    if args.json:
        return json.dumps(json_report(title, accounts, largest), indent=2)
    return text_report(title, accounts, largest, accountant.limit)


def read_rso_json(path: str, flag: str = "--deepspeed") -> dict[str, Any]:
    """A DeepSpeed JSON whose RSO keys left "auto" count as defaults. Raises ``RSOConfigError``."""
    config = read_json(path, flag)
    if not isinstance(config, dict):
        raise RSOConfigError(f"{flag} {path} must hold a JSON object.")
    block = config.get("optimizer")
    if isinstance(block, dict) and isinstance(block.get("params"), dict):
        block["params"] = {k: v for k, v in block["params"].items() if v != AUTO}
    return config


def positions(hf_config: Any) -> int | None:
    """The number of positions of models that learn one embedding for each; others can be extended."""
    if hf_config.model_type in ("gpt2", "opt", "bert", "roberta"):
        return int(hf_config.max_position_embeddings)
    return None
