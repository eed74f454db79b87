"""Versions installed here, against what the package's own metadata asks for."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from importlib import metadata

from rso_ds.doctor.report import FAILED, OK, WARNING, Finding

# torch is needed by everything; without the others parts of the package are.
_WITHOUT = {
    "deepspeed": "--engine ddp and fsdp2 do without",
    "transformers": "launch/train.py needs it",
}
_OPERATORS: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}


def versions() -> dict[str, str | None]:
    """Version of Python and of each package that matters, None where it is missing."""
    found: dict[str, str | None] = {"Python": platform.python_version()}
    for name in ("torch", *_WITHOUT):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_software() -> list[Finding]:
    """One finding for all that is as it should be, one more for each version that is not."""
    found = versions()
    try:
        ranges = _ranges(metadata.requires("rso_ds") or [])
        ranges["Python"] = metadata.metadata("rso_ds")["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        ranges = {}
    wrong = []
    for name, version in found.items():
        wanted = ranges.get(name, "")
        if version is None:
            status = FAILED if name == "torch" else WARNING
            remedy = f'pip install "{name}{wanted}"'
            wrong.append(Finding(name, status, f"is not installed: {_WITHOUT.get(name, 'needed')}", remedy))
        elif not satisfies(version, wanted):
            remedy = "use another interpreter" if name == "Python" else f'pip install "{name}{wanted}"'
            wrong.append(Finding(name, FAILED, f"{version} is installed, {wanted} is supported", remedy))
    present = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    if not ranges:
        return [Finding("software", WARNING, f"{present}; rso_ds is not installed, so no ranges", "pip install -e .")]
    return [Finding("software", OK, present), *wrong]


def satisfies(version: str, wanted: str) -> bool:
    """Whether ``version`` is in a range such as ">=2.6,<3"; suffixes of builds ("+cpu", "rc1") do not count."""
    for part in filter(None, wanted.split(",")):
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([0-9.]+)\s*", part)
        if match:
            mine, limit = _numbers(version), _numbers(match[2])
            length = max(len(mine), len(limit))
            pad = [x + (0,) * (length - len(x)) for x in (mine, limit)]
            if not _OPERATORS[match[1]](pad[0], pad[1]):
                return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def _ranges(requirements: list[str]) -> dict[str, str]:
    """{"torch": ">=2.6"}; extras repeat each other."""
    parsed = (re.match(r"([A-Za-z0-9_.-]+)\s*\(?([^;)]*)", line) for line in requirements)
    return {match[1]: match[2].strip() for match in parsed if match}
