"""Rows to train on and rows held out, and what a run says of them before it begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.description import DataDescription, PartDescription
from rso_ds.recipes.finetuning import cells
from rso_ds.recipes.finetuning.arguments import FinetuneArguments
from rso_ds.recipes.finetuning.rows import FilePart, Found, HubPart, Rows, check_columns, columns_of, find, read
from rso_ds.text import UTF8

_BATCH = 1000


@dataclass(frozen=True)
class Splits:
    """``marks``: what must be equal on every rank."""

    train: Dataset
    held_out: Dataset
    description: DataDescription
    marks: dict[str, Any]


def load_splits(args: FinetuneArguments, seed: int) -> Splits:
    """The rows that train and those that are held out: all of ``--eval_data``, else the validation split of ``--data``,
    else ``--eval_fraction`` of its rows. Only the columns that the task reads are kept, as texts.

    Raises ``RSOConfigError`` if either cannot be read, has no row, or misses a column or a cell that the task reads.
    """
    data = find(args.data, "--data", args.encoding)
    columns = args.columns(columns_of(data.parts))
    check_columns(data.parts, columns)
    rows = read(data.parts, _cells_of(columns), args.data, "--data")
    marks = {
        "rows of --data": rows.digest,
        **{f"--{flag}": getattr(args, flag) for flag in ("eval_fraction", "max_rows")},
        "--seed": seed,
    }
    if args.eval_data is not None:
        evaluated = find(args.eval_data, "--eval_data", args.encoding, prefer=("validation", "test", "train"))
        held_out = _read_held_out(evaluated, columns, args.eval_data, "--eval_data")
        train, rest, whence = rows.dataset, held_out.dataset, "--eval_data"
    elif data.held_out is not None:
        evaluated = Found(data.held_out, None, {})
        held_out = _read_held_out(evaluated, columns, f"{args.data} (its validation split)", "--data")
        train, rest, whence = rows.dataset, held_out.dataset, "the validation split of --data"
    else:
        evaluated, held_out = Found([], None, {}), rows
        train, rest = _divided(rows.dataset, args, seed)
        whence = f"--eval_fraction {args.eval_fraction:g} of these rows, chosen by --seed {seed}"
    marks["held-out rows"] = held_out.digest
    drawn = "" if args.max_rows is None else f"of which at most --max_rows {args.max_rows} train"
    description = DataDescription(
        args.data,
        [
            PartDescription("trains", [part.name for part in data.parts], _amounts(train), drawn),
            PartDescription("held out", [part.name for part in evaluated.parts], _amounts(rest), whence),
        ],
        _untouched(args, data, evaluated),
        json.dumps(train[0], ensure_ascii=False),
    )
    return Splits(train, rest, description, marks)


def sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """``count`` random rows, all if it is None or more than there are."""
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(count))


def load_rows(source: str, flag: str, columns: Mapping[str, str] | None = None, encoding: str = UTF8) -> Dataset:
    """All training rows of files or a hub dataset; only ``columns`` (flag -> name), where given, which are then checked
    as ``load_splits`` checks them. Every single value is a text, as it is written in csv and JSON.

    Raises ``RSOConfigError`` for what is not there, cannot be read, or has no row.
    """
    parts = find(source, flag, encoding).parts
    if columns is None:
        every = {name: cells.as_it_is for part in parts for row, _ in part.records(_all(part)) for name in row}
        return read(parts, every, source, flag).dataset
    check_columns(parts, columns)
    return read(parts, _cells_of(columns), source, flag).dataset


def _all(part: FilePart | HubPart) -> list[str]:
    header = part.header()
    return [] if header is None else header[0]


def _require(rows: Dataset, source: str, columns: Mapping[str, str]) -> None:
    """Raise ``RSOConfigError`` unless ``rows`` have ``columns`` (flag -> name), with a value in each cell."""
    parts = [HubPart(rows, source)]
    check_columns(parts, columns)
    read(parts, _cells_of(columns), source, "")


def token_count(dataset: Dataset) -> int:
    """Tokens of an encoded data set."""
    batches = dataset.with_format("arrow").iter(_BATCH)
    return sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)


# -- below: how the two are told apart and told about ----------------------------------------------------


def _cells_of(columns: Mapping[str, str]) -> dict[str, cells.Cell]:
    talks = columns.get("--messages_column")
    return {name: cells.conversation if name == talks else cells.text for name in columns.values()}


def _read_held_out(found: Found, columns: Mapping[str, str], source: str, flag: str) -> Rows:
    check_columns(found.parts, columns)
    return read(found.parts, _cells_of(columns), source, flag)


def _divided(rows: Dataset, args: FinetuneArguments, seed: int) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise RSOConfigError(f"--data {args.data} has {len(rows)} row, too few to hold some out: give --eval_data.")
    try:
        parts = rows.train_test_split(test_size=args.eval_fraction, seed=seed)
    except ValueError:
        raise RSOConfigError(
            f"--eval_fraction {args.eval_fraction:g} of the {len(rows)} rows of --data {args.data} leaves none to train"
            " on: make it smaller, or give --eval_data."
        ) from None
    return parts["train"], parts["test"]


def _untouched(args: FinetuneArguments, data: Found, evaluated: Found) -> list[str]:
    """Names of what is there and neither trains nor is held out."""
    names = {**data.untouched, **evaluated.untouched}
    if args.eval_data is not None:
        names |= {part.key: part.name for part in data.held_out or ()}
    used = {part.key for part in (*data.parts, *evaluated.parts)}
    return [name for key, name in names.items() if key not in used]


def _amounts(rows: Dataset) -> dict[str, int]:
    size = sum(cells.characters(value) for batch in rows.iter(_BATCH) for column in batch.values() for value in column)
    return {"rows": len(rows), "characters": size}
