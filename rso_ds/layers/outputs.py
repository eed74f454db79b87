"""The linear layers in which a model ends: those whose output it returns, and no other layer reads.

A model of no known library does not say which of its layers is the head, so the source of its ``forward`` is followed
from the first statement to what is returned. Functions and layers without parameters (a softmax, a reshape, a loss,
a sum) change nothing. The last layer of a repeated block (the one before it is read by the next) is no head.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from rso_ds.layers.linears import is_linear
from rso_ds.layers.partitioned import full_shape
from rso_ds.layers.source import Modules, Names, modules_of, plain_function, source_of
from rso_ds.layers.wrappers import without_compile

Layers = frozenset[nn.Module]
NONE: Layers = frozenset()
_DEEPEST = 25  # calls within calls
_COLLECTING = ("append", "extend", "insert", "update", "setdefault")


def output_layers(model: nn.Module) -> list[str]:
    """Names, in model order, of the linear layers in which ``model`` ends; empty if there are none.

    Where the source cannot be read (code that was typed in, compiled code) or does not tell, it is the last linear
    layer of the shape of a token embedding; without source and embedding it is the last one. Where nothing comes before
    them, as in a model of one linear layer, they are no heads of anything.
    """
    found = _found(model)
    matrices = (n for n, p in model.named_parameters() if is_lazy(p) or len(full_shape(p)) > 1)
    return found if any(name.rpartition(".")[0] not in found for name in matrices) else []


def _found(model: nn.Module) -> list[str]:
    top = without_compile(model)
    flow = _Flow()
    found = flow.ends(top)
    step = plain_function(getattr(type(top), "training_step", None))  # Lightning's modules may have nothing else
    if step is not None:
        found |= flow.run(step, top, [], {})
    names = {module: name for name, module in model.named_modules() if is_linear(module)}
    read = {_place(names[m]) for m in flow.read if m in names}
    result = [n for m, n in names.items() if m in found and _place(n) not in read]
    if result or not names:
        return result
    tables = {(m.num_embeddings, m.embedding_dim) for m in top.modules() if isinstance(m, nn.Embedding)}
    shaped = [n for m, n in names.items() if isinstance(m, nn.Linear) and (m.out_features, m.in_features) in tables]
    if shaped:
        return shaped[-1:]
    forward = plain_function(top.forward)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    unread = forward is None or source_of(forward) is None
    return [] if isinstance(top, containers) or not unread else list(names.values())[-1:]


def _place(name: str) -> tuple[str, ...] | str:
    """``name`` without the numbers of blocks; a layer that is numbered itself is like no other."""
    parts = name.split(".")
    return name if parts[-1].isdigit() else tuple("*" if part.isdigit() else part for part in parts)


@dataclass
class _Frame:
    """What the names of a running function stand for: values, by the layers they come from, and modules."""

    function: FunctionType
    known: Names
    values: dict[str, Layers] = field(default_factory=dict)
    returned: Layers = NONE
    assigned: tuple[str, ...] = ()  # by the statement at hand


class _Flow:
    def __init__(self) -> None:
        self.read: set[nn.Module] = set()  # layers whose output another layer reads
        self._ends: dict[nn.Module, Layers] = {}
        self._depth = 0

    def ends(self, module: nn.Module) -> Layers:
        """The linear layers that the output of ``module`` comes from."""
        if module not in self._ends:
            self._ends[module] = NONE
            self._ends[module] = self._find(module)
        return self._ends[module]

    def _find(self, module: nn.Module) -> Layers:
        if is_linear(module):
            return frozenset([module])
        if isinstance(module, nn.Sequential):
            value = NONE
            for child in module:
                value = self.call(child, value)
            return value
        forward = plain_function(module.forward)
        if forward is None or type(module).__module__.startswith(("torch.", "transformers.")):
            return NONE
        return self.run(forward, module, [], {})

    def call(self, module: nn.Module, given: Layers) -> Layers:
        """What ``module`` makes of values that come from ``given``."""
        if next(module.parameters(), None) is None:
            return given
        ends = self.ends(module)
        self.read |= given - ends
        return ends

    def run(
        self, function: FunctionType, owner: nn.Module, given: list[tuple[Layers, Modules]], named: dict[str, Any]
    ) -> Layers:
        """What a method of ``owner`` returns for arguments of which each is a (value, modules) pair."""
        source = source_of(function)
        tree = source.tree.body[0] if source is not None and isinstance(source.tree, ast.Module) else None
        if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) or self._depth > _DEEPEST:
            return NONE
        names = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
        arguments = {**dict(zip(names[1:], given, strict=False)), **named}
        frame = _Frame(function, {name: modules for name, (_, modules) in arguments.items()})
        frame.values = {name: value for name, (value, _) in arguments.items()}
        frame.known[names[0] if names else "self"] = (owner,)
        self._depth += 1
        self._block(tree.body, frame)
        self._depth -= 1
        return frame.returned

    def _block(self, body: Iterable[ast.stmt], f: _Frame) -> None:
        for node in body:
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                self._assign(node, f)
            elif isinstance(node, ast.Return):
                f.returned |= self._value(node.value, f)
            elif isinstance(node, ast.Expr):
                value = self._value(node.value, f)
                called = node.value.func if isinstance(node.value, ast.Call) else None
                if isinstance(called, ast.Attribute) and called.attr in _COLLECTING:
                    f.values[ast.unparse(called.value)] = value
            elif isinstance(node, (ast.For, ast.AsyncFor)):
                each: list[Modules] = [(module,) for module in _items(node.iter, f.known)]
                for modules in each or [()]:
                    self._bind(node.target, self._value(node.iter, f), modules, f)
                    self._block(node.body, f)
            elif isinstance(node, ast.If):
                before = dict(f.values)
                self._block(node.body, f)
                after, f.values = f.values, before
                self._block(node.orelse, f)
                f.values = {k: f.values.get(k, NONE) | after.get(k, NONE) for k in {*f.values, *after}}
            else:
                for part in ("body", "handlers", "orelse", "finalbody", "cases"):
                    for inner in getattr(node, part, []) if not _defines(node) else ():
                        self._block(getattr(inner, "body", [inner]) if not isinstance(inner, ast.stmt) else [inner], f)

    def _assign(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign, f: _Frame) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        f.assigned = tuple(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        value = self._value(node.value, f)
        if isinstance(node, ast.AugAssign):
            value |= self._value(node.target, f)
        modules = () if node.value is None else modules_of(node.value, f.known)
        f.assigned = ()
        for target in targets:
            self._bind(target, value, modules, f)

    def _bind(self, target: ast.expr, value: Layers, modules: Modules, f: _Frame) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._bind(item, value, modules, f)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, value, modules, f)
        elif isinstance(target, ast.Subscript):  # out["logits"] = ...
            key = ast.unparse(target.value)
            f.values[key] = f.values.get(key, NONE) | value
        else:
            key = ast.unparse(target)
            f.values[key] = value
            f.known[key] = modules

    def _value(self, node: ast.AST | None, f: _Frame) -> Layers:
        """The linear layers that the value of an expression comes from."""
        if node is None or isinstance(node, ast.Lambda):
            return NONE
        if isinstance(node, (ast.Name, ast.Attribute)):
            key = ast.unparse(node)
            owner = node.value if isinstance(node, ast.Attribute) else None
            return f.values[key] if key in f.values else self._value(owner, f)
        if isinstance(node, ast.Call):
            return self._called(node, f)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            for part in node.generators:
                self._bind(part.target, self._value(part.iter, f), tuple(_items(part.iter, f.known)), f)
            parts: list[ast.expr] = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return self._union(parts, f)
        value = self._union((n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)), f)
        if isinstance(node, ast.NamedExpr):
            self._bind(node.target, value, modules_of(node.value, f.known), f)
        return value

    def _union(self, nodes: Iterable[ast.AST], f: _Frame) -> Layers:
        return NONE.union(*(self._value(node, f) for node in nodes))

    def _called(self, node: ast.Call, f: _Frame) -> Layers:
        arguments = [*node.args, *(k.value for k in node.keywords)]
        given = self._union(arguments, f)
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in ("forward", "__call__"):
            called = called.value if modules_of(called.value, f.known) else called
        modules = list(_callees(called, f, arguments))
        if modules:
            return NONE.union(*(self.call(module, given) for module in modules))
        if isinstance(called, ast.Attribute):
            for owner in modules_of(called.value, f.known):
                method = plain_function(inspect.getattr_static(type(owner), called.attr, None))
                if method is not None and method is not f.function:
                    pairs = [(self._value(a, f), modules_of(a, f.known)) for a in node.args]
                    named = {k.arg: (self._value(k.value, f), modules_of(k.value, f.known)) for k in node.keywords}
                    return self.run(method, owner, pairs, {k: v for k, v in named.items() if k is not None})
            given |= self._value(called.value, f)
        handed_on = [m for a in arguments for m in modules_of(a, f.known)]  # to torch's checkpoint, to map
        return NONE.union(given, *(self.call(module, given) for module in handed_on))


def _callees(node: ast.expr, f: _Frame, arguments: list[ast.expr]) -> Iterator[nn.Module]:
    """The modules that a call may call; of a container with an index, ``x = self.layers[i](x)``, the last."""
    if not isinstance(node, ast.Subscript):
        yield from modules_of(node, f.known)
        return
    for owner in modules_of(node.value, f.known):
        if isinstance(owner, nn.ModuleDict):
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            yield from [owner[key]] if isinstance(key, str) and key in owner else owner.values()
        elif isinstance(owner, (nn.ModuleList, nn.Sequential)):
            items = list(owner)
            try:
                index = ast.literal_eval(node.slice)
            except ValueError:
                index = None
            read = {n.id for a in arguments for n in ast.walk(a) if isinstance(n, ast.Name)}
            if isinstance(index, int) and -len(items) <= index < len(items):
                yield items[index]
            else:
                yield from items[-1:] if read & set(f.assigned) else items


def _items(node: ast.expr, known: Names) -> Iterator[nn.Module]:
    """The modules that a loop over an expression goes through, in order."""
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        try:
            bounds: list[Any] = [
                b and ast.literal_eval(b) for b in (node.slice.lower, node.slice.upper, node.slice.step)
            ]
        except ValueError:
            bounds = [None]
        for owner in modules_of(node.value, known):
            yield from list(owner.children())[slice(*bounds)]
    elif isinstance(node, ast.Call):  # enumerate(self.layers), self.layers.items()
        for source in [node.func.value] if isinstance(node.func, ast.Attribute) else node.args:
            yield from _items(source, known)
    else:
        for module in modules_of(node, known):
            yield from module.children() if isinstance(module, containers) else (module,)


def _defines(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
