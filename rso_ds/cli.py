"""Console script ``rso-ds``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from rso_ds.checkpoint import command as export
from rso_ds.config import RSOConfig
from rso_ds.deepspeed_json import refuse_unsupported, rso_config
from rso_ds.doctor import command as doctor
from rso_ds.errors import RSOError
from rso_ds.planning.communication import command as comm
from rso_ds.planning.memory import command as memory
from rso_ds.planning.plan import command as plan
from rso_ds.recipes.evaluation import command as evaluate
from rso_ds.recipes.report import command as report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rso-ds", description="Randomized Subspace Optimization for DeepSpeed.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="validate the RSO block of a DeepSpeed JSON and show what it does to a model, without weights"
    )
    check.add_argument("--deepspeed", required=True, help="DeepSpeed JSON")
    check.add_argument("--model", default="llama-7b", help="named shape or folder with a config.json [llama-7b]")
    check.add_argument("--vocab-size", type=int, default=32000, help="vocabulary of a named shape [32000]")
    memory.trust_flag(check)
    memory.add_arguments(
        commands.add_parser("memory", help="what one rank needs in memory, counted without allocating the model")
    )
    comm.add_arguments(
        commands.add_parser("comm", help="what ranks exchange in a step, and how long that takes on a given network")
    )
    plan.add_arguments(
        commands.add_parser("plan", help="ZeRO stage, rank and batch for a cluster, with the reasons and the job")
    )
    export.add_arguments(
        commands.add_parser("export", help="a checkpoint as a Hugging Face model, or as a LoRA adapter; no GPU needed")
    )
    evaluate.add_arguments(
        commands.add_parser("evaluate", help="held-out loss of a run's checkpoints, beside the run or after it")
    )
    report.add_arguments(
        commands.add_parser("report", help="runs beside each other on one page: losses, memory, bytes")
    )
    doctor.add_arguments(
        commands.add_parser(
            "doctor", help="what a job will meet here, and how to mend it; run it as the job's first step"
        )
    )
    args = parser.parse_args(argv)
    actions = {
        "export": export.run, "memory": memory.run, "comm": comm.run, "plan": plan.run, "check": _check,
        "report": report.run, "evaluate": evaluate.run,
    }  # fmt: skip
    try:
        if args.command == "doctor":
            sys.exit(doctor.run(args))
        print(actions[args.command](args))
    except RSOError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _check(args: argparse.Namespace) -> str:
    """The start-up table of a model under a JSON; "auto" values count as defaults."""
    from rso_ds.layers import convert, much_outside, summary_table
    from rso_ds.models import model_config, random_model

    config = memory.read_rso_json(args.deepspeed)
    rso: RSOConfig = rso_config(config)
    refuse_unsupported(config)
    hf_config = model_config(args.model, args.vocab_size, 2048, args.trust_remote_code)
    with torch.device("meta"):
        model = random_model(hf_config, trust_remote_code=args.trust_remote_code)
    convert(model, rso)
    return "\n".join(filter(None, [summary_table(model, rso), much_outside(model)]))


if __name__ == "__main__":
    main()
