"""benchmarks/gpu.sh where there is no GPU: its message, and that its parts still fit the code that they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.environment import ROOT
from support.exhaustive import EXHAUSTIVE, quick

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # A folder that is no environment, so that the script takes this interpreter.
    everything = {**os.environ, "PATH": path, "RSO_DS_VENV": os.devnull, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=everything, capture_output=True, text=True, timeout=300
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("argument", quick(["--dry-run", "results"], {"results"}))
def test_without_a_gpu_it_says_so_and_runs_nothing(argument, tmp_path):
    done = run(str(tmp_path / argument) if argument == "results" else argument)
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu.sh: there is no CUDA device here, so nothing was run"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_the_limits_stay_below_eight_minutes():
    done = run("--dry-run", DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    limits = [int(line.split()[-2]) for line in done.stdout.splitlines() if ", at most " in line]
    assert len(limits) >= 4
    assert sum(limit + 10 for limit in limits) <= 480  # each has 10 s more to end in


def test_a_failed_section_is_named_and_the_others_run(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "env").write_text("#!/bin/sh\nexit 7\n")  # the script starts step_time by env
    (bin_folder / "env").chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run(str(tmp_path / "out"), "step_time", "rates", DEVICE="cpu", PATH=path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().endswith("gpu.sh: not ok: step_time")
    (summary,) = (tmp_path / "out").glob("summary_*.json")
    assert {row["section"]: row["result"] for row in json.loads(summary.read_text())} == {
        "rates": "ok",
        "step_time": "failed with status 7",
    }
    (rates,) = (tmp_path / "out").glob("rates_*.json")
    assert all(row["median"] > 0 for row in json.loads(rates.read_text())["rows"])


@EXHAUSTIVE
def test_a_case_equals_the_reference(tmp_path):
    out = tmp_path / "equivalence.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability" / "equivalence.py"), "--device", "cpu"]
    command += ["--engines", "one", "--cases", "project", "folded", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["project", "folded"]
    assert all(row["equal"] and row["weight"] < 1e-11 for row in rows)
