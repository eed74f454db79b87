"""Flags, DeepSpeed JSON, tokens, packing: everything of the main job that needs no rank."""

import time
from threading import Event

import numpy as np
import pytest
import torch
import yaml
from support.environment import ROOT, needs

from rso_ds import RSOConfigError
from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.dataset import PackedTokens, token_file
from rso_ds.recipes.data.read_ahead import read_ahead
from rso_ds.recipes.data.tokenization import load_tokenizer
from rso_ds.recipes.training.arguments import TrainArguments, parse_arguments
from rso_ds.recipes.training.command import main
from rso_ds.recipes.training.metrics import Waits

needs("transformers")

GPT2 = ROOT.parent / "shared" / "data" / "tokenizers" / "gpt2"
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


# -- flags and YAML ------------------------------------------------------------------------------------


def test_flags_win_over_yaml_and_the_effective_settings_read_back(tmp_path):
    (tmp_path / "a.yaml").write_text("model: llama-20m\nlearning_rate: 1e-3\nseq_len: 64\n")
    args = parse_arguments(["--config", str(tmp_path / "a.yaml"), "--seq-len", "32", "--set", "a=1", "--set", "b=2"])
    assert (args.model, args.learning_rate, args.seq_len, args.set) == ("llama-20m", 1e-3, 32, ["a=1", "b=2"])
    args.save(tmp_path / "b.yaml")
    assert parse_arguments(["--config", str(tmp_path / "b.yaml")]) == args


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modell: x", "unknown key 'modell' of the training configuration. Did you mean 'model'?"),
        ("learning_rate: fast", "'learning_rate' must be a number"),
        ("seq_len: 1", "--seq-len must be an integer of at least 2, got 1"),
        ("{eval_interval: 0, keep_best: 1}", "--keep-best chooses by the held-out loss"),
        ("seq_len: 2.5", "--seq-len must be an integer"),
        ("warmup: 2", r"--warmup must lie in \[0, 1\]"),
        ("max_steps: 3\ntrain_tokens: 5", "--max-steps and --train-tokens are both set"),
        ("precision: fp8", "--precision must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ("gradient_checkpointing: 'no'", "--gradient-checkpointing must be true or false"),
        ("set: a=1", "--set must be a list"),
        ("clip: -1", "--clip must be a number of at least 0"),
        ("data: []", "--data must name something to train on"),
        ("- a", "must hold key: value lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_yaml(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(RSOConfigError, match=message):
        parse_arguments(["--config", str(tmp_path / "a.yaml")])


def test_a_flag_that_says_how_long_replaces_the_other_of_the_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("max_steps: 3\n")
    args = parse_arguments(["--config", str(tmp_path / "a.yaml"), "--train-tokens", "500"])
    assert (args.max_steps, args.train_tokens) == (None, 500)


def test_every_flag_has_help():
    import dataclasses

    assert all(f.metadata.get("help") for f in dataclasses.fields(TrainArguments))


# -- tokens --------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    text = "".join(f"the {i} quick brown foxes jump over {i % 7} lazy dogs\n" for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    return Corpus(str(tmp_path / "a.txt"), held_out=0.1)


def test_bpe_is_trained_once_and_round_trips(corpus, tmp_path):
    tokenizer = load_tokenizer(None, corpus, 300, tmp_path / "cache")
    assert len(tokenizer) <= 300
    text = next(corpus.documents("held_out"))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = load_tokenizer(None, corpus, 300, tmp_path / "cache")
    assert again.get_vocab() == tokenizer.get_vocab()


def test_saved_tokenizers_load_from_their_folder(corpus, tmp_path):
    load_tokenizer(None, corpus, 300, tmp_path / "cache").save_pretrained(tmp_path / "mine")
    again = load_tokenizer(str(tmp_path / "mine"), corpus, 300, tmp_path / "cache")
    assert again.decode(again("quick foxes")["input_ids"]) == "quick foxes"


@pytest.mark.parametrize("name", ["./nowhere", "no-such-tokenizer"])
def test_unknown_tokenizers(corpus, tmp_path, name):
    with pytest.raises(RSOConfigError, match=f"--tokenizer {name}"):
        load_tokenizer(name, corpus, 300, tmp_path)


@pytest.mark.skipif(not GPT2.is_dir(), reason="needs the GPT-2 vocabulary beside the checkout (../shared/data)")
def test_gpt2_vocabulary_and_merges_without_a_config(corpus, tmp_path):
    tokenizer = load_tokenizer(str(GPT2), corpus, 300, tmp_path)
    assert len(tokenizer) == 50257
    assert tokenizer.decode(tokenizer("Hello, world")["input_ids"]) == "Hello, world"


def test_tokens_are_documents_with_an_end_after_each(corpus, tmp_path):
    tokenizer = load_tokenizer(None, corpus, 300, tmp_path / "cache")
    path = token_file(corpus, "held_out", tokenizer, tmp_path / "cache")
    tokens = np.load(path)
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1].tolist()) == next(corpus.documents("held_out"))
    stamp = path.stat().st_mtime_ns
    assert token_file(corpus, "held_out", tokenizer, tmp_path / "cache").stat().st_mtime_ns == stamp


@pytest.fixture
def packed(tmp_path):
    np.save(tmp_path / "tokens-x-train.npy", np.arange(1003, dtype=np.uint16))
    return PackedTokens(tmp_path / "tokens-x-train.npy", 10, seed=3)


def test_an_epoch_sees_every_sequence_once(packed):
    seen = [packed.micro_batches(s, 1, 1, 0, 10) for s in range(0, 100, 10)]
    firsts = sorted(int(x) for batch in seen for x in batch[0, :, 0])
    assert firsts == list(range(0, 1000, 10))
    assert sorted(int(x) for s in range(100, 200, 10) for x in packed.micro_batches(s, 1, 1, 0, 10)[0, :, 0]) == firsts
    assert not np.array_equal(seen[0], packed.micro_batches(100, 1, 1, 0, 10))


@pytest.mark.parametrize(("accumulation", "world", "micro"), [(1, 1, 12), (3, 2, 2), (1, 4, 3), (2, 3, 2)])
def test_a_step_sees_the_same_data_at_any_world_size(packed, accumulation, world, micro):
    """And in any order of asking: step 9 crosses an epoch, step 2 comes after it."""
    for step in (9, 2):
        expected = sorted(packed.micro_batches(step * 12, 1, 1, 0, 12)[0, :, 0].tolist())
        got = [packed.micro_batches(step * 12, accumulation, world, r, micro)[..., 0].flatten() for r in range(world)]
        assert sorted(int(x) for part in got for x in part) == expected


def test_the_next_step_is_read_while_one_trains():
    begun = {step: Event() for step in range(2, 6)}

    def read(step):
        if step == 5:
            raise OSError("the disk of step 5")
        begun[step].set()
        return torch.full((1, 2, 3), step)

    batches = read_ahead(read, 2, torch.device("cpu"))
    for step in (2, 3, 4):
        assert torch.equal(next(batches), torch.full((1, 2, 3), step))
        if step < 4:
            assert begun[step + 1].wait(10), "nobody asked for it: it is read ahead"
    with pytest.raises(OSError, match="the disk of step 5"):
        next(batches)


def test_waits_add_up_by_reason_and_begin_anew():
    waits = Waits()
    for _ in range(2):
        with waits.of("data"):
            time.sleep(0.01)
    taken = waits.take()
    assert taken.pop("data") >= 0.02
    assert set(taken.values()) == {0.0}
    assert set(waits.take().values()) == {0.0}


def test_sequences_longer_than_the_data_are_refused(packed, tmp_path):
    with pytest.raises(RSOConfigError, match="--seq-len 2000 is longer than the data: train part has 1003 tokens"):
        PackedTokens(tmp_path / "tokens-x-train.npy", 2000)


# -- errors end the command before any rank starts -----------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.txt"], "--data missing.txt: no such file or folder"),
        (["--config", "missing.yaml"], "--config missing.yaml cannot be read"),
        (["--deepspeed", "missing.json"], "--deepspeed missing.json cannot be read"),
    ],
)
def test_the_command_ends_with_one_message(monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert str(end.value).startswith("RSOConfigError: ")
    assert message in str(end.value)


def test_yaml_settings_are_plain(tmp_path):
    TrainArguments().save(tmp_path / "a.yaml")
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["seq_len"] == 256
