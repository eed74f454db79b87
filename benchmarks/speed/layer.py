"""Forward and backward of one linear layer: dense, LoRA, and RSO in each form, by turns.

    python benchmarks/speed/layer.py --sizes 1024 4096 --dtypes fp32 bf16 --json layer.json

Times are shares of a dense layer that computes y, dx and dW; "floor" is the same share counted in operations. "+ merge"
adds W <- W + B P^T, which the folded form does once a step (the two-path form once an interval); bf16 is rounded
stochastically. On a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rso_ds.layers import merge_, round_stochastically, subspace_linear
from rso_ds.layers.functional import folded_linear, projected_input
from rso_ds.subspace import sample_projection
from rso_ds.subspace.transform import factor_sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLERS = ("haar", "srht", "coordinate")


def floors(size: int, rank: int) -> dict[str, float]:
    """Operations as a share of a dense layer's 6 T in out, at in = out = ``size``."""
    share, factors = rank / size, sum(factor_sizes(size)) / size
    return {
        "dense": 1.0,
        "LoRA": (4 + 12 * share) / 6,
        "two-path, haar": (4 + 10 * share) / 6,
        "folded, haar": (4 + 4 * share) / 6,
        "two-path, srht": (4 + 6 * share + 4 * factors) / 6,
        "folded, srht": (4 + 2 * share + 2 * factors) / 6,
        "two-path, coordinate": (4 + 6 * share) / 6,
        "folded, coordinate": (4 + 2 * share) / 6,
    }


class Layer:
    """One set of operands and the computations on them."""

    def __init__(self, size: int, tokens: int, rank: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(DEVICE, dtype)

        self.x, self.dy = random(tokens, size).requires_grad_(), random(tokens, size)
        self.frozen = random(size, size) / size**0.5
        self.weight = self.frozen.clone().requires_grad_()
        self.B = torch.zeros(size, rank, dtype=dtype, device=DEVICE).requires_grad_()
        self.A = (random(rank, size) / size**0.5).requires_grad_()
        self.P = {s: sample_projection(s, 0, "layer", 0, size, rank, DEVICE) for s in SAMPLERS}
        self.P["haar"] = self.P["haar"].to(dtype)
        self.generator = torch.Generator(DEVICE).manual_seed(0)

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> y of that way."""
        x, w, b = self.x, self.frozen, self.B
        ways: dict[str, Callable[[], Tensor]] = {
            "dense": lambda: x @ self.weight.t(),
            "LoRA": lambda: x @ w.t() + (x @ self.A.t()) @ b.t(),
        }
        for s, p in self.P.items():
            ways[f"two-path, {s}"] = partial(subspace_linear, x, w, b, p)
            ways[f"folded, {s}"] = partial(self.folded, p)
        return ways

    def folded(self, P: Tensor) -> Tensor:
        return folded_linear(self.x, projected_input(self.x, P), self.frozen, self.B)

    def step(self, way: Callable[[], Tensor]) -> float:
        """Seconds of forward and backward."""
        start = now()
        way().backward(self.dy)
        seconds = now() - start
        for tensor in (self.x, self.weight, self.A, self.B):
            tensor.grad = None
        return seconds

    @torch.no_grad()
    def merge(self, sampler: str) -> float:
        start = now()
        merge_(self.frozen, self.B, self.P[sampler], 1.0, partial(round_stochastically, generator=self.generator))
        return now() - start


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(size: int, tokens: int, rank: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    layer = Layer(size, tokens, rank, DTYPES[dtype])
    ways = layer.ways()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    merges: dict[str, list[float]] = {s: [] for s in SAMPLERS}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            seconds[name].append(layer.step(way))
        for sampler in SAMPLERS:
            merges[sampler].append(layer.merge(sampler))
        if turn == 0:  # the first one warms caches and threads up
            seconds, merges = {n: [] for n in seconds}, {s: [] for s in merges}
    dense = statistics.median(seconds["dense"])
    rows = []
    for name, times in seconds.items():
        shares = [t / dense for t in times]
        row: dict[str, Any] = {
            "size": size, "tokens": tokens, "rank": rank, "dtype": dtype, "way": name, "seconds": times,
            "share": statistics.median(shares), "low": min(shares), "high": max(shares),
            "floor": floors(size, rank)[name],
        }  # fmt: skip
        if name.startswith("folded"):
            sampler = name.removeprefix("folded, ")
            row["with_merge"] = row["share"] + statistics.median(merges[sampler]) / dense
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| in = out | dtype | way | of dense | + merge | floor |", "|---|---|---|---|---|---|"]
    for r in rows:
        merge = f"{r['with_merge']:.3f}" if "with_merge" in r else ""
        shown = f"{r['share']:.3f} ({r['low']:.3f}-{r['high']:.3f})"
        lines.append(f"| {r['size']} | {r['dtype']} | {r['way']} | {shown} | {merge} | {r['floor']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank-ratio", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    rows = []
    for size in args.sizes:
        for dtype in args.dtypes:
            rows += measure(size, args.tokens, round(args.rank_ratio * size), dtype, args.repeats)
    print(f"{device}, {args.threads} threads, {args.tokens} tokens, rank {args.rank_ratio:g} of in\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
