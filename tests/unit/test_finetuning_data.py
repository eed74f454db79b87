"""Rows for fine-tuning: as they are written, of the right split, and named by their place where they cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.environment import needs

from rso_ds.errors import RSOConfigError

needs("datasets", "transformers")

from datasets import ClassLabel, Dataset, Features, Value  # noqa: E402

from rso_ds.recipes.finetuning.arguments import CausalArguments, ClassificationArguments  # noqa: E402
from rso_ds.recipes.finetuning.data import _require, load_rows, load_splits, token_count  # noqa: E402

LABELLED = {"--text_column": "text", "--label_column": "label"}
PAIRS = {"--prompt_column": "prompt", "--completion_column": "completion"}
TALKS = {"--messages_column": "messages"}


def written(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path: Path, *records: object) -> str:
    return written(path, "".join(json.dumps(record) + "\n" for record in records))


def parquet(path: Path, columns: dict, **types: pa.DataType) -> str:
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), path)
    return str(path)


def message_of(source: str, columns: dict[str, str], **options: str) -> str:
    with pytest.raises(RSOConfigError) as refused:
        load_rows(source, "--data", columns, **options)
    return str(refused.value)


# -- as they are written -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_cells_of_csv_stay_as_they_are(tmp_path, suffix):
    lines = ["text,label", "00012,NA", "null,01", '"1.50, twice",None', "true,n/a"]
    separated = [line.replace(",", "\t", 1) if '"' not in line else '"1.50, twice"\tNone' for line in lines]
    source = written(tmp_path / f"rows.{suffix}", "\n".join(lines if suffix == "csv" else separated) + "\n")
    expected = {"text": ["00012", "null", "1.50, twice", "true"], "label": ["NA", "01", "None", "n/a"]}
    assert load_rows(source, "--data", LABELLED).to_dict() == expected
    every = load_rows(source, "--data")
    assert every.to_dict() == expected
    _require(every, source, LABELLED)


def test_numbers_of_json_are_texts_as_they_are_written(tmp_path):
    """Also where the numbers of one column are not all of one kind, of which Arrow makes an error."""
    cells = ["7", "0.10", "true", "false", "1E3", "1e999", '"seven"', "12345678901234567890123"]
    source = written(tmp_path / "n.jsonl", "".join(f'{{"prompt": "a", "completion": {cell}}}\n' for cell in cells))
    expected = [cell.strip('"') for cell in cells]
    assert load_rows(source, "--data", PAIRS)["completion"][:] == expected
    assert load_rows(source, "--data")["completion"][:] == expected


def test_typed_parquet_becomes_texts_and_classes_their_names(tmp_path):
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["toxic", "fine"]), "other": Value("int64")}
    )
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "other": [5, 6]}, features=features)
    rows.to_parquet(tmp_path / "classes.parquet")
    assert load_rows(str(tmp_path / "classes.parquet"), "--data", LABELLED).to_dict() == {
        "text": ["a", "b"],
        "label": ["fine", "toxic"],
    }
    numbers = parquet(tmp_path / "n.parquet", {"text": [1, 2], "label": [3.8, 0.1]}, label=pa.float32())
    assert load_rows(numbers, "--data", LABELLED).to_dict() == {"text": ["1", "2"], "label": ["3.8", "0.1"]}


def test_hub_datasets_are_read_alike(tmp_path, monkeypatch):
    """A folder stands for the hub; its csv is text, its classes have names, its splits are its own."""
    import datasets

    from rso_ds.recipes.finetuning import rows

    written(tmp_path / "texts" / "train.csv", "text,label\n00012,NA\nb,01\n")
    written(tmp_path / "texts" / "validation.csv", "text,label\nc,01\n")
    written(tmp_path / "texts" / "test.csv", "text,label\nd,01\n")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["toxic", "fine"])})
    (tmp_path / "typed" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        typed = Dataset.from_dict({"text": [split, "b"], "label": [1, -1 if split == "test" else 0]}, features=features)
        typed.to_parquet(tmp_path / "typed" / "data" / f"{split}-00000-of-00001.parquet")

    def from_folder(name: str, subset: str | None = None, revision: str | None = None, **options: object) -> object:
        return datasets.load_dataset(str(tmp_path / name.rpartition("/")[2]), subset, **options)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(rows, "load_dataset", from_folder)
    splits = load_splits(ClassificationArguments("m", "owner/texts"), 0)
    assert splits.train.to_dict() == {"text": ["00012", "b"], "label": ["NA", "01"]}
    assert splits.held_out["text"][:] == ["c"]
    assert splits.description.untouched == ["owner/texts, split test"]
    assert load_rows("owner/typed", "--data", LABELLED)["label"][:] == ["fine", "toxic"]
    assert "owner/typed::test, split test, row 2: 'label' is -1" in message_of("owner/typed::test", LABELLED)
    assert "has the splits train, test, and none is 'dev'" in message_of("owner/typed::dev", LABELLED)
    assert "--label_column kind: owner/typed, split train has the columns text, label" in message_of(
        "owner/typed", {"--label_column": "kind"}
    )


def test_conversations_keep_their_structure(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    talk = [{"role": "user", "content": 7, "name": "Eve"}, {"role": "assistant", "content": ""}]
    source = jsonl(tmp_path / "talks.jsonl", {"messages": talk, "id": 1}, {"messages": [talk[0], call], "id": "x"})
    first, second = load_rows(source, "--data", TALKS)["messages"]
    assert [(m["role"], m["content"], m["name"]) for m in first] == [("user", "7", "Eve"), ("assistant", "", None)]
    assert second[1]["tool_calls"] == call["tool_calls"]


def test_encodings(tmp_path):
    text = 'text,label\n"Zoë, naïve",ça\nb,c\n'
    for encoding, name in (("cp1252", "a.csv"), ("utf-16", "b.csv"), ("utf-8-sig", "c.csv")):
        source = written(tmp_path / name, text.encode(encoding))
        read_as = encoding if encoding != "utf-8-sig" else "utf-8"
        assert load_rows(source, "--data", LABELLED, read_as)[0] == {"text": "Zoë, naïve", "label": "ça"}
    assert "a.csv, offset 14" in message_of(str(tmp_path / "a.csv"), LABELLED)
    with pytest.raises(RSOConfigError, match="--encoding 'utf-9' is no encoding"):
        ClassificationArguments("m", "d", encoding="utf-9")


# -- records that cannot be used -------------------------------------------------------------------------

GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD = {
    "missing": ('{"prompt": "a", "answer": 1}', "no 'completion' (there are prompt, answer)"),
    "null": ('{"prompt": null, "completion": "b"}', "'prompt' is null"),
    "empty": ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
    "list": ('{"prompt": ["a"], "completion": "b"}', "'prompt' is a list, and not a text"),
    "object": ('{"prompt": {"a": 1}, "completion": "b"}', "'prompt' is an object, and not a text"),
    "not a number": ('{"prompt": "a", "completion": NaN}', "'completion' is NaN, which often stands for no value"),
    "half a pair": (r'{"prompt": "a\ud83d", "completion": "b"}', "half of a surrogate pair"),
    "no object": ('["a", "b"]', "a list, and not a JSON object"),
    "no JSON": ("prompt: a", "not a JSON object a line"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_record_that_cannot_be_used_is_named(tmp_path, kind):
    record, why = BAD[kind]
    message = message_of(written(tmp_path / "r.jsonl", GOOD * 2 + "\n" + record + "\n" + GOOD), PAIRS)
    assert "r.jsonl, line 4: " in message
    assert why in message


TALK = [{"role": "user", "content": "a"}]
BAD_TALKS = {
    "text": ("hello", "is a text, and not a list of messages"),
    "none": ([], "is empty, and not a list of messages"),
    "object": ({"role": "user", "content": "a"}, "is an object, and not a list of messages"),
    "texts": (["a"], "has as message 1 a text, and not an object"),
    "old keys": ([*TALK, {"from": "gpt", "value": "b"}], 'a message, number 2, without "role" (it has from, value)'),
    "no content": ([{"role": "user"}], 'a message, number 1, without "content"'),
    "null content": ([{"role": "user", "content": None}], 'number 1, whose "content" is null'),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], 'whose "content" is a list, and not a text'),
    "role": ([{"role": 1, "content": "a"}], 'whose "role" is no text'),
    "half a pair": ([{"role": "user", "content": "a", "name": "\ud83d"}], "half of a surrogate pair"),
    "kinds": (
        [{"role": "user", "content": "a", "name": {"first": "Eve"}}],
        "built otherwise than in the records before",
    ),
}


@pytest.mark.parametrize("kind", BAD_TALKS)
def test_a_malformed_conversation_is_named(tmp_path, kind):
    good = {"messages": [{**TALK[0], "name": "Eve"}]}
    talk, why = BAD_TALKS[kind]
    message = message_of(jsonl(tmp_path / "t.jsonl", good, good, {"messages": talk}, good), TALKS)
    assert message.startswith(f"{tmp_path}/t.jsonl, line 3: 'messages' ")
    assert why in message


def test_rows_of_csv_and_parquet_are_named(tmp_path):
    hole = written(tmp_path / "hole.csv", 'text,label\n"two\nlines",b\nc,\n')
    assert "hole.csv, line 4: 'label' is empty" in message_of(hole, LABELLED)
    table = parquet(tmp_path / "hole.parquet", {"text": ["a", "b", "c"], "label": ["x", None, "y"]})
    assert "hole.parquet, row 2: 'label' is null" in message_of(table, LABELLED)
    raw = parquet(tmp_path / "raw.parquet", {"text": [b"a"], "label": ["x"]})
    assert "raw.parquet, row 1: 'text' is bytes, and not a text" in message_of(raw, LABELLED)
    with pytest.raises(RSOConfigError, match="rows, row 2: 'label' is null"):
        _require(load_rows(table, "--data"), "rows", LABELLED)


def test_missing_columns_are_told_with_those_that_there_are(tmp_path):
    semicolons = written(tmp_path / "s.csv", "text;label\na;b\n")
    message = message_of(semicolons, LABELLED)
    assert "--text_column text: " in message
    assert "s.csv has the columns text;label. Its cells seem to be separated by ';': csv has commas" in message
    parquet(tmp_path / "two" / "a.parquet", {"text": ["a"], "label": ["b"]})
    parquet(tmp_path / "two" / "b.parquet", {"text": ["a"], "kind": ["b"]})
    assert "--label_column label: " in message_of(str(tmp_path / "two"), LABELLED)
    assert "b.parquet has the columns text, kind." in message_of(str(tmp_path / "two"), LABELLED)
    assert load_rows(str(tmp_path / "two"), "--data")["kind"][:] == [None, "b"]
    assert "has no rows" in message_of(written(tmp_path / "empty.csv", "text,label\n"), LABELLED)


# -- splits ----------------------------------------------------------------------------------------------


def folder_of(root: Path, *splits: str) -> str:
    for split in splits:
        jsonl(root / f"{split}.jsonl", *({"prompt": f"{split} {i}", "completion": i, "other": i} for i in range(20)))
    return str(root)


def begins(rows: Dataset) -> set[str]:
    return {prompt.split()[0] for prompt in rows["prompt"]}


@pytest.mark.parametrize(
    ("splits", "held_out", "untouched"),
    [
        (("train", "test"), "train", ["test.jsonl"]),
        (("train", "validation", "test"), "validation", ["test.jsonl"]),
        (("train", "dev"), "dev", []),
    ],
)
def test_only_the_training_split_trains(tmp_path, splits, held_out, untouched):
    found = load_splits(CausalArguments("m", folder_of(tmp_path, *splits)), 3)
    assert begins(found.train) == {"train"}
    assert begins(found.held_out) == {held_out}
    assert (len(found.train), len(found.held_out)) == ((18, 2) if held_out == "train" else (20, 20))
    assert not set(found.train["prompt"]) & set(found.held_out["prompt"])
    assert found.train.column_names == ["prompt", "completion"]
    assert found.description.untouched == untouched


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (("train", "validation", "test"), "validation"),
        (("train", "test"), "test"),
        (("train",), "train"),
        (("a",), "a"),
    ],
)
def test_the_split_that_evaluation_data_means(tmp_path, splits, chosen):
    data = folder_of(tmp_path / "data", "train", "validation")
    held_out = folder_of(tmp_path / "held_out", *splits)
    found = load_splits(CausalArguments("m", data, eval_data=held_out), 0)
    assert (len(found.train), begins(found.held_out), len(found.held_out)) == (20, {chosen}, 20)
    assert "validation.jsonl" in found.description.untouched  # of --data


def test_the_test_split_of_the_training_folder_as_evaluation_data(tmp_path):
    data = folder_of(tmp_path, "train", "test")
    for evaluated in (data, f"{data}/test.jsonl"):
        found = load_splits(CausalArguments("m", data, eval_data=evaluated), 0)
        assert (begins(found.train), begins(found.held_out)) == ({"train"}, {"test"})
        assert found.description.untouched == []


def test_too_few_rows_for_two_parts(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", {"prompt": "a", "completion": "b"})
    two = jsonl(tmp_path / "two.jsonl", *[{"prompt": "a", "completion": "b"}] * 2)
    with pytest.raises(RSOConfigError, match="has 1 row, too few to hold some out"):
        load_splits(CausalArguments("m", one), 0)
    with pytest.raises(RSOConfigError, match=r"--eval_fraction 0.99 of the 2 rows .* leaves none to train on"):
        load_splits(CausalArguments("m", two, eval_fraction=0.99), 0)


def test_what_is_told_of_the_data(tmp_path):
    data = folder_of(tmp_path, "train", "validation", "test")
    description = load_splits(CausalArguments("m", data, max_rows=5), 0).description
    assert description.text().splitlines() == [
        f"data {data}",
        "  trains    1 file, 20 rows, 180 characters (of which at most --max_rows 5 train): train.jsonl",
        "  held out  1 file, 20 rows, 280 characters (the validation split of --data): validation.jsonl",
        "  not read  test.jsonl",
        """  begins    '{"prompt": "train 0", "completion": "0"}'""",
    ]
    long = jsonl(tmp_path / "long.jsonl", *[{"prompt": "a" * 500, "completion": "b"}] * 2)
    last = load_splits(CausalArguments("m", long), 0).description.text().splitlines()[-1]
    assert len(last) == len("  begins    ''") + 200
    tokens = Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5, 6]]})
    assert token_count(tokens.select([2, 0])) == 5


def test_ranks_can_tell_whether_they_have_the_same_rows(tmp_path):
    def marks(name: str, *completions: object, **options: object) -> dict:
        source = jsonl(tmp_path / name / "r.jsonl", *({"prompt": "a", "completion": c} for c in completions))
        return load_splits(CausalArguments("m", source, **options), 0).marks

    here = marks("here", "b", 1)
    assert marks("elsewhere", "b", 1) == here
    assert marks("order", 1, "b")["rows of --data"] != here["rows of --data"]
    assert marks("cells", "b", 2)["rows of --data"] != here["rows of --data"]
    assert marks("flag", "b", 1, eval_fraction=0.3) != here


def test_changed_files_are_read_anew(tmp_path):
    """A data set that datasets caches by names or times would still have the old rows."""
    source = written(tmp_path / "r.csv", "text,label\na,b\n")
    assert load_rows(source, "--data", LABELLED)["text"][:] == ["a"]
    written(tmp_path / "r.csv", "text,label\nc,b\n")
    assert load_rows(source, "--data", LABELLED)["text"][:] == ["c"]


def test_labels_that_look_like_numbers():
    from rso_ds.recipes.finetuning.classification import _numbers_first

    labels = ["b", "10", "01", "--5", "2", "²", "NA", "-1", "1"]
    assert sorted(labels, key=_numbers_first) == ["-1", "01", "1", "2", "10", "--5", "NA", "b", "²"]


# -- the DeepSpeed JSON ----------------------------------------------------------------------------------


def test_the_deepspeed_json_is_read_by_us(tmp_path):
    from rso_ds.recipes.finetuning.parser import _json_of

    config = {"optimizer": {"type": "RSO", "params": {"rank": 8}}}
    marked = written(tmp_path / "ds.json", json.dumps(config).encode("utf-8-sig"))
    assert json.loads(_json_of(marked)) == config
    assert json.loads(_json_of(f" {json.dumps(config)}")) == config
    for content, words in ((b'{"a": "\xff"}', "offset 7"), (b"[1]", "must hold a JSON object"), (b"{", "is not JSON")):
        with pytest.raises(RSOConfigError, match=f"--deepspeed .*{words}"):
            _json_of(written(tmp_path / "bad.json", content))
