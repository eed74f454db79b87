"""Streams of text: how fast, in what memory, what training waits for them, and whether they go on exactly.

    python benchmarks/data/stream.py make runs/shards --gigabytes 1 --format jsonl
    python benchmarks/data/stream.py speed runs/shards --json speed.json
    python benchmarks/data/stream.py waiting runs/shards --model llama-20m --json waiting.json
    python benchmarks/data/stream.py kills runs/shards --kills 6 --json kills.json

``make`` writes shards of records cut at random from the standard library's source code. ``speed`` reads them alone:
tokens a second and the readers' own memory, by number of processes. ``waiting`` trains and sums up what
``metrics.jsonl`` says about waiting. ``kills`` kills runs on two ranks at random moments, resumes them on two ranks or
on one, and compares the end with an undisturbed run. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rso_ds.recipes.data.corpus import Corpus
from rso_ds.recipes.data.stream import StreamSteps, lanes_for, plan_stream
from rso_ds.recipes.data.tokenization import load_tokenizer

SHARDS, BATCH, SEQ_LEN, VOCABULARY = 16, 32, 256, 4096
PAUSE = 1.0  # seconds between two looks at memory


def make(folder: Path, size: int, form: str, seed: int) -> int:
    """Write ``SHARDS`` shards of ``size`` bytes of text in all; returns the number of records."""
    random_ = random.Random(seed)
    sources = [text for text in Corpus("stdlib", 0).documents("train") if len(text) > 2000]
    folder.mkdir(parents=True)
    count = 0
    for shard in range(SHARDS):
        name = f"train-{shard:05d}-of-{SHARDS:05d}"
        records, written = [], 0
        while written < size // SHARDS:
            text = random_.choice(sources)
            length = min(len(text), int(random_.lognormvariate(7.3, 0.9)))
            start = random_.randrange(len(text) - length + 1)
            record = f"record {count}\n{text[start : start + length]}\n"
            records.append(record)
            written, count = written + len(record), count + 1
        if form == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": records}), folder / f"{name}.parquet", row_group_size=1000)
            continue
        lines = "".join(json.dumps({"text": record}) + "\n" for record in records).encode()
        if form == "jsonl.gz":
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines, 6))
        else:
            (folder / f"{name}.jsonl").write_bytes(lines)
    return count


def resident(pid: int) -> int:
    """Bytes that only this process holds (anonymous memory)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def speed(folder: Path, seconds: float, workers: int, cache: Path) -> dict[str, Any]:
    """Tokens a second of the stream alone, and the memory of its processes while it goes on."""
    corpus = Corpus(str(folder)).streamed()
    tokenizer = load_tokenizer(None, corpus, VOCABULARY, cache)
    started = time.monotonic()
    plan = plan_stream(corpus, None, tokenizer, SEQ_LEN, 0, lanes_for(BATCH))
    planned = time.monotonic() - started
    stream = StreamSteps(plan, (1, 1, 0, BATCH), 0, None, workers)
    stream.next()
    first = time.monotonic() - started
    processes = [w.pid for w in stream._parts._workers] if workers else [os.getpid()]
    began = looked = time.monotonic()
    steps, memory = 0, []
    while time.monotonic() - began < seconds:
        stream.next()
        steps += 1
        if time.monotonic() - looked > PAUSE:
            looked = time.monotonic()
            memory.append(sum(resident(pid) for pid in processes))
    elapsed = time.monotonic() - began
    stream.close()
    third = max(1, len(memory) // 3)
    return {
        "data_bytes": corpus.size,
        "processes": workers,
        "tokens_per_second": round(steps * BATCH * SEQ_LEN / elapsed),
        "tokens": steps * BATCH * SEQ_LEN,
        "seconds_to_plan": round(planned, 2),
        "seconds_to_first_step": round(first, 2),
        "memory_first_third": statistics.median(memory[:third]),
        "memory_last_third": statistics.median(memory[-third:]),
    }


# -- beside training -----------------------------------------------------------------------------------


class Ranks:
    """``launch/train.py`` on ``ranks`` CPU ranks, each the leader of a group with the processes that read for it."""

    def __init__(self, folder: Path, output: Path, cache: Path, ranks: int, flags: Sequence[str]) -> None:
        data = ["--data", str(folder), "--stream", "yes", "--cache", str(cache), "--output", str(output)]
        common = ["--engine", "ddp", "--log-interval", "1", "--eval-interval", "0", "--eval-tokens", "10000"]
        command = [sys.executable, str(ROOT / "launch/train.py"), *data, *common, "--sample-tokens", "0", *flags]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "MASTER_PORT": port}
        own |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **own, "RANK": str(r), "LOCAL_RANK": str(r)},
                cwd=ROOT,
                start_new_session=True,
            )
            for r in range(ranks)
        ]

    def running(self) -> bool:
        return all(p.poll() is None for p in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def finish(self) -> None:
        """Wait for the end. Raises ``RuntimeError`` if a rank fails."""
        codes = [p.wait() for p in self.processes]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")


def records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [record for record in map(json.loads, lines) if record["step"]]


def waiting(folder: Path, model: str, steps: int, ranks: int, work: Path) -> dict[str, Any]:
    """Seconds of a step, and the share of it for which training waited for data. The first step is left out: it holds
    the start of the reading processes, which is told by itself."""
    output = work / f"waiting-{model}-{ranks}"
    shutil.rmtree(output, ignore_errors=True)
    flags = ["--model", model, "--max-steps", str(steps), "--save-interval", "0", "--seq-len", str(SEQ_LEN)]
    Ranks(folder, output, work / "cache", ranks, flags).finish()
    logged = records(output)
    later = logged[1:]
    step_tokens = logged[0]["tokens"]
    seconds = [step_tokens / r["tokens_per_second"] for r in later]
    waited = [r["waited_seconds"]["data"] for r in later]
    return {
        "model": model,
        "ranks": ranks,
        "tokens_a_step": step_tokens,
        "seconds_a_step_median": statistics.median(seconds),
        "waited_a_step_median": statistics.median(waited),
        "waited_share": sum(waited) / sum(seconds),
        "waited_share_worst_step": max(w / s for w, s in zip(waited, seconds, strict=True)),
        "waited_first_step": logged[0]["waited_seconds"]["data"],
    }


# -- kills ---------------------------------------------------------------------------------------------

KILL_FLAGS = ["--model", "llama-9m", "--global-batch", "16", "--seq-len", "64", "--vocab-size", "1000"]
KILL_FLAGS += ["--max-steps", "60", "--save-interval", "4", "--timeout", "60"]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in records(output)]


def weights(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(output / "model" / "model.safetensors")


def kills(folder: Path, count: int, ranks: int, seed: int, work: Path) -> dict[str, Any]:
    """A run on two ranks that is killed ``count`` times and resumed on ``ranks``, beside an undisturbed one."""
    random_ = random.Random(seed)
    straight, killed = work / "straight", work / f"killed-{ranks}"
    if not (straight / "model").is_dir():
        shutil.rmtree(straight, ignore_errors=True)
        Ranks(folder, straight, work / "cache", 2, KILL_FLAGS).finish()
    shutil.rmtree(killed, ignore_errors=True)
    stopped_at = []
    for number in range(count):
        there = len(records(killed)) if (killed / "metrics.jsonl").is_file() else 0
        run = Ranks(folder, killed, work / "cache", ranks if number else 2, [*KILL_FLAGS, "--resume", "auto"])
        wanted = min(there + random_.randint(2, 8), 59)
        while run.running() and ((killed / "metrics.jsonl").is_file() and len(records(killed))) < wanted:
            time.sleep(0.05)
        time.sleep(random_.uniform(0, 0.3))
        run.kill()
        stopped_at.append(len(records(killed)))
    Ranks(folder, killed, work / "cache", ranks, [*KILL_FLAGS, "--resume", "auto"]).finish()
    one, other = weights(straight), weights(killed)
    return {
        "resumed_on_ranks": ranks,
        "kills_after_step": stopped_at,
        "largest_difference_of_a_loss": max(abs(a - b) for a, b in zip(losses(straight), losses(killed), strict=True)),
        "largest_difference_of_a_weight": max((one[n] - other[n]).abs().max().item() for n in one),
        "bitwise_equal": all((one[n] == other[n]).all().item() for n in one),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join(lines + [f"| {' | '.join(str(row[n]) for n in names)} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "speed", "waiting", "kills"))
    parser.add_argument("folder", type=Path, nargs="+", help="of shards")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--format", choices=("jsonl", "jsonl.gz", "parquet"), default="jsonl")
    parser.add_argument("--seconds", type=float, default=30.0, help="that speed reads for")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="llama-20m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/stream"), help="folder of runs and caches")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder, args.work = args.folder[0].absolute(), args.work.absolute()
    if args.what == "make":
        print(f"{make(folder, int(args.gigabytes * 1e9), args.format, args.seed):,} records in {folder}")
        return
    if args.what == "speed":
        cache = args.work / "cache"
        rows = [speed(f, args.seconds, n, cache) for f in args.folder for n in args.processes]
    elif args.what == "waiting":
        rows = [waiting(folder, args.model, args.steps, n, args.work) for n in args.ranks]
    else:
        rows = [kills(folder, args.kills, n, args.seed, args.work) for n in args.ranks]
    print(table(rows))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("folder", "work", "json")}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
