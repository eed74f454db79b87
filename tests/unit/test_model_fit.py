"""Whether a tokenizer and a length fit a model; code that comes with a model."""

from __future__ import annotations

import json

import pytest
import torch
from support import byte_tokenizer, tiny_llama
from support.environment import needs
from support.exhaustive import quick

from rso_ds import RSOConfigError
from rso_ds.cli import main

needs("transformers", "accelerate")

import transformers  # noqa: E402

from rso_ds.checkpoint import save_dense  # noqa: E402
from rso_ds.checkpoint.model_files import write_model_files  # noqa: E402
from rso_ds.models import (  # noqa: E402
    check_length,
    check_tokens,
    ensure_padding,
    find_start,
    learned_positions,
    load_tokenizer,
    random_model,
    rows_needed,
)
from rso_ds.recipes.data.tokenization import token_dtype  # noqa: E402
from rso_ds.recipes.training.held_out import sample  # noqa: E402

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BODY = {**SIZES, "intermediate_size": 64}


class Ids:
    """A tokenizer of ``count`` tokens with ids up to ``largest``."""

    def __init__(self, count: int, largest: int) -> None:
        self.vocabulary = {f"t{i}": i for i in range(count - 1)} | {"last": largest}
        self.all_special_ids = [0]

    def __len__(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def config(rows: int = 300) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(vocab_size=rows, max_position_embeddings=64)


@pytest.mark.parametrize(("tokenizer", "needed"), [(Ids(300, 299), 300), (Ids(301, 300), 301), (Ids(20, 400), 401)])
def test_tokens_that_the_model_has_no_rows_for(tokenizer, needed):
    """Ids count, and not how many there are: the last has a gap before it."""
    assert rows_needed(tokenizer) == needed
    assert check_tokens(config(), tokenizer, resize=True) == max(300, needed)
    if needed <= 300:
        assert check_tokens(config(), tokenizer, resize=False) == 300
        return
    with pytest.raises(RSOConfigError) as refused:
        check_tokens(config(), tokenizer, resize=False)
    for part in (f"ids up to {needed - 1}", "300 embeddings", f"{needed - 300} too few", "--resize-embeddings"):
        assert part in str(refused.value)


def test_ids_with_gaps_are_stored_whole():
    assert token_dtype(Ids(20, 65535)).__name__ == "uint16"
    assert token_dtype(Ids(20, 65536)).__name__ == "uint32"


@pytest.mark.parametrize(
    ("settings", "kind", "positions"),
    [
        (transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=24), "CausalLM", 24),
        (transformers.OPTConfig(**SIZES, ffn_dim=64, max_position_embeddings=24, word_embed_proj_dim=32),
         "CausalLM", 24),
        (transformers.BertConfig(**BODY, max_position_embeddings=24), "SequenceClassification", 24),
        (transformers.RobertaConfig(**BODY, max_position_embeddings=26), "SequenceClassification", 24),
        (transformers.LlamaConfig(**BODY, max_position_embeddings=24), "CausalLM", None),
        (transformers.MistralConfig(**BODY, num_key_value_heads=2, max_position_embeddings=24, sliding_window=8),
         "CausalLM", None),
    ],
)  # fmt: skip
def test_lengths_beyond_the_positions(settings, kind, positions):
    """Learned positions refuse what would be read beyond their end, and nothing less; computed ones warn."""
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = random_model(settings, auto).eval()
    found = learned_positions(model)
    assert found == positions
    assert check_length(settings, found, 24, "--seq-len") is None
    ids = torch.arange(24).remainder(40)[None] + 5
    model(input_ids=ids)
    longer = torch.cat([ids, ids[:, :1]], 1)
    if positions is None:
        warning = check_length(settings, found, 25, "--seq-len")
        assert warning.startswith("warning: --seq-len 25 is more than the 24 positions")
        model(input_ids=longer)
        return
    with pytest.raises(RSOConfigError, match="--seq-len 25 is more than the 24 positions"):
        check_length(settings, found, 25, "--seq-len")
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longer)


def test_named_shapes_are_made_for_any_length():
    assert check_length(None, find_start("llama-9m").positions, 100_000, "--seq-len") is None


@pytest.mark.parametrize("new_tokens", [5, 200])
def test_a_sample_stays_within_the_positions(new_tokens):
    settings = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=24, eos_token_id=None
    )
    settings.bos_token_id = None
    assert sample(random_model(settings), byte_tokenizer.build(), "a prompt of more than 24 bytes", new_tokens, 0)


@pytest.mark.parametrize("tie", [True, False])
def test_grown_embeddings(tmp_path, tie):
    """All old rows stay, the head grows with them, and the new rows are near the mean, as transformers makes them."""
    old = tiny_llama.build(vocab=300, tie=tie)
    old.save_pretrained(tmp_path)
    start = find_start(str(tmp_path))
    torch.manual_seed(5)
    model = start.build(310)
    assert start.config.vocab_size == 300
    assert model.config.vocab_size == 310
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    torch.manual_seed(5)
    old.resize_token_embeddings(310)
    for layer, expected in ((model.model.embed_tokens, old.model.embed_tokens), (model.lm_head, old.lm_head)):
        assert torch.equal(layer.weight, expected.weight)
    model.save_pretrained(tmp_path / "grown")
    again = find_start(str(tmp_path / "grown")).build(310)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_configuration_is_no_tokenizer(tmp_path, kind):
    """transformers makes one without any tokens of it."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(RSOConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path), "--model")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RSOConfigError, match="no tokens but its special ones"):
        load_tokenizer(str(tmp_path), "--model")
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(RSOConfigError, match="Git LFS pointer"):
        load_tokenizer(str(tmp_path), "--model")


def test_padding_without_a_token_for_it():
    tokenizer = byte_tokenizer.build()
    tokenizer.pad_token = None
    ensure_padding(tokenizer, "folder")
    assert tokenizer.pad_token == tokenizer.eos_token
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(RSOConfigError, match=r"neither a padding token nor an end-of-text token.*--resize-embeddings"):
        ensure_padding(tokenizer, "folder")


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A model that is defined by a file in its folder, and a standard input that nobody may read."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = tmp_path / "brings_code"
    tiny_llama.build(vocab=300).save_pretrained(folder)
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own", "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_code_runs_only_where_it_is_trusted(own_code, tmp_path):
    with pytest.raises(RSOConfigError, match="allow it with --trust-remote-code"):
        find_start(str(own_code))
    start = find_start(str(own_code), trust_remote_code=True)
    model = start.build(0)
    assert type(model).__name__ == "OwnModel"
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_dense(model, tmp_path / "saved")
    write_model_files(model, None, checkpoint)
    for folder in (tmp_path / "saved", checkpoint):
        assert {"configuration_own.py", "modeling_own.py", "config.json"} <= {p.name for p in folder.iterdir()}
    assert find_start(str(tmp_path / "saved"), trust_remote_code=True).weights is not None


@pytest.mark.parametrize("command", quick(["check", "memory", "comm", "plan"], {"check"}))
def test_commands_that_build_the_model_take_the_flag(own_code, tmp_path, capsys, command):
    settings = {"optimizer": {"type": "RSO", "params": {"targets": "all-linear"}}, "zero_optimization": {"stage": 1}}
    (tmp_path / "rso.json").write_text(json.dumps(settings))
    flags = ["--deepspeed", str(tmp_path / "rso.json")]
    if command == "plan":
        flags = ["--base", str(tmp_path / "rso.json"), "--gpus", "1", "--gpu-memory", "8GB", "--precision", "fp32"]
        flags += ["--global-batch", "1", "--seq-len", "16"]
    if command == "memory":
        flags += ["--seq-len", "16"]
    with pytest.raises(SystemExit, match="--trust-remote-code"):
        main([command, *flags, "--model", str(own_code)])
    main([command, *flags, "--model", str(own_code), "--trust-remote-code"])
    assert str(own_code) in capsys.readouterr().out or command == "check"
