"""``rso-ds doctor``: every check, in an order that nothing hangs in, and one report."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from rso_ds.comm.launch import Launch, export_launch_environment
from rso_ds.comm.outcome import gathered
from rso_ds.doctor import report
from rso_ds.doctor.disks import check_folders, check_output, check_shared_memory
from rso_ds.doctor.extensions import check_extensions, extensions_folder
from rso_ds.doctor.gpus import check_gpus
from rso_ds.doctor.launcher import check_launcher
from rso_ds.doctor.limits import checked, in_short, limited
from rso_ds.doctor.network import check_network
from rso_ds.doctor.ops import build_ops, check_ops
from rso_ds.doctor.rendezvous import NotMet, diagnosis, rendezvous
from rso_ds.doctor.report import FAILED, NOT_CHECKED, Finding
from rso_ds.doctor.resources import check_memory, check_open_files, check_threads
from rso_ds.doctor.software import check_software
from rso_ds.doctor.speed import findings_of, measure
from rso_ds.doctor.together import Facts, check_agreement, check_clocks, check_placement, facts, members
from rso_ds.errors import RSOConfigError, RSOError
from rso_ds.planning.memory.command import read_rso_json
from rso_ds.units import parse_rate, parse_size

_LOCAL_SECONDS = 20.0  # for one check of this process alone
_ALONE = Launch("none", 0, 0, 1, 1, "127.0.0.1", 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--deepspeed", help="the job's DeepSpeed JSON: its ops, its precision, equal on all ranks")
    parser.add_argument("--output", help="folder that results are to go to: writable, with room")
    parser.add_argument("--checkpoint-size", help="size of one checkpoint, as 80GB [unknown: 10 GB free are enough]")
    parser.add_argument("--build-ops", action="store_true", help="build the ops the JSON needs, once on each node")
    parser.add_argument("--build-timeout", type=float, default=900, help="seconds that a build may take [900]")
    parser.add_argument("--link", help="rate promised between nodes, as 25Gbit: less than half of it warns")
    parser.add_argument("--all-reduce-mb", type=float, default=64, help="fp32 megabytes to reduce; 0: none [64]")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for the other ranks [60]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the report (on rank 0; on every rank if they do not meet); 0 unless something failed, then 1 everywhere.

    With several ranks it ends the process: threads that wait for what never comes would keep it. Raises
    ``RSOConfigError`` for arguments that cannot be read.
    """
    checkpoint = parse_size(args.checkpoint_size, "--checkpoint-size", least=0) if args.checkpoint_size else None
    link = parse_rate(args.link, "--link") if args.link else None
    if args.timeout <= 0 or args.build_timeout <= 0 or args.all_reduce_mb < 0:
        raise RSOConfigError("--timeout and --build-timeout must be above 0, --all-reduce-mb not below.")
    launch, mine = _local(args, checkpoint)
    if launch.world_size == 1:
        rows = report.merged([mine], [""])
        return _finish(args, "rso-ds doctor: one process", rows, None)
    status = 1
    try:
        waiting = args.timeout + (args.build_timeout if args.build_ops else 0)
        rendezvous(launch, waiting)
        status = limited(lambda: _together(args, launch, mine, link), 3 * waiting)
        with contextlib.suppress(RuntimeError):
            dist.barrier()  # the others may still read from this rank
    except NotMet as error:
        _apart(args, launch, [*mine, error.finding])
    except Exception as error:
        text = f"rank {launch.rank} met the others, then lost one: {in_short(error)}; {diagnosis(launch)}"
        remedy = "read the first error in the other ranks' logs; slow links: --timeout, --all-reduce-mb"
        _apart(args, launch, [*mine, Finding("meeting", FAILED, text, remedy)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _local(args: argparse.Namespace, checkpoint: int | None) -> tuple[Launch, list[Finding]]:
    """Checks that need no other rank; stale locks before anything that could wait for one."""
    seconds = min(_LOCAL_SECONDS, args.timeout)
    found: list[Finding] = []

    def add(name: str, check: Callable[[], Sequence[Finding]], limit: float = seconds) -> None:
        found.extend(checked(name, check, limit))

    folder = extensions_folder()
    add("build locks", partial(check_extensions, folder))
    launch, config = _ALONE, None
    try:
        launch = export_launch_environment()
        add("launcher", partial(check_launcher, launch))
    except RSOError as error:
        found.append(Finding("launcher", FAILED, str(error), "see docs/doctor.md"))
    if args.deepspeed:
        try:
            config = read_rso_json(args.deepspeed)
        except RSOConfigError as error:
            found.append(Finding("DeepSpeed JSON", FAILED, str(error), "give all nodes this file"))
    on_gpu = _has_gpu(found)
    here = launch.local_world_size or 1
    add("software", check_software)
    add("GPUs", partial(check_gpus, launch, config), 120)
    if args.build_ops and launch.local_rank == 0:
        if any(finding.status == FAILED for finding in found):
            found.append(Finding("build", NOT_CHECKED, "nothing was built: mend what failed first"))
        else:
            add("build", partial(build_ops, config, on_gpu, folder, args.build_timeout), args.build_timeout + 60)
    add("ops", partial(check_ops, config, on_gpu, folder))
    add("network", partial(check_network, launch, on_gpu))
    add("output", partial(check_output, args.output, checkpoint))
    add("folders", check_folders)
    add("shared memory", partial(check_shared_memory, here))
    add("memory", partial(check_memory, here))
    add("open files", partial(check_open_files, launch.world_size))
    add("threads", partial(check_threads, here))
    return launch, found


def _has_gpu(found: list[Finding]) -> bool:
    try:
        return limited(torch.cuda.is_available, 120)
    except TimeoutError as error:
        found.append(Finding("GPUs", FAILED, f"{error} from the driver", "nvidia-smi; take this node out"))
        return False


def _together(args: argparse.Namespace, launch: Launch, mine: list[Finding], link: float | None) -> int:
    everyone: list[Facts] = gathered(facts(launch, _readable(args.deepspeed)))
    findings = gathered(mine)
    clocks, offsets = check_clocks(everyone)
    joint = [*check_placement(everyone), *check_agreement(everyone), *clocks]
    on_gpu = all(fact.gpu is not None for fact in everyone)
    speeds = []
    # NCCL hangs on GPUs that ranks share.
    if args.all_reduce_mb and not any(finding.name == "own GPU" for finding in joint):
        device = torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        speeds = measure(everyone, device, args.all_reduce_mb, args.timeout)
        joint += findings_of(speeds, link)
    rows = report.merged(findings, [fact.host for fact in everyone], joint)
    nodes = len(members(everyone))
    title = (
        f"rso-ds doctor: {len(everyone)} ranks on {nodes} node{'s' if nodes > 1 else ''}, started by"
        f" {launch.launcher}, {'nccl' if on_gpu else 'gloo'}"
    )
    measured = {"all_reduce": [asdict(speed) for speed in speeds], "clock_offsets_s": offsets}
    if launch.rank == 0:
        return _finish(args, title, rows, measured)
    return int(report.failed(rows))


def _apart(args: argparse.Namespace, launch: Launch, findings: list[Finding]) -> None:
    """The report of one rank, who does not know about the others."""
    host = os.uname().nodename
    title = f"rso-ds doctor: rank {launch.rank} of {launch.world_size}, on {host}, started by {launch.launcher}"
    time.sleep(0.05 * min(launch.rank, 20))  # reports of a node's ranks go to one terminal
    _finish(args, title, report.merged([findings], [host]), None)


def _finish(args: argparse.Namespace, title: str, rows: Sequence[report.Row], measured: dict[str, Any] | None) -> int:
    text = report.as_json(title, rows, measured) if args.json else report.table(title, rows)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return int(report.failed(rows))


def _readable(path: str | None) -> dict[str, Any] | None:
    try:
        return read_rso_json(path) if path else None
    except RSOConfigError:
        return None
