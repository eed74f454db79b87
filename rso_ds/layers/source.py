"""What the source of a model's functions says: which modules an expression stands for."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn

# Calls that give back the modules that they are given, or those inside.
_PASSING = {
    *("children", "enumerate", "items", "iter", "list", "modules", "named_children", "reversed", "tuple", "values"),
    "zip",
}

Modules = tuple[nn.Module, ...]
Names = dict[str, Modules]  # local names of a function that stand for modules


def plain_function(thing: Any) -> FunctionType | None:
    """The plain function behind a method and its decorators."""
    while isinstance(thing, (MethodType, functools.partial)):
        thing = thing.__func__ if isinstance(thing, MethodType) else thing.func
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if not isinstance(thing, FunctionType) or thing.__module__ == nn.Module.__module__:
        return None
    return thing


@dataclass(frozen=True, eq=False)
class Source:
    """What a function says: its nodes, and the node around each."""

    tree: ast.AST
    parents: Mapping[ast.AST, ast.AST]


@functools.cache
def source_of(function: FunctionType) -> Source | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or none that stands alone
        return None
    return Source(tree, {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)})


def modules_of(node: ast.AST, known: Names) -> Modules:
    """The modules that an expression may stand for."""
    if isinstance(node, ast.Name):
        return known.get(node.id, ())
    if isinstance(node, ast.Attribute):
        return tuple(m for owner in modules_of(node.value, known) for m in _attribute(owner, node.attr))
    if isinstance(node, ast.Subscript):
        return inside(modules_of(node.value, known))
    if isinstance(node, ast.Call):
        attribute = constant_getattr(node)
        if attribute is not None:
            return modules_of(attribute, known)
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
        if name not in _PASSING:
            return ()
        sources = [called.value] if isinstance(called, ast.Attribute) else node.args
        return inside(tuple(m for source in sources for m in modules_of(source, known)))
    if isinstance(node, (ast.IfExp, ast.BoolOp, ast.Tuple, ast.List, ast.NamedExpr)):
        return tuple(m for child in ast.iter_child_nodes(node) for m in modules_of(child, known))
    return ()


def _attribute(owner: nn.Module, name: str) -> Iterator[nn.Module]:
    value = owner._modules.get(name, owner.__dict__.get(name))
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, nn.Module):
            yield item


def inside(modules: Modules) -> Modules:
    """The modules that containers hold; other modules as they are."""
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return tuple(m for module in modules for m in (module.children() if isinstance(module, containers) else (module,)))


def constant_getattr(call: ast.Call) -> ast.Attribute | None:
    """``x.name`` for ``getattr(x, "name")``."""
    if getattr(call.func, "id", None) == "getattr" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
        return ast.Attribute(call.args[0], str(call.args[1].value), ast.Load())
    return None
