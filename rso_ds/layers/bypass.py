"""Layers whose weight another module reads by itself, so that W would act there without B P^T.

Such code calls no layer: it hands ``self.dt_proj.weight`` to a kernel (Mamba), or ``self.linear1.weight`` to torch's
fast path for evaluation (``nn.TransformerEncoderLayer``). Whether it runs may depend on the device, on the mode and on
what is installed, so trying it out does not tell: the source of every ``forward`` is read instead, with the methods and
functions that it calls. What is found by other means (``state_dict()`` of a layer, compiled code) is not seen; if
nothing else trains such a layer, the first step says so (``rso_ds.layers.start.refuse_untrained``).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from rso_ds.layers.source import Modules, Names, Source, constant_getattr, inside, modules_of, plain_function, source_of

# What may be asked of a weight without using its values.
_FACTS = {
    *("device", "dim", "dtype", "element_size", "is_cuda", "is_floating_point", "is_meta", "ndim", "numel"),
    *("requires_grad", "shape", "size", "stride"),
}
_QUESTIONS = {"hasattr", "id", "isinstance", "len", "type"}
# Functions with a branch that reads a weight and that no model gets to.
_UNREACHED = {
    # with query_states, which DebertaModel hands over only if z_steps > 1, and z_steps is 0
    ("transformers.models.deberta.modeling_deberta", "DisentangledSelfAttention.forward"),
}


def weight_readers(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """{layer: "Class.method" that reads its weight} for those of the layers ``names`` of which that is so."""
    targets = {id(model.get_submodule(name)): name for name in names}
    found: dict[str, str] = {}
    seen: set[tuple[int, tuple[Any, ...]]] = set()
    queue: list[tuple[FunctionType, Names]] = []
    for module in model.modules():
        forward = plain_function(module.forward)
        if id(module) not in targets and forward is not None:
            queue.append((forward, _bound(forward, (module,))))
    while queue:
        function, given = queue.pop()
        key = (id(function), tuple((name, *map(id, modules)) for name, modules in sorted(given.items())))
        unreached = (function.__module__, function.__qualname__) in _UNREACHED
        source = None if key in seen or unreached or not any(given.values()) else source_of(function)
        seen.add(key)
        if source is None:
            continue
        known = _named(source.tree, given)
        for weight in _weights(source):
            for module in () if _is_switched_off(weight, source, known) else modules_of(weight.value, known):
                if id(module) in targets:
                    found.setdefault(targets[id(module)], function.__qualname__)
        queue.extend(_called(source, known, function))
    return {name: found[name] for name in names if name in found}


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
                modules = modules_of(value, known)
                modules = inside(modules) if each else modules
                for name in ast.walk(target) if modules else ():
                    if isinstance(name, ast.Name):
                        known[name.id] = tuple({id(m): m for m in (*known.get(name.id, ()), *modules)}.values())
        if sum(map(len, known.values())) == before:
            return known


def _weights(source: Source) -> Iterator[ast.Attribute]:
    """Every ``x.weight`` of which the values may be used."""
    for node in ast.walk(source.tree):
        weight = constant_getattr(node) if isinstance(node, ast.Call) else node
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


def _is_switched_off(node: ast.AST, source: Source, known: Names) -> bool:
    """True in the body of an ``if self.option and ...`` where the option is False in every module it may be."""
    while (parent := source.parents.get(node)) is not None:
        if isinstance(parent, ast.If) and any(node is child for child in parent.body):
            test = parent.test
            parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
            for part in parts:
                owners = modules_of(part.value, known) if isinstance(part, ast.Attribute) else ()
                if owners and all(vars(owner).get(part.attr) is False for owner in owners):  # type: ignore[attr-defined]
                    return True
        node = parent
    return False


def _called(source: Source, known: Names, caller: FunctionType) -> Iterator[tuple[FunctionType, Names]]:
    """The functions that may run from here, with what they are given."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):  # a method, called here or handed on (to torch's checkpoint, say)
            call = source.parents.get(node)
            arguments = _arguments(call, known) if isinstance(call, ast.Call) and call.func is node else ((), {})
            for owner in modules_of(node.value, known):
                method = None if node.attr in owner._modules else inspect.getattr_static(type(owner), node.attr, None)
                method = method.fget if isinstance(method, property) else method
                function = None if isinstance(method, (staticmethod, classmethod)) else plain_function(method)
                if function is not None:
                    yield function, _bound(function, (owner, *arguments[0]), arguments[1])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            function = plain_function(caller.__globals__.get(node.func.id))
            if function is not None:
                yield function, _bound(function, *_arguments(node, known))


def _arguments(call: ast.Call, known: Names) -> tuple[tuple[Modules, ...], dict[str, Modules]]:
    named = {k.arg: modules_of(k.value, known) for k in call.keywords if k.arg is not None}
    return tuple(modules_of(argument, known) for argument in call.args), named
