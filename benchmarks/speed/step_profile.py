"""What a step's time is spent on: AdamW and RSO in each form, in one process; and what a boundary and a draw cost.

    python benchmarks/speed/step_profile.py --json profile.json

The phases are timed apart, the methods by turns; medians. "merge" is the folded form's W <- W + B P^T, once a step;
"boundary" one crossing, draws included, which comes once an interval. The shares of operators are of one profiled step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_time import CUDA, now
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import rso_ds
from rso_ds.config import SAMPLERS
from rso_ds.models import LLAMA_SHAPES, llama_config
from rso_ds.subspace import sample_projection

PHASES = ("forward", "backward", "solver", "merge", "boundary")
METHODS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "RSO two-path haar": {"form": "two_path", "sampler": "haar"},
    "RSO folded haar": {"form": "folded", "sampler": "haar"},
    "RSO two-path coordinate": {"form": "two_path", "sampler": "coordinate"},
    "RSO folded coordinate": {"form": "folded", "sampler": "coordinate"},
}
OPERATORS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "gathers": ("aten::index", "aten::gather", "aten::scatter_add", "aten::embedding"),
}
EVERY = 1_000_000  # steps to a boundary that is crossed by hand


class Method:
    """A model with its optimizer; ``options``: of RSO, None for AdamW. ``spent``: seconds of each phase, by call."""

    def __init__(self, options: dict[str, Any] | None, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        shape = llama_config(args.model, args.vocab)
        self.device, self.vocab = "cuda" if CUDA else "cpu", args.vocab
        self.model = AutoModelForCausalLM.from_config(shape).to(self.device).train()
        self.spent: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.boundary: Any = None
        if options is None:
            optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            self.optimizer = optimizer
            optimizer.step = self._timed("solver", optimizer.step)
            return
        config = rso_ds.RSOConfig(rank_ratio=0.25, interval=EVERY, **options)
        rso_ds.convert(self.model, config)
        self.optimizer = optimizer = rso_ds.RSO(self.model, config)
        self.boundary = optimizer.boundary
        optimizer.solver.step = self._timed("solver", optimizer.solver.step)
        self.boundary.fold = self._timed("merge", self.boundary.fold)
        self.boundary.cross = self._timed("boundary", self.boundary.cross)

    def step(self, batch: int, seq_len: int) -> None:
        ids = torch.randint(self.vocab, (batch, seq_len)).to(self.device)
        loss = self._timed("forward", self.model)(input_ids=ids, labels=ids, use_cache=False).loss
        self._timed("backward", loss.backward)()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = call(*args, **kwargs)
            self.spent[phase].append(now() - start)
            return result

        return timed

    def median(self, phase: str) -> float:
        return statistics.median(self.spent[phase]) if self.spent[phase] else 0.0

    def operators(self, batch: int, seq_len: int) -> dict[str, float]:
        """Shares of the time of one step, by kind of operator."""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=kinds) as seen:
            self.step(batch, seq_len)
        found = dict.fromkeys((*OPERATORS, "other"), 0.0)
        for event in seen.key_averages():
            spent = event.self_device_time_total if CUDA else event.self_cpu_time_total
            found[next((kind for kind, names in OPERATORS.items() if event.key.startswith(names)), "other")] += spent
        total = sum(found.values())
        return {kind: spent / total for kind, spent in found.items()}


def draws(shapes: list[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """Seconds to draw P [in, rank], by sampler."""
    found = []
    for in_features, rank in shapes:
        row: dict[str, Any] = {"in": in_features, "rank": rank}
        for sampler in SAMPLERS:
            times = []
            for draw in range(repeats):
                start = now()
                sample_projection(sampler, 0, "x", draw, in_features, rank, "cuda" if CUDA else "cpu")
                times.append(now() - start)
            row[sampler] = statistics.median(times)
        found.append(row)
    return found


def phase_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| ms | forward | backward | solver | merge | step | boundary | share, interval 10 | interval 50 |"]
    lines.append("|" + "---|" * 9)
    for r in rows:
        step = sum(r[phase] for phase in PHASES[:-1])
        cells = [f"{1e3 * r[phase]:.1f}" for phase in PHASES[:-1]] + [f"{1e3 * step:.1f}", f"{1e3 * r['boundary']:.1f}"]
        # A boundary merges itself, so that the folded form's merge of that step falls away.
        more = max(0.0, r["boundary"] - r["merge"])
        cells += [f"{100 * more / (n * step + more):.1f} %" if r["boundary"] else "" for n in (10, 50)]
        lines.append(f"| {r['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def operator_table(rows: list[dict[str, Any]]) -> str:
    kinds = (*OPERATORS, "other")
    lines = ["| share of a step | " + " | ".join(kinds) + " |", "|" + "---|" * (len(kinds) + 1)]
    for r in rows:
        lines.append(f"| {r['method']} | " + " | ".join(f"{100 * r['operators'][kind]:.0f} %" for kind in kinds) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LLAMA_SHAPES, default="llama-35m")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    methods = {name: Method(options, args) for name, options in METHODS.items()}
    for round_ in range(args.rounds + 1):
        for method in methods.values():
            method.step(args.batch, args.seq_len)
            if method.boundary is not None:
                method.boundary.cross()
            if round_ == 0:  # to warm up
                method.spent.update({phase: [] for phase in PHASES})
    rows = [
        {
            "method": name,
            **{phase: m.median(phase) for phase in PHASES},
            "spread": {phase: [min(s), max(s)] for phase, s in m.spent.items() if s},
            "operators": m.operators(args.batch, args.seq_len),
        }
        for name, m in methods.items()
    ]
    drawn = draws([(512, 128), (1024, 256), (4096, 1024), (11008, 1024)], 3)
    name = torch.cuda.get_device_name() if CUDA else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(phase_table(rows), operator_table(rows), sep="\n\n")
    print("\n| seconds to draw P | " + " | ".join(SAMPLERS) + " |\n" + "|---" * (len(SAMPLERS) + 1) + "|")
    for d in drawn:
        print(f"| {d['in']} x {d['rank']} | " + " | ".join(f"{d[sampler]:.6f}" for sampler in SAMPLERS) + " |")
    if args.json:
        setup = {k: v for k, v in vars(args).items() if k != "json"}
        found = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "setup": setup}
        args.json.write_text(json.dumps({**found, "rows": rows, "draws": drawn}, indent=1) + "\n")


if __name__ == "__main__":
    main()
