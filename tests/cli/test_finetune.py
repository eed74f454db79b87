"""launch/finetune.py: real runs on small files, its metric, its saved model, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny_llama
from support.environment import ROOT, needs
from support.exhaustive import EXHAUSTIVE, quick
from support.progress import run_command
from support.train_workspace import free_port

needs("accelerate", "datasets", "trl", "peft")

BIN = Path(sys.executable).parent
ANIMALS, TOOLS = ("fox", "dog", "bee", "cat"), ("saw", "axe", "pen", "key")
FILLERS = ("the", "a", "red", "old", "big")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files, an encoder, a decoder with a chat template, both with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    out = tmp_path_factory.mktemp("finetune")
    words = ["[PAD]", "[UNK]", "</s>", "user", "assistant", "is", "animal", "tool", *ANIMALS, *TOOLS, *FILLERS]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **special)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} "
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s> {% endgeneration %}"
        "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=64, max_position_embeddings=64)).save_pretrained(out / "bert")
    llama = tiny_llama.build()
    llama.save_pretrained(out / "llama")
    for name in ("bert", "llama"):
        tokenizer.save_pretrained(out / name)
    rows = [
        (f"{a} {b} {word}", "NA" if word in ANIMALS else "01")  # which are no missing value and no number
        for a in FILLERS for b in FILLERS for word in (*ANIMALS, *TOOLS)
    ]  # fmt: skip
    (out / "rows.csv").write_text("text,label\n" + "".join(f"{t},{kind}\n" for t, kind in rows))
    (out / "rows.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{kind}\n" for t, kind in rows))
    rows = [(t, "animal" if kind == "NA" else "tool") for t, kind in rows]
    pairs = [{"prompt": t, "completion": f"is {kind}"} for t, kind in rows]
    pairs += [{"prompt": "tool", "completion": 7}] * 10  # a number beside texts
    (out / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    chats = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": f"is {kind}"}]}
        for t, kind in rows
    ]
    (out / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config = json.loads((ROOT / "ds_configs" / "rso_zero3.json").read_text())
    del config["train_batch_size"]
    config["optimizer"]["params"] |= {"interval": 4, "torch_adam": True}
    (out / "rso3.json").write_text(json.dumps(config), encoding="utf-8-sig")  # as Windows writes it
    return out


def finetune(folder: Path, out: str, *flags: str, launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "PATH": f"{BIN}{os.pathsep}{env['PATH']}"}
    common = ["--output_dir", str(folder / out), "--use_cpu", "--report_to", "none", "--save_strategy", "no"]
    common += ["--disable_tqdm", "true", "--seed", "1"]
    command = [*(launcher or [sys.executable]), str(ROOT / "launch" / "finetune.py"), *common, *flags]
    return run_command(command, cwd=folder, env=env)


def results(done: subprocess.CompletedProcess, folder: Path, out: str) -> dict:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / out / "results.json").read_text())


def torchrun() -> list[str]:
    return [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}"]


def deepspeed() -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]


CLASSIFY = ["--task", "classification", "--model", "bert", "--data", "rows.csv", "--learning_rate", "1e-2"]
CLASSIFY += ["--num_train_epochs", "3", "--per_device_train_batch_size", "8"]
CAUSAL = ["--task", "causal", "--model", "llama", "--data", "rows.jsonl", "--max_length", "16", "--learning_rate"]
CAUSAL += ["1e-2", "--num_train_epochs", "3", "--per_device_train_batch_size", "8", "--bf16", "false"]
CAUSAL += ["--separator", " ", "--gradient_checkpointing", "false"]


def accuracy(model: Path, folder: Path) -> float:
    """Of the saved classifier over all rows, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [line.split(",") for line in (folder / "rows.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = classifier(**tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")).logits
    chosen = [classifier.config.id2label[i] for i in logits.argmax(-1).tolist()]
    return float(np.mean([a == b for a, (_, b) in zip(chosen, rows, strict=True)]))


def test_classification_with_rso_on_two_ranks(folder):
    done = finetune(folder, "rso", *CLASSIFY, "--rso", "rank=8", "interval=5", launcher=torchrun())
    got = results(done, folder, "rso")
    assert (got["method"], got["ranks"], got["train_rows"], got["eval_rows"]) == ("rso", 2, 180, 20)
    assert got["eval_accuracy"] == 1.0
    assert got["eval_f1_macro"] == 1.0
    assert accuracy(folder / "rso", folder) == 1.0
    labels = json.loads((folder / "rso" / "config.json").read_text())["id2label"]
    assert labels == {"0": "01", "1": "NA"}
    said = done.stdout.splitlines()
    assert any(line.startswith("  trains    1 file, 180 rows, ") for line in said)
    assert any(line.startswith("  held out  20 rows, ") for line in said)
    assert any(line.startswith("""  begins    '{"text": """) for line in said)
    assert "train: 180 sequences, 540 tokens; held out: 20 sequences, 60 tokens" in said
    card = (folder / "rso" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| base model | bert |" in card
    assert "| interval | 5 |" in card
    assert f"| eval_accuracy | {got['eval_accuracy']:.6g} |" in card
    # Every trained element is reduced once a step in fp32; a few bytes more are the ranks' count of used parameters.
    assert got["subspace_parameters"] > 0
    assert got["comm_bytes_per_step"]["gradient"] == pytest.approx(4 * got["trainable_parameters"], rel=0.02)


@EXHAUSTIVE
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods(folder, method):
    got = results(finetune(folder, method, *CLASSIFY, "--method", method, "--lora_rank", "8"), folder, method)
    assert got["eval_accuracy"] > 0.9
    assert got["subspace_parameters"] == 0
    assert accuracy(folder / method, folder) > 0.9


@pytest.mark.parametrize("form", quick(["pairs", "chats", "packed"], {"pairs"}))
def test_causal(folder, form):
    """The completion follows from the prompt, the prompt's own words are random: only completions can get to 0."""
    flags = {
        "pairs": [],
        "chats": ["--data", "chats.jsonl", "--assistant_only_loss", "true"],
        "packed": ["--packing", "true", "--packing_strategy", "wrapped", "--rso", "rank=8"],
    }[form]
    got = results(finetune(folder, form, *CAUSAL, *flags), folder, form)
    assert got["method"] == "rso"
    if form != "packed":  # whose chunks also count the words of the prompt
        assert got["eval_loss"] < 0.1
    assert says_what_it_is(folder / form, chat=form == "chats") > 0.9


def says_what_it_is(model: Path, chat: bool) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    language, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    right = []
    for word in (*ANIMALS, *TOOLS):
        ids = tokenizer(f"user the old {word} assistant" if chat else f"the old {word}").input_ids
        with torch.no_grad():
            for _ in range(2):
                ids.append(int(language(torch.tensor([ids])).logits[0, -1].argmax()))
        right.append(tokenizer.decode(ids[-2:]) == ("is animal" if word in ANIMALS else "is tool"))
    return float(np.mean(right))


@EXHAUSTIVE
def test_deepspeed_zero3(folder):
    done = finetune(folder, "zero3", *CAUSAL, "--deepspeed", "rso3.json", launcher=deepspeed())
    got = results(done, folder, "zero3")
    assert (got["method"], got["ranks"]) == ("rso", 2)
    assert got["eval_loss"] < 0.1
    assert says_what_it_is(folder / "zero3", chat=False) > 0.9
    history = json.loads((folder / "zero3" / "trainer_state.json").read_text())["log_history"]
    last = [entry for entry in history if "loss" in entry][-1]
    assert {"merge_ratio", "subspace_grad_norm", "comm_bytes_per_step"} <= last.keys()


@EXHAUSTIVE
@pytest.mark.parametrize(
    ("of_rank_1", "words"),
    [
        ("text,label\na,b\nc,e\n", "RSOReplicaError: ranks disagree on the rows of --data"),
        ("text,label\na,b\nc,\n", "RSOConfigError: rank 1: rows.csv, line 3: 'label' is empty"),
    ],
)
def test_ranks_with_other_rows_end_with_one_message(folder, of_rank_1, words):
    """Each reads a file of its own node."""
    for node, content in (("node0", "text,label\na,b\nc,d\n"), ("node1", of_rank_1)):
        (folder / node).mkdir(exist_ok=True)
        (folder / node / "rows.csv").write_text(content)
    shell = ["bash", "-c", 'cd "node$RANK" && exec "$0" "$@"', sys.executable]
    launcher = [torchrun()[0], "--no-python", *torchrun()[1:], *shell]
    done = finetune(folder, "divided", *CLASSIFY, "--model", str(folder / "bert"), launcher=launcher)
    assert done.returncode
    assert words in done.stderr
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]


@EXHAUSTIVE
def test_starting_from_a_lora_adapter(folder):
    """The adapter is merged: training starts where the adapted model stands."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "llama")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "adapter")
    still = ["--learning_rate", "0", "--model", "adapter"]
    results(finetune(folder, "merged", *CAUSAL, *still, "--rso", "rank=8"), folder, "merged")
    trained = AutoModelForCausalLM.from_pretrained(folder / "merged")
    ids = tiny_llama.tokens(0, 2)
    with torch.no_grad():
        difference = (trained(ids).logits - adapted.eval()(ids).logits).abs().max()
    assert difference < 1e-5


REFUSED = {
    "column": (["--label_column", "kind"], "--label_column kind: rows.csv has the columns text, label"),
    "file": (["--data", "nothing.csv"], "--data nothing.csv: no such file or folder"),
    "hub": (["--data", "nobody/nothing-1.0"], "--data nobody/nothing-1.0: no such file, and the hub cannot give it"),
    "format": (["--data", "bert/config.json.txt"], "bert/config.json.txt"),
    "empty": (["--data", "empty.csv"], "empty.csv"),
    "one label": (["--data", "one.csv"], "one label only"),
    "missing cell": (["--data", "hole.csv"], "hole.csv, line 3: 'label' is empty"),
    "bytes": (["--data", "latin.csv"], "latin.csv, offset 13"),
    "encoding": (["--encoding", "utf-9"], "--encoding 'utf-9' is no encoding"),
    "bytes of the json": (["--deepspeed", "latin.csv"], "--deepspeed latin.csv, offset 13"),
    "unseen label": (["--eval_data", "other.csv"], "the label 'plant', which no training row has"),
    "model": (["--model", "nothing"], "nothing"),
    "method": (["--method", "galore"], "--method must be one of rso, full, lora"),
    "rso key": (["--rso", "intervall=3"], "intervall"),
    "rso form": (["--rso", "rank"], "write KEY=VALUE"),
    "rso and full": (["--method", "full", "--rso", "rank=4"], "--rso has no effect with --method full"),
    "lr": (["--rso", "lr=1"], "'lr' is set by learning_rate"),
    "flag": (["--bogus", "1"], "unknown flag or value: --bogus 1"),
    "fraction": (["--eval_fraction", "2"], "--eval_fraction must lie between 0 and 1"),
    "json": (["--method", "full", "--deepspeed", "rso3.json"], "with DeepSpeed the JSON chooses RSO"),
    "json and rso": (["--rso", "rank=4", "--deepspeed", "rso3.json"], "write these keys into the JSON"),
}


@pytest.fixture
def no_traces(monkeypatch):
    """TrainingArguments leaves environment variables, and DeepSpeed's JSON to every model built afterwards."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    yield
    unset_hf_deepspeed_config()
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def test_refusals(folder, monkeypatch, capsys, no_traces):
    """One message each, before any training."""
    from rso_ds.recipes.finetuning.command import main

    (folder / "empty.csv").write_text("text,label\n")
    (folder / "one.csv").write_text("text,label\na,b\nc,b\nd,b\n")
    (folder / "hole.csv").write_text("text,label\na,b\nc,\nd,e\n")
    (folder / "latin.csv").write_bytes("text,label\na,ça\n".encode("latin-1"))
    (folder / "other.csv").write_text("text,label\na,plant\nc,tool\n")
    (folder / "bert" / "config.json.txt").write_text("{}")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    wrong = {}
    for name, (flags, expected) in REFUSED.items():
        with pytest.raises(SystemExit) as end:
            main([*CLASSIFY, "--output_dir", str(folder / "refused"), "--use_cpu", "--report_to", "none", *flags])
        if expected not in str(end.value) or "RSO" not in str(end.value):
            wrong[name] = str(end.value)
    assert not wrong


def test_the_metric():
    """Three of four right: accuracy 3/4, F1 of the classes 0.8 and 2/3."""
    from transformers import EvalPrediction

    from rso_ds.recipes.finetuning.classification import scores

    logits = np.array([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    found = scores(EvalPrediction(predictions=logits, label_ids=np.array([0, 0, 1, 1])))
    assert found["accuracy"] == 0.75
    assert found["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2)
