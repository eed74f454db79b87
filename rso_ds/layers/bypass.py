"""Layers whose weight another module reads by itself, so that W would act there without B P^T.

Such code calls no layer: it hands ``self.dt_proj.weight`` to a kernel (Mamba), or ``self.linear1.weight`` to torch's
fast path for evaluation (``nn.TransformerEncoderLayer``). Whether it runs may depend on the device, on the mode and on
what is installed, so trying it out does not tell: the source of every ``forward`` is read instead, with the methods and
functions that it calls. What is found by other means (``state_dict()`` of a layer, compiled code) is not seen; if
nothing else trains such a layer, the first step says so (``rso_ds.layers.start.refuse_untrained``).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn

# What may be asked of a weight without using its values.
_FACTS = {
    *("device", "dim", "dtype", "element_size", "is_cuda", "is_floating_point", "is_meta", "ndim", "numel"),
    *("requires_grad", "shape", "size", "stride"),
}
_QUESTIONS = {"hasattr", "id", "isinstance", "len", "type"}
# Calls that give back the modules that they are given, or those inside.
_PASSING = {
    *("children", "enumerate", "items", "iter", "list", "modules", "named_children", "reversed", "tuple", "values"),
    "zip",
}

Modules = tuple[nn.Module, ...]
Names = dict[str, Modules]  # local names of a function that stand for modules


def weight_readers(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """{layer: "Class.method" that reads its weight} for those of the layers ``names`` of which that is so."""
    targets = {id(model.get_submodule(name)): name for name in names}
    found: dict[str, str] = {}
    seen: set[tuple[int, tuple[Any, ...]]] = set()
    queue: list[tuple[FunctionType, Names]] = []
    for module in model.modules():
        forward = _function(module.forward)
        if id(module) not in targets and forward is not None:
            queue.append((forward, _bound(forward, (module,))))
    while queue:
        function, given = queue.pop()
        key = (id(function), tuple((name, *map(id, modules)) for name, modules in sorted(given.items())))
        source = None if key in seen or not any(given.values()) else _source(function)
        seen.add(key)
        if source is None:
            continue
        known = _named(source.tree, given)
        for weight in _weights(source):
            for module in _modules(weight.value, known):
                if id(module) in targets:
                    found.setdefault(targets[id(module)], function.__qualname__)
        queue.extend(_called(source, known, function))
    return {name: found[name] for name in names if name in found}


def _function(thing: Any) -> FunctionType | None:
    """The plain function behind a method and its decorators."""
    while isinstance(thing, (MethodType, functools.partial)):
        thing = thing.__func__ if isinstance(thing, MethodType) else thing.func
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if not isinstance(thing, FunctionType) or thing.__module__ == nn.Module.__module__:
        return None
    return thing


@dataclass(frozen=True, eq=False)
class _Source:
    """What a function says: its nodes, and the node around each."""

    tree: ast.AST
    parents: Mapping[ast.AST, ast.AST]


@functools.cache
def _source(function: FunctionType) -> _Source | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or none that stands alone
        return None
    return _Source(tree, {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)})


def _bound(function: FunctionType, positional: tuple[Any, ...], named: Mapping[str, Modules] | None = None) -> Names:
    """The parameters of ``function`` that are modules; an item of ``positional`` is one, or several, or None."""
    code = function.__code__
    bound = {
        name: value if isinstance(value, tuple) else (value,)
        for name, value in zip(code.co_varnames[: code.co_argcount], positional, strict=False)
        if value
    }
    return {**bound, **{name: modules for name, modules in (named or {}).items() if modules}}


def _named(tree: ast.AST, given: Names) -> Names:
    """``given`` and the names that the function assigns modules to, in whatever order."""
    known = dict(given)
    while True:
        before = sum(map(len, known.values()))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                pairs = [(target, node.value, False) for target in node.targets]
            elif isinstance(node, (ast.For, ast.comprehension)):
                pairs = [(node.target, node.iter, True)]
            elif isinstance(node, ast.NamedExpr):
                pairs = [(node.target, node.value, False)]
            else:
                continue
            for target, value, each in pairs:
                modules = _modules(value, known)
                modules = _inside(modules) if each else modules
                for name in ast.walk(target) if modules else ():
                    if isinstance(name, ast.Name):
                        known[name.id] = tuple({id(m): m for m in (*known.get(name.id, ()), *modules)}.values())
        if sum(map(len, known.values())) == before:
            return known


def _modules(node: ast.AST, known: Names) -> Modules:
    """The modules that an expression may stand for."""
    if isinstance(node, ast.Name):
        return known.get(node.id, ())
    if isinstance(node, ast.Attribute):
        return tuple(m for owner in _modules(node.value, known) for m in _attribute(owner, node.attr))
    if isinstance(node, ast.Subscript):
        return _inside(_modules(node.value, known))
    if isinstance(node, ast.Call):
        attribute = _getattr(node)
        if attribute is not None:
            return _modules(attribute, known)
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
        if name not in _PASSING:
            return ()
        sources = [called.value] if isinstance(called, ast.Attribute) else node.args
        return _inside(tuple(m for source in sources for m in _modules(source, known)))
    if isinstance(node, (ast.IfExp, ast.BoolOp, ast.Tuple, ast.List, ast.NamedExpr)):
        return tuple(m for child in ast.iter_child_nodes(node) for m in _modules(child, known))
    return ()


def _attribute(owner: nn.Module, name: str) -> Iterator[nn.Module]:
    value = owner._modules.get(name, owner.__dict__.get(name))
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, nn.Module):
            yield item


def _inside(modules: Modules) -> Modules:
    """The modules that containers hold; other modules as they are."""
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return tuple(m for module in modules for m in (module.children() if isinstance(module, containers) else (module,)))


def _getattr(call: ast.Call) -> ast.Attribute | None:
    """``x.name`` for ``getattr(x, "name")``."""
    if getattr(call.func, "id", None) == "getattr" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
        return ast.Attribute(call.args[0], str(call.args[1].value), ast.Load())
    return None


def _weights(source: _Source) -> Iterator[ast.Attribute]:
    """Every ``x.weight`` of which the values may be used."""
    for node in ast.walk(source.tree):
        weight = _getattr(node) if isinstance(node, ast.Call) else node
        if not (isinstance(weight, ast.Attribute) and weight.attr == "weight" and isinstance(weight.ctx, ast.Load)):
            continue
        parent = source.parents.get(node)
        asked = (
            (isinstance(parent, ast.Attribute) and parent.attr in _FACTS)
            or (isinstance(parent, ast.Call) and getattr(parent.func, "id", None) in _QUESTIONS)
            or (isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops))
        )
        if not asked:
            yield weight


def _called(source: _Source, known: Names, caller: FunctionType) -> Iterator[tuple[FunctionType, Names]]:
    """The functions that may run from here, with what they are given."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):  # a method, called here or handed on (to torch's checkpoint, say)
            call = source.parents.get(node)
            arguments = _arguments(call, known) if isinstance(call, ast.Call) and call.func is node else ((), {})
            for owner in _modules(node.value, known):
                method = None if node.attr in owner._modules else inspect.getattr_static(type(owner), node.attr, None)
                method = method.fget if isinstance(method, property) else method
                function = None if isinstance(method, (staticmethod, classmethod)) else _function(method)
                if function is not None:
                    yield function, _bound(function, (owner, *arguments[0]), arguments[1])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = _function(caller.__globals__.get(node.func.id))
            if function is not None:
                yield function, _bound(function, *_arguments(node, known))


def _arguments(call: ast.Call, known: Names) -> tuple[tuple[Modules, ...], dict[str, Modules]]:
    named = {k.arg: _modules(k.value, known) for k in call.keywords if k.arg is not None}
    return tuple(_modules(argument, known) for argument in call.args), named
