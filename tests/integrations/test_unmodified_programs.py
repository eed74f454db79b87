"""Programs that know nothing of rso_ds, started as their users start them, with RSO from the JSON alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny_llama
from support.environment import ROOT, needs
from support.exhaustive import EXHAUSTIVE, quick
from support.progress import run_command
from support.train_workspace import free_port

needs("deepspeed", "datasets")

PROGRAMS = ROOT / "tests" / "programs"
BIN = Path(sys.executable).parent
LINE = "the quick brown fox jumps over the lazy dog and runs away from nine angry bees"
WORDS = LINE.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, two models with a tokenizer of whole words, and the JSON of RSO."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    out = tmp_path_factory.mktemp("programs")
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    llama = tiny_llama.build()
    llama.config.max_position_embeddings = 64
    llama.save_pretrained(out / "llama")
    tokenizer.save_pretrained(out / "llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(vocab), max_position_embeddings=64))
    bert.save_pretrained(out / "bert")
    tokenizer.save_pretrained(out / "bert")

    (out / "train.txt").write_text(f"{LINE}\n" * 400)
    (out / "valid.txt").write_text(f"{LINE}\n" * 40)
    rows = [f"{w} {v},{'animal' if w in ('fox', 'dog', 'bees') else 'other'}\n" for w in WORDS for v in WORDS]
    for name, part in (("train", rows * 3), ("valid", rows[::5]), ("test", rows[::7])):
        (out / f"{name}.csv").write_text("sentence,label\n" + "".join(part))
    for name, stage in (("rso2", 2), ("rso3", 3)):
        config = json.loads((PROGRAMS.parent.parent / "ds_configs" / f"rso_zero{stage}.json").read_text())
        del config["train_batch_size"]  # transformers counts one rank when a model is built at stage 3 on CPUs
        config["optimizer"]["params"] |= {"interval": 4, "torch_adam": True}
        (out / f"{name}.json").write_text(json.dumps(config))
    return out


def start(launcher: list[str], program: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAMS.parent.parent), "HF_HOME": str(folder / "hf")}
    env["PATH"] = os.pathsep.join([str(BIN), env["PATH"]])
    command = [*launcher, str(PROGRAMS / program), *flags]
    return run_command(command, env=env, cwd=folder)


def deepspeed() -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module", "rso_ds.run"]


def torchrun() -> list[str]:
    rendezvous = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    return [str(BIN / "torchrun"), "--nproc-per-node=2", "--rdzv-backend=c10d", rendezvous, "-m", "rso_ds.run"]


COMMON = ["--use_cpu", "--report_to", "none", "--logging_steps", "5", "--do_train", "--do_eval", "--bf16", "False"]
CLM = [*COMMON, "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--save_strategy", "steps"]
CLM += ["--config_name", "llama", "--tokenizer_name", "llama", "--train_file", "train.txt", "--validation_file"]
CLM += ["valid.txt", "--block_size", "32", "--save_steps", "10", "--lr_scheduler_type", "constant"]
GLUE = [*COMMON, "--model_name_or_path", "bert", "--train_file", "train.csv", "--validation_file", "valid.csv"]
GLUE += ["--test_file", "test.csv", "--do_predict", "--learning_rate", "2e-2", "--save_strategy", "no"]
GLUE += ["--per_device_train_batch_size", "16", "--num_train_epochs", "3"]


def is_dense(model: Path) -> bool:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as f:
        return not any(name.endswith(".B") for name in f.keys())  # noqa: SIM118


@pytest.mark.parametrize("stage", quick([2, 3], {3}))
def test_run_clm(folder, stage):
    """Trains, saves, evaluates; started again it goes on from its own checkpoint. The saved model is as good."""
    from transformers import AutoModelForCausalLM

    out = folder / f"clm{stage}"
    flags = [*CLM, "--deepspeed", f"rso{stage}.json", "--output_dir", str(out)]
    first = start(deepspeed(), "run_clm.py", folder, *flags, "--max_steps", "20")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-6000:]
    assert "groups that share P" in first.stdout
    again = start(deepspeed(), "run_clm.py", folder, *flags, "--max_steps", "40")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-6000:]
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 40
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(5, 41, 5))
    said = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    assert said < 1.0  # 2.7 is the entropy of its words without order
    assert is_dense(out)
    ids = torch.tensor([[*range(2, 8), 2, *range(8, 10)]])  # the first nine words
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits[0]
    assert (logits.argmax(-1)[2:-1] == ids[0, 3:]).float().mean() > 0.7


@EXHAUSTIVE
def test_run_glue(folder):
    out = folder / "glue"
    flags = [*GLUE, "--deepspeed", "rso2.json", "--output_dir", str(out)]
    done = start(torchrun(), "run_glue.py", folder, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "groups that share P" in done.stdout
    assert json.loads((out / "eval_results.json").read_text())["eval_accuracy"] > 0.9
    truth = [line.rpartition(",")[2] for line in (folder / "test.csv").read_text().splitlines()[1:]]
    predicted = (out / "predict_results.txt").read_text().split()
    assert sum(a == b for a, b in zip(truth, predicted, strict=True)) > 0.9 * len(truth)
    assert is_dense(out)


def test_a_program_that_is_not_there(folder):
    command = [sys.executable, "-m", "rso_ds.run", "--local_rank=0", "nothing.py"]
    done = run_command(command, cwd=folder)
    assert done.returncode == 2
    assert "nothing.py does not exist" in done.stderr
    assert "Traceback" not in done.stderr


END = """
import atexit, os, sys, threading, time
class Late:
    def __del__(self):
        os.abort()
late = Late()  # still there when the interpreter takes itself apart
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.5), print("thread")), daemon=False).start()
sys.stdout.write("end ")
sys.exit({code})
"""


ENDS = [("0", 0), ("", 0), ("3", 3), ("'a message'", 1)]


@pytest.mark.parametrize(("code", "status"), quick(ENDS, {ENDS[0], ENDS[3]}))
def test_how_a_program_ends(tmp_path, code, status):
    """Exit functions and threads have their turn; what goes wrong after them is not the finished program's fault."""
    text = END.format(code=code) if status == 0 else END.format(code=code).replace("os.abort()", "pass")
    (tmp_path / "program.py").write_text(text)
    command = [sys.executable, "-m", "rso_ds.run", "program.py"]
    env = {**os.environ, "PYTHONPATH": str(PROGRAMS.parent.parent)}
    done = run_command(command, cwd=tmp_path, env=env)
    assert done.returncode == status, done.stderr
    assert done.stdout == "end thread\nat exit\n"
    assert ("a message" in done.stderr) == (status == 1)
