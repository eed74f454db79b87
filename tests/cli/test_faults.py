"""What becomes of a run that is signalled, killed, or fed with NaN."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick
from support.fault_runs import ENGINES, FLAGS, SAVE, STEPS, faults, same, undisturbed_run
from support.progress import end_of
from support.train_ranks import TrainRanks
from support.train_workspace import ROOT, Workspace

from rso_ds.comm.rank_context import restart_advice
from rso_ds.recipes.training.signals import EXIT_REQUEUE

needs("deepspeed")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(space):
    """Engine name -> a complete run."""
    return {name: undisturbed_run(space, name) for name in ENGINES}


# -- signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "how", "to"),
    [
        ("zero2", signal.SIGUSR1, [1]),
        ("ddp", signal.SIGTERM, [0, 1]),
        pytest.param("ddp", signal.SIGTERM, [1], marks=EXHAUSTIVE),
    ],
)
def test_a_signal_saves_and_ends_all_ranks_with_the_status_for_requeueing(space, undisturbed, engine, how, to):
    run = faults.Run(
        space, f"signalled-{engine}-{how}-{len(to)}", [*FLAGS, *ENGINES[engine], "--save-interval", "1000"]
    )
    ranks = run.start()
    ranks.wait_for(run.output / "metrics.jsonl", 4)
    for rank in to:
        ranks.kill(rank, how)
        ranks.kill(rank, how)  # as a launcher does that was signalled too: one request
    assert ranks.wait() == [EXIT_REQUEUE, EXIT_REQUEUE], ranks.text()
    step = run.step()
    assert 3 <= step < STEPS
    assert (run.output / "checkpoints" / "latest").read_text() == f"step{step}"
    said = f"stopped after step {step}, saved step{step}; continue with --resume auto (exit status {EXIT_REQUEUE})"
    assert said in ranks.text(0)
    ranks = run.start()
    assert ranks.wait() == [0, 0], ranks.text()
    assert f"continuing from {run.output / 'checkpoints' / f'step{step}'}, after step {step}" in ranks.text(0)
    assert same(run, undisturbed[engine])


def test_a_later_second_sigterm_ends_a_rank_that_waits_for_a_silent_one(space):
    run = faults.Run(space, "stuck", [*FLAGS, *ENGINES["ddp"], "--max-steps", "100000", "--timeout", "100"])
    ranks = run.start()
    ranks.wait_for(run.output / "metrics.jsonl", 3)
    ranks.kill(1, signal.SIGSTOP)
    time.sleep(0.5)
    ranks.kill(0, signal.SIGTERM)
    time.sleep(5.5)
    assert ranks.processes[0].is_alive()
    ranks.kill(0, signal.SIGTERM)
    ranks.processes[0].join(5)
    assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
    assert "second SIGTERM: ending at once" in ranks.text(0)
    ranks.stop()


def test_a_signal_while_the_other_rank_is_dead_ends_with_one_message(space):
    """As launchers do it: a rank has died, the others are told to end."""
    run = faults.Run(space, "orphan", [*FLAGS, *ENGINES["zero2"], "--max-steps", "100000"])
    ranks = run.start()
    ranks.wait_for(run.output / "metrics.jsonl", 3)
    ranks.kill(1)
    ranks.kill(0, signal.SIGTERM)
    began = time.monotonic()
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 10
    assert "rank 0 lost another rank in the middle of a collective" in ranks.text(0)
    assert "Traceback" not in ranks.text(0)


def launched(space: Workspace, run: faults.Run, command: list[str], log: Path, **env: str) -> subprocess.Popen:
    """A launcher from the environment's bin folder in a process group of its own."""
    command = [str(Path(sys.executable).parent / command[0]), *command[1:], "launch/train.py", *run.flags]
    everything = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **env}
    with open(log, "w") as f:
        return subprocess.Popen(
            [*command, "--resume", "auto"], cwd=ROOT, env=everything, stdout=f, stderr=f, start_new_session=True
        )


def progressed(run: faults.Run, process: subprocess.Popen, log: Path, step: int) -> None:
    deadline = time.monotonic() + 150
    while run.step() < step or not (run.output / "checkpoints" / "latest").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen) -> list[int]:
    import psutil

    found = psutil.Process(process.pid).children(recursive=True)
    return [p.pid for p in found if p.cmdline()[-1:] == ["auto"] and "deepspeed.launcher.launch" not in p.cmdline()]


def end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@EXHAUSTIVE
def test_torchrun_signalled_with_all_its_ranks(space):
    """As SLURM ends a step: torchrun passes on the SIGTERM that its ranks have got already."""
    run = faults.Run(space, "torchrun", [*FLAGS, *ENGINES["ddp"], "--max-steps", "100000"])
    log = space.folder / "torchrun.log"
    process = launched(space, run, ["torchrun", "--standalone", "--nproc-per-node", "2"], log)
    try:
        progressed(run, process, log, 8)
        os.killpg(process.pid, signal.SIGTERM)
        assert end_of(process) == 1
    finally:
        end_group(process)
    step = run.step()
    assert (run.output / "checkpoints" / "latest").read_text() == f"step{step}"
    assert f"SIGTERM: stopped after step {step}, saved step{step}" in log.read_text()


# -- elastic restarts ------------------------------------------------------------------------------------


@EXHAUSTIVE
@pytest.mark.parametrize("engine", list(ENGINES))
def test_torchrun_restarts_after_a_killed_rank_and_ends_the_same(space, undisturbed, engine):
    run = faults.Run(space, f"elastic-{engine}", [*FLAGS, *ENGINES[engine]])
    log = space.folder / f"elastic-{engine}.log"
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    process = launched(space, run, command, log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    try:
        progressed(run, process, log, SAVE + 2)
        os.kill(ranks_of(process)[1], signal.SIGKILL)
        assert end_of(process) == 0, log.read_text()[-3000:]
    finally:
        end_group(process)
    text = log.read_text()
    assert "torchrun is to restart this run" not in text
    at = re.search(r"--resume auto: continuing from \S+, after step (\d+)", text)
    assert at, text[-3000:]
    assert int(at[1]) >= SAVE
    assert same(run, undisturbed[engine])


def test_what_restarts_need_is_said_at_the_start(monkeypatch):
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert restart_advice(None) is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert restart_advice(None) is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in restart_advice("auto")
    assert "add --resume auto" not in restart_advice("auto")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert restart_advice("auto") is None
    assert restart_advice(None).endswith("add --resume auto")


# -- steps that are not finite ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_models(space):
    """Folders of two models: one whose embedding of the letter Q is infinite, one with NaN in a norm."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rso_ds.recipes.data.corpus import Corpus
    from rso_ds.recipes.data.tokenization import load_tokenizer

    rare = space.folder / "rare.txt"
    lines = space.data.read_text().splitlines()
    rare.write_text("\n".join(line + ("Q" if i % 50 == 7 else "") for i, line in enumerate(lines)))
    corpus = Corpus(str(rare), 0.02, str(space.data), "text")
    tokenizer = load_tokenizer(None, Corpus(str(space.data)), 400, space.cache)  # one to which Q is a lone byte
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    (token,) = tokenizer("Q", add_special_tokens=False)["input_ids"]
    for name in ("rare", "always"):
        with torch.no_grad():
            if name == "rare":
                model.model.embed_tokens.weight[token] = torch.inf
            else:
                model.model.norm.weight[3] = torch.nan
        model.save_pretrained(space.folder / name)
        tokenizer.save_pretrained(space.folder / name)
    return rare, tokenizer, token, corpus


def not_finite(space, broken_models, name: str, engine: str, *flags: str) -> tuple[faults.Run, TrainRanks]:
    run = faults.Run(space, f"{name}-{engine}", [*FLAGS, *SKIPPING[engine], *flags])
    run.flags[run.flags.index("--data") + 1] = str(broken_models[0])
    run.flags += ["--model", str(space.folder / name), "--val-data", str(space.data)]
    return run, run.start()


SKIPPING = {f"zero{stage}": ["--deepspeed", f"ds_configs/rso_zero{stage}.json"] for stage in (1, 3)}
SKIPPING |= {"ddp": ["--engine", "ddp"], "fsdp2": ["--engine", "fsdp2"]}


@pytest.mark.parametrize("engine", quick(SKIPPING, {"zero3"}))
def test_steps_that_are_not_finite_are_skipped_and_the_run_goes_on(space, broken_models, engine):
    from rso_ds.recipes.data.dataset import PackedTokens, token_file

    _, tokenizer, token, corpus = broken_models
    data = PackedTokens(token_file(corpus, "train", tokenizer, space.cache), 32, 0)
    steps = [torch.stack([data.micro_batches(4 * s, 1, 2, r, 2) for r in (0, 1)]) for s in range(STEPS)]
    bad = [bool((ids == token).any()) for ids in steps]
    assert 2 < sum(bad) < STEPS / 2
    run, ranks = not_finite(space, broken_models, "rare", engine)
    assert ranks.wait() == [0, 0], ranks.text()
    metrics = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()][1:]
    assert [m["loss"] is None for m in metrics] == bad
    assert [m["skipped_steps"] for m in metrics] == [sum(bad[: i + 1]) for i in range(STEPS)]
    assert metrics[-1]["applied_steps"] == STEPS - sum(bad)
    assert metrics[-1]["val_loss"] < 6
    assert "not finite" in ranks.text(0)


@pytest.mark.parametrize("engine", ["zero3", "ddp"])
def test_a_run_in_which_every_step_is_skipped_ends(space, broken_models, engine):
    run, ranks = not_finite(space, broken_models, "always", engine, "--max-skipped", "6")
    assert ranks.wait() == [1, 1], ranks.text()
    for rank in (0, 1):
        assert (
            "RSOError: 6 steps in a row had a loss or gradients that are not finite, the last at step 6"
            in ranks.text(rank)
        )
        assert "no step had a finite loss, the newest checkpoint is" in ranks.text(rank)
        assert "--max-skipped allows more" in ranks.text(rank)
    assert "NaN" not in (run.output / "metrics.jsonl").read_text()
    state = json.loads((run.output / "checkpoints" / "step5" / "rso_state.json").read_text())
    assert state["score"] is None


# -- the campaign, small --------------------------------------------------------------------------------


@EXHAUSTIVE
def test_kills_at_random_moments_end_bitwise_equal(space):
    result = faults.Campaign(space, 1, 30, 4, random.Random(7)).run(4)
    assert result["kills"] == 4
    assert result["lost_steps_max"] <= 4
    assert result["runs_bitwise_equal_to_the_undisturbed"] == result["runs"]
    assert result["failures"] == []
