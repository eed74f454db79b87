"""rso-ds report: what it reads, what it shows, what it refuses."""

from __future__ import annotations

import base64
import json
import re
import sys

import pytest
from support.environment import needs

from rso_ds import RSOError
from rso_ds.cli import main
from rso_ds.recipes.report.page import table, write_report
from rso_ds.recipes.report.runs import load_runs

needs("matplotlib")

PNG = b"\x89PNG\r\n"


def record(step, loss, draw=0, **more):
    sent = {"gradient": 100, "weights": 50, "evaluation": 9, "boundary": 0, "other": 0}
    found = {"step": step, "loss": loss, "lr": 1e-3, "tokens": step * 64, "tokens_per_second": 32.0, "draw": draw}
    return {**found, "comm_bytes": sent, "peak_memory_bytes": 2**30 + step, "skipped_steps": 0, **more}


def write_run(folder, records, tail=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    params = {"lr": 4e-3, "rank_ratio": 0.25, "interval": 5, "sampler": "haar"}
    (folder / "deepspeed.json").write_text(
        json.dumps({"optimizer": {"type": "RSO", "params": params}, "zero_optimization": {"stage": 2}})
    )
    (folder / "config.yaml").write_text("model: llama-9m\nengine: deepspeed\nseed: 0\n")
    return folder


@pytest.fixture
def run(tmp_path):
    records = [{"step": 0, "tokens": 0, "val_loss": 7.0, "val_ppl": 1096.6}, record(5, 6.0, 1, merge_ratio=0.5)]
    records += [record(10, 5.0, 2, merge_ratio=0.25, subspace_grad_norm=0.1, val_loss=5.5, val_ppl=244.7)]
    records += [record(15, 4.5, 2, merge_ratio=0.25, tokens_per_second=64.0)]
    return write_run(tmp_path / "run", records, tail='{"step": 20, "lo')


def test_what_a_run_says(run):
    """Seconds are tokens over speed, bytes those of a step times the steps; evaluations are left out."""
    (got,) = load_runs([run])
    assert got.loss == [(5, 6.0), (10, 5.0), (15, 4.5)]
    assert got.held_out == [(0, 7.0), (10, 5.5)]
    assert got.merge_ratio == [(5, 0.5), (10, 0.25)]
    assert got.seconds == {0: 0.0, 5: 10.0, 10: 20.0, 15: 25.0}
    assert got.sent == {0: 0.0, 5: 750.0, 10: 1500.0, 15: 2250.0}
    assert got.tokens[15] == 960
    assert (got.peak_memory, got.tokens_per_second, got.bytes_per_step) == (2**30 + 15, 32.0, 150.0)
    cells = {row[0]: row[1] for row in table([got])}
    assert cells["optimizer"] == "RSO"
    assert cells["ZeRO stage"] == "2"
    assert cells["held-out loss, best"] == "5.5000"
    assert cells["seconds of training"] == "25.0"


def test_the_page(run, tmp_path, capsys):
    other = write_run(tmp_path / "b" / "run", [record(5, 6.5), record(10, 6.25)])
    page, picture = tmp_path / "out" / "page.html", tmp_path / "page.png"
    main(["report", str(run), str(other), "--output", str(page)])
    assert "2 runs" in capsys.readouterr().out
    text = page.read_text()
    assert base64.b64decode(re.search(r"base64,([^\"]+)", text)[1]).startswith(PNG)
    assert "<th>b/run</th>" in text
    assert "<td>6.2500</td>" in text
    assert "<td>5.5000</td><td>-</td>" in text
    assert "http" not in text.replace(re.search(r"base64,([^\"]+)", text)[1], "")
    main(["report", str(run), "--output", str(picture)])
    assert picture.read_bytes().startswith(PNG)


def test_runs_of_hugging_faces_trainer(tmp_path):
    folder = tmp_path / "trainer"
    folder.mkdir()
    history = [{"step": 5, "loss": 3.0}, {"step": 5, "eval_loss": 3.1}, {"step": 10, "loss": 2.0}, {"step": 10}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (got,) = load_runs([folder])
    assert got.loss == [(5, 3.0), (10, 2.0)]
    assert got.held_out == [(5, 3.1)]
    told = {"method": "rso", "seed": 0, "comm_bytes_per_step": {"gradient": 8, "other": 2}, "seconds_per_step": 0.5}
    (folder / "results.json").write_text(json.dumps(told))
    (got,) = load_runs([folder])
    assert got.seconds[10] == 5.0
    assert got.sent[10] == 100.0
    told = {"draw": 1, "merge_ratio": 0.5, "subspace_grad_norm": 2.0, "comm_bytes_per_step": 7, "peak_memory_bytes": 9}
    history = [{**entry, **told} if "loss" in entry else entry for entry in history]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (got,) = load_runs([folder])
    assert got.merge_ratio == [(5, 0.5)]
    assert got.gradient == [(5, 2.0), (10, 2.0)]
    assert got.sent == {5: 35.0, 10: 70.0}


def test_refusals(run, tmp_path, monkeypatch):
    def message(*folders, output=tmp_path / "x.html"):
        with pytest.raises(SystemExit) as end:
            main(["report", *map(str, folders), "--output", str(output)])
        return str(end.value)

    (tmp_path / "empty").mkdir()
    assert "holds neither metrics.jsonl" in message(tmp_path / "empty")
    assert "holds neither metrics.jsonl" in message(tmp_path / "nowhere")
    assert "not one step has been logged" in message(write_run(tmp_path / "none", [{"step": 0, "tokens": 0}]))
    damaged = write_run(tmp_path / "damaged", [record(5, 6.0)], tail='{"step": 10, "lo\n{}\n')
    assert "metrics.jsonl: line 2 is damaged" in message(damaged)
    assert "named twice" in message(run, run)
    assert "must end in .html or .png" in message(run, output=tmp_path / "x.pdf")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in message(run, output=tmp_path / "file" / "x.html")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "trainer_state.json").write_text("{")
    assert "trainer_state.json is damaged" in message(tmp_path / "bad")
    assert not (tmp_path / "x.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RSOError, match=r"pip install 'rso_ds\[plot\]'"):
        write_report(load_runs([run]), tmp_path / "x.html")
