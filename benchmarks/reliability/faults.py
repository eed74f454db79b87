"""Kill ranks of a training run at random moments, resume it each time, and compare the end with an undisturbed run.

    python benchmarks/reliability/faults.py --kills 25 --stages 0 1 2 3 --seed 0 --json faults.json

For each ZeRO stage: one undisturbed run on two CPU ranks, then runs of the same settings that are disturbed until
there have been ``--kills`` kills in all. A kill comes at a random time after the start of the ranks or, every third,
while a checkpoint is being written. It is a SIGKILL of a random rank, a SIGKILL of both, or (one in six) a SIGTERM
of one, after which all ranks must save and exit with status 85. Every restart is ``--resume auto``.

Ranks are forked from a process that has torch and DeepSpeed imported and do what launch/train.py does from there on.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests", ROOT):
    sys.path.insert(0, str(folder))

from support.train_ranks import TrainRanks
from support.train_workspace import Workspace

from rso_ds.checkpoint.storage import StoredTensors
from rso_ds.recipes.training.signals import EXIT_REQUEUE

FLAGS = ["--seq-len", "32", "--global-batch", "4", "--micro-batch", "2", "--vocab-size", "400", "--log-interval", "1"]
FLAGS += ["--eval-interval", "1000000", "--eval-tokens", "128", "--sample-tokens", "0", "--timeout", "30"]


class Run:
    """One output folder: start ranks on it, and see how far it has come."""

    def __init__(self, space: Workspace, name: str, flags: list[str]) -> None:
        self.output, self.own = space.folder / name, flags
        self.logs = space.folder / "logs" / name
        self.flags = ["--data", str(space.data), "--cache", str(space.cache), "--output", str(self.output), *flags]

    def start(self) -> TrainRanks:
        return TrainRanks([*self.flags, "--resume", "auto"], self.logs)

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        file = self.output / "metrics.jsonl"
        lines = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def losses(self) -> list[float | None]:
        return [json.loads(line).get("loss") for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def saving(self) -> bool:
        return any((self.output / "checkpoints").glob(".*.saving"))

    def digest(self) -> str:
        """Of the final model's bytes and of every tensor of the last checkpoint."""
        digest = hashlib.sha256((self.output / "model" / "model.safetensors").read_bytes())
        checkpoints = self.output / "checkpoints"
        stored = StoredTensors(checkpoints / (checkpoints / "latest").read_text())
        for name in sorted(stored.metadata):
            digest.update(name.encode() + stored.load(name).numpy().tobytes())
        return digest.hexdigest()


class Campaign:
    """Disturbed runs of one stage until ``kills`` kills have been made."""

    def __init__(self, space: Workspace, stage: int, steps: int, interval: int, chance: random.Random) -> None:
        self.space, self.stage, self.steps, self.interval, self.chance = space, stage, steps, interval, chance
        self.flags = [*FLAGS, "--deepspeed", f"ds_configs/rso_zero{stage}.json", "--max-steps", str(steps)]
        self.flags += ["--save-interval", str(interval)]
        self.signals: Counter[str] = Counter()
        self.survivors: Counter[str] = Counter()
        self.lost: list[int] = []
        self.failures: list[str] = []
        self.resumes = self.during_save = self.before_first_checkpoint = self.runs = self.equal = 0

    def run(self, kills: int) -> dict[str, Any]:
        reference = Run(self.space, f"zero{self.stage}-undisturbed", self.flags)
        codes = reference.start().wait()
        assert codes == [0, 0], codes
        expected, losses = reference.digest(), reference.losses()
        began = time.monotonic()
        while sum(self.signals.values()) < kills:
            run = Run(self.space, f"zero{self.stage}-disturbed{self.runs}", self.flags)
            self._until_complete(run, kills)
            self.runs += 1
            same = run.digest() == expected and run.losses() == losses
            self.equal += same
            if same:
                shutil.rmtree(run.output)
        return {
            "stage": self.stage,
            "runs": self.runs,
            "kills": sum(self.signals.values()),
            "signals": dict(self.signals),
            "kills_that_left_a_half_written_checkpoint": self.during_save,
            "kills_before_the_first_checkpoint": self.before_first_checkpoint,
            "resumes": self.resumes,
            "lost_steps": self.lost,
            "lost_steps_max": max(self.lost),
            "lost_steps_mean": round(sum(self.lost) / len(self.lost), 2),
            "save_interval": self.interval,
            "other_rank_ended_with": dict(self.survivors),
            "runs_bitwise_equal_to_the_undisturbed": self.equal,
            "failures": self.failures,
            "seconds": round(time.monotonic() - began),
        }

    def _until_complete(self, run: Run, kills: int) -> None:
        reached: int | None = None
        while True:
            ranks = run.start()
            last = sum(self.signals.values()) >= kills
            killed = None if last else self._kill(run, ranks)
            codes = ranks.wait()
            text = ranks.text(0)
            if reached is not None:
                at = re.search(r"continuing from \S+, after step (\d+)", text)
                if at:
                    self.resumes += 1
                if at or "beginning at step 0" in text:  # else it was killed before it could say where it begins
                    self.lost.append(reached - (int(at[1]) if at else 0))
                    reached = None
            if killed is None:
                if codes != [0, 0]:
                    self.failures.append(f"ended with {codes}: {ranks.text()[-1500:]}")
                    raise RuntimeError(self.failures[-1])
                return
            self._record(run, ranks, killed, codes)
            reached = max(run.step(), reached or 0)
            time.sleep(0.05)

    def _kill(self, run: Run, ranks: TrainRanks) -> tuple[str, int] | None:
        """(what was done, rank); None if the run was complete before."""
        number, chance = sum(self.signals.values()), self.chance
        if chance.random() < 0.2:  # at any time, the start of the processes included
            self._pause(ranks, chance.uniform(0.2, 6.0))
        else:
            begun = run.step()
            self._pause(ranks, 60, lambda: run.step() != begun)  # it has trained, or dropped what was not saved
            self._pause(ranks, chance.uniform(0.0, 3.0))
            if number % 3 == 2 and self._pause(ranks, 5, run.saving):
                self._pause(ranks, chance.uniform(0.0, 0.08))
        if not ranks.running():
            return None
        rank = chance.randrange(2)
        what = chance.choice(["SIGTERM of one", "SIGKILL of both", *["SIGKILL of one"] * 4])
        ranks.kill(rank, signal.SIGTERM if what == "SIGTERM of one" else signal.SIGKILL)
        if what == "SIGKILL of both":
            ranks.kill(1 - rank)
        self.signals[what] += 1
        return what, rank

    def _pause(self, ranks: TrainRanks, seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Wait so long, or until ``done`` (returns True) or until a rank has ended."""
        until = time.monotonic() + seconds
        while ranks.running() and time.monotonic() < until:
            if done():
                return True
            time.sleep(0.002)
        return False

    def _record(self, run: Run, ranks: TrainRanks, killed: tuple[str, int], codes: list[int | None]) -> None:
        what, rank = killed
        self.during_save += run.saving()
        self.before_first_checkpoint += not (run.output / "checkpoints" / "latest").exists()
        if what == "SIGKILL of both":
            return
        other = codes[1 - rank]
        if what == "SIGTERM of one":
            early = -signal.SIGTERM in codes
            saved = codes == [EXIT_REQUEUE] * 2
            if not early and not saved:
                self.failures.append(f"{what} ended with {codes}: {ranks.text()[-1500:]}")
            how = f"SIGTERM: both saved and exit {EXIT_REQUEUE}" if saved else f"SIGTERM: exits {codes}"
            self.survivors["SIGTERM before the handler was there" if early else how] += 1
            return
        text = ranks.text(1 - rank)
        lost = "lost another rank" in text
        how = "one message, exit 1" if other == 1 and lost and "Traceback" not in text else f"other: exit {other}"
        if other == 0 and (run.output / "model").is_dir():
            how = "exit 0: it was complete before it could miss the other"
        if how.startswith("other"):
            self.failures.append(f"survivor of {what} ended with {other}: {text[-1500:]}")
        self.survivors[how] += 1


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| ZeRO stage | runs | kills | resumes | kills that left a half-written checkpoint | lost steps, mean (max)"
        " | save interval | final weights bitwise equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['stage']} | {r['runs']} | {r['kills']} | {r['resumes']}"
            f" | {r['kills_that_left_a_half_written_checkpoint']} | {r['lost_steps_mean']} ({r['lost_steps_max']})"
            f" | {r['save_interval']} | {r['runs_bitwise_equal_to_the_undisturbed']} of {r['runs']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="for each stage")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-interval", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the choice of ranks")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder))
        for stage in args.stages:
            chance = random.Random(args.seed * 10 + stage)
            results.append(Campaign(space, stage, args.steps, args.save_interval, chance).run(args.kills))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
            if args.json:
                body = {
                    "command": " ".join(["python", "benchmarks/reliability/faults.py", *sys.argv[1:]]),
                    "seed": args.seed,
                }
                args.json.write_text(json.dumps({**body, "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
