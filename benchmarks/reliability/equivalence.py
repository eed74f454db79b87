"""Does RSO on this device give the numbers of the float64 reference? One process, and DeepSpeed's ZeRO on one rank.

    python benchmarks/reliability/equivalence.py --json equivalence.json
    python benchmarks/reliability/equivalence.py --device cpu --engines zero2 --cases zero2 zero2-folded

The cases are those of the test suite, which runs them on CPUs: the options of
tests/engines/test_one_process_equals_reference.py in float64, and some of tests/cases/deepspeed_cases.py in fp32, on a
GPU under nccl. The reference (tests/reference/rso.py) is computed on the CPU, with the P that this device draws. (A QR
rounds differently on each device; that difference is printed on a line of its own.) Prints Markdown. The exit status is
1 if a case fails or differs from the reference by more than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import reference.rso
from reference.rso import Settings, train
from support import tiny_llama
from support.environment import prepare

import rso_ds
from rso_ds.subspace import sample_projection

# Losses and weights are of size 0.1 to 4; float64 keeps 16 digits, and the tests ask for 11 of them on a CPU.
FLOAT64_TOLERANCE = 1e-9
ZERO_CASES = (
    "zero1", "zero2", "zero2-gas2", "zero2-clip", "zero2-project", "zero2-reset", "zero2-decay-proximal",
    "zero2-dense_lr-gaussian", "zero2-adam-coordinate", "zero2-sgd", "zero2-embeddings", "zero2-tied", "zero2-folded",
    "zero2-folded-coordinate", "zero2-choice", "zero2-checkpointing-non_reentrant", "zero3", "zero3-project",
    "zero3-adam-coordinate", "zero3-embeddings", "zero3-folded", "zero3-choice", "zero3-checkpointing-non_reentrant",
)  # fmt: skip


def largest_difference(losses: list[float], weights: dict[str, torch.Tensor], expected: Any) -> dict[str, float]:
    gaps = [(weights[n].cpu().double() - w).abs().max().item() for n, w in expected.weights.items()]
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, expected.losses, strict=True)),
        "weight": max(gaps),
    }


def one_process(case: str, device: torch.device) -> dict[str, Any]:
    """``rso_ds.RSO`` on a float64 model of this device."""
    from engines import test_one_process_equals_reference as tests

    options = {"lr": 1e-2, "eps": 1e-6, "interval": tests.INTERVAL, **tests.CASES[case]}
    settings = Settings(groups=tests.GROUPS, rank=tests.RANK, **options)
    batches = [[tests.data(step)] for step in range(tests.STEPS)]
    expected = train(tests.build(), settings, tests.loss_of, batches)
    model = tests.build().to(device)
    config = rso_ds.RSOConfig(rank=tests.RANK, targets=["q_proj", "k_proj", "out"], **options)
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    losses = []
    for step in range(tests.STEPS):
        optimizer.zero_grad()
        loss = tests.loss_of(model, [x.to(device) for x in tests.data(step)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = rso_ds.to_dense(model).state_dict()
    return {**largest_difference(losses, weights, expected), "tolerance": FLOAT64_TOLERANCE}


def under_zero(case: str, device: torch.device) -> dict[str, Any]:
    """DeepSpeed on this one rank, in fp32."""
    from cases.deepspeed_cases import MICRO, STEPS, fp32_cases
    from engines import test_deepspeed_equals_reference as tests
    from support.observed_norms import as_run

    from rso_ds.checkpoint import dense_state_dict

    tests.WORLD = 1  # its reference takes the batches of as many ranks
    spec = fp32_cases()[case]
    model = tiny_llama.build(spec["intermediate"], **spec["model"])
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": spec["checkpointing"] == "reentrant"})
    config = {**spec["json"], "optimizer": {"type": "RSO", "params": spec["rso"]}}
    engine, *_ = rso_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.train()
    losses, rates = [], []
    for step in range(STEPS):
        ids = tiny_llama.tokens(step, MICRO * spec["gas"], spec["model"].get("vocab", tiny_llama.VOCAB)).to(device)
        rates.append(engine.rso.layout.solver.param_groups[0]["lr"])
        total = 0.0
        for micro in ids.split(MICRO):
            loss = tiny_llama.loss_of(engine, micro)
            engine.backward(loss)
            engine.step()
            total += loss.item() / spec["gas"]
        losses.append(total)
    weights = dense_state_dict(engine.module)
    expected = tests.reference(as_run(spec, {"form": engine.rso.config.form}), rates)
    engine.destroy()
    return {**largest_difference(losses, weights, expected), "tolerance": spec["tolerance"]}


def projection_difference(device: torch.device) -> float:
    """Between the P of a CPU and that of ``device``, at most, as a share of an entry's usual size."""
    shapes = [(256, 64), (1024, 256)]
    gaps = []
    for shape in shapes:
        here, there = (sample_projection("haar", 0, "layer", 0, *shape, d) for d in ("cpu", device))
        gaps.append(((here - there.cpu()).abs().max() * shape[1] ** 0.5).item())
    return max(gaps)


def draw_on(device: torch.device) -> None:
    """The reference takes its P from ``device`` from now on."""
    reference.rso.sample_projection = lambda *args: sample_projection(*args, device).cpu()


def attempt(run: Callable[[str, torch.device], dict[str, Any]], case: str, device: torch.device) -> dict[str, Any]:
    try:
        found = run(case, device)
    except Exception as error:  # the other cases are to be run all the same
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "equal": False}
    return {**found, "equal": max(found["loss"], found["weight"]) <= found["tolerance"]}


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['engine']} | {row['case']} | {row['error'].splitlines()[0]} | | no |"
    gaps = f"{row['loss']:.1e} | {row['weight']:.1e}"
    return f"| {row['engine']} | {row['case']} | {gaps} | {'yes' if row['equal'] else 'no'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--engines", nargs="+", choices=("one", "zero1", "zero2", "zero3"),
                        default=["one", "zero1", "zero2", "zero3"], help="one: no engine, one process")  # fmt: skip
    parser.add_argument("--cases", nargs="+", help="only these; all of the engines if left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --device cpu runs the same cases on the CPU")
    os.environ["DS_ACCELERATOR"] = args.device
    prepare()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    draw_on(device)

    from engines.test_one_process_equals_reference import CASES

    jobs = [(one_process, "one process, float64", case) for case in CASES if "one" in args.engines]
    zero = [case for case in ZERO_CASES if case.partition("-")[0] in args.engines]
    jobs += [(under_zero, case.partition("-")[0].replace("zero", "ZeRO-"), case) for case in zero]
    jobs = [job for job in jobs if not args.cases or job[2] in args.cases]
    if any(run is under_zero for run, *_ in jobs):
        join_alone(args.device)
    rows = []
    for run, engine, case in jobs:
        rows.append({"engine": engine, "case": case, **attempt(run, case, device)})
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    off = projection_difference(device)
    print(f"{name}, torch {torch.__version__}")
    print(f"a P of this device differs from a CPU's by {off:.1e} of an entry's size\n")
    print("| engine | case | largest difference of a loss | of a weight | equal |\n|---|---|---|---|---|")
    print("\n".join(line(row) for row in rows))
    different = [row["case"] for row in rows if not row["equal"]]
    print(f"\n{len(rows)} cases, not equal: {', '.join(different) or 'none'}", flush=True)
    if args.json:
        found = {"device": name, "torch": torch.__version__, "projection_difference": off, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    rso_ds.comm.leave_process_groups()
    if different or not rows:
        sys.exit(1)


def join_alone(device: str) -> None:
    """A process group of this process alone, by the backend that several ranks would have."""
    import deepspeed

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    # Console scripts of the running interpreter: ninja, which builds DeepSpeed's operators, is one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if device == "cuda":
        torch.cuda.set_device(0)
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")


if __name__ == "__main__":
    main()
