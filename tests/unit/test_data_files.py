"""Which files of a folder train: nothing of a test split ever does."""

import os
from pathlib import Path

import datasets
import pytest
from support.data_folders import EN_FR, card, config, make, splits

from rso_ds import RSOConfigError
from rso_ds.recipes.data.files import files_of_folder, format_of, local_file
from rso_ds.recipes.data.sources import TEXT_KINDS, find_source


def ours(folder: Path, subset: str | None = None) -> dict[str, list[str]]:
    found = files_of_folder(folder, TEXT_KINDS, subset)
    return {split: sorted(file.name for file in files) for split, files in found.splits.items()}


def theirs(folder: Path, subset: str | None = None) -> dict[str, list[str]]:
    found = datasets.load_dataset_builder(str(folder), subset).config.data_files
    root = os.path.realpath(folder)
    return {str(split): sorted(os.path.relpath(url, root) for url in urls) for split, urls in found.items()}


# -- folders -------------------------------------------------------------------------------------------

LAYOUTS = {
    "shards": [f"data/{n}-of-00002.parquet" for n in ("train-00000", "train-00001", "test-00000", "validation-00000")],
    "shards with hashes": ["data/train-00000-of-00001-a09b74b3.parquet", "data/test-00000-of-00001-ef9c.parquet"],
    "shards of other splits": ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
    "shards in the folder itself": [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "test-00000-of-00001.parquet",
    ],
    "names": ["train.jsonl", "test.jsonl", "dev.jsonl"],
    "other names": ["training.txt", "valid.txt", "val_2.txt", "testing.txt", "evaluation.txt"],
    "numbers": ["train_0.csv", "train1.csv", "test-0.csv", "eval.csv"],
    "prefixes": ["gsm8k_train.jsonl", "gsm8k.test.jsonl", "gsm8k dev.jsonl"],
    "packed": ["train.jsonl.gz", "test.jsonl.gz"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "validation/a.jsonl", "test/a.jsonl"],
    "folders in a folder": ["data/my-train/a.csv", "data/my-test/a.csv"],
    "files of other splits in a folder": ["train/test_cases.jsonl", "train/dev.jsonl", "test/train.jsonl"],
    "a heap": ["a.jsonl", "b.jsonl", "deep/c.jsonl"],
    "words that only hold one": ["contest.jsonl", "latest.jsonl", "trainer.jsonl", "devices.jsonl"],
    "hidden files": [
        "a.jsonl",
        ".test.jsonl",
        ".git/train.jsonl",
        "__pycache__/train.jsonl",
        ".ipynb_checkpoints/test.jsonl",
    ],
    "other files beside": ["train.jsonl", "test.jsonl", "README.md", "notebook.ipynb", "train.py.lock"],
    "no train": ["test.jsonl", "validation.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_found_as_datasets_finds_them(tmp_path, layout):
    make(tmp_path, *LAYOUTS[layout])
    assert ours(tmp_path) == theirs(tmp_path)


CARDS = {
    "splits": (["a/x.jsonl", "b/y.jsonl", "c.jsonl"], card(config(splits(train="a/*", test=["b/*"]))), None),
    "one pattern": (["x/a.jsonl", "b.jsonl", "test.jsonl"], card(config("x/*.jsonl")), None),
    "list": (["a.csv", "b.csv", "c/d.csv"], card(config(["a.csv", "./c/*.csv"])), None),
    "all depths": (["x/y/a.jsonl", "b.jsonl"], card(config("**/*.jsonl")), None),
    "subset": (EN_FR, card(config("en/*", "en"), config(splits(train="fr/train*", test="fr/test*"), "fr")), "fr"),
    "subset called default": (EN_FR, card(config("en/*", "en"), config("fr/train.jsonl")), None),
    "marked default": (EN_FR, card(config("en/*", "en"), config("fr/train*", "fr", default=True)), None),
    "folders of subsets": (EN_FR, card(config(None, "en", data_dir="en"), config(None, "fr", data_dir="fr")), "fr"),
    "no configs": (["train.jsonl", "test.jsonl"], "---\nlicense: mit\n---\ntext", None),
    "no metadata": (["train.jsonl", "test.jsonl"], "# A dataset\n---\nfoo: [\n---\n", None),
    "Windows": (["a.jsonl", "b.jsonl"], card(config("b.jsonl")).replace("\n", "\r\n"), None),
}


@pytest.mark.parametrize("case", CARDS)
def test_cards_are_understood_as_datasets_does(tmp_path, case):
    names, content, subset = CARDS[case]
    (make(tmp_path, *names) / "README.md").write_text(content, newline="")
    assert ours(tmp_path, subset) == theirs(tmp_path, subset)


@pytest.mark.parametrize(
    ("names", "content", "subset", "message"),
    [
        (EN_FR, card(config("en/*", "en"), config("fr/*", "fr")), None, "has the subsets en, fr: write .*:en"),
        (EN_FR, card(config(None, "en", data_dir="en"), config(None, "fr", data_dir="fr")), None, "has the subsets"),
        (EN_FR, card(config("en/*", "en")), "de", "has the subsets en: write"),
        (EN_FR, None, "en", "no README.md there says what its subset 'en' is"),
        (["a.jsonl"], card(config(["a.jsonl", "b.jsonl"])), None, "README.md names b.jsonl, which is not there"),
        (["a.jsonl"], card(config("../b.jsonl")), None, "names ../b.jsonl, which is not in this folder"),
        (["a.jsonl"], card(config("https://a.b/c.jsonl")), None, "names https://a.b/c.jsonl, which is not in"),
        (["a.jsonl"], card(config("**.jsonl")), None, "the pattern \\*\\*.jsonl is none"),
        (["a.jsonl"], card(config({"train": "a.jsonl"})), None, "data_files must be paths, or a list"),
        (["a.jsonl"], card(config([{"split": "train"}])), None, "data_files must be paths, or a list"),
        (["a.jsonl"], card(config([*splits(train="a*"), *splits(train="b*")])), None, "with each split once"),
        (["a.jsonl"], "---\nconfigs: [\n---\n", None, "its metadata are not YAML"),
        (["a.jsonl"], "---\nconfigs: default\n---\n", None, "'configs' must be a list"),
        (
            ["x/a.jsonl", "x/test.jsonl"],
            card(config(splits(train="x/*", test="x/test*"))),
            None,
            "'x/test.jsonl' is of the splits train and test",
        ),
    ],
)
def test_cards_that_leave_open_what_trains_are_refused(tmp_path, names, content, subset, message):
    make(tmp_path, *names)
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    with pytest.raises(RSOConfigError, match=message):
        files_of_folder(tmp_path, TEXT_KINDS, subset)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["Train.jsonl", "TEST.jsonl", "Dev.JSONL"],
            {"train": ["Train.jsonl"], "test": ["TEST.jsonl"], "validation": ["Dev.JSONL"]},
        ),
        (["train/a.jsonl", "Test/a.jsonl"], {"train": ["train/a.jsonl"], "test": ["Test/a.jsonl"]}),
        (
            ["train/a.jsonl", "test.jsonl", "dev_1.jsonl"],
            {"train": ["train/a.jsonl"], "test": ["test.jsonl"], "validation": ["dev_1.jsonl"]},
        ),
        (["A.TXT", "B.Txt.GZ"], {"train": ["A.TXT", "B.Txt.GZ"]}),
        (["a.txt", "README.txt", "readme-zh.md", "LICENSE.txt", "licence.md", "CITATION.md"], {"train": ["a.txt"]}),
        (
            ["readme.jsonl", "license_plates.csv.jsonl", "notice.jsonl"],
            {"train": ["license_plates.csv.jsonl", "notice.jsonl", "readme.jsonl"]},
        ),
        (["a.txt", "notice-board.txt", "readmeabout.txt"], {"train": ["a.txt", "notice-board.txt", "readmeabout.txt"]}),
        (
            ["train.jsonl", "test.jsonl", "notes.txt", "dataset_infos.json"],
            {"train": ["train.jsonl"], "test": ["test.jsonl"]},
        ),
        (["a.parquet", "b.ipynb", "c.pdf", "noname", ".jsonl", "x.tar.gz"], {"train": ["a.parquet"]}),
    ],
)
def test_names_that_datasets_takes_for_text_to_train_on(tmp_path, names, expected):
    assert ours(make(tmp_path, *names)) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train.jsonl", "more.jsonl"],
            "'more.jsonl' belongs to no split, though others do.*It holds more.jsonl, train.jsonl",
        ),
        (["train.csv", "test.csv", "sample_submission.csv"], "'sample_submission.csv' belongs to no split"),
        (["train.jsonl", "heldout.jsonl.gz"], "'heldout.jsonl.gz' belongs to no split"),
        (["train/a.jsonl", "extra/b.jsonl"], "'extra/b.jsonl' belongs to no split"),
        (["train_test.jsonl", "a.jsonl"], "'train_test.jsonl' may be of the splits train and test"),
        (["train/dev/a.jsonl"], "'train/dev/a.jsonl' may be of the splits train and validation"),
        (["a.jsonl", "b.csv"], "the split 'train' has files of several formats, csv and jsonl"),
        (["train.jsonl", "train.parquet"], "the split 'train' has files of several formats, jsonl and parquet"),
        (["a.jsonl", "a.jsonl.gz"], "'a.jsonl' and 'a.jsonl.gz' are one file, packed and unpacked"),
        ([f"x{i:02}.jsonl" for i in range(30)] + ["y.csv"], "x19.jsonl and 11 more"),
    ],
)
def test_heaps_that_leave_open_what_trains_are_refused_with_their_files(tmp_path, names, message):
    with pytest.raises(RSOConfigError, match=f"{message}.*Name the files"):
        ours(make(tmp_path, *names))


@pytest.mark.parametrize("name", ["test", "train data", "validation", "a [b] *c?", "data.train", "über"])
def test_the_path_of_a_folder_says_nothing_of_its_files(tmp_path, name):
    folder = make(tmp_path / name / "test", "a.jsonl", "sub/b.jsonl")
    source = find_source(str(folder))
    assert [file.name for file in source.train] == ["a.jsonl", "sub/b.jsonl"]
    assert all(Path(file.url).is_file() for file in source.train)
    found = find_source(f"{folder}/*.jsonl")
    assert [file.name for file in found.train] == ["a.jsonl"]


def test_the_snapshots_of_the_hubs_cache_are_links(tmp_path):
    blobs = make(tmp_path / "blobs", "0a", "0b", "0c")
    snapshot = tmp_path / "snapshots" / "12ab"
    for name, blob in (
        ("data/train-00000-of-00001.jsonl", "0a"),
        ("data/test-00000-of-00001.jsonl", "0b"),
        ("a.pdf", "0c"),
    ):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / blob, (snapshot / name).parent))
    assert ours(snapshot) == theirs(snapshot)
    assert [file.name for file in find_source(str(snapshot)).train] == ["data/train-00000-of-00001.jsonl"]
    (blobs / "0a").unlink()
    with pytest.raises(RSOConfigError, match="train-00000-of-00001.jsonl cannot be read: it is a link to what is not"):
        ours(snapshot)


def test_links_within_a_folder_count_no_file_twice_and_never_go_round(tmp_path):
    folder = make(tmp_path / "corpus", "books/a.jsonl", "books/b.jsonl")
    make(tmp_path / "elsewhere", "c.jsonl")
    (folder / "again").symlink_to("books")
    (folder / "books" / "latest.jsonl").symlink_to("a.jsonl")
    (folder / "books" / "up").symlink_to(folder)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    assert ours(folder) == {"train": ["books/a.jsonl", "books/b.jsonl", "more/c.jsonl"]}


def test_the_targets_of_git_annex_lie_hidden_in_the_folder(tmp_path):
    make(tmp_path, ".git/annex/objects/XY")
    (tmp_path / "a.jsonl").symlink_to(".git/annex/objects/XY")
    assert ours(tmp_path) == {"train": ["a.jsonl"]}


def test_empty_files(tmp_path):
    """Of source code many are; a file of records that is empty was not written to its end."""
    make(tmp_path, "code/a.py", "code/deep/b.py", "rows/a.jsonl")
    (tmp_path / "code" / "__init__.py").touch()
    (tmp_path / "rows" / "b.jsonl").touch()
    found = files_of_folder(tmp_path / "code", TEXT_KINDS)
    assert ours(tmp_path / "code") == {"train": ["a.py", "deep/b.py"]}
    assert found.ignored == ("__init__.py",)
    with pytest.raises(RSOConfigError, match="b.jsonl is empty"):
        ours(tmp_path / "rows")
    with pytest.raises(RSOConfigError, match="__init__.py is empty"):
        find_source(str(tmp_path / "code" / "__init__.py"))


def test_what_is_no_regular_file_is_refused_before_it_blocks(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(RSOConfigError, match="a.jsonl cannot be read: it is no regular file"):
        ours(tmp_path)


def test_a_closed_folder_is_an_error_and_not_an_empty_one(tmp_path, monkeypatch):
    make(tmp_path, "a.jsonl", "closed/b.jsonl")
    scan = os.scandir

    def closed(path):  # to root nothing is
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(RSOConfigError, match="closed cannot be read: Permission denied"):
        ours(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("jsonl", "")),
        ("A.JSONL.GZ", ("jsonl", ".gz")),
        ("a.b.txt", ("text", "")),
        ("x/y.tsv.zst", ("tsv", ".zst")),
        (".jsonl", None),
        (".gz", None),
        ("a.gz", None),
        ("jsonl", None),
        ("a.tar.gz", None),
        ("a.jsonl/b", None),
        ("a.docx", None),
    ],
)
def test_formats_by_suffix(name, expected):
    assert format_of(name) == expected


def test_unknown_formats_are_named_with_the_known(tmp_path):
    make(tmp_path, "a.docx")
    with pytest.raises(RSOConfigError, match=r"a.docx: unknown format; known are .txt, .*also with .xz"):
        local_file(tmp_path / "a.docx")
