"""What the cells of a row must be, whatever kind of file or hub dataset it comes from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

Cell = Callable[[Any], Any]

_KINDS = {str: "a text", list: "a list", dict: "an object", bytes: "bytes"}


class Unusable(Exception):
    """Why a cell cannot be used, to be read after its name."""


def text(value: Any) -> str:
    """A cell as text; numbers as they are written in JSON. Raises ``Unusable`` if it is none, or empty."""
    if value is None:
        raise Unusable("is null")
    if isinstance(value, str):
        if not value:
            raise Unusable("is empty")
        _refuse_surrogates(value)
        return value
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and not math.isfinite(value) and not re.search("[0-9]", str(value)):
        raise Unusable(f"is {value}, which often stands for no value")
    if isinstance(value, int | float | np.number | Decimal | date | time):
        return str(value)
    raise Unusable(f"is {_kind_of(value)}, and not a text")


def conversation(value: Any) -> list[dict[str, Any]]:
    """A list of messages, "role" and "content" of each as texts; "content" may be absent beside "tool_calls".

    Raises ``Unusable`` for anything else.
    """
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else _kind_of(value)
        raise Unusable(f'is {what}, and not a list of messages with "role" and "content"')
    return [_message(message, number) for number, message in enumerate(value, 1)]


def as_it_is(value: Any) -> Any:
    """A single value as text; nothing, lists and objects as they are."""
    if value is None or isinstance(value, str | list | dict | bytes):
        return value
    return str(value) if isinstance(value, float | np.floating) else text(value)


def characters(value: Any) -> int:
    """Those of a text, or of what is said in a conversation."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(characters(message.get("content")) for message in value if isinstance(message, dict))
    return 0


def decoders(schema: pa.Schema) -> dict[str, Cell]:
    """For columns whose values do not say by themselves what was written: classes have names, and a float of 32 bits
    has fewer digits than Python's."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (info.get("info") or {}).get("features") or {}
    found: dict[str, Cell] = {}
    for column in schema:
        feature = features.get(column.name)
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[column.name] = _class_names(feature["names"])
        elif pa.types.is_float32(column.type):
            found[column.name] = lambda value: None if value is None else np.float32(value)
    return found


def _class_names(names: list[str]) -> Cell:
    def name_of(value: Any) -> Any:
        if isinstance(value, int) and not 0 <= value < len(names):
            raise Unusable(f"is {value}, which none of the {len(names)} classes has as its number")
        return names[value] if isinstance(value, int) else value

    return name_of


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Unusable(f'has as message {number} {_kind_of(message)}, and not an object with "role" and "content"')
    speaks = message.get("content") is not None or not message.get("tool_calls")
    for key in ("role", "content") if speaks else ("role",):
        if key not in message:
            raise Unusable(f'has a message, number {number}, without "{key}" (it has {", ".join(message) or "no key"})')
    if not isinstance(message["role"], str) or not message["role"]:
        raise Unusable(f'has a message, number {number}, whose "role" is no text')
    content = message.get("content") if speaks else None
    if speaks and content != "":
        try:
            content = text(content)
        except Unusable as error:
            raise Unusable(f'has a message, number {number}, whose "content" {error}') from None
    _refuse_surrogates(json.dumps(message, ensure_ascii=False, default=str))
    return {**message, "content": content}


def _refuse_surrogates(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"holds {value[error.start]!r}, half of a surrogate pair and no character") from None


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    return next((what for kind, what in _KINDS.items() if isinstance(value, kind)), f"a {type(value).__name__}")
