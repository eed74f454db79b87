"""benchmarks/network/bandwidth.py in its smallest form: a real shaped link between two network namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.environment import ROOT
from support.exhaustive import EXHAUSTIVE

BENCHMARK = ROOT / "benchmarks" / "network" / "bandwidth.py"
METHODS = ["AdamW", "PowerSGD h/16", "AdamW, DenseSubspace h/16", "RSO h/16"]
STEPS = 2


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.strip()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("bandwidth") / "result.json"
    command = [sys.executable, str(BENCHMARK), "--model", "llama-9m", "--vocab", "256"]
    command += ["--links", "1gbit", "--rounds", "1", "--steps", str(STEPS), "--sweep-seq-lens"]
    command += ["--methods", *METHODS, "--json", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: it has namespaces to remove
        raise
    assert process.returncode == 0, output
    if output.startswith("skipped: "):
        pytest.skip(output.strip().removeprefix("skipped: "))
    assert not {name for name in namespaces() if name.startswith(f"rsobw{process.pid}-")}
    return {row["method"]: row for row in json.loads(out.read_text())["rows"]}


@EXHAUSTIVE
def test_all_methods_took_their_steps(rows):
    assert list(rows) == METHODS
    assert all(row["steps"] == STEPS and row["median_s"] > 0 for row in rows.values())


@EXHAUSTIVE
@pytest.mark.parametrize("method", ["AdamW", "RSO h/16"])
def test_gradients_are_four_bytes_a_trainable_element(rows, method):
    assert rows[method]["counted_bytes"]["gradient"] == 4 * rows[method]["trainable"]


@EXHAUSTIVE
@pytest.mark.parametrize("method", METHODS)
def test_the_wire_carries_what_was_counted(rows, method):
    # With two ranks a ring sends the payload once; headers, acknowledgements and barriers come on top.
    counted = sum(rows[method]["counted_bytes"].values())
    assert counted < rows[method]["sent_bytes"] < 1.25 * counted


@EXHAUSTIVE
def test_rso_really_sends_less_than_adamw(rows):
    assert rows["RSO h/16"]["sent_bytes"] < rows["AdamW"]["sent_bytes"] / 3


@EXHAUSTIVE
def test_without_tools_it_is_skipped_and_says_why(tmp_path):
    command = [sys.executable, str(BENCHMARK)]
    env = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("skipped: ")


def test_rates():
    sys.path.insert(0, str(BENCHMARK.parent))
    try:
        from bandwidth_net import parse_rate
    finally:
        sys.path.pop(0)
    assert [parse_rate(link) for link in ("none", "100mbit", "2.5gbit")] == [None, 1e8, 2.5e9]
    for link in ("fast", "0mbit", "100", "-1gbit", ""):
        with pytest.raises(ValueError, match="link must be"):
            parse_rate(link)
