"""The current subspace of a checkpoint as a LoRA adapter: what was trained since the last boundary, apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from rso_ds.checkpoint.export import SHARD_SIZE, Exported, Progress, converted_dtype, new_folder, write_model
from rso_ds.checkpoint.folder import write_text
from rso_ds.checkpoint.native_model import NativeModel
from rso_ds.checkpoint.reading import open_model
from rso_ds.checkpoint.stored_model import StoredModel
from rso_ds.checkpoint.weights_file import Entry, write_file
from rso_ds.errors import RSOConfigError
from rso_ds.layers.kinds import STACKED
from rso_ds.subspace import dense_projection

BASE, ADAPTER = "base", "adapter_model.safetensors"


def export_lora(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = SHARD_SIZE,
    config: str | Path | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write B and P^T of ``checkpoint`` as an adapter of PEFT, ``out``, over the dense model ``out/base``.

    The base is W as the last boundary left it, with everything that trains densely as it is now. ``lora_alpha``
    equals the rank, so that PEFT adds B P^T unscaled. The adapter is in fp32 (or ``dtype``), in which PEFT
    computes adapters anyway; layers of other ranks than most are in ``rank_pattern`` and ``alpha_pattern``.
    Arguments and errors otherwise as in ``export_dense``; ``RSOConfigError`` too for a run without RSO and for
    RSO layers that share one weight.
    """
    with new_folder(Path(out)) as folder:
        model = _with_subspace(open_model(Path(checkpoint)))
        (folder / BASE).mkdir()
        base = write_model(model, folder / BASE, False, dtype, max_shard_size, config, progress)
        parts = _parts(model)
        kept = converted_dtype(torch.promote_types(base.dtype, torch.float32), dtype)
        entries = [Entry(name, shape, kept) for name, (_, _, shape) in parts.items()]
        write_file(folder / ADAPTER, entries, lambda name: _value(model, *parts[name][:2]).to(kept))
        names = base.config.get("architectures") or [""]
        text = json.dumps(_adapter_config(model, str(Path(out) / BASE), names[0]), indent=2, sort_keys=True)
        write_text(folder / "adapter_config.json", text + "\n")
    size = sum(e.bytes for e in entries)
    files = [ADAPTER, *(f"{BASE}/{name}" for name in base.files)]
    return Exported(base.tensors + len(entries), base.bytes + size, files, base.dtype, base.config)


def _with_subspace(model: StoredModel | NativeModel) -> StoredModel:
    """``model``, if an adapter can be made of it."""
    if isinstance(model, NativeModel) or not model.layers:
        raise RSOConfigError(f"--lora: {model.path} is of a run without RSO, which has no subspace: leave --lora out.")
    if model.state["rso"].get("form") == "folded":
        raise RSOConfigError(
            f"--lora: {model.path} is of a run with 'form': 'folded', whose current subspace is part of W already:"
            " export without --lora."
        )
    stacked = next((name for name, layer in model.layers.items() if layer.kind in STACKED), None)
    if stacked is not None:
        raise RSOConfigError(
            f"--lora: {stacked} holds the experts of a mixture in one parameter. An adapter of PEFT needs an A for each"
            " expert there, and all have one P here. Export without --lora."
        )
    for name, (first, _) in model.tied.items():
        if model.layer_of(name) is not None:
            raise RSOConfigError(
                f"--lora: {name} is tied to {first}, and PEFT would train, and merge, two adapters of one weight."
                " Export without --lora."
            )
    return model


def _parts(model: StoredModel) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Tensor of the adapter -> (RSO layer, "A" or "B" of LoRA, shape)."""
    parts: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for name, layer in model.layers.items():
        prefix = f"base_model.model.{name}.lora_"
        if layer.kind == "embedding":  # there PEFT adds (B A)^T to a weight [vocabulary, hidden]
            parts[f"{prefix}embedding_A"] = (name, "A", (layer.rank, layer.out_features))
            parts[f"{prefix}embedding_B"] = (name, "B", (layer.in_features, layer.rank))
        else:
            parts[f"{prefix}A.weight"] = (name, "A", (layer.rank, layer.in_features))
            parts[f"{prefix}B.weight"] = (name, "B", (layer.out_features, layer.rank))
    return parts


def _value(model: StoredModel, name: str, part: str) -> Tensor:
    layer = model.layers[name]
    is_p = (part == "A") != (layer.kind == "embedding")
    tensor = dense_projection(model.projection(layer), layer.in_features) if is_p else model.b(name)
    return tensor.t().contiguous() if part == "A" else tensor


def _adapter_config(model: StoredModel, base: str, architecture: str) -> dict[str, object]:
    ranks = {name: layer.rank for name, layer in model.layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ranks),
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in model.layers.values()),
    }
