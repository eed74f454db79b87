"""``import rso_ds`` is enough: ``deepspeed.initialize`` of an unmodified program takes RSO up from its JSON.

This module imports DeepSpeed no earlier than the program does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "deepspeed"


def watch_deepspeed() -> None:
    """Replace ``deepspeed.initialize`` now, or as soon as DeepSpeed has been imported. Idempotent.

    JSONs that select another optimizer go to DeepSpeed's own function untouched.
    """
    module = sys.modules.get(_NAME)
    if module is not None:
        _replace_initialize(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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


class _Finder(MetaPathFinder):
    """Finds DeepSpeed as the other finders do, and replaces ``initialize`` once its module has been executed.

    It stays installed: accelerate and transformers look for DeepSpeed with ``find_spec`` long before importing it.
    """

    _searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _replace_initialize(module)

            loader.exec_module = exec_module
        return spec
