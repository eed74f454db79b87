"""The weights and the tokenizer that a fine-tuning starts from."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from rso_ds.comm.agreement import agree_on
from rso_ds.comm.decisions import first_on_each_node
from rso_ds.comm.outcome import agreed
from rso_ds.errors import RSOConfigError
from rso_ds.models import Start, check_length, check_tokens, find_start, load_tokenizer, rows_needed
from rso_ds.recipes.finetuning.arguments import FinetuneArguments


class Base:
    """The model and the tokenizer of ``--model``, compared with one another before the model is loaded.

    ``kind``: the Auto class of the task. ``quantised``: a quantised model will do. ``changes``: attributes of its
    configuration. All ranks make it together. Raises ``RSOConfigError`` where something is missing or does not fit.
    """

    def __init__(
        self, kind: Any, args: FinetuneArguments, training: TrainingArguments, quantised: bool, **changes: Any
    ) -> None:
        self._resize, self._first = args.resize_embeddings, training.process_index == 0
        trust: bool = getattr(args, "trust_remote_code", False) or getattr(training, "trust_remote_code", False)

        def look() -> tuple[Start, Any]:
            new_head = bool(changes)
            start = find_start(args.model, kind, "pretrained", trust, new_head, quantised, **changes)
            return start, load_tokenizer(args.model, "--model", trust)

        self.start, self.tokenizer = first_on_each_node(
            look, "looking at --model", training.ddp_timeout, training.local_process_index, RSOConfigError
        )
        mine = {"start of the model": self.start.mark(), "tokens of the tokenizer": rows_needed(self.tokenizer)}
        agree_on(mine, "Give every rank the same --model.")
        self._say(self.start.text())

    def fits(self, length: int | None) -> None:
        """Refuse a ``--max_length`` beyond the model's positions, None for none, or warn of it."""
        if length is not None:
            warning = check_length(self.start.config, self.start.positions, length, "--max_length")
            self._say(warning)

    def load(self) -> PreTrainedModel:
        """The model in fp32, with embeddings for every token. All ranks call this together."""
        rows = check_tokens(self.start.config, self.tokenizer, self._resize)
        return agreed(lambda: self.start.build(rows), kind=RSOConfigError)

    def _say(self, line: str | None) -> None:
        if line is not None and self._first:
            print(line, flush=True)
