"""``rso-ds plan``: its figures are those of the other commands, its choice that of an exhaustive loop."""

import json
import os
import shlex
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from support.environment import ROOT, needs
from support.exhaustive import EXHAUSTIVE
from support.traces import remembered_traces
from torch._subclasses.fake_tensor import FakeTensorMode

from rso_ds import RSOConfig, convert
from rso_ds.cli import main
from rso_ds.models import llama_config
from rso_ds.planning.communication.exchange import Deployment, Exchange, transfers
from rso_ds.planning.communication.network import Network
from rso_ds.planning.memory.account import Accountant, model_builder
from rso_ds.planning.memory.states import Engine
from rso_ds.planning.plan.config_json import DEFAULT_BASE
from rso_ds.planning.plan.search import choose
from rso_ds.recipes.training.arguments import parse_arguments

needs("transformers")

EXAMPLE = ["--model", "llama-7b", "--gpus", "16", "--gpu-memory", "40GB", "--link", "25Gbit"]
SMALL = ["--model", "llama-9m", "--vocab-size", "512", "--seq-len", "128"]


@pytest.fixture(autouse=True)
def traced_once():
    """(Not in ``everything``, which is of the module: each of its figures is counted by itself.)"""
    with remembered_traces():
        yield


def plan(capsys, *flags):
    main(["plan", "--json", *flags])
    return json.loads(capsys.readouterr().out)


def refusal(*flags):
    with pytest.raises(SystemExit) as end:
        main(["plan", *flags])
    message = str(end.value)
    assert "\n" not in message
    return message


# -- LLaMA-7B ----------------------------------------------------------------------------------------


def test_the_example(capsys):
    got = plan(capsys, *EXAMPLE)
    chosen = got["chosen"]
    assert (chosen["stage"], chosen["micro_batch"], chosen["accumulation"]) == (1, 2, 8)
    assert (chosen["rank_ratio"], chosen["gradient_checkpointing"], chosen["hpz"]) == (0.25, False, 1)
    assert chosen["compute_seconds"] == pytest.approx(6 * 6_738_415_616 * 256 * 2048 / (16 * 100e12))
    assert got["reasons"]["stage"][0].startswith("stage 0: rejected, would need 5")
    assert got["reasons"]["stage"][0].endswith("of 40.0 GB (micro batch 1, with checkpointing)")
    assert "the next divisor of 16 would need" in got["reasons"]["micro batch"][0]
    assert got["commands"] == [
        "sbatch --nodes=2 --gpus-per-node=8 launch/slurm/torchrun.sbatch --deepspeed rso.json --model llama-7b"
        " --vocab-size 32000 --seq-len 2048 --micro-batch 2 --global-batch 256 --output runs/llama-7b"
    ]


@EXHAUSTIVE
def test_the_text_holds_json_command_and_reasons(capsys):
    main(["plan", *SMALL, "--gpus", "4", "--gpu-memory", "2GB"])
    out = capsys.readouterr().out
    assert json.loads(out[out.index("\n{\n") : out.index("\n}\n") + 2])["train_batch_size"] == 256
    assert "\nsbatch --nodes=1 --gpus-per-node=4 " in out
    assert "\ndeepspeed --num_gpus 4 launch/train.py --deepspeed rso.json --model llama-9m" in out
    for word in ("memory", "rank", "stage", "checkpointing", "micro batch", "time", "(assumed)"):
        assert word in out


@EXHAUSTIVE
@pytest.mark.parametrize(("memory", "stage", "hpz"), [("40GB", 1, 1), ("20GB", 3, 8)])
def test_the_other_commands_and_the_main_job_take_the_json_and_agree(capsys, tmp_path, memory, stage, hpz):
    from rso_ds.recipes.training.fill_json import fill, read_json

    got = plan(capsys, *EXAMPLE, "--gpu-memory", memory, "--out", str(tmp_path))
    chosen, path = got["chosen"], str(tmp_path / "rso.json")
    assert (chosen["stage"], chosen["hpz"]) == (stage, hpz)
    config = json.loads((tmp_path / "rso.json").read_text())
    assert config == got["deepspeed"]

    assert needed(capsys, path, chosen) == chosen["needed_bytes"] <= got["memory_bytes"]
    # What is simpler or faster and was rejected for memory does not fit by that command either.
    rejected = [c for c in got["candidates"] if not c["fits"]]
    better = [c for c in rejected if c["seconds"] < chosen["seconds"]]
    assert better
    for candidate in better[:4]:
        zero = {**config["zero_optimization"], "stage": candidate["stage"], "zero_hpz_partition_size": candidate["hpz"]}
        other = {
            **config,
            "zero_optimization": zero,
            "gradient_accumulation_steps": candidate["accumulation"],
            "train_micro_batch_size_per_gpu": candidate["micro_batch"],
        }
        (tmp_path / "other.json").write_text(json.dumps(other))
        assert needed(capsys, str(tmp_path / "other.json"), candidate) == candidate["needed_bytes"]
        assert candidate["needed_bytes"] > got["memory_bytes"]

    recompute = ["--gradient-checkpointing"] if chosen["gradient_checkpointing"] else []
    main(["comm", "--deepspeed", path, "--gpus", "16", "--nodes", "2", "--link", "25Gbit", "--json", *recompute])
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert rows["RSO"]["seconds"] == pytest.approx(chosen["communication_seconds"])

    main(["check", "--deepspeed", path, "--model", "llama-7b"])
    assert "communicated    1,654,919,168" in capsys.readouterr().out

    command = shlex.split(got["commands"][0])
    args = parse_arguments(command[command.index("launch/slurm/torchrun.sbatch") + 1 :])
    assert (args.model, args.vocab_size, args.gradient_checkpointing) == (
        "llama-7b",
        32000,
        chosen["gradient_checkpointing"],
    )
    filled = fill(read_json(args), args, world_size=16, steps=100, on_gpu=False)
    assert filled["gradient_accumulation_steps"] == chosen["accumulation"]
    assert filled["bf16"]["enabled"] is True


def needed(capsys, path, candidate):
    flags = ["--gradient-checkpointing"] if candidate["gradient_checkpointing"] else []
    batch = ["--micro-batch", str(candidate["micro_batch"])]
    main(["memory", "--deepspeed", path, "--model", "llama-7b", "--gpus", "16", *batch, *flags, "--json"])
    return json.loads(capsys.readouterr().out)["accounts"][0]["needed_bytes"]


@EXHAUSTIVE
def test_a_slower_link_never_makes_a_faster_plan_and_changes_it(capsys):
    links = ("1Gbit", "25Gbit", "3.2Tbit")
    found = [plan(capsys, *EXAMPLE, "--gpu-memory", "24GB", "--link", link) for link in links]
    fastest = [min(c["seconds"] for c in got["candidates"] if c["fits"]) for got in found]
    assert fastest == sorted(fastest, reverse=True)
    slow, fast = found[0]["chosen"], found[-1]["chosen"]
    assert (slow["gradient_checkpointing"], slow["accumulation"]) == (True, 1)  # fewer micro batches send less
    assert (fast["gradient_checkpointing"], fast["accumulation"]) == (False, 8)
    assert found[0]["reasons"]["time"][1].startswith("the links between nodes bound the step")
    assert found[-1]["reasons"]["time"][1].startswith("computing bounds the step")


@EXHAUSTIVE
def test_a_smaller_rank_is_taken_only_where_nothing_else_fits(capsys):
    got = plan(capsys, "--model", "llama-7b", "--gpus", "8", "--gpu-memory", "8GB", "--gpu-tflops", "50")
    assert got["chosen"]["rank_ratio"] == 0.125
    assert got["reasons"]["rank"][0].startswith("rank_ratio 0.25 (rank 1024 of 4096): rejected, would need 9.0 GB of 8")
    assert got["reasons"]["rank"][1].endswith("(rank 512 of 4096): the largest that fits. What the smaller rank does"
                                              " to the loss is your risk")  # fmt: skip
    assert [c["rank_ratio"] for c in got["candidates"]].count(0.25) == 1


# -- an exhaustive loop ------------------------------------------------------------------------------

GPUS, NODES, SHARE, SEQ = 8, 2, 8, 256


@pytest.fixture(scope="module")
def everything():
    """Needs and what is sent for every configuration of a llama-60m, each counted by itself."""
    rso = RSOConfig(rank_ratio=0.25, interval=50, sampler="coordinate", master_weights="cpu")
    build = model_builder(llama_config("llama-60m", 4096, SEQ))
    with FakeTensorMode():
        model = build(torch.bfloat16, None)
        dense = sum(p.numel() for p in model.parameters())
        convert(model, rso)
        exchange = Exchange.of(model, rso)
    found = []
    for stage, hpz, checkpointing, micro in product(range(4), (1, GPUS // NODES), (False, True), (1, 2, 4, 8)):
        if hpz > 1 and stage < 3:
            continue
        zero = {"stage": stage, "reduce_bucket_size": 50_000_000, "zero_hpz_partition_size": hpz}
        config = {
            "bf16": {"enabled": True},
            "gradient_accumulation_steps": SHARE // micro,
            "zero_optimization": zero,
        }
        deployment = Deployment.from_json(config, GPUS, checkpointing=checkpointing)
        account = Accountant(build, rso, Engine.from_json(config, GPUS), checkpointing).account("rso", micro, SEQ)
        found.append(((stage, hpz, checkpointing, micro), account.needed, transfers(exchange, deployment), deployment))
    return dense, found


@EXHAUSTIVE
@pytest.mark.parametrize("fitting_share", [0.0, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("link", ["100Mbit", "1Tbit"])
@pytest.mark.parametrize("tflops", ["0.5", "100"])
def test_the_plan_is_that_of_an_exhaustive_loop(capsys, everything, fitting_share, link, tflops):
    dense, found = everything
    needs = sorted({need for _, need, *_ in found})
    index = int(fitting_share * len(needs))
    limit = (needs[index] + needs[index + 1]) / 2
    rate = {"100Mbit": 12.5e6, "1Tbit": 1.25e11}[link]
    network = Network(NODES, rate, 200e9)
    fitting = {}
    for key, need, sent, deployment in found:
        flops = (8 if key[2] else 6) * dense * SHARE * GPUS * SEQ
        if need <= limit:
            fitting[key] = flops / (GPUS * float(tflops) * 1e12) + network.seconds(sent, deployment)
    fastest = min(fitting.values())
    expected = min((k for k, s in fitting.items() if s <= 1.02 * fastest), key=lambda k: (*k[:3], -k[3]))
    cluster = ["--gpus", str(GPUS), "--gpus-per-node", str(GPUS // NODES), "--gpu-memory", f"{limit / 1e6:.6f}MB"]
    model = ["--model", "llama-60m", "--vocab-size", "4096", "--seq-len", str(SEQ), "--rank-ratio", "0.25"]
    rates = ["--link", link, "--gpu-tflops", tflops, "--global-batch", str(SHARE * GPUS)]
    got = plan(capsys, *model, *cluster, *rates)["chosen"]
    assert (got["stage"], got["hpz"], got["gradient_checkpointing"], got["micro_batch"]) == expected
    assert got["seconds"] == pytest.approx(fitting[expected])


def test_near_ties_go_to_the_simpler_and_never_to_what_does_not_fit():
    def candidate(needed, seconds, *complexity):
        return SimpleNamespace(needed=needed, seconds=seconds, complexity=complexity)

    fastest, near, far = candidate(9, 1.0, 3), candidate(10, 1.019, 2), candidate(5, 1.021, 1)
    assert choose([fastest, near, far, candidate(11, 0.5, 0)], 10) is near
    assert choose([fastest, far], 10) is fastest
    assert choose([near], 9) is None


# -- bases and files ---------------------------------------------------------------------------------


def test_the_default_base_is_the_file_for_a_7b():
    config = json.loads((ROOT / "ds_configs/rso_7b_zero3.json").read_text())
    params = {k: v for k, v in config["optimizer"]["params"].items() if k != "rank"}
    assert DEFAULT_BASE["optimizer"] == {"type": "RSO", "params": params}
    zero = {k: v for k, v in config["zero_optimization"].items() if k not in ("stage", "overlap_comm")}
    assert DEFAULT_BASE["zero_optimization"] == zero


@EXHAUSTIVE
def test_a_base_keeps_its_rso_block_and_what_it_offloads(capsys):
    flags = (*SMALL, "--gpus", "16", "--gpu-memory", "2GB")
    got = plan(capsys, *flags, "--base", str(ROOT / "ds_configs/rso_offload.json"))
    base = json.loads((ROOT / "ds_configs/rso_offload.json").read_text())
    assert got["deepspeed"]["optimizer"] == base["optimizer"]
    assert got["reasons"]["rank"] == ["rank_ratio 0.25 (rank 32 of 128): fixed by --base"]
    assert {(c["stage"], c["hpz"]) for c in got["candidates"]} == {(3, 1)}
    assert got["chosen"]["host_bytes"] > 0
    got = plan(capsys, *flags, "--base", str(ROOT / "ds_configs/rso_zero2.json"), "--precision", "fp32")
    assert got["deepspeed"]["bf16"] == {"enabled": False}
    assert got["deepspeed"]["optimizer"]["params"]["lr"] == "auto"


@EXHAUSTIVE
def test_files_are_written_once_and_the_job_submits_them(capsys, tmp_path):
    out = tmp_path / "a plan"
    flags = (*SMALL, "--gpus", "2", "--gpu-memory", "2GB", "--global-batch", "8", "--out", str(out))
    plan(capsys, *flags)
    plan(capsys, *flags)
    assert "exists and differs" in refusal(*flags, "--global-batch", "4")
    assert json.loads((out / "rso.json").read_text())["train_batch_size"] == 8
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = ["bash", str(out / "job.sh"), "--data", "my text"]
    done = subprocess.run(job, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=True)
    given = done.stdout.splitlines()
    assert given[:3] == ["--nodes=1", "--gpus-per-node=2", "launch/slurm/torchrun.sbatch"]
    assert given[given.index("--deepspeed") + 1] == str(out / "rso.json")
    assert given[-2:] == ["--data", "my text"]


@EXHAUSTIVE
def test_no_deepspeed_is_needed():
    code = "import sys; sys.modules['deepspeed'] = None; from rso_ds.cli import main; main(sys.argv[1:])"
    flags = ["plan", *SMALL, "--gpus", "2", "--gpu-memory", "2GB", "--global-batch", "2"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# -- refusals ----------------------------------------------------------------------------------------


@EXHAUSTIVE
def test_nothing_fits():
    message = refusal("--gpus", "2", "--gpu-memory", "10GB")
    assert message.startswith("RSOConfigError: nothing fits in --gpu-memory 10.0 GB: the least is 15.8 GB")
    for remedy in ("offload of optimizer and parameters", "--gpus 4 would need", "--seq-len 1024 would need"):
        assert remedy in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "40"], "--gpu-memory '40' is not an amount of memory: write it as 40GB or 79GiB."),
        (["--gpu-memory", "40Gb"], "--gpu-memory '40Gb' is not"),
        (["--gpu-memory", "0GB"], "--gpu-memory '0GB' is not"),
        (["--gpu-memory", "-4GB"], "--gpu-memory"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--gpus-per-node", "3"], "--gpus-per-node 3 must divide --gpus 4"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0 must divide --gpus 4"),
        (["--link", "fast"], "--link: 'fast' is not a rate"),
        (["--intra-link", "0GB/s"], "--intra-link: '0GB/s' is not a rate"),
        (["--latency", "-1"], "--latency must be a number of microseconds of at least 0, got -1.0"),
        (["--latency", "nan"], "--latency must be"),
        (["--global-batch", "3"], "--global-batch 3 is fewer than a sequence for each of 4 GPUs"),
        (["--global-batch", "10"], "--global-batch 10 does not divide among 4 GPUs: use 8 or 12."),
        (["--rank-ratio", "0"], "--rank-ratio must lie in (0, 1], got 0.0"),
        (["--rank-ratio", "nan"], "--rank-ratio must lie in (0, 1]"),
        (["--rank-ratio", "0.5", "--base", "ds_configs/rso.json"], "--rank-ratio contradicts the rank of --base"),
        (["--gpu-tflops", "0"], "--gpu-tflops must be a number above 0, got 0.0"),
        (["--gpu-tflops", "inf"], "--gpu-tflops must be a number above 0"),
        (["--base", "missing.json"], "--base missing.json cannot be read"),
        (["--base", "ds_configs/adamw.json"], 'its optimizer is "AdamW"'),
        (["--model", "llama-9"], "Did you mean 'llama-9m'?"),
        (["--vocab-size", "0"], "--vocab-size must be at least 1, got 0"),
        (["--seq-len", "1"], "--seq-len must be at least 2, got 1"),
        pytest.param(["--out", "/dev/null/x"], "--out /dev/null/x cannot be written", marks=EXHAUSTIVE),
    ],
)
def test_bad_input_is_refused(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    joined = [f"{flags[0]}={flags[1]}", *flags[2:]]
    assert message in refusal(*SMALL, "--gpus", "4", "--gpu-memory", "2GB", *joined)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fp16": {"enabled": True}}, "--base: fp16 is not planned"),
        ({"bf16": True}, "'bf16' must be a block {...}, got True"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "RSO does not support"),
        ({"optimizer": {"type": "RSO", "params": {"communicate": "boundary"}}}, "is not for DeepSpeed"),
        ({"optimizer": {"type": "RSO", "params": {"rnak": 4}}}, "Did you mean 'rank'?"),
        ({"optimizer": {"type": "RSO", "params": {"rank": 4096}}}, "'rank': 4096 exceeds the smaller side"),
    ],
)
def test_bad_bases_are_refused(tmp_path, change, message):
    (tmp_path / "base.json").write_text(json.dumps({"optimizer": {"type": "RSO", "params": {}}, **change}))
    assert message in refusal(*SMALL, "--gpus", "4", "--gpu-memory", "2GB", "--base", str(tmp_path / "base.json"))
