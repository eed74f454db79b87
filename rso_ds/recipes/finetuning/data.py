"""Rows of text from files, folders and the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.finetuning.arguments import FinetuneArguments

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(args: FinetuneArguments, seed: int) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows).

    Raises ``RSOConfigError`` if either cannot be read, has no row, or misses a column or a cell that the task reads.
    """
    rows = load_rows(args.data, "--data")
    columns = args.columns(rows.column_names)
    _require(rows, args.data, columns)
    if args.eval_data is not None:
        held_out = load_rows(args.eval_data, "--eval_data")
        _require(held_out, args.eval_data, columns)
    else:
        if len(rows) < 2:
            raise RSOConfigError(f"--data {args.data} has {len(rows)} row, too few to hold some out: give --eval_data.")
        parts = rows.train_test_split(test_size=args.eval_fraction, seed=seed)
        rows, held_out = parts["train"], parts["test"]
    return rows, held_out


def sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """``count`` random rows, all if it is None or more than there are."""
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(count))


def load_rows(source: str, flag: str) -> Dataset:
    """All rows of a file, of the files of one format in a folder, or of a hub dataset's split "train"."""
    path = Path(source)
    try:
        if path.is_file():
            rows = _from_files(flag, source, [path])
        elif path.is_dir():
            rows = _from_files(flag, source, sorted(p for p in path.iterdir() if p.suffix in _BUILDERS))
        else:
            name, _, subset = source.partition(":")
            rows = load_dataset(name, subset or None, split="train")
    except RSOConfigError:
        raise
    except Exception as error:  # datasets and the hub client raise dozens of kinds
        cause = error.__cause__ or error
        raise RSOConfigError(f"{flag} {source} cannot be read: {type(cause).__name__}: {cause}") from None
    if not len(rows):
        raise RSOConfigError(f"{flag} {source} has no rows.")
    return rows


def _from_files(flag: str, source: str, files: list[Path]) -> Dataset:
    kinds = {file.suffix for file in files}
    unknown = kinds - set(_BUILDERS)
    if unknown or len({_BUILDERS[kind] for kind in kinds}) != 1:
        found = ", ".join(sorted(kinds)) or "no such files"
        raise RSOConfigError(f"{flag} {source}: {found}; expected files of one of {', '.join(_BUILDERS)}.")
    options: dict[str, Any] = {"sep": "\t"} if kinds == {".tsv"} else {}
    return load_dataset(_BUILDERS[files[0].suffix], data_files=[str(f) for f in files], split="train", **options)


def _require(rows: Dataset, source: str, columns: dict[str, str]) -> None:
    for flag, name in columns.items():
        if name not in rows.column_names:
            raise RSOConfigError(f"{flag} {name}: {source} has the columns {', '.join(rows.column_names)}.")
        missing = _first_missing(rows[name])
        if missing is not None:
            raise RSOConfigError(f"{source}: row {missing + 1} has no '{name}'.")


def _first_missing(values: Iterable[Any]) -> int | None:
    return next((i for i, value in enumerate(values) if value is None), None)
