"""The card of a dataset (README.md): which files it says are of which split."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from fsspec.utils import glob_translate

from rso_ds.errors import RSOConfigError
from rso_ds.text import decoded

CARD = "README.md"


def files_by_card(folder: Path, names: Sequence[str], subset: str | None) -> Mapping[str, Sequence[str]] | str | None:
    """Of ``names``, files below ``folder``, those of each split, as its card says for ``subset`` (None: the default
    one). The beginning of the names that belong to the subset if it says no more than their folder. None if there is
    no card, or none that names files.

    Raises ``RSOConfigError`` for a card that cannot be understood, files that are not there, an unknown subset, and
    several subsets without a default.
    """
    card = folder / CARD
    configs = _configs(card)
    if not configs:
        if subset is not None:
            raise RSOConfigError(f"{folder}: no {CARD} there says what its subset '{subset}' is: name the files.")
        return None
    defaults = [n for n, c in configs.items() if len(configs) == 1 or n == "default" or c.get("default")]
    chosen = subset if subset is not None else defaults[0] if len(defaults) == 1 else None
    if chosen not in configs:
        raise RSOConfigError(
            f"{folder} has the subsets {', '.join(configs)}: write {folder}:{next(iter(configs))}, say."
        )
    config = configs[chosen]
    inside = _relative(config.get("data_dir") or "", card)
    if config.get("data_files") is None:
        return f"{inside}/" if inside else None
    return {
        split: _matching(names, [_relative(f"{inside}/{path}" if inside else path, card) for path in paths], card)
        for split, paths in _paths(config["data_files"], card).items()
    }


def _configs(card: Path) -> dict[str, dict[str, Any]]:
    """The subsets of a dataset by name, in the order of its card."""
    if not card.is_file():
        return {}
    text = decoded(card.read_bytes(), str(card))
    front = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise RSOConfigError(f"{card}: its metadata are not YAML: {error}") from None
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    if configs is None:
        return {}
    if not isinstance(configs, list) or not all(isinstance(c, dict) and "config_name" in c for c in configs):
        raise RSOConfigError(f"{card}: 'configs' must be a list of subsets, each with a config_name.")
    return {str(config["config_name"]): config for config in configs}


def _paths(data_files: Any, card: Path) -> dict[str, list[str]]:
    """Patterns by split, from any of the three forms that a card may have."""
    entries = [data_files] if isinstance(data_files, str) else data_files
    if isinstance(entries, list) and all(isinstance(e, str) for e in entries):
        return {"train": entries}
    paths: dict[str, list[str]] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        split, its = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        its = [its] if isinstance(its, str) else its
        if split is None or split in paths or not isinstance(its, list) or not all(isinstance(p, str) for p in its):
            raise RSOConfigError(
                f"{card}: data_files must be paths, or a list of 'split: ..., path: ...' with each split once, and not"
                f" {data_files!r}."
            )
        paths[str(split)] = its
    return paths


def _relative(path: str, card: Path) -> str:
    if "://" in path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise RSOConfigError(f"{card} names {path}, which is not in this folder: fetch it, and name the files.")
    return "" if path in ("", ".") else PurePosixPath(path).as_posix()


def _matching(names: Sequence[str], patterns: Sequence[str], card: Path) -> list[str]:
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            matcher = re.compile(glob_translate(pattern))
        except ValueError as error:
            raise RSOConfigError(f"{card}: the pattern {pattern} is none: {error}.") from None
        matches = [name for name in names if matcher.fullmatch(name)]
        if not matches and not glob.has_magic(pattern):
            raise RSOConfigError(f"{card} names {pattern}, which is not there: fetch it, or name the files.")
        found.update(dict.fromkeys(matches))
    return list(found)
