"""Records of a data file: texts to train on, or rows; each that cannot be used is named by file and line."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rso_ds.errors import RSOConfigError
from rso_ds.recipes.data.files import DataFile
from rso_ds.text import HEAD, UTF8, codec_of, first_undecodable, undecodable

_CHUNK = 1 << 20
_BATCH = 256  # parquet rows decoded at a time
BLANK = " \t\r\n\ufeff"  # between JSON values; byte order marks where files were put end to end
_SIGN = re.compile(f"[^{BLANK}]")
_LONGEST_WORD = 16  # characters; of what a piece of JSON may be cut within, other than a string

_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'", ",": "commas"}

Record = tuple[Any, int]  # a text or a row, and the number of its line (its row in parquet), from 1


class AsWritten(float):
    """A number of a JSON file that prints as it is written there: 0.10 and not 0.1."""

    def __new__(cls, written: str) -> AsWritten:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        return self.written


_JSON = json.JSONDecoder(parse_float=AsWritten, parse_constant=AsWritten)


def texts(file: DataFile, key: str, encoding: str = UTF8) -> Iterator[tuple[str, int]]:
    """The texts of ``file`` that are not empty: a plain file whole, else those of the key or column ``key``.

    Raises ``RSOConfigError`` for what cannot be read, decoded or used.
    """
    if file.kind == "text":
        text = whole_text(file, encoding)
        if text.strip():
            yield text, 1
        return
    for row, number in rows(file, (key,), encoding):
        text = text_of(row, key, file, number)
        if text:
            yield text, number


def text_of(row: dict[str, Any], key: str, file: DataFile, number: int) -> str:
    """``row[key]``, "" for a null. Raises ``RSOConfigError`` if it is absent or no text."""
    if key not in row:
        there, hint = ", ".join(row), separator_hint([*row])
        raise RSOConfigError(f"{place(file, number)}: no key '{key}' (there are {there}): set --text-key.{hint}")
    text = row[key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise RSOConfigError(f"{place(file, number)}: '{key}' is not a text but {_kind_of(text)}.")
    return checked(text, file, number)


def separator_hint(columns: Sequence[str]) -> str:
    """What to say of a table that has one column, since its cells are separated otherwise than its name says."""
    between = next((words for sign, words in _SEPARATORS.items() if len(columns) == 1 and sign in columns[0]), None)
    if between is None:
        return ""
    return f" Its cells seem to be separated by {between}: csv has commas, and tsv tabs."


def checked(text: str, file: DataFile, number: int) -> str:
    """``text``. Raises ``RSOConfigError`` for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise RSOConfigError(
            f"{place(file, number)}: {half!r} is half of a surrogate pair and no character: mend or remove this record."
        ) from None
    return text


def rows(file: DataFile, columns: Sequence[str] | None = None, encoding: str = UTF8) -> Iterator[Record]:
    """Rows of ``file`` as dictionaries; of parquet only ``columns``, where given. CSV cells are texts as written there.

    Raises ``RSOConfigError`` for what cannot be read, decoded or taken for rows.
    """
    with readable(file, encoding):
        if file.kind == "parquet":
            yield from parquet_rows(file, columns)
        elif file.kind in ("csv", "tsv"):
            yield from _csv_rows(file, encoding)
        elif file.kind in ("json", "jsonl"):
            yield from _json_rows(file, encoding)
        else:
            raise RSOConfigError(f"{file.url} is plain text and has no rows.")


def place(file: DataFile, number: int) -> str:
    """Where a record stands, in words."""
    return f"{file.url}, {'row' if file.kind == 'parquet' else 'line'} {number}"


@contextlib.contextmanager
def readable(file: DataFile, encoding: str = UTF8) -> Iterator[None]:
    """What goes wrong while ``file`` is read, as ``RSOConfigError``: damage, and bytes that do not decode."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError:
        with file.open() as stream:
            offset, around = first_undecodable(stream, encoding)
        raise undecodable(file.url, offset, around, encoding) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise RSOConfigError(f"{file.url} cannot be opened beside so many others: raise 'ulimit -n'.") from None
        raise RSOConfigError(f"{file.url} cannot be read, it may be damaged: {error}") from None


# -- plain text ----------------------------------------------------------------------------------------


def whole_text(file: DataFile, encoding: str = UTF8) -> str:
    """The text of a plain file, lines ended by newlines."""
    with readable(file, encoding), file.open() as stream:
        text = text_stream(stream, file, encoding).read()
    return without_zeros(text.lstrip("\ufeff"), file)


def text_stream(stream: IO[bytes], file: DataFile, encoding: str, newline: str | None = None) -> io.TextIOWrapper:
    """``stream``, from its start, as text. Raises ``RSOConfigError`` if its first bytes are none."""
    buffered: Any = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, _CHUNK)  # type: ignore
    return io.TextIOWrapper(buffered, codec_of(buffered.peek(HEAD)[:HEAD], file.url, encoding), newline=newline)


def without_zeros(text: str, file: DataFile, first: int = 1) -> str:
    """``text``, which begins in line ``first``. Raises ``RSOConfigError`` for a NUL, which binary content has and text
    has not."""
    zero = text.find("\0")
    if zero >= 0:
        line = text.count("\n", 0, zero) + first
        raise RSOConfigError(
            f"{file.url}, line {line}: a NUL character, so that this is no text: remove or convert it."
        )
    return text


# -- JSON ----------------------------------------------------------------------------------------------


def _json_rows(file: DataFile, encoding: str) -> Iterator[Record]:
    with file.open() as stream:
        text = text_stream(stream, file, encoding)
        blank = 0
        while (start := text.readline(_CHUNK)) and not start.strip(BLANK):  # an array may be one line of any length
            blank += start.endswith("\n")
        if start.lstrip(BLANK).startswith("["):
            yield from _Array(text, start, blank + 1, file).rows()
            return
        first = start if start.endswith("\n") else start + text.readline()
        for number, line in enumerate(itertools.chain((first,), text), blank + 1):
            if line.strip(BLANK):
                yield json_row(line, file, number), number


def json_row(line: str, file: DataFile, number: int) -> dict[str, Any]:
    """The object that ``line`` holds. Raises ``RSOConfigError``."""
    try:
        row = _JSON.decode(line.lstrip(BLANK))
    except json.JSONDecodeError as error:
        why = f"{error.msg}, column {error.pos + 1}"
        raise RSOConfigError(f"{place(file, number)}: not a JSON object a line ({why}).") from None
    except ValueError as error:
        raise RSOConfigError(f"{place(file, number)}: not a JSON object a line ({error}).") from None
    except RecursionError:
        raise RSOConfigError(f"{place(file, number)}: nested too deeply.") from None
    return _object(row, file, number)


class _Array:
    """One JSON array, of which ``text`` is the beginning and ``stream`` the rest: a piece at a time is held."""

    def __init__(self, stream: IO[str], text: str, line: int, file: DataFile) -> None:
        self._stream, self._file = stream, file
        self._text, self._at, self._line = text, 0, line

    def rows(self) -> Iterator[Record]:
        self._sign()
        self._pass(self._at + 1)
        end = self._sign() == "]"
        while not end:
            number = self._line
            yield _object(self._item(), self._file, number), number
            sign = self._sign()
            if sign not in (",", "]"):
                what = "a comma or the array's end is missing" if sign else "the file ends within the array"
                raise RSOConfigError(f"{place(self._file, self._line)}: not an array of JSON objects ({what}).")
            end = sign == "]"
            if not end:
                self._pass(self._at + 1)
                self._sign()
        self._pass(self._at + 1)
        if self._sign():
            raise RSOConfigError(
                f"{place(self._file, self._line)}: there is more after the end of the array: write one array, or an"
                " object a line."
            )

    def _sign(self) -> str:
        """The next character that is not blank, "" at the end of the file."""
        while True:
            found = _SIGN.search(self._text, self._at)
            self._pass(found.start() if found else len(self._text))
            if found or not self._more(_CHUNK):
                return found[0] if found else ""

    def _item(self) -> Any:
        size = _CHUNK
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                at, why = error.pos, error.msg
                cut = why.startswith("Unterminated string") or at >= len(self._text) - _LONGEST_WORD
                if cut and self._more(size):
                    size *= 2
                    continue
            except (ValueError, RecursionError) as error:
                at, why = self._at, str(error)
            else:
                self._pass(end)
                return value
            self._pass(at)
            raise RSOConfigError(f"{place(self._file, self._line)}: not an array of JSON objects ({why}).")

    def _pass(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self, size: int) -> bool:
        more = self._stream.read(size)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)


def _object(row: Any, file: DataFile, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RSOConfigError(f"{place(file, number)}: {_kind_of(row)}, and not a JSON object.")
    return row


def _kind_of(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", AsWritten: "a number", float: "a number", list: "a list"}
    kinds |= {dict: "an object", bytes: "bytes", str: "a text", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


# -- CSV -----------------------------------------------------------------------------------------------


def _csv_rows(file: DataFile, encoding: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    sign = "\t" if file.kind == "tsv" else ","
    with file.open() as stream:
        reader = csv.reader(text_stream(stream, file, encoding, newline="\n"), delimiter=sign, strict=True)
        header: list[str] = []
        number = 1  # of the line in which a row begins
        try:
            for cells in reader:
                if cells and not header:
                    header = _header(cells, file)
                elif cells:
                    if len(cells) != len(header):
                        raise RSOConfigError(
                            f"{place(file, number)}: {len(cells)} cells, and the header has {len(header)}"
                            f" ({', '.join(header)}).{separator_hint(header)}"
                        )
                    for cell in cells:
                        without_zeros(cell, file, number)
                    yield dict(zip(header, cells, strict=True)), number
                number = reader.line_num + 1
        except csv.Error as error:
            raise RSOConfigError(f"{place(file, number)}: not CSV ({error}).") from None


def _header(cells: list[str], file: DataFile) -> list[str]:
    header = [cells[0].lstrip("\ufeff"), *cells[1:]]
    double = next((name for name in header if header.count(name) > 1), None)
    if double is not None:
        raise RSOConfigError(f"{file.url}: the column '{double}' is there twice.")
    return header


# -- parquet -------------------------------------------------------------------------------------------


def parquet_rows(
    file: DataFile, columns: Sequence[str] | None, first: int = 0, end: int | None = None
) -> Iterator[Record]:
    """Rows ``first`` to ``end`` (from 0; None: all), of the column chunks only what they need.

    Raises ``RSOConfigError`` for a column that is not there and a text that is not UTF-8; damage is left to
    ``readable``.
    """
    import pyarrow.parquet as pq

    with file.open() as stream:
        table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_CHUNK, page_checksum_verification=True)
        names = table.schema_arrow.names
        missing = next((c for c in columns or () if c not in names), None)
        if missing is not None:
            raise RSOConfigError(f"{file.url}: no column '{missing}' (there are {', '.join(names)}): set --text-key.")
        end = table.metadata.num_rows if end is None else end
        group_end = 0
        for group in range(table.num_row_groups):
            at, group_end = group_end, group_end + table.metadata.row_group(group).num_rows
            if at >= end or group_end <= first:
                continue
            for batch in table.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
                begin, until = max(first, at), min(end, at + batch.num_rows)
                if begin < until:
                    yield from _batch_rows(batch.slice(begin - at, until - begin), file, begin + 1)
                at += batch.num_rows
                if at >= end:
                    break


def _batch_rows(batch: Any, file: DataFile, number: int) -> Iterator[Record]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:
            for i in range(batch.num_rows):
                yield from _batch_rows(batch.slice(i, 1), file, number + i)
            return
        raise RSOConfigError(f"{place(file, number)}: a text that is not UTF-8 ({error}).") from None
    yield from zip(rows, itertools.count(number))
