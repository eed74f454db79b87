"""Sizes and rates as people write and read them: powers of ten, as disks and links are sold; GiB where memory is meant.

The parsers take what follows a flag and name the flag in their errors.
"""

from __future__ import annotations

import re
from decimal import Decimal

from rso_ds.errors import RSOConfigError

MB, GB, GIB = 10**6, 10**9, 2**30
_UNITS = {"MB": MB, "GB": GB, "TB": 10**12, "MiB": 2**20, "GiB": GIB}
_PREFIXES = {"": 1, "K": 10**3, "M": MB, "G": GB, "T": 10**12}


def parse_size(text: str, flag: str, least: int = 1) -> int:
    """Bytes of ``80GB``, ``1.5 tb``, ``200M`` or a plain number, in powers of ten. Raises ``RSOConfigError``, also for
    fewer than ``least`` bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(Decimal(match[1]) * _PREFIXES[match[2].upper()]) if match else -1
    if size < least:
        raise RSOConfigError(f"{flag} {text!r} is not a size: write it as 80GB or 200MB.")
    return size


def parse_memory(text: str, flag: str) -> int:
    """Bytes of ``40GB`` (10^9) or ``79GiB`` (2^30), also in MB and MiB. The unit has to be there, as it is written: on
    cards the two differ by the seven percent that decide. Raises ``RSOConfigError``."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(MB|GB|MiB|GiB)", text.strip())
    size = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise RSOConfigError(f"{flag} {text!r} is not an amount of memory: write it as 40GB or 79GiB.")
    return size


def parse_rate(text: str, flag: str) -> float:
    """Bytes a second of ``10Gbit``, ``25Gbit/s``, ``1Gbps`` or ``300GB/s``: a small b is a bit. Raises
    ``RSOConfigError``."""
    match = re.fullmatch(r"([0-9.]+)\s*([KkMGT]?)(bits?|bytes?|b|B)(ps|/s)?", text.strip())
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:  # two points
        value = 0.0
    if not match or value <= 0:
        raise RSOConfigError(f"{flag}: {text!r} is not a rate: write it as 10Gbit or 300GB/s.")
    in_bytes = match[3] == "B" or match[3].startswith("byte")
    return value * _PREFIXES[match[2].upper()] * (1.0 if in_bytes else 0.125)


def in_unit(size: float, unit: str, form: str) -> str:
    """``size`` bytes in MB, GB, TB, MiB or GiB, its number formatted by ``form``: "1.5 GB"."""
    return f"{size / _UNITS[unit]:{form}} {unit}"


def amount(size: float) -> str:
    """``size`` bytes with three digits, in the largest of TB, GB and MB that it reaches."""
    for unit in ("TB", "GB", "MB"):
        if size >= _UNITS[unit]:
            return in_unit(size, unit, ".3g")
    return f"{size:.0f} bytes"
