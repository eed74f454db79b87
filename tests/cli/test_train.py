"""The main command as a user types it, on two CPU ranks: trains, resumes, exports, refuses."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick
from support.train_ranks import run
from support.train_workspace import REAL_TEXT, SAVE, STEPS, Workspace

from rso_ds import defaults
from rso_ds.cli import main
from rso_ds.comm.rank_context import RankContext
from rso_ds.recipes.training.held_out import held_out_loss

needs("deepspeed")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def finished(space):
    done = space.run("full", "--deepspeed", "ds_configs/rso.json", "--profile-memory")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_profile_memory_sets_measurement_beside_the_model(space, finished):
    details = json.loads((space.folder / "full" / "memory.json").read_text())
    rows = details["comparison"]
    assert rows["kept for backward"]["measured"] == sum(details["kept_bytes"].values())
    assert abs(rows["kept for backward"]["error"]) < 0.05
    assert abs(rows["weights, P, solver state, masters"]["error"]) < 0.05
    assert abs(rows["peak of the step"]["error"]) < 0.05
    assert "kept for backward, by module and op" in finished.stdout


def test_metrics_have_every_promised_key(space, finished):
    steps = {m["step"]: m for m in space.metrics("full")}
    assert sorted(steps) == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        assert {"loss", "lr", "tokens", "tokens_per_second", "comm_bytes", "peak_memory_bytes"} <= set(steps[step])
        assert steps[step]["tokens"] == step * 8 * 32
        waited = steps[step]["waited_seconds"]
        assert waited["data"] > 0
        assert (waited["evaluation"] > 0) == (step in (4, 8, 12))
    assert [s for s, m in steps.items() if "val_loss" in m] == [0, 4, 8, 12]
    assert steps[12]["val_loss"] < steps[0]["val_loss"]
    assert steps[12]["applied_steps"] == 12
    assert steps[12]["draw"] == 1


def test_bytes_sent_are_those_of_the_start_up_table(space, finished):
    """fp32, accumulation 2 at ZeRO-2 (which reduces each micro step): 2 x 4 bytes x communicated."""
    communicated = next(line for line in finished.stdout.splitlines() if "communicated" in line)
    elements = int(communicated.split()[1].replace(",", ""))
    assert space.metrics("full")[-1]["comm_bytes"]["gradient"] == pytest.approx(2 * 4 * elements, rel=0.01)


def test_output_ends_with_sample_perplexities_and_place(space, finished):
    tail = finished.stdout[finished.stdout.index("--- sample") :]
    first, last = space.metrics("full")[0], space.metrics("full")[-1]
    assert f"held-out perplexity {first['val_ppl']:.2f} -> {last['val_ppl']:.2f}" in tail
    assert str(space.folder / "full" / "model") in tail


def test_saved_model_has_the_same_validation_loss(space, finished):
    """Loaded by plain transformers in one process; the run's figure was summed over two ranks."""
    model = space.model("full")
    assert not any(n.endswith(".B") for n in model.state_dict())
    loss = held_out_loss(model, space.held_out(), 1500, 3, RankContext(0, 0, 1, False))
    assert loss == pytest.approx(space.metrics("full")[-1]["val_loss"], abs=2e-6)


def test_effective_configuration_is_beside_the_results(space, finished):
    ds = json.loads((space.folder / "full" / "deepspeed.json").read_text())
    assert ds["train_batch_size"] == 8
    assert ds["gradient_accumulation_steps"] == 2
    assert ds["optimizer"]["type"] == "RSO"
    assert (space.folder / "full" / "config.yaml").is_file()


def test_the_model_has_a_card(space, finished):
    card = (space.folder / "full" / "model" / "README.md").read_text()
    assert "base_model" not in card  # a named shape starts from nothing
    assert "| shape | llama-9m |" in card
    assert "| data | text.txt |" in card
    assert f"| val_loss | {space.metrics('full')[-1]['val_loss']:.6g} |" in card
    assert "| sampler | haar |" in card
    assert str(space.folder) not in card


def test_resume_continues_to_the_same_weights(space, finished):
    """From step 6, in the middle of a subspace, in new processes: metrics and weights bit for bit."""
    shutil.copytree(space.folder / "full", space.folder / "again")
    checkpoints = space.folder / "again" / "checkpoints"
    shutil.rmtree(checkpoints / f"step{STEPS}")
    shutil.rmtree(space.folder / "again" / "model")
    (checkpoints / "latest").write_text(f"step{SAVE}")
    done = run(space, "again", "--deepspeed", "ds_configs/rso.json", "--resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    keys = ("step", "loss", "lr", "val_loss")
    straight, resumed = space.metrics("full"), space.metrics("again")
    assert [[m.get(k) for k in keys] for m in resumed] == [[m.get(k) for k in keys] for m in straight]
    expected = space.model("full").state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in space.model("again").state_dict().items())


def test_exported_checkpoint_is_the_model_that_the_run_saved(space, finished, capsys):
    out = space.folder / "exported"
    main(["export", str(space.folder / "full" / "checkpoints"), str(out)])  # on another number of threads, maybe
    assert "float32, in 1 file" in capsys.readouterr().out
    model = space.folder / "full" / "model"
    assert {p.name for p in out.iterdir()} | {"README.md"} == {p.name for p in model.iterdir()}  # no model card
    assert (out / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    assert json.loads((out / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    expected, found = (load_file(folder / "model.safetensors") for folder in (model, out))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@EXHAUSTIVE
def test_zero3_from_a_checkpoint_folder_with_bf16_offload(space, finished):
    """Fine-tune the model just saved: from_pretrained under zero.Init, offload, bf16."""
    done = space.run(
        "tuned", "--deepspeed", "ds_configs/rso_offload.json", "--model", str(space.folder / "full" / "model"),
        "--set", "optimizer.params.torch_adam=false", "--precision", "bf16", "--gradient-checkpointing",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before = space.metrics("full")[-1]["val_loss"]
    tuned = space.metrics("tuned")
    assert tuned[0]["val_loss"] == pytest.approx(before, abs=0.05)
    assert tuned[-1]["val_loss"] < before


def test_adamw_json_trains_densely_with_the_same_command(space):
    done = run(space, "adamw", "--deepspeed", "ds_configs/adamw.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert space.metrics("adamw")[-1]["val_loss"] < space.metrics("adamw")[0]["val_loss"]
    assert "draw" not in space.metrics("adamw")[-1]
    assert (space.folder / "adamw" / "checkpoints" / f"step{STEPS}" / "zero_to_fp32.py").is_file()


def error_of(done) -> str:
    assert done.returncode != 0
    found = [line for line in done.stderr.splitlines() if re.match(r"RSO\w*Error: ", line)]
    assert found, done.stderr[-3000:]
    assert "step 1/" not in done.stdout  # before training started
    return found[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-len", "100000"], "--seq-len 100000 is longer than the data"),
        (["--profile-memory", "--max-steps", "1"], "--profile-memory measures the second step"),
        (["--set", "optimizer.params.rank=200", "--set", "optimizer.params.rank_ratio=null"], "'rank': 200 exceeds"),
    ],
)
def test_errors_end_the_command_before_training(space, flags, message):
    assert message in error_of(run(space, "broken", "--deepspeed", "ds_configs/rso.json", *flags, ranks=1))


def test_checkpoint_of_another_model_or_run_is_refused(space, finished):
    source = str(space.folder / "full" / "checkpoints")
    other_model = run(space, "other", "--resume", source, "--set", "optimizer.params.rank_ratio=0.5")
    assert "is of another model or rank: layer" in error_of(other_model)
    assert "holds checkpoints of an earlier run" in error_of(run(space, "full", ranks=1))
    assert "that run had seed = 0, this one 1" in error_of(run(space, "other", "--resume", source, "--seed", "1"))
    fewer = error_of(run(space, "other", "--resume", source, ranks=1, steps=3))
    assert "12 steps have been taken already, and this run is to have 3 in all" in fewer
    less = error_of(run(space, "other", "--resume", source, "--train-tokens", "300", ranks=1, steps=None))
    assert "3,072 tokens have been trained on already, and --train-tokens is 300: give more" in less
    assert "does not exist" in error_of(run(space, "other", "--resume", str(space.folder), ranks=1))


@pytest.mark.parametrize("schedule", quick(["stretch", "continue"], {"stretch"}))
def test_a_finished_run_is_extended(space, finished, schedule):
    """With the same text under another path; the rates are those of the cosine, by its formula."""
    shutil.copytree(space.folder / "full", space.folder / schedule)
    copied = str(shutil.copy(space.data, space.folder / "copy.txt"))
    flags = ["--resume", "auto", "--resume-schedule", schedule, "--data", copied]
    done = run(space, schedule, "--deepspeed", "ds_configs/rso.json", *flags, steps=STEPS + 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"with another max_steps: {STEPS} -> {STEPS + 4}" in done.stdout
    metrics = space.metrics(schedule)
    assert [m["step"] for m in metrics] == list(range(STEPS + 5))
    assert metrics[-1]["tokens"] == (STEPS + 4) * 8 * 32
    for m in metrics[1:]:
        total = STEPS if schedule == "continue" or m["step"] <= STEPS else STEPS + 4
        share, short = cosine(m["step"], total), defaults.RANDOM_SHORT
        assert (m["lr"], m["dense_lr"]) == pytest.approx((short.lr * share, short.dense_lr * share))


def cosine(step: int, total: int) -> float:
    """Share of the peak: 5 % warm-up, which is one step here, then to a tenth."""
    progress = min(1.0, max(0.0, (step - 2) / (total - 1)))
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


@pytest.fixture(scope="module")
def streamed(space):
    """Flags of a run that streams records and holds nothing out, and its undisturbed run."""
    rows = [json.dumps({"text": f"{i} bottles of beer on the wall, {i * i} more\n" * (i % 4 + 1)}) for i in range(600)]
    for shard in range(2):
        (space.folder / "shards").mkdir(exist_ok=True)
        (space.folder / "shards" / f"train-{shard}.jsonl").write_text("\n".join(rows[shard::2]))
    flags = ["--data", str(space.folder / "shards"), "--stream", "yes", "--engine", "ddp", "--val-fraction", "0"]
    flags += ["--data-workers", "0", "--eval-interval", "0", "--save-interval", "5"]
    done = run(space, "straight", *flags, steps=8)
    assert done.returncode == 0, done.stderr[-3000:]
    return flags, done


def test_a_run_without_validation(space, streamed):
    assert "held out  nothing (there will be no validation)" in streamed[1].stdout
    assert "perplexity" not in streamed[1].stdout
    assert "--- sample" in streamed[1].stdout
    metrics = space.metrics("straight")
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert not any("val_loss" in m for m in metrics)
    assert "val_loss" not in (space.folder / "straight" / "model" / "README.md").read_text()
    assert json.loads((space.folder / "straight" / "data.json").read_text())["held out"]["note"]


@pytest.mark.parametrize("ranks", quick([1, 2], {1}))
def test_a_stream_goes_on_as_if_it_had_not_stopped(space, streamed, ranks):
    name = f"stopped-{ranks}"
    shutil.copytree(space.folder / "straight", space.folder / name)
    shutil.rmtree(space.folder / name / "checkpoints" / "step8")
    (space.folder / name / "checkpoints" / "latest").write_text("step5")
    done = run(space, name, *streamed[0], "--resume", "auto", ranks=ranks, steps=8)
    assert done.returncode == 0, done.stderr[-3000:]
    straight, resumed = (space.metrics(n) for n in ("straight", name))
    assert [m["loss"] for m in resumed] == pytest.approx([m["loss"] for m in straight], abs=0 if ranks == 2 else 1e-5)
    expected, found = (load_file(space.folder / n / "model" / "model.safetensors") for n in ("straight", name))
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if ranks == 2 else 1e-5)


@EXHAUSTIVE
def test_processes_read_for_a_run_that_the_launcher_starts(space, streamed):
    done = space.run("read", *streamed[0], "--data-workers", "2", steps=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [m["loss"] for m in space.metrics("read")] == [m["loss"] for m in space.metrics("straight")]


@EXHAUSTIVE
@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="needs the ELTeC corpus beside the checkout (../shared/data)")
def test_real_text_loss_falls(space):
    done = space.run("real", "--data", str(REAL_TEXT / "valid.jsonl.xz"), "--vocab-size", "1000", steps=40)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = space.metrics("real")[0], space.metrics("real")[-1]
    assert last["val_loss"] < first["val_loss"] - 0.3


def test_monitors_of_the_json(space):
    """CSV, TensorBoard and Weights & Biases get the numbers of metrics.jsonl, over samples; beside DeepSpeed's own."""
    for package in ("tensorboard", "wandb"):
        pytest.importorskip(package)
    folder = space.folder / "monitors"
    flags = [f"csv_monitor.enabled=true|csv_monitor.output_path={folder}/csv|csv_monitor.job_name=run"]
    flags += [f"tensorboard.enabled=true|tensorboard.output_path={folder}/board|tensorboard.job_name=run"]
    flags += ["wandb.enabled=true|wandb.project=rso_ds"]
    sets = [x for flag in "|".join(flags).split("|") for x in ("--set", flag)]
    sets += ["--set", "optimizer.params.interval=3"]
    done = run(space, "monitored", "--sample-tokens", "0", *sets, WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [r for r in space.metrics("monitored") if "loss" in r]
    for key in ("loss", "merge_ratio", "subspace_grad_norm", "draw"):
        lines = (folder / "csv" / "run" / f"rso_ds_{key}.csv").read_text().splitlines()
        written = {int(step): float(value) for step, value in (line.split(",") for line in lines[1:])}
        assert written == {r["step"] * 8: pytest.approx(r[key]) for r in records if key in r}
    assert (folder / "csv" / "run" / "Train_Samples_lr.csv").is_file()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "board" / "run"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("rso_ds/loss")] == [
        (r["step"] * 8, pytest.approx(r["loss"], rel=1e-6)) for r in records
    ]
    (offline,) = (space.folder / "monitored" / "wandb").glob("offline-run-*/run-*.wandb")
    content = offline.read_bytes()
    assert b"rso_ds/merge_ratio" in content
    assert b"rso_ds/comm_bytes/gradient" in content


def test_a_monitor_without_its_package_is_refused(monkeypatch):
    import importlib.util

    from rso_ds import RSOConfigError
    from rso_ds.recipes.training.monitor import check_monitors

    assert not check_monitors({"wandb": {"enabled": False}})
    assert check_monitors({"csv_monitor": {"enabled": True}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RSOConfigError, match="'wandb' of the DeepSpeed JSON is enabled: pip install wandb"):
        check_monitors({"wandb": {"enabled": True}})
