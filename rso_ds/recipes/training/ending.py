"""What a run leaves behind at its end, beside the model's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rso_ds.models import begins_random
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.recipes.training.held_out import sample
from rso_ds.recipes.training.metrics import traffic_summary
from rso_ds.recipes.training.model_card import write_card


def sample_text(folder: Path, tokenizer: Any, args: TrainArguments, beginning: str) -> str:
    """What the model in ``folder`` says after ``--prompt``, else after ``beginning``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    text = sample(model, tokenizer, args.prompt or beginning, args.sample_tokens, args.seed)
    return f"--- sample\n{text}\n---"


def write_model_card(
    folder: Path,
    args: TrainArguments,
    ds_json: dict[str, Any],
    facts: dict[str, Any],
    scores: Mapping[str, float | None],
    rso: Any,
) -> None:
    """``facts``: further lines of the card; ``scores``: of the model, by their names; ``rso``: its configuration or
    None."""
    optimizer = ds_json["optimizer"]
    recipe = {
        **facts, "engine": args.engine, "optimizer": optimizer["type"], "learning rate": optimizer["params"]["lr"],
        "sequence length": args.seq_len, "seed": args.seed,
    }  # fmt: skip
    base = None if begins_random(args.model, args.init) else args.model
    write_card(folder, {"shape": args.model, **recipe} if base is None else recipe, scores, rso, base)


def write_traffic(output: Path, traffic: Any, ranks: int, steps: int) -> str:
    """Everything that rank 0 has sent in ``steps`` steps, into ``comm.json``; returns it as a table."""
    details = {"ranks": ranks, "nodes": traffic.node_count, "steps": steps}
    (output / "comm.json").write_text(json.dumps({**details, "traffic": traffic.table()}, indent=2))
    return traffic_summary(traffic, steps)
