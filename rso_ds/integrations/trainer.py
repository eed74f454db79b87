"""Hugging Face's Trainer, and trainers derived from it, under DDP, FSDP2 and in one process.

(Under DeepSpeed the JSON and ``import rso_ds`` are enough.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from rso_ds.boundary import Boundary
from rso_ds.checkpoint import Checkpointer, dense_state_dict
from rso_ds.config import RSOConfig
from rso_ds.engines.fsdp2 import refuse_fsdp1
from rso_ds.engines.optimizer import RSO
from rso_ds.errors import RSOConfigError, RSOUnsupportedError
from rso_ds.integrations.logs import with_subspace_logs
from rso_ds.layers import convert, rso_layers, summary_table
from rso_ds.solvers.groups import decay_groups

TAG = "rso"  # RSO's own checkpoint inside Trainer's folder checkpoint-N
# Keys of RSOConfig that TrainingArguments has under another name.
ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}

logger = logging.getLogger(__name__)


class LateRSO(RSO):
    """RSO for loops that make the optimizer first and wrap the model, in DDP or FSDP2, afterwards.

    ``model``: converted, not wrapped. ``wrapped`` must be called before the first step; ``params`` as for ``RSO``.
    """

    def __init__(self, model: nn.Module, config: RSOConfig, params: Iterable[Any] | None = None) -> None:
        self.attached = False
        self._build_solver(model, config, params)

    def wrapped(self, model: nn.Module) -> None:
        """``model``: what the model has become. Raises as ``RSO`` does."""
        if isinstance(model, nn.DataParallel):
            raise RSOUnsupportedError(
                "torch.nn.DataParallel is not supported: start one process a GPU, by torchrun or accelerate launch."
            )
        refuse_fsdp1(model)
        self._attach(model, None)
        self.attached = True

    def step(self, closure: Any = None) -> Any:
        if not self.attached:
            raise RSOConfigError(
                "LateRSO.wrapped(model) must be called once the model has been wrapped, before a step."
            )
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.attached else self.solver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.attached:
            super().load_state_dict(state_dict)
        else:  # Accelerate moves the state to its device in this way
            self.solver.load_state_dict(state_dict)
            self.follow_solver()


class _Factory:
    """What transformers calls, with the model, in place of an optimizer's class."""

    def __call__(self, model: nn.Module, config: RSOConfig, weight_decay: float) -> LateRSO:
        if not dict(rso_layers(model)):
            convert(model, config)
        return LateRSO(model, config, decay_groups(model, weight_decay))


def with_rso(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of ``trainer_class`` (``Trainer``, TRL's ``SFTTrainer``, ...) that trains with RSO.

    Its constructor takes ``rso``: the keys of ``RSOConfig`` but learning rate, betas, eps and weight decay, which
    are those of TrainingArguments. Saved models are dense; ``checkpoint-N/rso`` holds RSO's own checkpoint, from
    which ``resume_from_checkpoint`` continues exactly and ``load_best_model_at_end`` loads. Logs as of
    ``with_subspace_logs``.

        trainer = with_rso(Trainer)(model=model, args=args, train_dataset=data, rso={"rank_ratio": 0.25})

    The constructor raises ``RSOConfigError`` for a bad key, and under DeepSpeed, whose JSON selects RSO instead.
    """

    class RSOTrainer(with_subspace_logs(trainer_class)):  # type: ignore[misc]
        def __init__(self, *args: Any, rso: Mapping[str, Any], **kwargs: Any) -> None:
            if kwargs.get("optimizer_cls_and_kwargs") or any(kwargs.get("optimizers") or ()):
                raise RSOConfigError("there is an optimizer in code and rso=: remove one of them.")
            super().__init__(*args, **kwargs)
            if self.is_deepspeed_enabled:
                raise RSOConfigError(
                    'with DeepSpeed, RSO is chosen by "optimizer": {"type": "RSO"} in its JSON and "import rso_ds": use'
                    f" {trainer_class.__name__} itself."
                )
            config = configuration(rso, self.args)
            self.optimizer_cls_and_kwargs = (_Factory, {"config": config, "weight_decay": self.args.weight_decay})

        def rso_boundary(self) -> Boundary:
            self.attach_rso()
            return self.optimizer.optimizer.boundary

        def attach_rso(self) -> None:
            """Complete the optimizer, now that Accelerate has wrapped the model. Idempotent."""
            optimizer: LateRSO = self.optimizer.optimizer
            if not optimizer.attached:
                optimizer.wrapped(self.model_wrapped)
                if self.is_world_process_zero():
                    logger.info("%s\n%s", summary_table(optimizer._bare, optimizer._config), optimizer.form)

        def _rso_checkpoints(self) -> Checkpointer:
            self.attach_rso()
            return self.optimizer.optimizer.checkpointer(scheduler=self.lr_scheduler)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            bare = self.accelerator.unwrap_model(self.model)
            state = dense_state_dict(bare, keep=self.args.should_save)
            if self.args.should_save:
                self._save(output_dir or self.args.output_dir, state_dict=state)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            self._rso_checkpoints().save(output_dir, TAG)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """Nothing: W and B come from RSO's own checkpoint, when there is an optimizer for the rest of it."""

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                self._rso_checkpoints().load(checkpoint, TAG)

        def _load_best_model(self) -> None:
            if self.args.save_only_model:  # there is the dense model alone, which RSO's layers load too
                super()._load_best_model()
                return
            self._rso_checkpoints().load(self.state.best_model_checkpoint, TAG)

    RSOTrainer.__name__ = RSOTrainer.__qualname__ = f"RSO{trainer_class.__name__}"
    return RSOTrainer


def configuration(rso: Mapping[str, Any], args: TrainingArguments) -> RSOConfig:
    """RSO's keys with what TrainingArguments says of the rest. Raises ``RSOConfigError``."""
    for key, argument in ARGUMENTS.items():
        if key in rso:
            raise RSOConfigError(f"'{key}' is set by {argument} of TrainingArguments: remove it from rso=.")
    return RSOConfig.from_dict(
        {
            **rso,
            "lr": args.learning_rate,
            "betas": [args.adam_beta1, args.adam_beta2],
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
    )
