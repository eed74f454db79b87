"""A folder with text to train on, and launch/train.py as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.environment import ROOT
from support.progress import run_command
from support.ranks import free_port

from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.dataset import PackedTokens, token_file
from rso_ds.recipes.data.tokenization import load_tokenizer

STEPS, SAVE = 12, 6
REAL_TEXT = ROOT.parent / "shared" / "data" / "eltec-eng"
BASE = ["--seq-len", "32", "--global-batch", "8", "--micro-batch", "2", "--vocab-size", "400"]
BASE += ["--log-interval", "1", "--eval-interval", "4", "--eval-tokens", "1500"]
BASE += ["--sample-tokens", "5", "--save-interval", str(SAVE)]


class Workspace:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "text.txt"
        self.data.write_text("".join(f"{i} bottles of beer on the wall, {i} bottles of beer\n" for i in range(1500)))
        self.cache = folder / "cache"

    def arguments(self, output: str, *flags: str, steps: int | None = STEPS) -> list[str]:
        """Of launch/train.py."""
        place = ["--output", str(self.folder / output), "--cache", str(self.cache)]
        if "--data" not in flags:
            place += ["--data", str(self.data)]
        return [*place, *BASE, *([] if steps is None else ["--max-steps", str(steps)]), *flags]

    def run(self, output: str, *flags: str, ranks: int = 2, steps: int | None = STEPS) -> subprocess.CompletedProcess:
        """As a user starts it: by DeepSpeed's launcher. (``train_ranks.run`` spares the imports.)"""
        launcher = Path(sys.executable).parent / "deepspeed"
        place = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        command = [str(launcher), *place, "launch/train.py", *self.arguments(output, *flags, steps=steps)]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
        env["PYTHONWARNINGS"] = "ignore"
        return run_command(command, cwd=ROOT, env=env)

    def metrics(self, output: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / output / "metrics.jsonl").read_text().splitlines()]

    def model(self, output: str):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / output / "model").eval()

    def held_out(self, seq_len: int = 32) -> PackedTokens:
        corpus = Corpus(str(self.data))
        tokenizer = load_tokenizer(None, corpus, 400, self.cache)
        return PackedTokens(token_file(corpus, "held_out", tokenizer, self.cache), seq_len)
