"""Traces of memory that tests of one process share: many commands account for the same large model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from rso_ds.planning.memory.account import Accountant

_TRACES: dict[Any, Any] = {}


@contextmanager
def remembered_traces() -> Iterator[None]:
    """Within it a trace that one ``Accountant`` has made is taken over by all that would make the same."""

    def remembering(name: str) -> Any:
        whole = getattr(Accountant, name)

        def traced(self: Accountant, *how: Any) -> Any:
            model = inspect.getclosurevars(self.build).nonlocals["hf_config"].to_json_string()  # of ``model_builder``
            key = (name, model, self.engine.kind, self.engine.precision, self.checkpointing, repr(self.config), *how)
            if key not in _TRACES:
                _TRACES[key] = whole(self, *how)
            return _TRACES[key]

        return traced

    with (
        mock.patch.object(Accountant, "_traced", remembering("_traced")),
        mock.patch.object(Accountant, "_evaluated", remembering("_evaluated")),
    ):
        yield
