"""Nothing the doctor does may wait for ever: not a dead file server, a name server, nor another rank."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from rso_ds.doctor.report import FAILED, NOT_CHECKED, Finding

T = TypeVar("T")


def limited(action: Callable[[], T], seconds: float) -> T:
    """What ``action`` returns or raises; ``TimeoutError`` after ``seconds``, with the action left to itself."""
    box: dict[str, T] = {}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            box["result"] = action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} s")
    if errors:
        raise errors[0]
    return box["result"]


def checked(name: str, check: Callable[[], Sequence[Finding]], seconds: float) -> list[Finding]:
    """Findings of ``check``, or one that says why there are none."""
    try:
        return list(limited(check, seconds))
    except TimeoutError as error:
        return [Finding(name, FAILED, f"{error}: a file system, driver or name server hangs", "look at the node")]
    except Exception as error:  # a check that stumbles must not hide what the others found
        return [Finding(name, NOT_CHECKED, f"{type(error).__name__}: {str(error)[:300]}")]


def in_short(error: BaseException) -> str:
    """First line of what ``error`` says, without the places in C++ source files."""
    lines = re.sub(r"\[(?:enforce fail at )?\S+\.(?:cc|cpp|h|hpp):\d+\]\.?\s*", "", str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
