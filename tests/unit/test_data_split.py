"""What is held out: some of the text, about the share asked for, never all, never of what trains."""

import json
import pickle
import random

import pytest

from rso_ds import RSOConfigError
from rso_ds.recipes.data import split as module
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.split import choose, united


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def parts(texts, share):
    """(what trains, what is held out), document by document."""
    chosen = choose(lambda: iter(texts), share)
    for text in texts:
        assert chosen.part(text, False) + chosen.part(text, True) == text
    return [chosen.part(t, False) for t in texts], [chosen.part(t, True) for t in texts]


def words(count, seed=0):
    draw = random.Random(seed)
    return " ".join("word" * draw.randrange(1, 4) for _ in range(count))


def lines(count, seed=0):
    return "".join(f"line {i} of document {seed}: {words(7, i)}\n" for i in range(count))


SHORT = {
    "one-line documents": [f"Record {i}: the quick brown fox number {i} jumps over the lazy dog." for i in range(300)],
    "questions and answers": [f"What is {i} + {i}?\nIt is {2 * i}. #### {2 * i}" for i in range(400)],
    "of many lengths": [words(1 + i * i % 97, i) for i in range(499)],
    "a hundred": [lines(3, i) for i in range(100)],
    "with copies": [f"document {i % 60}" for i in range(499)],
    "hundreds of copies": [f"document {i % 7}" for i in range(3000)],
    "heavy tail": [words(2 ** (i % 10), i) for i in range(200)],
}
FEW = {
    "three lines": ["a line", "another line", "one more"],
    "two": ["question\nanswer", "question two\nanswer two"],
    "one huge, two tiny": [lines(3000), "tiny one", "tiny two"],
    "one huge, one tiny": [lines(3000), "tiny"],
    "ten of a page": [lines(40, i) for i in range(10)],
    "three books": [lines(2000, i) for i in range(3)],
    "two books without newlines": [words(30_000, i) for i in (1, 2)],
    "two books without spaces": ["夜は暗かった。" * 3000, "朝は明るかった。" * 3000],
    "a book and its copy": [lines(2000)] * 2,
    "a book, its copy and a page": [lines(2000), lines(20, 1), lines(2000)],
    "pages under a title": ["Title", *(lines(200, i) for i in range(5))],
    "one of two characters": ["ab"],
    "blank lines": ["\n" * 1000],
}
ONE = {
    "lines": lines(2000),
    "two lines": f"{words(9000)}\n{words(9000)}\n",
    "one line": words(20_000),
    "a line at the end": f"{words(9000)}\nend",
    "no space": "夜は暗かった。" * 3000,
    "short": "just a few words here",
}


@pytest.mark.parametrize("case", SHORT)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5])
def test_whole_documents_are_held_out_about_the_share_asked_for(case, share):
    texts = SHORT[case]
    _, held_out = parts(texts, share)
    assert all(text in ("", whole) for text, whole in zip(held_out, texts, strict=True)), "one is cut"
    total, taken = sum(map(len, texts)), sum(map(len, held_out))
    most = max(texts.count(text) * len(text) for text in texts)
    assert 0 < taken < total
    assert 0.5 * share * total <= taken < share * total + most


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5, 0.9])
def test_few_documents_leave_text_on_both_sides(case, share):
    train, held_out = parts(FEW[case], share)
    assert "".join(train)
    assert "".join(held_out)


LONG = ["three books", "two books without newlines", "two books without spaces", "a book and its copy", "ten of a page"]


@pytest.mark.parametrize("case", [*LONG, "pages under a title"])
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_long_documents_are_cut_where_a_whole_one_would_be_too_much(case, share):
    texts = FEW[case]
    _, held_out = parts(texts, share)
    assert 0.5 * share < sum(map(len, held_out)) / sum(map(len, texts)) < max(1.5 * share, 0.11)


@pytest.mark.parametrize("case", ONE)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_a_single_document_is_cut_at_a_line_a_space_or_anywhere(case, share):
    text = ONE[case]
    (train,), (held_out,) = parts([text], share)
    assert train.strip()
    assert held_out.strip()
    assert len(held_out) <= max(2 * share * len(text), share * len(text) + 200)
    assert len(held_out) >= share * len(text) * 0.99 or len(text) < 100
    if case == "lines":
        assert train.endswith("\n")
    elif " " in text:
        assert train[-1] in " \n"


def test_nothing_is_held_out_where_nothing_is_asked_for():
    train, held_out = parts(SHORT["a hundred"], 0)
    assert train == SHORT["a hundred"]
    assert not any(held_out)


@pytest.mark.parametrize("share", [0.0002, 0.002, 0.02, 0.3])
def test_many_documents_are_held_out_by_their_hash(share):
    texts = [f"document {i}" for i in range(3000)]
    held_out = [text for text in parts(texts, share)[1] if text]
    assert held_out
    assert abs(len(held_out) - share * 3000) <= 1 + 4 * (share * 3000) ** 0.5
    assert len(set(parts(texts[::-1] + ["more"] * 9, share)[1]) ^ set(held_out)) <= 2, "others, for another order"


def test_no_share_is_too_small_for_many_documents(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 1000)
    assert any(parts([f"document {i}" for i in range(2000)], 1e-7)[1])


def test_500_copies_are_few_documents():
    """Their hash would hold out all of them, or none."""
    for share in (0.02, 0.5):
        train, held_out = parts(["one text\nin two lines\n"] * 600, share)
        assert all(train)
        assert all(held_out)


def test_no_more_is_read_than_the_choice_needs():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield f"document {read}"

    choose(endless, 0.02)
    assert read == 500


# -- corpora -------------------------------------------------------------------------------------------


def of(corpus):
    return list(corpus.documents("train")), list(corpus.documents("held_out"))


@pytest.mark.parametrize("count", [300, 700])
def test_all_text_of_a_corpus_is_in_one_part(tmp_path, count):
    texts = [f"document {i}" for i in range(count)]
    train, held_out = of(Corpus(write(tmp_path / "a.jsonl", texts), 0.1))
    assert sorted(train + held_out) == sorted(texts)
    assert 0.05 * count < len(held_out) < 0.15 * count


def test_a_corpus_may_hold_out_nothing(tmp_path):
    corpus = Corpus(write(tmp_path / "a.jsonl", ["a", "b"]), 0.0)
    assert of(corpus) == (["a", "b"], [])
    assert not corpus.validates


def test_validation_splits_are_held_out_and_test_splits_are_left_alone(tmp_path):
    for part in ("train", "dev", "test"):
        write(tmp_path / f"{part}.jsonl", [f"{part} {i}" for i in range(9)])
    corpus = Corpus(str(tmp_path))
    train, held_out = of(corpus)
    assert {t.split()[0] for t in train} == {"train"}
    assert {t.split()[0] for t in held_out} == {"dev"}
    assert (len(train), len(held_out), corpus.validates) == (9, 9, True)
    assert {t.split()[0] for t in of(Corpus(str(tmp_path), held_out_source=str(tmp_path / "test.jsonl")))[1]} == {
        "test"
    }
    assert {t.split()[0] for t in of(Corpus(str(tmp_path), held_out_source=str(tmp_path)))[1]} == {"dev"}


@pytest.mark.parametrize("sizes", [(300, 300), (700, 300), (300, 700), (700, 700), (1, 2), (1, 700)])
def test_what_one_source_holds_out_does_not_train_in_another(tmp_path, sizes):
    """Both have the same documents, and some of their own."""
    first = [lines(10, i) for i in range(sizes[0])]
    second = [lines(10, i) for i in range(sizes[1])] + ["its own"]
    names = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    train, held_out = of(Corpus(names, 0.1))
    assert train
    assert held_out
    assert not set("".join(train).splitlines()) & set("".join(held_out).splitlines())
    assert len("".join(train + held_out)) == len("".join(first + second))


def test_splits_travel_to_other_processes(tmp_path):
    names = [write(tmp_path / "a.jsonl", ["a b", "c d", "e f"]), write(tmp_path / "b.jsonl", ["a b"])]
    members = Corpus(names, 0.3).members
    chosen = [member.split for member in members]
    assert [member.split for member in pickle.loads(pickle.dumps(members))] == chosen
    assert chosen[0] == chosen[1] == united(chosen)


def test_files_that_are_held_out_do_not_train_though_they_lie_beside_the_others(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "c.jsonl")
    corpus = Corpus(str(tmp_path), held_out_source=str(tmp_path / "link.jsonl"))
    assert of(corpus) == (["a", "b"], ["c"])
    assert [path.name for path in corpus.files] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(RSOConfigError, match="are the same files, so that none is left to train on"):
        Corpus(str(tmp_path / "c.jsonl"), held_out_source=str(tmp_path / "c.jsonl"))


def test_missing_sources_are_named_with_their_flag(tmp_path):
    with pytest.raises(RSOConfigError, match="--data none.txt: no such file"):
        Corpus("none.txt")
    with pytest.raises(RSOConfigError, match="--val-data none.txt: no such file"):
        Corpus(write(tmp_path / "a.jsonl", ["a"]), held_out_source="none.txt")


def test_the_fingerprint_is_of_content_and_split_and_not_of_names(tmp_path):
    first = Corpus(write(tmp_path / "a.jsonl", ["a", "b"])).fingerprint()
    assert Corpus(write(tmp_path / "deep" / "b.jsonl", ["a", "b"])).fingerprint() == first
    others = [Corpus(write(tmp_path / "c.jsonl", ["a", "c"])), Corpus(str(tmp_path / "a.jsonl"), 0.3)]
    others.append(Corpus(str(tmp_path / "a.jsonl"), encoding="latin-1"))
    others.append(Corpus(str(tmp_path / "a.jsonl"), held_out_source=str(tmp_path / "c.jsonl")))
    assert len({first, *(corpus.fingerprint() for corpus in others)}) == 5


def test_the_hub_is_not_asked_before_its_files_are_needed(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: 1 / 0)
    corpus = Corpus(["org/name", "teknium/OpenHermes-2.5:v1.1"], held_out_source="org/other")
    assert corpus.files is None
    with pytest.raises(RSOConfigError, match="the hub cannot give it: division by zero"):
        list(corpus.documents("train"))
