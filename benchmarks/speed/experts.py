"""Forward and backward of one module of stacked experts: transformers' own, and RSO in each form, by turns.

    python benchmarks/speed/experts.py --experts 8 64 --choices 2 8 --json experts.json

Times are shares of transformers' grouped form, which computes the gradients of W; "kept" are the bytes that a forward
pass leaves for backward, without weights. On a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from layer import DEVICE, DTYPES, now
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from rso_ds.config import RSOConfig
from rso_ds.layers import convert

WAYS = {
    "transformers, grouped": ("grouped_mm", None),
    "transformers, one by one": ("eager", None),
    "RSO, two-path": ("eager", "two_path"),
    "RSO, folded": ("eager", "folded"),
}


def build(implementation: str, form: str | None, args: argparse.Namespace, experts: int, choices: int) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=args.hidden, moe_intermediate_size=args.inner, num_experts=experts, num_experts_per_tok=choices
    )
    config._experts_implementation = implementation
    module: nn.Module = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for param in module.parameters():
        nn.init.normal_(param, std=0.02, generator=generator)
    module.to(DEVICE, DTYPES[args.dtype])
    if form is not None:
        config_of_rso = RSOConfig(rank_ratio=args.rank_ratio, sampler=args.sampler, targets=["*"], form=form)
        convert(module, config_of_rso)
    return module


def kept_bytes(module: nn.Module, inputs: list[Tensor]) -> int:
    """Of the tensors that one forward pass keeps, without those that are there anyway."""
    there = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *inputs]}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(*inputs)
    del y
    return sum(found.values())


def measure(args: argparse.Namespace, experts: int, choices: int) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    dtype = DTYPES[args.dtype]
    x = torch.randn(args.tokens, args.hidden, generator=g).to(DEVICE, dtype).requires_grad_()
    index = torch.stack([torch.randperm(experts, generator=g)[:choices] for _ in range(args.tokens)]).to(DEVICE)
    weights = torch.rand(args.tokens, choices, generator=g).to(DEVICE, dtype).requires_grad_()
    dy = torch.randn(args.tokens, args.hidden, generator=g).to(DEVICE, dtype)
    modules = {name: build(*way, args, experts, choices) for name, way in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(args.repeats + 1):
        for name, module in modules.items():
            start = now()
            module(x, index, weights).backward(dy)
            if turn:
                seconds[name].append(now() - start)
            for tensor in (x, weights, *module.parameters()):
                tensor.grad = None
    first = next(iter(WAYS))
    rows = []
    for name, times in seconds.items():
        shares = [t / base for t, base in zip(times, seconds[first], strict=True)]
        rows.append(
            {
                "experts": experts, "choices": choices, "dtype": args.dtype, "way": name, "seconds": times,
                "share": statistics.median(shares), "low": min(shares), "high": max(shares),
                "kept": kept_bytes(modules[name], [x, index, weights]),
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| experts | of a token | way | time | kept, MB |", "|---|---|---|---|---|"]
    for r in rows:
        shown = f"{r['share']:.2f} ({r['low']:.2f}-{r['high']:.2f})"
        lines.append(f"| {r['experts']} | {r['choices']} | {r['way']} | {shown} | {r['kept'] / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--choices", type=int, nargs="+", default=[2, 8], help="experts of a token, one for each count")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--sampler", default="haar")
    parser.add_argument("--rank-ratio", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    rows = [row for e, k in zip(args.experts, args.choices, strict=True) for row in measure(args, e, k)]
    sizes = f"{args.tokens} tokens, hidden {args.hidden}, inner {args.inner}, {args.dtype}"
    print(f"{device}, {args.threads} threads, {sizes}\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
