"""Blocks: wherever a file is cut, its parts hold each record once, and errors say where they are in the whole."""

import json

import pytest
from support.environment import needs

from rso_ds import RSOConfigError
from rso_ds.recipes.data import blocks
from rso_ds.recipes.data.blocks import Block, block_texts
from rso_ds.recipes.data.files import local_file
from rso_ds.recipes.data.records import texts

needs("datasets", "pyarrow")

LINES = ["", "short", "é東🙂" * 9, "x" * 300, "", "CR\\r\\n inside", "last"]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf"])
def test_parts_of_a_file_of_lines_hold_each_line_once(tmp_path, parts, ending, head):
    rows = [json.dumps({"text": text}, ensure_ascii=False) if text else "" for text in LINES * 3]
    (tmp_path / "a.jsonl").write_bytes(head + ending.join(rows).encode())
    file = local_file(tmp_path / "a.jsonl")
    found = [t for i in range(parts) for t in block_texts(file, Block(0, i, parts), "text", "utf-8")]
    assert found == [t for t, _ in texts(file, "text")] == [t for t in LINES * 3 if t]


@pytest.mark.parametrize("parts", [1, 2, 5, 40])
@pytest.mark.parametrize("lines", [True, False])
def test_parts_of_a_plain_text_are_all_of_it(tmp_path, monkeypatch, parts, lines):
    """Cut at lines; and between characters of UTF-8 where a line is longer than a block."""
    monkeypatch.setattr(blocks, "_BLOCK", 128)
    monkeypatch.setattr(blocks, "_PIECE", 60)
    whole = "".join(f"é line {i} of 東 text{chr(10) if lines else ' '}" for i in range(300))
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    file = local_file(tmp_path / "a.txt")
    found = [t for i in range(parts) for t in block_texts(file, Block(0, i, parts), "", "utf-8")]
    assert "".join(found) == whole
    assert len(found) >= parts
    if lines:
        assert all(t.endswith("\n") for t in found)


@pytest.mark.parametrize("bad", [b"\xff", b"\xe9t"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_what_does_not_decode_is_named_by_its_offset(tmp_path, kind, bad):
    line = b'{"text": "abc"}\n'
    raw = line * 2000 + b'{"text": "' + bad + b'"}\n' + line * 20_000
    (tmp_path / f"a.{kind}").write_bytes(raw)
    file = local_file(tmp_path / f"a.{kind}")
    with pytest.raises(RSOConfigError, match=f"a.{kind}, offset {2000 * len(line) + 10}: "):
        [t for i in range(9) for t in block_texts(file, Block(0, i, 9), "text", "utf-8")]
