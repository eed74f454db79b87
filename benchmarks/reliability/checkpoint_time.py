"""Time and size of a checkpoint: RSO's own format beside plain DeepSpeed with AdamW, at the LLaMA-350M shape.

    python benchmarks/reliability/checkpoint_time.py --json checkpoint_time.json

Two gloo ranks on this machine with one thread each, ZeRO-2, bf16 with fp32 masters, one step of 16 tokens a rank
before the first save. Each save and load is repeated; the median and the range are printed as Markdown. Ours are
flushed to the disk, hashed and renamed when ``save`` returns, and verified by hash when loaded; DeepSpeed's are
neither flushed nor hashed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.environment import prepare

prepare()
RANKS = 2


def engine_of(method: str, shape: str) -> Any:
    import deepspeed

    import rso_ds
    from rso_ds.models import llama_config, random_model

    torch.manual_seed(0)
    model = random_model(llama_config(shape, 32000, 64))
    params: dict[str, Any] = {"lr": 1e-3, "torch_adam": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},
    }
    if method == "AdamW":
        config["optimizer"] = {"type": "AdamW", "params": params}
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    rank = {"RSO h/4": 0.25, "RSO h/16": 0.0625}[method]
    config["optimizer"] = {"type": "RSO", "params": {**params, "rank_ratio": rank}}
    return rso_ds.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def timed(action: Any) -> float:
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def worker(rank: int, port: int, method: str, shape: str, repeats: int, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.set_num_threads(1)  # as train.py does: two ranks share two cores
    engine = engine_of(method, shape)
    ids = torch.randint(0, 32000, (1, 16))
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()
    folder = Path(out) / "checkpoints"
    figures: dict[str, list[float]] = {"save": [], "load": [], "background": []}
    for i in range(repeats):
        figures["save"].append(timed(lambda i=i: engine.save_checkpoint(str(folder), tag=f"tag{i}")))
        if i:
            shutil.rmtree(folder / f"tag{i - 1}", ignore_errors=True)
        if method != "AdamW":
            saving = engine.checkpoints
            figures["background"].append(timed(lambda s=saving: s.save(folder, "background", wait=False)))
            saving.wait()
        figures["load"].append(timed(lambda i=i: engine.load_checkpoint(str(folder), tag=f"tag{i}")))
        dist.barrier()
    if rank == 0:
        size = sum(p.stat().st_size for p in (folder / f"tag{repeats - 1}").rglob("*") if p.is_file())
        (Path(out) / "figures.json").write_text(json.dumps({**figures, "bytes": size}))
    dist.barrier()
    dist.destroy_process_group()


def measure(method: str, shape: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        mp.spawn(worker, (port, method, shape, repeats, out), nprocs=RANKS)
        return dict(json.loads((Path(out) / "figures.json").read_text()))


def text(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-350m", help="named shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = {}
    print("| method | GB on disk | save, s | training stands still for a background save, s | load, s |")
    print("|---|---|---|---|---|")
    for method in ("AdamW", "RSO h/4", "RSO h/16"):
        got = found[method] = measure(method, args.shape, args.repeats)
        cells = (f"{got['bytes'] / 1e9:.2f}", text(got["save"]), text(got["background"]), text(got["load"]))
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "ranks": RANKS, "methods": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
