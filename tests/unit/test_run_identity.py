"""What makes two runs' data the same: the text and the tokenizer themselves, not where or when they were saved."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import byte_tokenizer
from support.environment import needs

from rso_ds import RSOCheckpointError, RSOConfigError
from rso_ds.recipes.data import corpus as corpora
from rso_ds.recipes.data import tokenization
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.dataset import counts_of, token_file
from rso_ds.recipes.data.tokenization import END_OF_TEXT, load_tokenizer, own_name, pieces, tokenizer_fingerprint
from rso_ds.recipes.training.arguments import TrainArguments
from rso_ds.recipes.training.data import RunData, corpus_of
from rso_ds.recipes.training.resume import FORMAT, ResumePoint, changed_settings, check_same_run

needs("transformers", "datasets")


def saved(folder: Path, change=None, settings=None):
    """The tokenizer of bytes, saved, its tokenizer.json and tokenizer_config.json changed, loaded again."""
    from transformers import PreTrainedTokenizerFast

    byte_tokenizer.build().save_pretrained(folder)
    for name, alter in (("tokenizer.json", change), ("tokenizer_config.json", settings)):
        content = json.loads((folder / name).read_text())
        (alter or (lambda content: None))(content)
        (folder / name).write_text(json.dumps(content))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def lowercase(content):
    content["normalizer"] = {"type": "Lowercase"}


def prefix(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def merge(content):
    content["model"]["vocab"]["ab"] = len(content["model"]["vocab"])
    content["model"]["merges"] = [["a", "b"]]


def other_end(content):
    content["eos_token"] = "!"


@pytest.mark.parametrize(
    ("change", "settings"),
    [(lowercase, None), (prefix, None), (merge, None), (None, other_end)],
    ids=["lowercase", "prefix", "merge", "end"],
)
def test_a_tokenizer_that_makes_other_tokens_has_another_fingerprint(tmp_path, change, settings):
    assert tokenizer_fingerprint(saved(tmp_path / "b", change, settings)) != tokenizer_fingerprint(
        saved(tmp_path / "a")
    )


def test_a_tokenizer_keeps_its_fingerprint(tmp_path):
    """Saved and loaded, and after calls that cut and pad, which the tokenizer remembers."""
    tokenizer = byte_tokenizer.build()
    mark = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == padded
    assert tokenizer_fingerprint(saved(tmp_path / "again")) == mark


def test_a_trained_tokenizer_keeps_its_fingerprint_in_a_checkpoint(tmp_path):
    corpus = Corpus(str(text(tmp_path / "a.txt")))
    tokenizer = load_tokenizer(None, corpus, 300, tmp_path / "cache")
    tokenizer.save_pretrained(tmp_path / "hf")
    again = load_tokenizer(str(tmp_path / "hf"), corpus, 300, tmp_path / "cache")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


class Slow:
    """A tokenizer in Python, as sentencepiece models have: nothing of its inside can be written out."""

    eos_token_id, sep_token_id, bos_token_id, special_tokens_map = 0, None, None, {"eos_token": "e"}

    def __init__(self, ids):
        self.ids = ids

    def get_vocab(self):
        return {"e": 0, "a": 1}

    def __call__(self, text, **options):
        return {"input_ids": self.ids}


def test_a_tokenizer_without_a_backend_is_told_by_what_it_makes_of_a_text():
    assert tokenizer_fingerprint(Slow([1, 2])) == tokenizer_fingerprint(Slow([1, 2]))
    assert tokenizer_fingerprint(Slow([1, 2])) != tokenizer_fingerprint(Slow([2, 1]))


# -- corpora and token files ---------------------------------------------------------------------------


def text(path: Path, number: int = 300) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"line {i} of a text\n" for i in range(number)))
    return path


def test_a_corpus_is_its_content(tmp_path, monkeypatch):
    mark = Corpus(str(text(tmp_path / "a.txt"))).fingerprint()
    os.utime(tmp_path / "a.txt", (1, 1))
    assert Corpus(str(tmp_path / "a.txt")).fingerprint() == mark
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")
    monkeypatch.chdir(tmp_path)
    assert Corpus("b.txt").fingerprint() == mark
    other = (tmp_path / "a.txt").read_text().replace("line 77 ", "lime 77 ")
    (tmp_path / "a.txt").write_text(other)
    os.utime(tmp_path / "a.txt", (1, 1))
    assert Corpus(str(tmp_path / "a.txt")).fingerprint() != mark
    assert Corpus("b.txt", held_out=0.1).fingerprint() != mark


def test_a_corpus_knows_which_of_its_files_train(tmp_path):
    """The same two files: both train, or one is held out. Tokens cached for one are not those of the other."""
    one, two = str(text(tmp_path / "one.txt")), str(text(tmp_path / "two.txt", 200))
    for name, first, second in (("both", "train-0", "train-1"), ("split", "train", "validation")):
        (tmp_path / name).mkdir()
        shutil.copy(one, tmp_path / name / f"{first}.txt")
        shutil.copy(two, tmp_path / name / f"{second}.txt")
    corpora = [Corpus([one, two]), Corpus(one, held_out_source=two), Corpus(two, held_out_source=one)]
    corpora += [Corpus(str(tmp_path / name)) for name in ("both", "split")]
    assert len({corpus.fingerprint() for corpus in corpora}) == len(corpora)
    apart = Corpus(one, 0.3, two)
    assert apart.fingerprint("train") == Corpus(one, 0.1, two).fingerprint("train")  # no share of it is held out


def test_the_validation_of_several_sources_sees_its_share_of_each(tmp_path):
    for name, word in (("x", "xx "), ("y", "yy ")):
        rows = [json.dumps({"text": f"{i} {word * 400}"}) for i in range(900)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    for weights, share in (((":3", ":1"), 0.75), (("", ""), 0.5)):
        names = [f"{tmp_path}/{name}.jsonl{weight}" for name, weight in zip("xy", weights, strict=True)]
        data = run_data(tmp_path, data=names, eval_tokens=4000, val_fraction=0.1)
        assert 4000 <= len(data.held_out.tokens) <= 4020
        seen = data.tokenizer.decode(data.held_out.tokens[:4000].tolist())
        assert seen.count("x") / (seen.count("x") + seen.count("y")) == pytest.approx(share, abs=0.03)


def test_large_data_are_known_by_size_beginning_middle_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_LARGE", 1000)
    monkeypatch.setattr(corpora, "_SAMPLE", 100)
    content = text(tmp_path / "a.txt").read_bytes()

    def mark(raw):
        (tmp_path / "a.txt").write_bytes(raw)
        corpus = Corpus(str(tmp_path / "a.txt"))
        assert corpus.large
        return corpus.fingerprint()

    whole = mark(content)
    middle = len(content) // 2
    for at in (0, middle, len(content) - 2):
        assert mark(content[:at] + b"#" + content[at + 1 :]) != whole
    assert mark(content + b"#") != whole
    assert mark(content) == whole


def test_the_same_text_in_other_files_has_the_same_digest(tmp_path):
    rows = [f"document {i}" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps([{"id": 1, "text": row} for row in rows], indent=2))
    tokenizer = byte_tokenizer.build()
    counts = [
        counts_of(token_file(Corpus(str(tmp_path / name)), "train", tokenizer, tmp_path))
        for name in ("a.jsonl", "b.json")
    ]
    assert counts[0] == counts[1]
    assert counts[0].documents == 39
    assert counts[0].characters == sum(map(len, Corpus(str(tmp_path / "a.jsonl")).documents("train")))
    assert counts[0].beginning.startswith("document ")


@pytest.mark.parametrize(("change", "settings"), [(lowercase, None), (None, other_end)], ids=["lowercase", "end"])
def test_cached_tokens_are_those_of_the_tokenizer(tmp_path, change, settings):
    (tmp_path / "a.jsonl").write_text('{"text": "Hello World"}\n' * 50 + '{"text": "x"}\n')
    corpus = Corpus(str(tmp_path / "a.jsonl"), 0)
    for tokenizer in (saved(tmp_path / "a"), saved(tmp_path / "b", change, settings)):
        tokens = np.load(token_file(corpus, "train", tokenizer, tmp_path / "cache")).tolist()
        hello = tokenizer("Hello World", add_special_tokens=False)["input_ids"]
        assert tokens[: len(hello) + 1] == [*hello, tokenizer.eos_token_id]
        assert tokens.count(tokenizer.eos_token_id) == 51


def test_temporary_names_do_not_rest_on_pid_or_host(tmp_path):
    """Containers on two hosts may have both in common; so has this process with itself."""
    assert own_name(tmp_path / "a") != own_name(tmp_path / "a")
    assert own_name(tmp_path / "a").parent == tmp_path


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        token_file(Corpus(str(text(tmp_path / "a.txt"))), "train", byte_tokenizer.build(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*"))


def test_documents_of_any_length_are_encoded_in_pieces(tmp_path, monkeypatch):
    from rso_ds.recipes.data import dataset

    whole = "é line\n" * 500 + "one long line " * 100
    assert "".join(pieces(whole, 100)) == whole
    assert all(len(piece) <= 100 for piece in pieces(whole, 100))
    monkeypatch.setattr(dataset, "_LONGEST", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": whole}) + "\n")
    tokenizer = byte_tokenizer.build()
    tokens = np.load(token_file(Corpus(str(tmp_path / "a.jsonl"), 0), "train", tokenizer, tmp_path / "cache"))
    assert tokenizer.decode(tokens.tolist()) == whole + END_OF_TEXT


def test_the_trained_tokenizer_leaves_no_half_folder(tmp_path):
    corpus = Corpus(str(text(tmp_path / "a.txt")))
    for _ in range(2):
        load_tokenizer(None, corpus, 300, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"bpe-300-{corpus.fingerprint()}"]
    assert tokenization.END_OF_TEXT == END_OF_TEXT


# -- what a run says -----------------------------------------------------------------------------------


def run_data(tmp_path, **flags):
    args = TrainArguments(cache=str(tmp_path / "cache"), vocab_size=300, seq_len=16, **flags)
    return RunData(args, corpus_of(args), None)


def test_the_first_lines_name_files_amounts_and_the_beginning(tmp_path):
    for part, count in (("train", 30), ("validation", 4), ("test", 5)):
        rows = [f"{part} document {i}\n" + "x" * 300 for i in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = run_data(tmp_path, data=[str(tmp_path)])
    lines = data.description.text().splitlines()
    assert lines[0] == f"data {tmp_path}"
    assert lines[1].startswith("  trains    1 file, 30 documents, 9,530 characters, ")
    assert lines[1].endswith(" tokens: train.jsonl")
    assert lines[2].startswith("  held out  1 file, 4 documents, 1,288 characters, ")
    assert lines[3] == "  not read  test.jsonl"
    assert lines[4] == "  begins    " + repr("train document 0\n" + "x" * 183)
    assert data.description.to_dict()["trains"]["documents"] == 30
    assert data.beginning(2) == data.held_out.tokens[:2].tolist()


def test_the_first_lines_say_what_share_is_held_out(tmp_path):
    data = run_data(tmp_path, data=[str(text(tmp_path / "a.txt", 1000))], val_fraction=0.1)
    assert "(10.1% of the text)" in data.description.text()


def test_no_validation(tmp_path):
    data = run_data(tmp_path, data=[str(text(tmp_path / "a.txt"))], val_fraction=0)
    assert data.held_out is None
    assert "held out  nothing (there will be no validation)" in data.description.text()
    assert data.identity["held-out text"] is None
    assert data.packed.tokens[:3].tolist() == data.beginning(3)


@pytest.mark.parametrize("stream", ["yes", "no"])
def test_ranks_agree_on_all_by_which_a_resume_is_refused(tmp_path, stream):
    """A rank that refused alone would leave the others waiting for it."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i} of some"}}\n' for i in range(300)))
    data = run_data(tmp_path, data=[str(tmp_path / "a.jsonl")], stream=stream, val_fraction=0.2, eval_tokens=100)
    assert data.identity.items() <= data.to_agree_on().items()


def test_streams_and_prepared_data(tmp_path):
    for i in range(3):
        text(tmp_path / "many" / f"{i}.txt", 3000)
    text(tmp_path / "b.txt")
    many, other = str(tmp_path / "many"), str(tmp_path / "b.txt")
    assert not run_data(tmp_path, data=[many]).streamed
    assert run_data(tmp_path, data=[many], stream="yes").streamed
    mixed = run_data(tmp_path, data=[f"{many}:0.7", f"{other}:0.3"])
    assert mixed.streamed
    assert mixed.identity["training text"]["weights"] == [0.7, 0.3]
    assert "(streamed)" in mixed.description.text()
    with pytest.raises(RSOConfigError, match="--stream no: a mixture with weights is streamed"):
        TrainArguments(data=["a:1", "b:1"], stream="no")


# -- resuming ------------------------------------------------------------------------------------------

TEXT = {"documents": 3, "characters": 100, "digest": "a1"}
RUN = {
    "format": FORMAT, "streamed": False, "training text": TEXT, "held-out text": None, "tokenizer": "t", "seed": 0,
    "seq_len": 32, "sequences_per_step": 8, "steps": 10, "planned": 10, "schedule_steps": 10, "lr": 1e-3,
}  # fmt: skip


def point(folder=Path("x/checkpoints")):
    return ResumePoint("auto", folder, "step4", {"step": 4, "position": {"sequences": 32}, "run": RUN})


def test_the_same_run_goes_on_with_more_steps_and_another_rate():
    check_same_run(point(), {**RUN, "steps": 20, "lr": 1.0}, new_batch=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "that run had seed = 0, this one 1: the data would not continue"),
        ({"tokenizer": "u"}, "that run had tokenizer = 't', this one 'u'"),
        ({"streamed": True}, "that run's data were not streamed: give --stream no"),
        (
            {"training text": {**TEXT, "documents": 4}},
            "the training text differs: that run had 3 documents, 100 characters, digest a1, this one has 4 documents",
        ),
        ({"held-out text": TEXT}, "the held-out text differs: that run had none, this one has 3 documents"),
        ({"sequences_per_step": 16}, "a batch of 8 sequences, this one of 16. --resume-new-batch allows it"),
    ],
)
def test_another_run_is_refused_with_what_differs(change, message):
    with pytest.raises(RSOCheckpointError, match=message):
        check_same_run(point(), {**RUN, **change}, new_batch=False)


def test_another_batch_is_a_choice():
    check_same_run(point(), {**RUN, "sequences_per_step": 16}, new_batch=True)


def test_changed_settings_are_told(tmp_path):
    args = TrainArguments(learning_rate=1e-3, max_steps=4)
    args.save(tmp_path / "config.yaml")
    (tmp_path / "deepspeed.json").write_text(json.dumps({"optimizer": {"params": {"lr": 1e-3, "interval": 10}}}))
    now = TrainArguments(learning_rate=5e-4, max_steps=4, resume="auto")
    changes = changed_settings(
        point(tmp_path / "checkpoints"), now, {"optimizer": {"params": {"lr": 5e-4, "interval": 10}}}
    )
    assert changes == ["learning_rate: 0.001 -> 0.0005", "optimizer.params.lr: 0.001 -> 0.0005"]
    assert changed_settings(point(tmp_path / "none" / "checkpoints"), now, {}) == []
