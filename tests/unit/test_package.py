"""The package as a whole: what importing costs, and that documents keep up with the code."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from support.environment import ROOT
from support.exhaustive import EXHAUSTIVE

from rso_ds import RSOConfig
from rso_ds.cli import main


def test_import_needs_torch_only():
    code = "import sys, rso_ds; print([m for m in ('deepspeed', 'transformers', 'yaml', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@EXHAUSTIVE
def test_the_commands_need_no_deepspeed():
    """The account is for the laptop on which nothing will train."""
    code = "import sys; sys.modules['deepspeed'] = None; from rso_ds.cli import main; main(sys.argv[1:])"
    flags = ["--deepspeed", "ds_configs/rso_zero2.json", "--model", "llama-9m", "--vocab-size", "1024"]
    for command in ("check", "memory"):
        done = subprocess.run([sys.executable, "-c", code, command, *flags], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_every_key_is_documented_with_its_default():
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, flags=re.M))
    defaults = {
        "rank": "null",
        "rank_ratio": "0.25",
        "form": "null",
        "tokens_per_step": "null",
        "dense_lr": "null (= `lr`)",
        "betas": "[0.9, 0.999]",
    }
    for f in dataclasses.fields(RSOConfig):
        assert f.name in rows, f.name
        if f.name in defaults:
            assert rows[f.name].strip() == defaults[f.name]
        elif isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
            assert float(rows[f.name]) == f.default, f.name
        else:
            assert rows[f.name].strip().strip('"') == str(f.default).lower(), f.name


def test_check_command(capsys):
    main(["check", "--deepspeed", str(ROOT / "ds_configs/rso_7b_zero3.json"), "--model", "llama-7b"])
    out = capsys.readouterr().out
    assert "224 layers in 128 groups" in out
    assert "communicated    1,654,919,168" in out


def test_check_command_with_embedding_and_head(capsys, tmp_path):
    config = json.loads((ROOT / "ds_configs/rso_7b_zero3.json").read_text())
    config["optimizer"]["params"]["targets"] = ["default", "embeddings", "head"]
    (tmp_path / "rso.json").write_text(json.dumps(config))
    main(["check", "--deepspeed", str(tmp_path / "rso.json"), "--model", "llama-7b"])
    out = capsys.readouterr().out
    assert "226 layers in 130 groups" in out
    assert f"communicated    {1_654_919_168 - 2 * 32000 * (4096 - 1024):,}" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--deepspeed", str(ROOT / "ds_configs/adamw.json")], 'its optimizer is "AdamW"'),
        (["--deepspeed", "missing.json"], "--deepspeed missing.json cannot be read"),
        (["--deepspeed", str(ROOT / "ds_configs/rso.json"), "--model", "llama-7bb"], "Did you mean 'llama-7b'?"),
    ],
)
def test_check_command_refusals(flags, message):
    with pytest.raises(SystemExit) as end:
        main(["check", *flags])
    assert message in str(end.value)
