"""Rows from files and hub datasets: only the columns that are asked for, each cell checked and named by its place."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.files import DataFile
from rso_ds.recipes.data.records import place, readable, rows, separator_hint
from rso_ds.recipes.data.sources import ROW_KINDS, HubDataset, find_source
from rso_ds.recipes.finetuning.cells import Cell, Unusable, decoders

_BATCH = 1000


@dataclass(frozen=True)
class FilePart:
    """The rows of one file."""

    file: DataFile
    encoding: str

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def key(self) -> str:
        """Equal for the same rows, however they are named."""
        return os.path.abspath(self.file.url)

    def place(self, number: int) -> str:
        return place(self.file, number)

    def schema(self) -> pa.Schema | None:
        """What a typed file says of its columns."""
        if self.file.kind != "parquet":
            return None
        import pyarrow.parquet as pq

        with readable(self.file), self.file.open() as stream:
            return pq.read_schema(stream)

    def header(self) -> tuple[list[str], str] | None:
        """(columns, where they stand), of JSON those of the first record; None if there is no record."""
        schema = self.schema()
        if schema is not None:
            return schema.names, self.file.url
        with closing(rows(self.file, None, self.encoding)) as records:  # type: ignore[type-var]
            first = next(records, None)
        if first is None:
            return None
        return list(first[0]), self.file.url if self.file.kind in ("csv", "tsv") else self.place(first[1])

    def records(self, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
        schema = self.schema()
        there = columns if schema is None else [c for c in columns if c in schema.names]
        yield from rows(self.file, there, self.encoding)


@dataclass(frozen=True)
class HubPart:
    """The rows of one split of a hub dataset, or of rows that are loaded already."""

    rows: Dataset
    name: str

    @property
    def key(self) -> str:
        return self.name

    def place(self, number: int) -> str:
        return f"{self.name}, row {number}"

    def schema(self) -> pa.Schema | None:
        return self.rows.features.arrow_schema

    def header(self) -> tuple[list[str], str] | None:
        return self.rows.column_names, self.name

    def records(self, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
        there = self.rows.select_columns([c for c in columns if c in self.rows.column_names])
        numbers = itertools.count(1)
        for batch in there.with_format("arrow").iter(_BATCH):
            for row in batch.to_pylist():
                yield row, next(numbers)


Part = FilePart | HubPart


@dataclass(frozen=True)
class Found:
    """Parts of a ``--data``: those that are meant, those of its validation split, and names of the rest by key."""

    parts: Sequence[Part]
    held_out: Sequence[Part] | None
    untouched: Mapping[str, str]


@dataclass(frozen=True)
class Rows:
    """What was read, and a digest that is equal where the rows are."""

    dataset: Dataset
    digest: str


def find(source: str, flag: str, encoding: str, prefer: Sequence[str] = ("train",)) -> Found:
    """Where the rows of ``source`` are. Of several splits the first of ``prefer`` that is there is meant.

    Raises ``RSOConfigError`` for what is not there, or leaves open what is meant.
    """
    found = find_source(source, flag, ROW_KINDS, prefer)
    if isinstance(found, HubDataset):
        return _on_the_hub(found, prefer)
    root = found.train[0].url.removesuffix(found.train[0].name)
    return Found(
        [FilePart(f, encoding) for f in found.train],
        None if found.held_out is None else [FilePart(f, encoding) for f in found.held_out],
        {os.path.abspath(os.path.join(root, name)): name for name in found.untouched},
    )


def _on_the_hub(found: HubDataset, prefer: Sequence[str]) -> Found:
    try:
        splits = load_dataset(found.repository, found.subset, revision=found.revision)
        first = next(iter(splits.values()))
        if first.info.builder_name == "csv":  # as texts: it would take NA for nothing and 01 for 1
            texts = Features({column: Value("string") for column in first.column_names})
            splits = load_dataset(
                found.repository, found.subset, revision=found.revision, features=texts, keep_default_na=False
            )
    except Exception as error:  # datasets and the hub client raise dozens of kinds
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        raise RSOConfigError(f"{found.flag} {found.name}: no such file, and the hub cannot give it: {cause}") from None
    wanted = found.split or next((s for s in prefer if s in splits), prefer[-1])
    if wanted not in splits:
        raise RSOConfigError(
            f"{found.flag} {found.name} has the splits {', '.join(splits)}, and none is '{wanted}'. Name one as"
            f" {found.repository}:{found.subset or ''}:{next(iter(splits))}."
        )
    parts: dict[str, Sequence[Part]] = {
        split: [HubPart(rows, f"{found.name}, split {split}")] for split, rows in splits.items()
    }
    held_out = parts.get("validation") if wanted == "train" else None
    rest = [part[0].name for part in parts.values() if part is not held_out and part is not parts[wanted]]
    return Found(parts[wanted], held_out, {name: name for name in rest})


def columns_of(parts: Sequence[Part]) -> list[str]:
    """Columns of the first of ``parts`` that has a row; none if none has."""
    return next((header[0] for header in (part.header() for part in parts) if header is not None), [])


def check_columns(parts: Sequence[Part], columns: Mapping[str, str]) -> None:
    """Raise ``RSOConfigError`` unless each of ``parts`` has the ``columns`` (flag -> name), naming those there are."""
    for part in parts:
        header = part.header()
        if header is None:
            continue
        present, where = header
        for flag, name in columns.items():
            if name not in present:
                raise RSOConfigError(
                    f"{flag} {name}: {where} has the columns {', '.join(present)}.{separator_hint(present)}"
                )


def read(parts: Sequence[Part], cells: Mapping[str, Cell], source: str, flag: str) -> Rows:
    """The rows of ``parts``, of each the columns of ``cells`` as these make them.

    Raises ``RSOConfigError`` if there is none, or for the first cell that cannot be used, with its place.
    """
    values: dict[str, list[Any]] = {name: [] for name in cells}
    digest = hashlib.sha256(repr(list(cells)).encode())
    for part in parts:
        schema = part.schema()
        decode = {} if schema is None else decoders(schema)
        for row, number in part.records(list(cells)):
            for name, cell in cells.items():
                try:
                    value = cell(decode[name](row.get(name)) if name in decode else row.get(name))
                except Unusable as error:
                    raise _unusable(part, number, name, row, str(error)) from None
                values[name].append(value)
            kept = [column[-1] for column in values.values()]
            digest.update(json.dumps(kept, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    if not any(values.values()):
        raise RSOConfigError(f"{flag} {source} has no rows.")
    return Rows(_dataset(values, parts), digest.hexdigest()[:16])


def _unusable(part: Part, number: int, name: str, row: Mapping[str, Any], why: str) -> RSOConfigError:
    what = f"'{name}' {why}" if name in row else f"no '{name}' (there are {', '.join(row) or 'no keys'})"
    return RSOConfigError(f"{part.place(number)}: {what}: mend or remove this record.")


def _dataset(values: dict[str, list[Any]], parts: Sequence[Part]) -> Dataset:
    try:
        return Dataset.from_dict(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        name = next(name for name, column in values.items() if not _fit(name, column))
        column = values[name]
        at = bisect.bisect_left(range(1, len(column) + 1), True, key=lambda count: not _fit(name, column[:count]))
        places = (part.place(number) for part in parts for _, number in part.records([name]))
        where = next(itertools.islice(places, at, None))
        raise RSOConfigError(
            f"{where}: '{name}' is built otherwise than in the records before: {error}. Mend or remove this record."
        ) from None


def _fit(name: str, column: list[Any]) -> bool:
    """Whether Arrow has one type for all of them."""
    try:
        Dataset.from_dict({name: column})
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True
