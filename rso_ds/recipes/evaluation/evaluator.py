"""Held-out losses of a run's checkpoints, by a process of its own: training does not wait for it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from rso_ds.checkpoint import folder as folders
from rso_ds.checkpoint.model_files import MODEL_FILES
from rso_ds.checkpoint.reading import DenseModel, open_model
from rso_ds.checkpoint.transaction import read_extra
from rso_ds.comm.rank_context import RankContext
from rso_ds.errors import RSOCheckpointError, RSOConfigError
from rso_ds.models import check_tokens, model_config, random_model
from rso_ds.recipes.data.dataset import PackedTokens
from rso_ds.recipes.data.tokenization import load_tokenizer, tokenizer_fingerprint
from rso_ds.recipes.training.arguments import TrainArguments, parse_arguments
from rso_ds.recipes.training.data import corpus_of, held_out_tokens, identity_of, streams
from rso_ds.recipes.training.held_out import held_out_loss
from rso_ds.recipes.training.metrics import MetricsFile, validation
from rso_ds.recipes.training.resume import FORMAT

EVALUATIONS = "evaluation.jsonl"


class Evaluator:
    """Appends a line to ``RUN/evaluation.jsonl`` for each checkpoint that has none there for so many held-out tokens.

    The loss is that of ``launch/train.py``: the same tokens, the model in the dtype of the run, on a GPU if there is
    one. The model is built once, and takes its weights, W + B P^T, from one checkpoint after the other.
    """

    def __init__(
        self, run: Path, micro_batch: int | None, eval_tokens: int | None, trust_remote_code: bool = False
    ) -> None:
        self.run, self.trust_remote_code = run, trust_remote_code
        self.settings: TrainArguments = parse_arguments(["--config", str(run / "config.yaml")])
        self.micro = micro_batch or self.settings.micro_batch or 16
        self.tokens = eval_tokens or self.settings.eval_tokens
        self.context = RankContext(0, 0, 1, torch.cuda.is_available())
        self.corpus = corpus_of(self.settings)
        self._model: Any = None
        self._held_out: PackedTokens | None = None
        self.file = MetricsFile(run / EVALUATIONS, sys.maxsize)
        self.records: list[dict[str, Any]] = [json.loads(line) for line in self.file.path.read_text().splitlines()]

    @property
    def complete(self) -> bool:
        """Whether the run's last step has been evaluated."""
        present = {folders.fingerprint(path) for path in self._checkpoints()}
        return any(r["step"] == r["steps"] and r["checkpoint"] in present for r in self._alike())

    def evaluate_new(self) -> int:
        """Evaluate, oldest first, what has not been; returns the number of checkpoints."""
        done = {r["checkpoint"] for r in self._alike()}
        count = 0
        for path in self._checkpoints():
            try:
                mark = folders.fingerprint(path)
                if mark in done:
                    continue
                record = {**self._evaluate(path), "checkpoint": mark}
            except (RSOCheckpointError, OSError, CheckpointException):
                if path.is_dir():
                    raise
                print(f"{path.name} was removed before it was read (--keep-last)", flush=True)
                continue
            self.records.append(record)
            self.file.write(record)
            print(_line(record), flush=True)
            count += 1
        return count

    def summary(self) -> str:
        found = [r for r in self._alike() if r["val_loss"] is not None]
        if not found:
            return f"{self.run / 'checkpoints'}: no checkpoint yet"
        best = min(found, key=lambda r: r["val_loss"])
        return f"{self.run / EVALUATIONS}: {len(self._alike())} checkpoints; the best is of {_line(best)}"

    def _alike(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r["eval_tokens"] == self.tokens]

    def _checkpoints(self) -> list[Path]:
        folder = self.run / "checkpoints"
        return [folder / tag for tag in folders.tags(folder)] if folder.is_dir() else []

    @torch.no_grad()
    def _evaluate(self, path: Path) -> dict[str, Any]:
        start = time.monotonic()
        stored = open_model(path)  # verifies every file
        client = read_extra(path)["client"]
        if client.get("run", {}).get("format") != FORMAT:
            raise RSOCheckpointError(f"{path} was not saved by train.py, or by an earlier one: its data are not known.")
        held_out = self._data(path, client["run"])
        model = self._filled(stored)
        loss = held_out_loss(model, held_out, self.tokens, self.micro, self.context)
        return {
            "step": client["step"], "steps": client["run"]["steps"], "eval_tokens": self.tokens, **validation(loss),
            "seconds": round(time.monotonic() - start, 3),
        }  # fmt: skip

    def _data(self, path: Path, trained_on: dict[str, Any]) -> PackedTokens:
        """The held-out part, by the checkpoint's tokenizer."""
        if self._held_out is None:
            cache = Path(self.settings.cache).expanduser()
            files = str(path / MODEL_FILES)
            trust = self.trust_remote_code
            tokenizer = load_tokenizer(files, self.corpus, self.settings.vocab_size, cache, trust)
            check_tokens(model_config(files, 0, 0, trust), tokenizer, resize=False)
            held_out = held_out_tokens(self.settings, self.corpus, tokenizer)
            if held_out is None:
                raise RSOConfigError(f"{self.run}: this run holds nothing out, so that there is nothing to evaluate.")
            text = identity_of(held_out, streams(self.settings, self.corpus), self.corpus, "held_out")
            now = {"held-out text": text, "tokenizer": tokenizer_fingerprint(tokenizer)}
            for key, value in now.items():
                if trained_on.get(key) != value:
                    raise RSOCheckpointError(
                        f"{path}: the run's {key} was {trained_on.get(key)}, now it is {value}: the loss could not be"
                        f" compared. Restore --data {self.corpus.source}, and start where the run was."
                    )
            self._held_out = held_out
        return self._held_out

    def _filled(self, stored: DenseModel) -> Any:
        """The model with the weights of ``stored``. Raises ``RSOCheckpointError`` if these are not the model's."""
        names = stored.names()
        if self._model is None:
            kinds = [stored.dtype(n) for n in names if stored.dtype(n).is_floating_point]
            config = model_config(str(stored.path / MODEL_FILES), 0, 0, self.trust_remote_code)
            model: Any = random_model(config, trust_remote_code=self.trust_remote_code, dtype=kinds[0])
            self._model = model.to(self.context.device)
        state = self._model.state_dict()
        for name in names:
            if name not in state or tuple(state[name].shape) != stored.shape(name):
                raise RSOCheckpointError(
                    f"{stored.path}: '{name}' {list(stored.shape(name))} is no tensor of the model that"
                    f" {MODEL_FILES}/config.json describes."
                )
            state[name].copy_(stored.value(name))
        filled = {state[name].data_ptr() for name in names}  # tied parameters share their memory
        for name, parameter in self._model.named_parameters():
            if parameter.data_ptr() not in filled:
                raise RSOCheckpointError(f"{stored.path} holds no '{name}', which would be evaluated at random.")
        return self._model


def _line(record: dict[str, Any]) -> str:
    loss = record["val_loss"]
    shown = "not finite" if loss is None else f"{loss:.4f} (perplexity {record['val_ppl']:.2f})"
    return f"step {record['step']}/{record['steps']}: held-out loss {shown}, {record['seconds']:.1f} s"
