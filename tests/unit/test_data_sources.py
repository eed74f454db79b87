"""What --data may name: files, folders, patterns, and datasets of the hub, which nobody asks before it is time."""

from pathlib import Path

import datasets
import pytest
from support.data_folders import EN_FR, card, config, make, splits

from rso_ds import RSOConfigError
from rso_ds.recipes.data.sources import ROW_KINDS, HubDataset, Source, find_source


def parts(source: Source) -> tuple[list[str], list[str] | None, list[str]]:
    held_out = None if source.held_out is None else [file.name for file in source.held_out]
    return [file.name for file in source.train], held_out, sorted(source.untouched)


def test_a_folder_trains_and_validates_by_its_splits(tmp_path):
    make(tmp_path, "train.jsonl", "dev.jsonl", "test.jsonl", "notes.pdf")
    assert parts(find_source(str(tmp_path))) == (["train.jsonl"], ["dev.jsonl"], ["notes.pdf", "test.jsonl"])
    assert parts(find_source(f"{tmp_path}::test")) == (["test.jsonl"], None, ["dev.jsonl", "notes.pdf", "train.jsonl"])
    prefer = ("validation", "test", "train")
    assert parts(find_source(str(tmp_path), "--val-data", prefer=prefer))[0] == ["dev.jsonl"]
    assert parts(find_source(str(tmp_path / "test.jsonl"))) == (["test.jsonl"], None, [])


def test_splits_of_a_card_may_be_called_otherwise(tmp_path):
    (make(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl") / "README.md").write_text(
        card(config(splits(train="a*", dev="b*", extra="c*")))
    )
    assert parts(find_source(str(tmp_path))) == (["a.jsonl"], ["b.jsonl"], ["c.jsonl"])


def test_subsets_and_splits_of_a_folder(tmp_path):
    (make(tmp_path, *EN_FR) / "README.md").write_text(
        card(config("en/*", "en"), config(splits(train="fr/train*", test="fr/test*"), "fr"))
    )
    assert parts(find_source(f"{tmp_path}:fr"))[0] == ["fr/train.jsonl"]
    assert parts(find_source(f"{tmp_path}:fr:test"))[0] == ["fr/test.jsonl"]
    with pytest.raises(RSOConfigError, match=r"none is 'dev'.*as in \S+:fr:train\."):
        find_source(f"{tmp_path}:fr:dev")


@pytest.mark.parametrize("names", [["test.jsonl"], ["test.jsonl", "valid.jsonl"], ["test/a.jsonl", "b.jsonl"]])
def test_a_folder_without_a_split_to_train_on_is_refused(tmp_path, names):
    with pytest.raises(RSOConfigError, match=r"none is 'train', so that it is not clear which files train: .*::\w+\."):
        find_source(str(make(tmp_path, *names)))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["train-0.jsonl", "train-1.jsonl"]),
        ("train-?.jsonl", ["train-0.jsonl", "train-1.jsonl"]),
        ("test*", ["test.jsonl"]),
        ("*", ["train-0.jsonl", "train-1.jsonl"]),
        ("**/*.csv", ["deep/train/a.csv"]),
        ("deep/*/*.csv", ["train/a.csv"]),
        ("deep/test/*", ["a.csv"]),
        ("deep/te*/*.csv", "none is 'train'"),
        ("dev*l", "no such file"),
        ("[tv]est.jsonl", "none is 'train'"),
        ("*.pdf", "none of its files .x.pdf, .* is a .txt"),
        ("none/*.jsonl", "no such file"),
        ("plain/*", ["a.txt", "b.md"]),
    ],
)
def test_patterns_train_on_what_they_name_and_on_no_other_split(tmp_path, pattern, expected):
    make(
        tmp_path,
        "train-0.jsonl",
        "train-1.jsonl",
        "test.jsonl",
        "README.md",
        "x.pdf",
        "deep/train/a.csv",
        "deep/test/a.csv",
        *("plain/a.txt", "plain/b.md", "plain/README.md"),
    )
    if isinstance(expected, str):
        with pytest.raises(RSOConfigError, match=expected):
            find_source(f"{tmp_path}/{pattern}")
    else:
        assert [file.name for file in find_source(f"{tmp_path}/{pattern}").train] == expected


def test_patterns_and_paths_from_here_and_from_home(tmp_path, monkeypatch):
    make(tmp_path, "a.jsonl", "sub/b.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jsonl", "*.jsonl", "./a.jsonl", "~/a.jsonl", "~/*.jsonl"):
        (file,) = find_source(name).train
        assert Path(file.url).resolve() == tmp_path / "a.jsonl"
    assert [file.name for file in find_source("sub").train] == ["b.jsonl"]


@pytest.fixture
def no_hub(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset_builder", asked)


@pytest.mark.parametrize(
    ("name", "repository", "subset", "split"),
    [
        ("wikitext", "wikitext", None, ""),
        ("owner/name@v1.0", "owner/name", None, ""),
        ("mlfoundations/dclm-baseline-1.0", "mlfoundations/dclm-baseline-1.0", None, ""),
        ("teknium/OpenHermes-2.5", "teknium/OpenHermes-2.5", None, ""),
        ("org/name:v1.1", "org/name", "v1.1", ""),
        ("org/name.de:a/b", "org/name.de", "a/b", ""),
        ("org/name:en:train_sft", "org/name", "en", "train_sft"),
        ("org/name::validation", "org/name", None, "validation"),
    ],
)
def test_names_of_the_hub_are_taken_as_such_and_nobody_is_asked(
    no_hub, tmp_path, monkeypatch, name, repository, subset, split
):
    monkeypatch.chdir(tmp_path)
    found = find_source(name)
    assert isinstance(found, HubDataset)
    assert (found.repository, found.subset, found.split) == (repository, subset, split)
    assert found.revision == ("v1.0" if "@" in name else None)


@pytest.mark.parametrize(
    "name",
    [
        "none.txt",
        "data/none.jsonl",
        "data/none.jsonl.gz",
        "./org",
        "../org/name",
        "~/name",
        "/org/name",
        "data/sub/name",
        *("~nobody/name", "data\\name", "my data", "data/", "", ".", "a--b/c", "data/none.parquet:en", "x" * 300),
    ],
)
def test_mistyped_paths_do_not_wait_for_the_hub(no_hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RSOConfigError, match="no such file or folder|the folder has no"):
        find_source(name)


def test_kinds_that_are_not_wanted(tmp_path):
    make(tmp_path, "a.txt", "b.csv")
    assert [file.name for file in find_source(str(tmp_path), kinds=ROW_KINDS).train] == ["b.csv"]
    with pytest.raises(RSOConfigError, match="a.txt: expected files of one of jsonl"):
        find_source(str(tmp_path / "a.txt"), kinds=ROW_KINDS)
    with pytest.raises(RSOConfigError, match="the folder has no .jsonl, .*.parquet file"):
        find_source(str(make(tmp_path / "texts", "a.txt")), kinds=ROW_KINDS)


def test_the_standard_library_is_enough_text():
    source = find_source("stdlib")
    assert sum(file.size for file in source.train) > 5_000_000
    assert not any("test" in file.name.split("/") for file in source.train)


# -- the hub, as a folder of the same layout -----------------------------------------------------------


def hub(folder: Path, monkeypatch, **more) -> HubDataset:
    ask = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset, revision: ask(str(folder), subset))
    return HubDataset("org/name", "org/name", more.get("subset"), more.get("split", ""), "--data")


def test_files_of_the_hub_by_split(tmp_path, monkeypatch):
    make(tmp_path, *(f"data/{n}-00000-of-00001.parquet" for n in ("train", "validation", "test")))
    source = hub(tmp_path, monkeypatch).find()
    assert [Path(file.name).name for file in source.train] == ["train-00000-of-00001.parquet"]
    assert [Path(file.name).name for file in source.held_out] == ["validation-00000-of-00001.parquet"]
    assert [Path(name).name for name in source.untouched] == ["test-00000-of-00001.parquet"]
    assert source.train[0].size == (tmp_path / "data" / "train-00000-of-00001.parquet").stat().st_size
    monkeypatch.undo()
    assert [Path(file.name).name for file in hub(tmp_path, monkeypatch, split="test").find().train] == [
        "test-00000-of-00001.parquet"
    ]


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["data/train_sft-00000-of-00001.parquet"], {}, r"none is 'train'.*as in org/name::train_sft"),
        (["train.jsonl", "test.jsonl"], {"split": "dev"}, "its files are of the splits train, test, and none is 'dev'"),
        (["train.jsonl"], {"subset": "en"}, "the hub cannot give it: BuilderConfig 'en' not found"),
        (["a.pdf"], {}, "--data org/name: "),
        (["train.arrow"], {}, "train.arrow is of no known format"),
    ],
)
def test_what_the_hub_cannot_give(tmp_path, monkeypatch, names, more, message):
    with pytest.raises(RSOConfigError, match=message):
        hub(make(tmp_path, *names), monkeypatch, **more).find()


def test_a_hub_out_of_reach_is_one_message(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        RSOConfigError, match="--data org/name: no such file, and the hub cannot give it: Couldn't reach"
    ):
        find_source("org/name").find()
