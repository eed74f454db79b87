"""Bytes into text: encodings, byte order marks, what is no text, and where something does not decode."""

import bz2
import codecs
import gzip
import io
import lzma
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest

from rso_ds import RSOConfigError
from rso_ds.text import check_encoding, codec_of, decoded, first_undecodable, read_json, read_text

ENGLISH, RUSSIAN, CHINESE = "It was a dark night.\n" * 9, "Была тёмная ночь.\n" * 9, "夜は暗かった。\n" * 9


def tar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return packed.getvalue()


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "text")
    return packed.getvalue()


def array() -> bytes:
    saved = io.BytesIO()
    np.save(saved, np.arange(3))
    return saved.getvalue()


def parquet() -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    saved = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"]}), saved)
    return saved.getvalue().to_pybytes()


def zstd() -> bytes:
    pa = pytest.importorskip("pyarrow")
    return pa.compress(b"text", codec="zstd", asbytes=True)


FOREIGN = {
    "gzip data": lambda: gzip.compress(b"text"), "bzip2 data": lambda: bz2.compress(b"text"),
    "xz data": lambda: lzma.compress(b"text"), "zstd data": zstd, "a zip archive": zipped, "a tar archive": tar,
    "a NumPy array": array, "a parquet file": parquet, "a pickle": lambda: pickle.dumps({"text": "a"}),
    "a PDF document": lambda: b"%PDF-1.7\n%\xe2\xe3\n", "bzip2": lambda: bz2.compress(b""),
    "zstd": lambda: b"\x50\x2a\x4d\x18\x04\0\0\0four" + zstd(),  # as pzstd begins
    "a Git LFS pointer: 'git lfs pull'": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a git-annex pointer": lambda: b"/annex/objects/SHA256E-s9--0.txt\n",
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_text_is_named_whatever_the_file_is_called(what):
    with pytest.raises(RSOConfigError, match=rf"a\.txt is (not the data but )?{what}"):
        decoded(FOREIGN[what](), "a.txt")


@pytest.mark.parametrize("text", ["PAR1 is a gene", "ORCs came", "BZh4 was his name", "%PDF is a format", "GIF89, or"])
def test_texts_that_begin_with_the_letters_of_a_signature_are_texts(text):
    assert decoded(text.encode(), "a.txt") == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("text", [ENGLISH, RUSSIAN, CHINESE], ids=["english", "russian", "chinese"])
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
def test_the_remedy_for_two_bytes_a_character_reads_the_text(encoding, text, marked):
    raw = text.encode(encoding)
    if marked and encoding[-2:] in ("le", "be"):
        raw = getattr(codecs, f"BOM_UTF16_{encoding[-2:].upper()}") + raw
    if not marked and encoding in ("utf-16", "utf-32"):
        raw = text.encode(f"{encoding}-be")
    with pytest.raises(RSOConfigError, match=r"^a\.txt.*--encoding utf-") as refused:
        decoded(raw, "a.txt")
    assert decoded(raw, "a.txt", re.search(r"--encoding (\S+)\.$", str(refused.value))[1]) == text


@pytest.mark.parametrize("text", ["It" + " was" * 9 + " \0" + " was" * 9, "夜は暗か\0った。\n" * 9, "\0\1\2\3\4\5"])
def test_single_zeros_are_not_taken_for_another_encoding(text):
    """Any two letters of ASCII are a Chinese character of UTF-16, so that text would be trained on as another."""
    with pytest.raises(
        RSOConfigError, match=rf"a\.txt, offset {text.encode().index(0)}: a NUL byte, which text has not"
    ):
        decoded(text.encode(), "a.txt")


def test_a_mark_is_no_part_of_the_text():
    assert decoded(codecs.BOM_UTF8 + b"text", "a.txt") == "text"
    assert decoded(codecs.BOM_UTF8 + b"text", "a.txt", "utf-8-sig") == "text"
    assert decoded("text".encode("utf-16"), "a.txt", "utf-16-le") == "text"
    assert decoded("text".encode("utf-32"), "a.txt", "utf-32-le") == "text"


@pytest.mark.parametrize(
    ("raw", "encoding", "message"),
    [
        (codecs.BOM_UTF8 + "Zoë".encode(), "latin-1", "byte order mark of utf-8: read it with --encoding utf-8"),
        ("Zoë".encode("utf-16"), "cp1252", "byte order mark of utf-16: read it with --encoding utf-16"),
        ("Zoë".encode("utf-16"), "utf-32", "byte order mark of utf-16: read it with --encoding utf-16"),
        (b"text in plain ASCII.", "utf-16", "no byte order mark to tell which utf-16 it is"),
        (
            RUSSIAN.encode("utf-16-be"),
            "utf-16",
            "no byte order mark to tell which utf-16 it is: say --encoding utf-16-be",
        ),
    ],
)
def test_an_encoding_that_the_file_contradicts_is_refused(raw, encoding, message):
    """cp1252 and UTF-16 decode nearly everything: what comes out is another text, without a word."""
    with pytest.raises(RSOConfigError, match=message):
        decoded(raw, "a.txt", encoding)


MIB = 1 << 20
BAD = {"utf-8": b"\xff", "utf-8-sig": b"\xff", "ascii": b"\x80", "gb18030": b"\xff", "utf-16": b"\x00\xdc"}


@pytest.mark.parametrize("encoding", BAD)
@pytest.mark.parametrize("size", [4, 4096, MIB - 1, MIB, MIB + 1, 2 * MIB + 3])
def test_the_offset_of_what_does_not_decode_is_exact(encoding, size):
    text = "ab\n" if encoding == "ascii" else "日é\n"[:: 2 if encoding == "gb18030" else 1]
    text = text * (size // len(text.encode(encoding)) + 1)
    good = text.encode(encoding)
    for raw in (good + BAD[encoding] + b"ab", good + BAD[encoding]):
        assert first_undecodable(io.BytesIO(raw), encoding)[0] == len(good)
        with pytest.raises(RSOConfigError, match=rf"^a\.txt, offset {len(good)}: "):
            decoded(raw, "a.txt", encoding)


@pytest.mark.parametrize("character", ["é", "日", "😀"])
def test_a_character_that_is_cut_off_is_found_at_the_end(character):
    raw = codecs.BOM_UTF8 + b"a" * (MIB - 4) + character.encode()[:-1]
    with pytest.raises(RSOConfigError, match=rf"offset {MIB - 1}: .* is not utf-8"):
        decoded(raw, "a.txt")
    assert first_undecodable(io.BytesIO(raw), "utf-8")[0] == MIB - 1


@pytest.mark.parametrize("name", ["utf-9", "rot13", "base64", ""])
def test_unknown_encodings(name):
    with pytest.raises(RSOConfigError, match=f"--encoding '{name}' is no encoding that Python knows"):
        check_encoding(name)


@pytest.mark.parametrize("name", ["utf8", "UTF-16", "cp1252", "shift_jis"])
def test_known_encodings(name):
    check_encoding(name)
    assert codecs.lookup(codec_of("é".encode("utf-8" if name == "utf8" else name, "ignore") + b"  ", "a", name))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1', "--deepspeed .*a.json is not JSON: Expecting"),
        (b"[" * 100_000, "--deepspeed .*a.json is not JSON"),
        ('{"a": "é"}'.encode("latin-1"), "--deepspeed .*a.json, offset 7: .* is not utf-8"),
    ],
    ids=["cut", "deep", "latin-1"],
)
def test_bad_json_files(tmp_path, raw, message):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(RSOConfigError, match=message):
        read_json(tmp_path / "a.json", "--deepspeed")


def test_json_files_with_a_mark_are_read_and_missing_ones_named(tmp_path):
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert read_json(tmp_path / "a.json", "--deepspeed") == {"a": 1}
    with pytest.raises(RSOConfigError, match="--config .*none.yaml cannot be read: No such file"):
        read_text(tmp_path / "none.yaml", "--config")
