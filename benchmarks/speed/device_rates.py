"""What the device itself can do: matrix products in each precision, its memory, and copies from and to the host.

    python benchmarks/speed/device_rates.py --json rates.json
    python benchmarks/speed/device_rates.py --device cpu --size 512 --megabytes 64 --seconds 0.2

A step's time means little without these: they say which share of the machine a method uses. Each rate is that of the
median repeat; "best" is the fastest. A product of n x n matrices counts 2 n^3 operations, a copy inside the device its
bytes twice (read and written), a copy between host and device once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WARM_UP, FEWEST = 3, 5


def repeats(action: Callable[[], Any], seconds: float, synchronize: Callable[[], None]) -> list[float]:
    """Seconds of each call, for ``seconds`` in all."""
    for _ in range(WARM_UP):
        action()
    synchronize()
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < seconds:
        start = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def rate(what: str, unit: str, work: float, times: list[float]) -> dict[str, Any]:
    return {
        "what": what, "unit": unit, "median": work / statistics.median(times), "best": work / min(times),
        "repeats": len(times),
    }  # fmt: skip


def products(device: torch.device, size: int, seconds: float, synchronize: Callable[[], None]) -> list[dict[str, Any]]:
    kinds = {"bf16": (torch.bfloat16, "highest"), "fp32": (torch.float32, "highest")}
    if device.type == "cuda":
        kinds["tf32"] = (torch.float32, "high")
    found = []
    for name, (dtype, precision) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        times = repeats(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds, synchronize)  # type: ignore[misc]
        found.append(rate(f"product {name}, n = {size}", "TFLOP/s", 2 * size**3 / 1e12, times))
    torch.set_float32_matmul_precision("highest")
    return found


def copies(
    device: torch.device, megabytes: int, seconds: float, synchronize: Callable[[], None]
) -> list[dict[str, Any]]:
    count = megabytes * 10**6
    here, there = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    times = repeats(lambda: there.copy_(here), seconds, synchronize)
    found = [rate(f"copy inside, {megabytes} MB", "GB/s", 2 * count / 1e9, times)]
    if device.type == "cuda":
        pinned, pageable = torch.empty(count, dtype=torch.uint8, pin_memory=True), torch.empty(count, dtype=torch.uint8)
        ways: dict[str, Callable[[], Any]] = {
            "host to device, pinned": lambda: here.copy_(pinned, non_blocking=True),
            "host to device, pageable": lambda: here.copy_(pageable),
            "device to host, pinned": lambda: pinned.copy_(here, non_blocking=True),
        }
        for name, action in ways.items():
            times = repeats(action, seconds, synchronize)
            found.append(rate(f"{name}, {megabytes} MB", "GB/s", count / 1e9, times))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--size", type=int, default=8192, help="n of the products of n x n matrices")
    parser.add_argument("--megabytes", type=int, default=1024, help="of a copy")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring each rate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --device cpu measures the CPU")
    device = torch.device(args.device)
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    rows = products(device, args.size, args.seconds, synchronize)
    rows += copies(device, args.megabytes, args.seconds, synchronize)
    processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if args.device == "cuda" else processor
    print(f"{name}, torch {torch.__version__}\n\n| rate | median | best | repeats |\n|---|---|---|---|")
    for r in rows:
        print(f"| {r['what']} | {r['median']:.4g} {r['unit']} | {r['best']:.4g} | {r['repeats']} |")
    if args.json:
        setup = {"size": args.size, "megabytes": args.megabytes}
        found = {"device": name, "torch": torch.__version__, "setup": setup, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
