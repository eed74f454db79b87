"""Run an unmodified program so that RSO in its DeepSpeed JSON comes into effect.

    deepspeed --num_gpus 8 --module rso_ds.run their_script.py --deepspeed ds_configs/rso.json ...
    torchrun --nproc-per-node 8 -m rso_ds.run their_script.py ...
    torchrun --nproc-per-node 8 -m rso_ds.run -m package.module ...

The same as ``import rso_ds`` in the program's first line.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import rso_ds  # noqa: F401  (its import is what this program is for)
from rso_ds.comm.shutdown import leave_process_groups

_USAGE = "usage: deepspeed --module rso_ds.run [-m] PROGRAM [ARGUMENTS ...]"


def main(argv: Sequence[str]) -> None:
    """Run the program that ``argv`` names, as the interpreter itself would, and end the process; 2 if there is none."""
    argv = list(argv)
    launcher = []
    while argv and argv[0].startswith("--local_rank="):  # the deepspeed launcher puts it before everything else
        launcher.append(argv.pop(0))
    as_module = argv[:1] == ["-m"]
    if as_module:
        del argv[0]
    if not argv or argv[0].startswith("-"):
        _refuse(_USAGE)
    program, *rest = argv
    if not as_module and not Path(program).is_file():
        _refuse(f"rso_ds.run: the program {program} does not exist.\n{_USAGE}")
    sys.argv = [program, *launcher, *rest]
    try:
        if as_module:
            sys.path[0] = str(Path.cwd())
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(program).resolve().parent)
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    _end()


def _end() -> NoReturn:
    """End the process with status 0, as the interpreter does up to where it takes itself apart.

    Programs seldom leave their process group, and threads of gloo and of Arrow that want the GIL after that point abort
    the process (pytorch issue 190489): a finished job would end with SIGABRT.
    """
    leave_process_groups()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _refuse(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
