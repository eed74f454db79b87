"""``import rso_ds`` is enough: ``deepspeed.initialize`` of an unmodified program takes RSO up from its JSON.

This module imports DeepSpeed no earlier than the program does.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from rso_ds.import_hooks import after_import


def watch_deepspeed() -> None:
    """Replace ``deepspeed.initialize`` now, or as soon as DeepSpeed has been imported. Idempotent.

    JSONs that select another optimizer go to DeepSpeed's own function untouched.
    """
    after_import("deepspeed", _replace_initialize)


def _replace_initialize(deepspeed: ModuleType) -> None:
    own = deepspeed.initialize
    if hasattr(own, "_rso_ds_own"):
        return

    @wraps(own)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        from rso_ds.engines.deepspeed.initialize import initialize_if_selected

        return initialize_if_selected(own, args, kwargs)

    initialize._rso_ds_own = own  # type: ignore[attr-defined]
    deepspeed.initialize = initialize  # type: ignore[attr-defined]
