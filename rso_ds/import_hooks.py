"""What we do to imports, by one finder in front of Python's own: an action after a module, and old names of modules.

The finder stays installed: accelerate and transformers look for DeepSpeed with ``find_spec`` long before importing it.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Call ``action`` with the module ``name``: now if it has been imported, else as soon as it has been executed."""
    _install()
    module = sys.modules.get(name)
    if module is not None:  # None stands there for a module that must not be imported
        action(module)
    else:
        _finder.actions[name] = action


def alias_modules(new_name: Callable[[str], str | None]) -> None:
    """Let imports of old names give the module of today itself, with a DeprecationWarning. ``new_name``: today's name,
    None for what is no old name, "" for an old package that held nothing."""
    _install()
    _finder.new_name = new_name


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}
        self.new_name: Callable[[str], str | None] = lambda old: None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = self.new_name(fullname)
        if new is not None:
            return ModuleSpec(fullname, _Alias(new), is_package=not new)
        action = self.actions.get(fullname)
        if action is None:
            return None
        others = (f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                action(module)

            loader.exec_module = exec_module
        return spec


class _Alias(Loader):
    """Puts the module of today under its old name; the module itself keeps its own name and spec."""

    def __init__(self, new: str) -> None:
        self._new = new

    def exec_module(self, module: ModuleType) -> None:
        if self._new:
            sys.modules[module.__name__] = importlib.import_module(self._new)
            warnings.warn(f"{module.__name__} is now {self._new}", DeprecationWarning, stacklevel=2)


_finder = _Finder()


def _install() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
