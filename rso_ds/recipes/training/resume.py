"""What a resumed run goes on from, and whether it is the same run: the same text in the same order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rso_ds.checkpoint.folder import MANIFEST, automatic_tag, has_checkpoints
from rso_ds.checkpoint.transaction import peek_client
from rso_ds.comm.decisions import decided
from rso_ds.errors import RSOCheckpointError
from rso_ds.recipes.training.arguments import TrainArguments

FORMAT = 2  # of what "run" says in a checkpoint; 1 knew data by path and time
_OF_NO_INTEREST = ("resume", "resume_schedule", "resume_new_batch")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint of ``train.py``. ``wanted``: what ``--resume`` said; ``client``: what the run saved of itself."""

    wanted: str
    folder: Path
    tag: str
    client: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.client["step"])

    @property
    def position(self) -> dict[str, Any]:
        """Where the data go on (``Batches.position``)."""
        return dict(self.client["position"])

    @property
    def run(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.client["run"]
        return found

    def refuse(self, why: str) -> RSOCheckpointError:
        return RSOCheckpointError(f"--resume {self.wanted}: {why}")


def find_resume_point(args: TrainArguments, output: Path, first: bool) -> ResumePoint | None:
    """The checkpoint that ``--resume`` names, None if there is nothing to go on from. All ranks call this together.

    Raises ``RSOCheckpointError`` on every rank for one that is absent, damaged or not of ``train.py``.
    """
    wanted = args.resume
    if wanted is None:
        return None
    folder, tag = output / "checkpoints" if wanted == "auto" else Path(wanted), None
    if wanted == "auto":
        found, tag, remark = decided(lambda: (has_checkpoints(folder), *automatic_tag(folder)))
        if first and remark:
            print(f"--resume auto: {remark}", flush=True)
        if not found:
            return None
    if decided(lambda: (folder / MANIFEST).is_file()):
        folder, tag = folder.parent, folder.name
    path, client = decided(lambda: peek_client(folder, tag))
    point = ResumePoint(wanted, folder, path.name, client)
    if "run" not in client:
        raise point.refuse("it was not saved by train.py.")
    if point.run.get("format") != FORMAT:
        raise point.refuse(
            "it was saved by an earlier version of rso_ds, which knew data by path and time of change: whether they are"
            " the same cannot be told. Begin a new run from its weights: rso-ds export makes a --model of it."
        )
    return point


def check_same_run(point: ResumePoint, now: Mapping[str, Any], new_batch: bool) -> None:
    """Raise ``RSOCheckpointError``, saying what differs, unless the data of the run ``now`` go on where those of
    ``point`` stopped. ``new_batch``: whether another batch is meant."""
    if point.run["streamed"] != now["streamed"]:
        flag = "yes" if point.run["streamed"] else "no"
        raise point.refuse(f"that run's data were {'' if flag == 'yes' else 'not '}streamed: give --stream {flag}.")
    for key in ("seed", "seq_len", "tokenizer"):
        if point.run[key] != now[key]:
            raise point.refuse(
                f"that run had {key} = {point.run[key]!r}, this one {now[key]!r}: the data would not continue where it"
                " stopped. Use the same settings, or start anew without --resume."
            )
    for part in ("training text", "held-out text"):
        if point.run[part] != now[part]:
            raise point.refuse(
                f"the {part} differs: that run had {_in_words(point.run[part])}, this one has {_in_words(now[part])}."
                " Restore the data and the flags that choose them (--data, --val-data, --val-fraction, --text-key,"
                " --encoding), or start anew without --resume."
            )
    then, this = point.run["sequences_per_step"], now["sequences_per_step"]
    if then != this and not new_batch:
        raise point.refuse(
            f"that run had a batch of {then} sequences, this one of {this}. --resume-new-batch allows it: the data go"
            " on where they stopped, steps are counted on, and the learning rate is not scaled."
        )


def changed_settings(point: ResumePoint, args: TrainArguments, ds_json: Mapping[str, Any]) -> list[str]:
    """What differs from the settings of the run of ``point``, as far as its folder says: "name: before -> now" for each
    flag and each key of the JSON."""
    run = point.folder.parent
    try:
        flags = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        keys = json.loads((run / "deepspeed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    now = {k: v for k, v in vars(args).items() if k not in _OF_NO_INTEREST}
    changes = _changes(flags, now, "") if isinstance(flags, dict) else []
    return changes + (_changes(keys, ds_json, "") if isinstance(keys, dict) else [])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], at: str) -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        name = f"{at}{key}"
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{name}.")
        elif old != new and key not in _OF_NO_INTEREST:
            found.append(f"{name}: {old!r} -> {new!r}")
    return found


def _in_words(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return "none"
    return ", ".join(f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in text.items())
