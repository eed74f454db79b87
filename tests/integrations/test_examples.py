"""The programs in examples/, as their first lines say they are started."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from support.environment import ROOT, needs
from support.exhaustive import EXHAUSTIVE, quick
from support.progress import run_command
from support.train_workspace import free_port

needs("transformers")

EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent


def start(*command: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{env['PATH']}"}
    done = run_command(command, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def learns(output: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", output)]
    assert len(losses) == 4
    assert losses[0] > 10 * losses[-1]  # uniform guesses have 5.5; most is learnt by the first line
    assert losses[-1] < 0.1
    assert re.findall(r"subspace (\d+)", output) == ["1", "2", "3", "4"]


@EXHAUSTIVE
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_loop(tmp_path, stage):
    pytest.importorskip("deepspeed")
    from transformers import AutoModelForCausalLM

    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    flags = ["--stage", str(stage), "--output", str(tmp_path / "model")]
    learns(start(*launcher, str(EXAMPLES / "deepspeed_loop.py"), *flags))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 64


@pytest.mark.parametrize("engine", quick(["none", "ddp", "fsdp2"], {"none"}))
def test_torch_ranks(engine):
    ranks = [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}"]
    launcher = [sys.executable] if engine == "none" else ranks
    learns(start(*launcher, str(EXAMPLES / "torch_ranks.py"), "--engine", engine))


@EXHAUSTIVE
def test_what_it_saves(tmp_path):
    output = start(sys.executable, str(EXAMPLES / "what_it_saves.py"), "--output", str(tmp_path / "model"))
    dense, ours = re.findall(r"kept for backward +([\d.]+) MiB +trained +([\d,]+)", output)
    assert float(ours[0]) < 0.65 * float(dense[0])
    assert int(ours[1].replace(",", "")) < 0.3 * int(dense[1].replace(",", ""))
    assert float(re.search(r"largest difference of logits (\S+)", output)[1]) < 1e-4


def test_they_are_short():
    programs = sorted(EXAMPLES.glob("*.py"))
    assert len(programs) == 3
    assert all(len(path.read_text().splitlines()) < 60 for path in programs)
