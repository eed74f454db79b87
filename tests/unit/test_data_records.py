"""Texts and rows of data files: as they are written there, or an error that names the place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rso_ds import RSOConfigError
from rso_ds.recipes.data import files, records
from rso_ds.recipes.data.files import local_file
from rso_ds.recipes.data.records import parquet_rows, place, rows, texts

MIB = 1 << 20


def file_of(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return local_file(folder / name)


def texts_of(folder, name, content, key="text", encoding="utf-8"):
    return [text for text, _ in texts(file_of(folder, name, content), key, encoding)]


def zstd(raw):
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as out:
        out.write(raw)
    return packed.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
LINES = "".join(json.dumps({"text": f"line {i} é"}, ensure_ascii=False) + "\n" for i in range(2000)).encode()
TEXTS = [f"line {i} é" for i in range(2000)]


# -- compressed files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_and_several_streams_in_one(tmp_path, suffix):
    pack, half = PACK[suffix], LINES.index(b"\n", len(LINES) // 2) + 1
    assert texts_of(tmp_path, f"a.jsonl{suffix}", pack(LINES)) == TEXTS
    parts = pack(b"") + pack(LINES[:half]) + pack(b"") + pack(LINES[half:]) + pack(b"")
    assert texts_of(tmp_path, f"b.jsonl{suffix}", parts) == TEXTS


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["cut", "zeros", "cut in the second", "second begins badly"])
def test_damage_is_an_error_and_never_less_text(tmp_path, suffix, damage):
    """Python's readers of bz2 and xz take the damaged beginning of a later stream for the end of the file; zstandard's
    takes a file that is cut off for a whole one."""
    one, two = PACK[suffix](LINES), PACK[suffix](LINES) * 2
    middle = len(one) // 2
    content = {
        "cut": one[:-5], "zeros": one[:middle] + bytes(len(one) - middle),
        "cut in the second": two[: len(one) + 3], "second begins badly": one + b"?" + one[1:],
    }[damage]  # fmt: skip
    with pytest.raises(RSOConfigError, match=rf"a\.jsonl\{suffix} cannot be read, it may be damaged"):
        texts_of(tmp_path, f"a.jsonl{suffix}", content)


CHECKED = b'(\xb5/\xfd$\x0eq\x00\x00{"text": "a"}\n\xfc\x0cHX'  # with the checksum that the zstd command writes


@pytest.mark.parametrize("suffix", PACK)
def test_packed_data_that_have_changed_are_an_error(tmp_path, suffix):
    one = CHECKED if suffix == ".zst" else PACK[suffix](b'{"text": "a"}\n')
    assert texts_of(tmp_path, f"a.jsonl{suffix}", one) == ["a"]
    at = one.index(b'"a"') + 1 if suffix == ".zst" else len(one) // 2
    with pytest.raises(RSOConfigError, match="cannot be read, it may be damaged"):
        texts_of(tmp_path, f"b.jsonl{suffix}", one[:at] + bytes([one[at] ^ 3]) + one[at + 1 :])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", LINES, "is named .gz but not compressed so"),
        ("a.jsonl.gz", lzma.compress(LINES), "is xz data, whatever its name says"),
        ("a.jsonl", gzip.compress(LINES), "is gzip data, whatever its name says"),
        ("a.txt.xz", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("a.parquet", LINES, "cannot be read, it may be damaged: Parquet magic bytes not found"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "compressed once more: unpack it"),
        ("a.csv", b"PAR1\x15\x04", "is a parquet file"),
        ("a.txt", b"a line\n" * 1000 + b"\0\1", "a.txt, line 1001: a NUL character"),
        (
            "a.csv",
            b"text\n" + b"x\n" * 3000 + b'"a\nb\0"\n',
            "a.csv, line 3003: (a NUL character|not CSV .line contains NUL)",
        ),
    ],
)
def test_content_that_is_not_what_the_name_says(tmp_path, name, content, message):
    with pytest.raises(RSOConfigError, match=message):
        texts_of(tmp_path, name, content)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.bz2", "a.json", "a.csv.xz", "a.tsv.zst"])
@pytest.mark.parametrize("before", [0, 9000, MIB + 1], ids=str)
def test_what_does_not_decode_is_named_by_its_offset_in_the_unpacked_file(tmp_path, name, before):
    line = f'{{"text": "{"日" * 99}"}}\n' if "json" in name else "日" * 99 + "\n"
    start = ("\ufeff[" if name == "a.json" else "\ufefftext\n" if "sv" in name else "\ufeff").encode()
    good = start + (line if name != "a.json" else line.replace("\n", ",\n")).encode() * (before // len(line.encode()))
    suffix = "." + name.split(".")[-1]
    content = good + '{"text": "é'.encode("latin-1") + b' in latin-1"}\n'
    with pytest.raises(RSOConfigError, match=rf"{name}, offset {len(good) + 10}: b'\\xe9.*' is not utf-8.*--encoding"):
        texts_of(tmp_path, name, PACK.get(suffix, bytes)(content))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-8"])
def test_other_encodings(tmp_path, name, encoding):
    content = {"a.txt": "Zoë", "a.jsonl": '{"text": "Zoë"}', "a.json": '[{"text": "Zoë"}]', "a.csv": "text\nZoë"}[name]
    assert texts_of(tmp_path, name, content.encode(encoding), "text", encoding) == ["Zoë"]


@pytest.mark.parametrize("off", range(-3, 4))
def test_characters_across_the_border_of_a_chunk(tmp_path, off):
    text = "a" * (MIB + off) + "日😀\r\né"
    assert texts_of(tmp_path, "a.txt", "\ufeff" + text) == [text.replace("\r\n", "\n")]


def test_marks_of_files_put_end_to_end_are_no_text(tmp_path):
    assert texts_of(tmp_path, "a.jsonl", '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n\ufeff\n\ufeff') == ["a", "b"]
    assert texts_of(tmp_path, "a.json", '\ufeff\ufeff\n [{"text": "a"}]\n\ufeff') == ["a"]
    assert texts_of(tmp_path, "a.csv", "\ufeff\ufefftext\na\n") == ["a"]
    assert texts_of(tmp_path, "a.txt", "\ufeff\ufeffa") == ["a"]


# -- JSON ----------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    content = (
        '\r\n{"text": "a\\n\u2028\\u00e9\\ud83d\\ude00"}\r\n\r\n  {"x": 1, "text": "b"}  \n{"text": null}\n{"text": ""}'
    )
    assert list(texts(file_of(tmp_path, "a.jsonl", content), "text")) == [("a\n\u2028é😀", 2), ("b", 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "x"}\n\n{"body": "y", "n": 1}\n', r"line 3: no key 'text' \(there are body, n\): set --text-key"),
        ("not json\n", "line 1: not a JSON object a line"),
        ('{"text": "x"}\n{"text": "a"}{"text": "b"}\n', "line 2: not a JSON object a line .Extra data, column 14"),
        ('{"text": "x"}\n{"text": "a"', "line 2: not a JSON object a line"),
        ('{"text": "x"}\n["a"]\n', "line 2: a list, and not a JSON object"),
        ('{"text": 1}\n', "line 1: 'text' is not a text but a number"),
        ('{"text": NaN}\n', "line 1: 'text' is not a text but a number"),
        ('{"text": {"en": "a"}}\n', "line 1: 'text' is not a text but an object"),
        ('\n{"text": "a\\ud83d"}\n', "line 2: .* is half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "line 1: nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "line 1: not a JSON object a line"),
        ('{\n  "text": "pretty"\n}\n', "line 1: not a JSON object a line"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, message):
    with pytest.raises(RSOConfigError, match=r"a\.jsonl, " + message):
        texts_of(tmp_path, "a.jsonl", content)


def test_numbers_are_as_they_are_written(tmp_path):
    content = '{"a": 0.10, "b": 1e400, "c": NaN, "d": -Infinity, "e": 7}'
    for name, text in (("a.jsonl", content), ("a.json", f"[{content}]")):
        ((row, _),) = rows(file_of(tmp_path, name, text))
        assert {k: str(v) for k, v in row.items()} == {
            "a": "0.10",
            "b": "1e400",
            "c": "NaN",
            "d": "-Infinity",
            "e": "7",
        }
        assert row["a"] == 0.1
        assert json.loads(json.dumps(row))["a"] == 0.1


VALUES = [
    *("", 'a "quoted" [word], {or} two: é', "\\", '\\\\"', "日\n\t\u2028😀"),
    *(0, -1, 1.5, 1e-7, 123456789012345, True, False, None, [], {}, [{}], {"a": [1, {"b": "]"}]}),
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1000])
def test_arrays_are_read_as_json_reads_them_wherever_they_are_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    draw = random.Random(chunk)
    for trial in range(15):
        items = [{"text": draw.choice(VALUES), "v": draw.choice(VALUES)} for _ in range(draw.randrange(5))]
        content = json.dumps(items, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 0, 2]))
        content = draw.choice(["", "\n\n", " ", "\ufeff"]) + content + draw.choice(["", "\n", "  \n\n"])
        written = content.replace("\n", "\r\n") if trial % 2 else content
        found = list(rows(file_of(tmp_path, "a.json", written)))
        assert [row for row, _ in found] == items
        assert all(content.split("\n")[number - 1].lstrip("\ufeff [").startswith("{") for _, number in found)
        for end in range(content.index("[") + 1, content.rindex("]"), 13):
            with pytest.raises(RSOConfigError, match=r"b\.json, line \d+: "):
                list(rows(file_of(tmp_path, "b.json", content[:end])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": 2} {"a": 3}]', "line 2: not an array of JSON objects .a comma or the array's end"),
        ('[{"a": 1},\n]', "line 2: not an array"),
        ('[{"a": 1},\n,{"a": 2}]', "line 2: not an array"),
        ('[{"a": 1}]\n[{"a": 2}]\n', "line 2: there is more after the end of the array"),
        ('[]\n{"a": 2}\n', "line 2: there is more after the end of the array"),
        ('[\n{"a": 1},\n{"a":\n}]', "line 4: not an array of JSON objects .Expecting value"),
        ('[{"a": 1},\n 5]', "line 2: a number, and not a JSON object"),
        ('[{"a": 1}', "line 1: .*the file ends within the array"),
        ('[{"a": ' + "[" * 100_000, "line 1: not an array"),
        ('[\n{"a": "x\ny"}]', "line 2: not an array .*Invalid control character"),
    ],
)
def test_bad_arrays_are_named(tmp_path, content, message):
    with pytest.raises(RSOConfigError, match=r"a\.json, " + message):
        list(rows(file_of(tmp_path, "a.json", content)))


def test_a_fault_early_in_an_array_is_found_before_the_rest_is_read(tmp_path):
    file = file_of(tmp_path, "a.json", '[{"a": x},\n' + '{"a": "some text"},\n' * 800_000 + "]")
    tracemalloc.start()
    with pytest.raises(RSOConfigError, match="line 1: not an array of JSON objects"):
        list(rows(file))
    assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_records_are_read_one_by_one(tmp_path, monkeypatch, name):
    """3 MB of records, the array in a single line."""
    monkeypatch.setattr(records, "_CHUNK", 1 << 14)
    monkeypatch.setattr(files, "_BUFFER", 1 << 14)
    items = [{"text": "a word or two " * 20, "n": i} for i in range(9_000)]
    lines = "".join(json.dumps(item) + "\n" for item in items).encode()
    table = "text,n\n" + "".join(f"{item['text']},{item['n']}\n" for item in items)
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(items), tmp_path / name)
        file = local_file(tmp_path / name)
    else:
        content = {"a.json": json.dumps(items), "a.csv": table, "a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines, 1)}
        file = file_of(tmp_path, name, content[name])
    del items, lines, table
    tracemalloc.start()
    count = sum(1 for _ in rows(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 9_000
    assert peak < MIB / 2


# -- CSV -----------------------------------------------------------------------------------------------


def test_cells_are_texts_as_they_are_written(tmp_path):
    content = 'text,label\r\nNA,01\r\n\r\n00012,null\r\n"say ""so"",\nor not",1.50\r\n"",None\r\n'
    expected = [("NA", "01", 2), ("00012", "null", 4), ('say "so",\nor not', "1.50", 5), ("", "None", 7)]
    for name, written in (("a.csv", content), ("a.tsv", content.replace(",", "\t").replace("\t\n", ",\n"))):
        found = [(row["text"], row["label"], number) for row, number in rows(file_of(tmp_path, name, written))]
        assert found == expected
    assert texts_of(tmp_path, "a.csv", content) == ["NA", "00012", 'say "so",\nor not']


def test_what_a_csv_writer_writes_is_read_again(tmp_path):
    draw = random.Random(1)
    for trial in range(100):
        table = [["".join(draw.choice('ab",;\t\n é\\') for _ in range(draw.randrange(6))) for _ in "12"] for _ in "123"]
        written = io.StringIO(newline="")
        writer = csv.writer(
            written, lineterminator=["\n", "\r\n"][trial % 2], quoting=[csv.QUOTE_ALL, csv.QUOTE_MINIMAL][trial % 3 % 2]
        )
        writer.writerows([["one", "two"], *table])
        assert [list(r.values()) for r, _ in rows(file_of(tmp_path, "a.csv", written.getvalue()))] == table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a\nb\nc",1\n\nd\n', r"line 6: 1 cells, and the header has 2 \(text, label\)"),
        ("text,label\n1,2\na,b,c\n", "line 3: 3 cells"),
        ('text,label\na,1\nb,"unclosed\nx,1\ny,2\n', "line 3: not CSV .unexpected end of data"),
        ('text,label\n"a" x,1\n', "line 2: not CSV"),
        ("text,label\na\rb,1\n", "line 2: not CSV .new-line character"),
        ("text,label,text\n1,2,3\n", "the column 'text' is there twice"),
        (
            "text;label\na;b\n",
            r"line 2: no key 'text' \(there are text;label\): set --text-key. Its cells seem to be separated by ';'",
        ),
        ("text;label\na, b;c\n", r"line 2: 2 cells, and the header has 1 \(text;label\)"),
        ("body,label\na,b\n", r"line 2: no key 'text' \(there are body, label\): set --text-key"),
    ],
)
def test_bad_tables_are_named_by_line(tmp_path, content, message):
    with pytest.raises(RSOConfigError, match=r"a\.csv[:,] " + message):
        texts_of(tmp_path, "a.csv", content)


def test_a_cell_may_be_of_any_length(tmp_path):
    assert texts_of(tmp_path, "a.csv", "text,n\n" + "x" * (MIB + 7) + ",1\n") == ["x" * (MIB + 7)]


# -- parquet -------------------------------------------------------------------------------------------


def table_of(kind, count=700):
    written = [None if i % 7 == 3 else "" if i % 7 == 5 else f"text {i}" for i in range(count)]
    types = {"string": pa.string(), "large": pa.large_string(), "dictionary": pa.string()}
    column = pa.array(written, types[kind])
    nested = [[{"role": "user", "content": f"{i}"}] for i in range(count)]
    columns = {"text": column.dictionary_encode() if kind == "dictionary" else column, "text.en": written}
    return written, pa.table({**columns, "messages": nested})


@pytest.mark.parametrize("kind", ["string", "large", "dictionary"])
@pytest.mark.parametrize("group", [1, 50, 256, 300, 1000])
def test_parquet_ranges_are_slices_of_the_rows(tmp_path, kind, group):
    written, table = table_of(kind, 70 if group == 1 else 700)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    file, count = local_file(tmp_path / "a.parquet"), len(written)
    every = [(row, number) for number, row in enumerate(table.to_pylist(), 1)]
    assert list(rows(file)) == every
    assert [text for text, _ in texts(file, "text")] == [text for text in written if text]
    ends = sorted({0, 1, group - 1, group, group + 1, 255, 256, 257, count - 1, count, count + 5})
    for first in ends:
        for end in [*ends, None]:
            found = list(parquet_rows(file, ("text",), first, end))
            assert found == [({"text": row["text"]}, number) for row, number in every[first:end]]


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "label": [1]}), tmp_path / "a.parquet")
    file = local_file(tmp_path / "a.parquet")
    with pytest.raises(RSOConfigError, match=r"no column 'text' \(there are body, label\): set --text-key"):
        list(texts(file, "text"))
    with pytest.raises(RSOConfigError, match="a.parquet, row 1: 'label' is not a text but a number"):
        list(texts(file, "label"))
    assert place(file, 3).endswith("a.parquet, row 3")


def test_bytes_that_are_no_text_in_parquet_are_named_by_row(tmp_path):
    raw = [b"good"] * 300 + ["naïf".encode("latin-1")] + [b"good"] * 9
    broken = pa.StringArray.from_buffers(len(raw), *pa.array(raw, pa.binary()).buffers()[1:])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet", row_group_size=290)
    with pytest.raises(RSOConfigError, match=r"a\.parquet, row 301: a text that is not UTF-8"):
        list(texts(local_file(tmp_path / "a.parquet"), "text"))


@pytest.mark.parametrize("damage", ["cut", "zeros", "changed"])
def test_damaged_parquet_is_an_error(tmp_path, damage):
    """Of a changed page only its checksum knows."""
    _, table = table_of("string")
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False, write_page_checksum=True)
    whole = (tmp_path / "a.parquet").read_bytes()
    at = whole.index(b"text 300")
    content = {
        "cut": whole[:-100],
        "zeros": whole[:at] + bytes(len(whole) - at),
        "changed": whole.replace(b"text 300", b"text 3OO"),
    }
    with pytest.raises(RSOConfigError, match=r"b\.parquet cannot be read, it may be damaged"):
        texts_of(tmp_path, "b.parquet", content[damage])
