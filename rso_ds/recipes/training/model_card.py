"""README.md of a saved model: how it was trained, for people and for the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import rso_ds
from rso_ds.config import RSOConfig

_OURS = "Trained with rso_ds"


def write_card(
    folder: Path,
    recipe: Mapping[str, Any],
    scores: Mapping[str, float | None],
    rso: RSOConfig | None,
    base_model: str | None = None,
    pipeline_tag: str = "text-generation",
) -> None:
    """Write ``folder/README.md``, unless there is one that we did not write.

    ``recipe``: what was done (data, tokens, steps, learning rate, ...); ``scores``: figures on held-out data, None
    where not finite; ``rso``: the optimizer's configuration, None for a training without RSO; ``base_model``: what
    the weights started from, a folder or hub name, of which a folder's own name alone is told.
    """
    path = folder / "README.md"
    if path.exists() and _OURS not in path.read_text(encoding="utf-8"):
        return
    tags = ["rso"] if rso is not None else []
    base = None
    if base_model is not None:
        base = Path(base_model).name if Path(base_model).exists() else base_model
    on_hub = base if base is not None and base == base_model else None
    data = ModelCardData(library_name="transformers", pipeline_tag=pipeline_tag, tags=tags, base_model=on_hub)
    lines = ["---", data.to_yaml().strip(), "---", "", f"# {folder.resolve().name}", ""]
    how = "Randomized Subspace Optimization ([arXiv 2502.07222](https://arxiv.org/abs/2502.07222))"
    lines.append(f"{_OURS} {rso_ds.__version__}" + ("." if rso is None else f" by {how}: a plain dense model."))
    lines += _table("Recipe", {**({} if base is None else {"base model": base}), **recipe})
    lines += _table("Held-out scores", {k: "not finite" if v is None else f"{v:.6g}" for k, v in scores.items()})
    if rso is not None:
        lines += _table("RSO", vars(rso))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    return ["", f"## {title}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
