"""Code that a model's or a tokenizer's folder brings: it runs only where ``--trust-remote-code`` says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rso_ds.errors import RSOConfigError, RSOError

T = TypeVar("T")
TRUST_FLAG = "--trust-remote-code"
TRUST_HELP = "Run the Python code that the model's or the tokenizer's folder brings with it. Read that code first."


def loaded(load: Callable[[], T], what: str, but: tuple[type[Exception], ...] = ()) -> T:
    """What ``load`` returns. ``what``, a flag and its value, begins the ``RSOConfigError`` that every failure ends in,
    ``but`` those that are raised as they are."""
    try:
        return load()
    except RSOError:
        raise
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise RSOConfigError(
                f"{what} needs Python code of its own, which has not been run. Read that code, then allow it with"
                f" {TRUST_FLAG}."
            ) from None
        raise RSOConfigError(f"{what} cannot be loaded: {error}") from None
    except OSError as error:
        raise RSOConfigError(f"{what} cannot be loaded: {error}") from None
    except Exception as error:  # safetensors, pickle, peft and foreign code have dozens of kinds
        if isinstance(error, but):
            raise
        raise RSOConfigError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error
