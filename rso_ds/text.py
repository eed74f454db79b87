"""Bytes into text: in which encoding, which content is no text at all, and where something does not decode."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import IO, Any

from rso_ds.errors import RSOConfigError

UTF8 = "utf-8"
HEAD = 4096  # bytes that decide what a file holds
_CHUNK = 1 << 20
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # before UTF-16, whose mark begins that of UTF-32
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8",
}  # fmt: skip
_UNMARKED = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
# Where a signature is made of letters, what must follow it is part of the pattern: a text may begin with PAR1 or BZh.
_FOREIGN = {
    rb"\x1f\x8b": "gzip data",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bzip2 data",
    rb"\xfd7zXZ\x00": "xz data",
    rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)": "zstd data",
    rb"\x04\x22\x4d\x18": "lz4 data",
    rb"PK(\x03\x04|\x05\x06)": "a zip archive (or an Office document)",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
    rb".{257}ustar": "a tar archive",
    rb"%PDF-\d": "a PDF document",
    rb"PAR1[\x00-\x1f]": "a parquet file",
    rb"ARROW1\x00": "an Arrow file",
    rb"\x89HDF\r\n": "an HDF5 file",
    rb"\x93NUMPY": "a NumPy array",
    rb"SQLite format 3\x00": "an SQLite database",
    rb"Obj\x01": "an Avro file",
    rb"\x89PNG": "a PNG image",
    rb"\xff\xd8\xff": "a JPEG image",
    rb"GIF8[79]a": "a GIF image",
    rb"\x7fELF": "a program (ELF)",
    rb"\xd0\xcf\x11\xe0": "an old Office document",
    rb"\{\\rtf\d": "an RTF document",
    rb"\x80[\x02-\x05]": "a pickle",
}
_POINTERS = {
    rb"version https://git-lfs\.github\.com/spec": "a Git LFS pointer: 'git lfs pull' fetches the data",
    rb"/annex/objects/": "a git-annex pointer: 'git annex get' fetches the data",
}


def content_of(head: bytes) -> str | None:
    """What a file that begins with ``head`` holds, in words; None if it may be text."""
    return _matching(_FOREIGN, head)


def check_content(head: bytes, name: str, expected: str | None = None) -> None:
    """Raise ``RSOConfigError`` if the file ``name``, which begins with ``head``, is seen to hold something else than
    ``expected``, a word of ``content_of``, or than text."""
    check_pointer(head, name)
    found = content_of(head)
    if found not in (None, expected):
        raise RSOConfigError(f"{name} is {found}, whatever its name says: convert, rename or remove it.")


def check_pointer(head: bytes, name: str) -> None:
    """Raise ``RSOConfigError`` if the file ``name``, which begins with ``head``, only says where its data are."""
    pointer = _matching(_POINTERS, head)
    if pointer is not None:
        raise RSOConfigError(f"{name} is not the data but {pointer}.")


def check_encoding(name: str, flag: str = "--encoding") -> None:
    """Raise ``RSOConfigError`` unless Python knows ``name`` as an encoding of text."""
    try:
        known = codecs.lookup(name)
        "a".encode(known.name)
    except (LookupError, ValueError):  # rot13 and its like are codecs, but not from text to bytes
        raise RSOConfigError(f"{flag} {name!r} is no encoding that Python knows: utf-8, utf-16, cp1252, ...") from None


def codec_of(head: bytes, name: str, encoding: str = UTF8) -> str:
    """The codec for a file that begins with ``head``: ``encoding``, with the byte order mark left out if there is one.

    Raises ``RSOConfigError``, with the file's ``name`` and the remedy, if ``head`` is no text in ``encoding``.
    """
    check_content(head, name)
    asked = codecs.lookup(encoding).name
    marked = next((its for mark, its in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if marked is not None:
        if not asked.startswith(marked):
            raise RSOConfigError(
                f"{name} begins with the byte order mark of {marked}: read it with --encoding {marked}."
            )
        return "utf-8-sig" if marked == UTF8 else marked
    if asked in ("utf-16", "utf-32"):
        which = _unmarked(head) or f"{asked}-le (Windows) or {asked}-be"
        raise RSOConfigError(f"{name} has no byte order mark to tell which {asked} it is: say --encoding {which}.")
    zero = head.find(b"\0") if _is_utf8(encoding) else -1
    if zero >= 0:
        likely = _unmarked(head)
        remedy = f"as in {likely}: try --encoding {likely}" if likely else "which text has not: remove or convert it"
        raise RSOConfigError(f"{name}, offset {zero}: a NUL byte, {remedy}.")
    return UTF8 if _is_utf8(encoding) else encoding


def undecodable(name: str, offset: int, around: bytes, encoding: str) -> RSOConfigError:
    """The error for ``around``, bytes of which the first does not decode, at ``offset`` of the file ``name``."""
    remedy = "Name its encoding with --encoding."
    if _is_utf8(encoding):
        remedy = (
            "Convert it, or name its encoding with --encoding: often cp1252 or latin-1 (western Europe), cp1251"
            " (Cyrillic), gb18030, big5, shift_jis or euc_kr."
        )
    return RSOConfigError(f"{name}, offset {offset}: {around[:4]!r} is not {encoding}. {remedy}")


def decoded(raw: bytes, name: str, encoding: str = UTF8) -> str:
    """``raw`` as text. Raises ``RSOConfigError`` naming the file and the offset of what does not decode."""
    codec = codec_of(raw[:HEAD], name, encoding)
    try:
        return raw.decode(codec)
    except UnicodeDecodeError as error:
        start = len(raw) - len(error.object) + error.start  # the codec may have left out a byte order mark
        raise undecodable(name, start, raw[start:], encoding) from None


def first_undecodable(stream: IO[bytes], codec: str) -> tuple[int, bytes]:
    """(offset, the bytes from there on) of the first that ``codec`` does not decode in ``stream``, from its start."""
    decoder = codecs.getincrementaldecoder(codec)()
    fed = 0
    while True:
        chunk = stream.read(_CHUNK)
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = fed + len(chunk) - len(error.object) + error.start
            return offset, error.object[error.start :]
        fed += len(chunk)
        if not chunk:
            return fed, b""


def read_text(path: str | Path, flag: str, encoding: str = UTF8) -> str:
    """A small file as text. ``flag`` names it in messages. Raises ``RSOConfigError``."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise RSOConfigError(f"{flag} {path} cannot be read: {error.strerror}.") from None
    return decoded(raw, f"{flag} {path}", encoding)


def read_json(path: str | Path, flag: str) -> Any:
    """What a JSON file holds. ``flag`` names it in messages. Raises ``RSOConfigError``."""
    text = read_text(path, flag)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RSOConfigError(f"{flag} {path} is not JSON: {error}.") from None


def _matching(patterns: dict[bytes, str], head: bytes) -> str | None:
    return next((what for pattern, what in patterns.items() if re.match(pattern, head, re.DOTALL)), None)


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def _unmarked(head: bytes) -> str | None:
    """The encoding of ``_UNMARKED`` in which ``head``, which has no byte order mark, is text."""
    if head.count(0) < len(head) // 4 and _looks_like_text(head.replace(b"\0", b""), UTF8):
        return None  # single zeros among text of one byte a character, any two of which are some Chinese character
    return next((codec for codec in _UNMARKED if b"\0" in head and _looks_like_text(head, codec)), None)


def _looks_like_text(head: bytes, codec: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(codec)().decode(head)
    except UnicodeDecodeError:
        return False
    signs = sum(sign.isprintable() or sign in "\t\n\f\r" for sign in text)
    return signs >= 0.95 * len(text) and any(sign.isspace() for sign in text)
