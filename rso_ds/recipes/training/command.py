"""``launch/train.py`` as a process: what it exits with, and with which words."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rso_ds.comm.failures import NO_ROOM, lost_rank
from rso_ds.comm.rank_context import restart_advice, start
from rso_ds.comm.shutdown import leave_process_groups
from rso_ds.errors import RSOError
from rso_ds.recipes.data.stream import lost_reader
from rso_ds.recipes.training.arguments import parse_arguments
from rso_ds.recipes.training.data import corpus_of
from rso_ds.recipes.training.fill_json import read_json
from rso_ds.recipes.training.loop import Job
from rso_ds.recipes.training.signals import EXIT_REQUEUE, Interruption, ignore_signals


def run_process() -> NoReturn:
    """``main``, and then the end of the process without the interpreter's last rites.

    Threads of torch's process groups that are still there when Python shuts down abort it now and then ("terminate
    called without an active exception"): the status would then be that of SIGABRT and not the one meant.
    """
    status = 0
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; an error of ours ends the process with its message alone and status 1.

    SIGTERM or SIGUSR1 ends it with status ``EXIT_REQUEUE`` once the current step is taken and saved.
    """
    with Interruption() as interruption:
        try:
            args = parse_arguments(argv)
            ds_json = read_json(args)
            corpus = corpus_of(args)
            advice = restart_advice(args.resume)
            if advice and os.environ.get("RANK") == "0":
                print(advice, flush=True)
            complete = Job(args, ds_json, corpus, start(args.timeout)).run(interruption)
        except RSOError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            sys.exit(f"{type(error).__name__}: {error}. Make room, then continue with --resume auto.")
        except RuntimeError as error:
            message = lost_rank(error) or lost_reader(error)
            if message is None:
                raise
            sys.exit(message)
    if not complete:
        ignore_signals()
    leave_process_groups()
    if not complete:
        sys.exit(EXIT_REQUEUE)
