"""``launch/train.py`` as a process: what it exits with, and with which words."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch.distributed as dist

from rso_ds.comm.failures import NO_ROOM, lost_rank
from rso_ds.errors import RSOError
from rso_ds.training.arguments import parse_arguments
from rso_ds.training.corpus import Corpus
from rso_ds.training.deepspeed_json import read_json
from rso_ds.training.distributed import start
from rso_ds.training.loop import Job
from rso_ds.training.signals import EXIT_REQUEUE, Interruption, ignore_signals


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; an error of ours ends the process with its message alone and status 1.

    SIGTERM or SIGUSR1 ends it with status ``EXIT_REQUEUE`` once the current step is taken and saved.
    """
    with Interruption() as interruption:
        try:
            args = parse_arguments(argv)
            ds_json = read_json(args)
            corpus = Corpus(args.data, args.val_fraction, args.val_data, args.text_key)
            complete = Job(args, ds_json, corpus, start(args.timeout, args.resume)).run(interruption)
        except RSOError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            sys.exit(f"{type(error).__name__}: {error}. Make room, then continue with --resume auto.")
        except RuntimeError as error:
            message = lost_rank(error)
            if message is None:
                raise
            sys.exit(message)
    if not complete:
        ignore_signals()
    if dist.is_initialized():
        dist.destroy_process_group()
    if not complete:
        sys.exit(EXIT_REQUEUE)
