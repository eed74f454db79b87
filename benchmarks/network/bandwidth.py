"""Step time of AdamW, GaLore, PowerSGD and RSO between two nodes joined by a link of limited rate.

    python benchmarks/network/bandwidth.py --model llama-60m --links none 1gbit 100mbit:2 --json bandwidth.json

Two network namespaces, one veth pair shaped by tc's token bucket at both ends, one gloo rank of one thread in each
(README.md says more). Both ranks build every method once; each round then runs a few steps of every method in turn, so
that other load on the machine falls on all alike. LINK:ROUNDS gives a slow link other rounds than --rounds.
``--sweep-seq-lens`` repeats AdamW and RSO h/16 with longer sequences, to find where the saved traffic stops to matter.
Token ids are random: times do not depend on them. Needs root, ip and tc; prints "skipped: ..." without them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bandwidth_net import ADDRESSES, DEVICE, NoNamespaces, TwoNodes, parse_rate
from bandwidth_worker import METHODS, WARM_UP

from rso_ds.models import LLAMA_SHAPES

ROOT = Path(__file__).resolve().parents[2]
BASELINE, OURS = "AdamW", "RSO h/16"
TARGET = 3.0


class Ranks:
    """The two worker processes."""

    def __init__(self, nodes: TwoNodes, logs: Path) -> None:
        self.logs = [logs / f"rank{rank}.log" for rank in range(2)]
        self.processes: list[subprocess.Popen[str]] = []
        for rank, log in enumerate(self.logs):
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": DEVICE,
                "OMP_NUM_THREADS": "1",
                "RSO_DS_NODE": nodes.names[rank],
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            worker = str(Path(__file__).with_name("bandwidth_worker.py"))
            with open(log, "w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [*nodes.inside(rank), sys.executable, worker],
                        env=env,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )

    def ask(self, timeout: float, **order: Any) -> list[dict[str, Any]]:
        """Both ranks' answers to one order."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        deadline = time.monotonic() + timeout
        return [self._answer(rank, deadline) for rank in range(2)]

    def _answer(self, rank: int, deadline: float) -> dict[str, Any]:
        stream = self.processes[rank].stdout
        assert stream is not None
        # An answer is one line after long silence, so readable means that the line is there.
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        line = stream.readline() if ready else ""
        if not line:
            what = "ended" if ready else "did not answer in time"
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)
            raise RuntimeError(f"rank {rank} {what}:\n{tails}")
        return json.loads(line)

    def stop(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def summary(name: str, answers: list[dict[str, Any]], trainable: int, **where: Any) -> dict[str, Any]:
    """One row: both ranks wait for each other in every step, so the slower one's time is the step's."""
    runs = [answer["runs"][name] for answer in answers]
    mine, theirs = ([s for run in rank for s in run["seconds"]] for rank in runs)
    seconds = [max(pair) for pair in zip(mine, theirs, strict=True)]
    steps = len(seconds) * len(answers)
    kinds = {k: sum(r["counted"][k] for rank in runs for r in rank) / steps for k in runs[0][0]["counted"]}
    first, middle, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "method": name,
        **where,
        "steps": len(seconds),
        "median_s": round(middle, 5),
        "q1_s": round(first, 5),
        "q3_s": round(third, 5),
        "mean_s": round(statistics.mean(seconds), 5),
        "cpu_s": round(max(sum(r["cpu"] for r in rank) for rank in runs) / len(seconds), 5),
        "trainable": trainable,
        "counted_bytes": {kind: round(n) for kind, n in kinds.items() if n},
        "sent_bytes": round(sum(r["sent"] for rank in runs for r in rank) / steps),
        "seconds": [round(s, 4) for s in seconds],
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """How many times faster than the baseline under the same link and tokens; the mean has RSO's boundaries in it."""
    base = {(r["link"], r["seq_len"]): r for r in rows if r["method"] == BASELINE}
    for row in rows:
        if (reference := base.get((row["link"], row["seq_len"]))) is not None:
            row["speedup_median"] = round(reference["median_s"] / row["median_s"], 3)
            row["speedup_mean"] = round(reference["mean_s"] / row["mean_s"], 3)


def predicted(rows: list[dict[str, Any]], seq_len: int) -> list[str]:
    """Link rates at which RSO's lead falls to given ratios, from processor time and bytes on the wire.

    A step is taken as its processor time plus its bytes over the link's rate: nothing overlaps, nothing else runs on
    the machine. Unlike times of day, processor time hardly depends on that.
    """
    found = {r["method"]: r for r in rows if r["seq_len"] == seq_len and r["link"] == "none"}
    if not {BASELINE, OURS} <= set(found):
        return []
    base, ours = found[BASELINE], found[OURS]
    lines = [
        f"sequence {seq_len}: {base['cpu_s'] / ours['cpu_s']:.2f} times less processor time, at most"
        f" {base['sent_bytes'] / ours['sent_bytes']:.2f} times faster on an endlessly slow link (bytes)"
    ]
    for ratio in (4.0, 3.0, 2.0, 1.5):
        # (tA + 8 bA / rate) / (tR + 8 bR / rate) = ratio, solved for the rate.
        saved = base["sent_bytes"] - ratio * ours["sent_bytes"]
        slower = ratio * ours["cpu_s"] - base["cpu_s"]
        if saved > 0 and slower > 0:
            lines.append(f"  predicted {ratio:g} times faster at {8e-6 * saved / slower:,.0f} Mbit/s")
    for row in rows:
        rate = parse_rate(row["link"])
        if row["method"] == OURS and row["seq_len"] == seq_len and rate and "speedup_mean" in row:
            model = [m["cpu_s"] + 8 * m["sent_bytes"] / rate for m in (base, ours)]
            lines.append(f"  {row['link']}: predicted {model[0] / model[1]:.2f}, measured {row['speedup_mean']:.2f}")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| link | tokens | method | median ms (quartiles) | mean ms | CPU ms | counted MB | wire MB | faster (mean) |",
        "|" + "---|" * 9,
    ]
    for r in rows:
        lines.append(
            f"| {r['link']} | {r['seq_len'] * r['micro_batch']} | {r['method']} | {1e3 * r['median_s']:,.0f}"
            f" ({1e3 * r['q1_s']:,.0f} to {1e3 * r['q3_s']:,.0f}) | {1e3 * r['mean_s']:,.0f} | {1e3 * r['cpu_s']:,.0f}"
            f" | {sum(r['counted_bytes'].values()) / 1e6:.2f} | {r['sent_bytes'] / 1e6:.2f}"
            f" | {r.get('speedup_median', 1):.2f} ({r.get('speedup_mean', 1):.2f}) |"
        )
    return "\n".join(lines)


def measure(nodes: TwoNodes, args: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as logs:
        ranks = Ranks(nodes, Path(logs))
        try:
            batch = {"micro_batch": args.micro_batch, "seq_len": args.seq_len}
            built = ranks.ask(600, do="build", methods=args.methods, model=args.model, vocab=args.vocab, **batch)[0]
            for name, reason in built["left_out"].items():
                print(f"left out: {name}: {reason}", flush=True)
            main_pass = [(link, args.seq_len, list(built["trainable"])) for link in args.links]
            pair = [name for name in (BASELINE, OURS) if name in built["trainable"]]
            sweep = [(link, seq_len, pair) for seq_len in args.sweep_seq_lens for link in args.sweep_links]
            for link_rounds, seq_len, names in main_pass + sweep:
                link, _, rounds = link_rounds.partition(":")
                nodes.shape(link)
                order = {"methods": names, "rounds": int(rounds or args.rounds), "steps": args.steps}
                answers = ranks.ask(3600, do="pass", **order, **{**batch, "seq_len": seq_len})
                rate = round(min(a["mbit"] for a in answers), 1)
                # Two ranks keep about two processors busy; more than that is other work on the machine.
                load = round(os.getloadavg()[0], 1)
                where = {
                    "load": load,
                    "all_reduce_mbit": rate,
                    "link": link,
                    "seq_len": seq_len,
                    "micro_batch": args.micro_batch,
                }
                rows += [summary(name, answers, built["trainable"][name], **where) for name in names]
                print(
                    f"{link}, sequence {seq_len}: one all_reduce ran at {rate:,.0f} Mbit/s, load {load}",
                    flush=True,
                )
        finally:
            ranks.stop()
    add_ratios(rows)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, two network namespaces, gloo",
        "model": args.model,
        "vocab": args.vocab,
        "warm_up_steps": WARM_UP,
        "left_out": built["left_out"],
        "predicted": [line for s in (args.seq_len, *args.sweep_seq_lens) for line in predicted(rows, s)],
        "rows": rows,
    }


def verdict(result: dict[str, Any], args: argparse.Namespace) -> str:
    target = f"target ({OURS} {TARGET:g} times faster than {BASELINE} at 1 Gbit)"
    for row in result["rows"]:
        if (row["method"], row["link"], row["seq_len"]) == (OURS, "1gbit", args.seq_len) and "speedup_mean" in row:
            lead = row["speedup_mean"]
            return f"{target}: {'reached' if lead >= TARGET else 'missed'}, {lead:.2f} times"
    return f"{target}: not measured"


def as_json(result: dict[str, Any]) -> str:
    """One line a row, so that a committed result can be read."""
    rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    head = json.dumps({**result, "rows": "ROWS"}, indent=1)
    return head.replace('"ROWS"', f"[\n{rows}\n ]") + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LLAMA_SHAPES, default="llama-60m")
    parser.add_argument("--vocab", type=int, default=4096, help="small, so that linear layers dominate")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--links", nargs="+", default=["none", "1gbit", "100mbit:2"], metavar="LINK[:ROUNDS]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="of each method in a round")
    parser.add_argument("--sweep-seq-lens", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--sweep-links", nargs="+", default=["none:2", "1gbit:2"], metavar="LINK[:ROUNDS]")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    for link in (*args.links, *args.sweep_links):
        name, _, rounds = link.partition(":")
        try:
            parse_rate(name)
        except ValueError as error:
            parser.error(str(error))
        if rounds and not rounds.isdigit():
            parser.error(f"rounds must be a number, got {link!r}.")
    if args.steps * args.rounds < 2:
        parser.error("quartiles need at least two steps.")
    return args


def main() -> None:
    args = arguments()
    # A terminated benchmark must still take its namespaces away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        with TwoNodes() as nodes:
            result = measure(nodes, args)
    except NoNamespaces as reason:
        print(f"skipped: {reason}")
        return
    print(table(result["rows"]))
    print("\n".join(result["predicted"]))
    print(verdict(result, args))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(as_json(result))


if __name__ == "__main__":
    main()
