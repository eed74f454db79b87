"""What happens in the subspaces, told to the reporters of Hugging Face's Trainer (TensorBoard, W&B, ...)."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rso_ds.boundary import Boundary
from rso_ds.comm.counter import install
from rso_ds.engines.observer import Observer
from rso_ds.planning.memory.peak import peak_memory_bytes


def with_subspace_logs(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of ``trainer_class`` whose logged steps tell of RSO's subspaces, and is otherwise the same.

    Beside loss and learning rate, ``report_to``'s reporters and ``state.log_history`` get what ``Observer.record``
    knows (draw, applied_steps, subspace_grad_norm, merge_ratio), ``comm_bytes_per_step`` (payload bytes that this
    rank handed to collectives since the last logged step, evaluation apart) and ``peak_memory_bytes``. For DeepSpeed
    runs with RSO in their JSON; ``with_rso`` does it on its own. Where nothing selects RSO, nothing is added.
    """

    class LoggingTrainer(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._subspace_log: _SubspaceLog | None = None
            self.add_callback(_Watch(self))

        def rso_boundary(self) -> Boundary | None:
            """The boundary of the engine in use; None without RSO."""
            return getattr(self.model_wrapped, "rso", None)

        def watch_subspaces(self) -> None:
            boundary = self.rso_boundary()
            if boundary is not None:
                self._subspace_log = _SubspaceLog(boundary, self.state.global_step)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and self._subspace_log is not None:
                logs = {**logs, **self._subspace_log.record(self.state.global_step)}
            super().log(logs, start_time)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            with install().phase("evaluation"):
                return super().evaluate(*args, **kwargs)

    LoggingTrainer.__name__ = LoggingTrainer.__qualname__ = trainer_class.__name__
    return LoggingTrainer


class _SubspaceLog:
    def __init__(self, boundary: Boundary, step: int) -> None:
        self.observer = Observer(boundary)
        self._sent, self._step = _sent(), step

    def record(self, step: int) -> dict[str, int | float]:
        found = self.observer.record()
        sent = _sent()
        found["comm_bytes_per_step"] = (sent - self._sent) / max(1, step - self._step)
        found["peak_memory_bytes"] = peak_memory_bytes()
        self._sent, self._step = sent, step
        return found


def _sent() -> int:
    return sum(n for kind, n in install().by_kind().items() if kind != "evaluation")


class _Watch(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.watch_subspaces()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        log = self._trainer._subspace_log
        if log is not None and _logs(args, state.global_step + 1, state):
            log.observer.watch_step()


def _logs(args: TrainingArguments, step: int, state: TrainerState) -> bool:
    """Whether Trainer will log this step."""
    if args.logging_strategy == "steps":
        return step % max(1, state.logging_steps) == 0 or (step == 1 and args.logging_first_step)
    # Only the last step of an epoch is logged, and which one that is Trainer does not tell beforehand.
    return args.logging_strategy == "epoch"
