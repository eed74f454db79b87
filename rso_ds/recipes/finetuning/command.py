"""``launch/finetune.py`` from its flags to ``results.json``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from rso_ds.comm.agreement import agree_on
from rso_ds.comm.counter import install
from rso_ds.comm.outcome import agreed
from rso_ds.comm.shutdown import leave_process_groups
from rso_ds.config import RSOConfig
from rso_ds.errors import RSOConfigError, RSOError
from rso_ds.integrations.logs import with_subspace_logs
from rso_ds.integrations.trainer import with_rso
from rso_ds.layers import rso_layers
from rso_ds.layers.partitioned import full_shape
from rso_ds.layers.targets import DEFAULT_TARGETS
from rso_ds.planning.memory.kept import KeptRecorder
from rso_ds.planning.memory.peak import peak_memory_bytes
from rso_ds.recipes.finetuning import causal, classification
from rso_ds.recipes.finetuning.arguments import CausalArguments, ClassificationArguments, FinetuneArguments
from rso_ds.recipes.finetuning.data import load_splits, token_count
from rso_ds.recipes.finetuning.parser import parse_arguments
from rso_ds.recipes.training.model_card import write_card


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; an error of ours ends the process with its message alone and status 1."""
    try:
        ours, training = parse_arguments(sys.argv[1:] if argv is None else argv)
        results = run(ours, training)
    except RSOError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if training.process_index == 0:
        path = Path(training.output_dir or ".") / "results.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(results, indent=2), flush=True)
    leave_process_groups()


def run(ours: FinetuneArguments, training: TrainingArguments) -> dict[str, Any]:
    """Fine-tune, evaluate, save the dense model; returns what ``results.json`` holds. All ranks call it."""
    method = ours.settle_method(training)
    set_seed(training.seed)  # a new classifier's weights are drawn before Trainer seeds anything
    splits = agreed(lambda: load_splits(ours, training.seed), kind=RSOConfigError, whose=True)
    agree_on(splits.marks, "Give every rank the same files and flags.")
    rows, held_out = splits.train, splits.held_out
    if training.process_index == 0:
        _say(splits.description.text())
    if isinstance(ours, ClassificationArguments):
        base: Any = Trainer
        # Trainer takes every model for one whose loss is a sum over tokens of all ranks: it would multiply this mean.
        training.average_tokens_across_devices = False
        parts = classification.trainer_parts(ours, training, method == "lora", rows, held_out)
    else:
        assert isinstance(ours, CausalArguments)
        base = causal.sft_trainer()
        parts = causal.trainer_parts(ours, training, method == "lora", rows, held_out)
    if method == "lora":
        parts["model"] = _with_lora(parts["model"], ours)
    elif method == "rso" and training.deepspeed is None:
        base, parts["rso"] = with_rso(base), ours.rso_keys()
    elif method == "rso":
        base = with_subspace_logs(base)
    traffic = install()
    trainer = base(args=training, **parts)
    if isinstance(ours, ClassificationArguments):
        # The forward takes any keyword, but the loss is a mean over rows: Trainer must divide by the accumulation.
        trainer.model_accepts_loss_kwargs = False
    if training.process_index == 0:
        _say(_tokens(trainer))
    before = traffic.by_kind()
    start = time.perf_counter()
    trained = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    sent = {kind: total - before[kind] for kind, total in traffic.by_kind().items()}
    metrics = trainer.evaluate()
    steps = max(1, trainer.state.global_step)
    module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    results = {
        "method": method,
        "model": ours.model,
        "data": ours.data,
        "train_rows": len(parts["train_dataset"]),
        "eval_rows": len(held_out),
        "ranks": training.world_size,
        "seed": training.seed,
        "learning_rate": training.learning_rate,
        "steps": steps,
        "train_loss": trained.training_loss,
        **{key: metrics[key] for key in sorted(metrics) if "per_second" not in key and "runtime" not in key},
        "trainable_parameters": sum(_numel(p) for p in module.parameters() if p.requires_grad),
        "subspace_parameters": sum(_numel(layer.B) for _, layer in rso_layers(module)),
        "kept_bytes": kept_bytes(trainer),
        "comm_bytes_per_step": {kind: total // steps for kind, total in sent.items() if kind != "evaluation"},
        "peak_memory_bytes": peak_memory_bytes(),
        "train_seconds": round(seconds, 3),
        "seconds_per_step": round(seconds / steps, 6),
    }
    if method == "lora":
        _save_merged(trainer)
    else:
        trainer.save_model()
    trainer.save_state()
    if training.process_index == 0:
        _write_card(ours, training, results, _configuration(trainer))
    return results


def _tokens(trainer: Any) -> str:
    counted = (("train", trainer.train_dataset), ("held out", trainer.eval_dataset))
    return "; ".join(f"{name}: {len(part):,} sequences, {token_count(part):,} tokens" for name, part in counted)


def _say(lines: str) -> None:
    """Print, whatever characters the console has."""
    encoding = sys.stdout.encoding or "utf-8"
    print(lines.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _configuration(trainer: Any) -> RSOConfig | None:
    """RSO's, of whichever engine trains with it."""
    if trainer.is_deepspeed_enabled:
        boundary = getattr(trainer.model_wrapped, "rso", None)
    else:
        boundary = getattr(trainer.optimizer.optimizer, "boundary", None)
    return None if boundary is None else boundary.config


def _write_card(
    ours: FinetuneArguments, training: TrainingArguments, results: dict[str, Any], rso: RSOConfig | None
) -> None:
    told = ("method", "train_rows", "steps", "ranks", "learning_rate", "seed")
    recipe = {"data": Path(ours.data).name, **{key: results[key] for key in told}}
    scores = {key: value for key, value in results.items() if key.startswith("eval_") and key != "eval_rows"}
    classifies = isinstance(ours, ClassificationArguments)
    tag = "text-classification" if classifies else "text-generation"
    write_card(Path(training.output_dir or "."), recipe, scores, rso, ours.model, tag)


def kept_bytes(trainer: Any) -> int | None:
    """Bytes that the forward pass of the first training rows, one micro batch, keeps for backward; None under
    checkpointing, of which looking at what a block saves would recompute it."""
    if trainer.args.gradient_checkpointing:
        return None
    trainer.model_wrapped.train()
    count = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(count)]))
    with KeptRecorder(trainer.accelerator.unwrap_model(trainer.model_wrapped)) as recorder:
        loss = trainer.compute_loss(trainer.model_wrapped, inputs)
    del loss
    return recorder.total


def _numel(param: nn.Parameter) -> int:
    count = 1
    for size in full_shape(param):
        count *= size
    return count


def _with_lora(model: Any, ours: FinetuneArguments) -> Any:
    """LoRA on the layers that RSO would train in a subspace, and a trainable classification head."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise RSOConfigError("--method lora needs peft: pip install 'rso_ds[finetune]'.") from None
    kind = TaskType.SEQ_CLS if isinstance(ours, ClassificationArguments) else TaskType.CAUSAL_LM
    targets = DEFAULT_TARGETS.get(model.config.model_type, "all-linear")
    chosen = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=ours.lora_rank, lora_alpha=ours.lora_alpha, target_modules=chosen, task_type=kind  # type: ignore[arg-type]
    )  # fmt: skip
    return get_peft_model(model, config)


def _save_merged(trainer: Any) -> None:
    """The dense model, as the other methods leave it; under ZeRO-3 the adapter alone."""
    if trainer.is_deepspeed_enabled and trainer.accelerator.deepspeed_config["zero_optimization"]["stage"] == 3:
        trainer.save_model()
        return
    if trainer.args.should_save:
        model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        model.save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)
