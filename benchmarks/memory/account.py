"""The memory of a real step beside what ``rso-ds memory`` says of it: AdamW and RSO under DeepSpeed, on one rank.

    python benchmarks/memory/account.py --shape llama-350m --micro-batch 8 --seq-len 1024 --json account.json
    python benchmarks/memory/account.py --device cpu --shape llama-9m --vocab 4096 --micro-batch 2 --seq-len 64

The second step is measured: on a GPU by CUDA's caching allocator, on a CPU by every storage that torch makes. Token ids
are random. An error is (model - measured) / measured. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import rso_ds
from rso_ds.comm import leave_process_groups
from rso_ds.models import LLAMA_SHAPES, llama_config
from rso_ds.planning.memory.account import Accountant, model_builder
from rso_ds.planning.memory.profile import StepProfiler, comparison
from rso_ds.planning.memory.states import Engine

GIB = 2**30
METHODS = ("adamw", "rso")


def deepspeed_json(method: str, args: argparse.Namespace) -> dict[str, Any]:
    rso = {"lr": 1e-3, "rank_ratio": args.rank_ratio, "torch_adam": True}  # torch's Adam needs no compiler
    adamw = {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}
    optimizer = {"type": "RSO", "params": rso} if method == "rso" else {"type": "AdamW", "params": adamw}
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "optimizer": optimizer,
        "bf16": {"enabled": args.bf16},
        "zero_optimization": {"stage": args.stage, "reduce_bucket_size": 50_000_000},
    }


def measure(method: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Model and measurement of ``method``, in bytes, and where the rank's bytes were before the step."""
    import deepspeed

    left_over = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # by the method before: peaks hold it
    torch.manual_seed(0)
    config = deepspeed_json(method, args)
    shape = llama_config(args.shape, args.vocab, args.seq_len)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    start = rso_ds.initialize if method == "rso" else deepspeed.initialize
    engine, *_ = start(model=model, model_parameters=model.parameters(), config=config)
    del model
    engine.train()
    ids = torch.randint(args.vocab, (args.micro_batch, args.seq_len)).to(device)

    def loss() -> Any:
        return engine(input_ids=ids, labels=ids, use_cache=False).loss

    engine.backward(loss())
    engine.step()
    profiler = StepProfiler(engine, args.gradient_checkpointing)
    with profiler:
        engine.backward(profiler.forward(loss))
    engine.step()
    rso = engine.rso.config if method == "rso" else rso_ds.RSOConfig()
    accountant = Accountant(model_builder(shape), rso, Engine.from_json(config, 1), args.gradient_checkpointing)
    account = accountant.account(method, args.micro_batch, args.seq_len)
    result = profiler.result
    found = {"source": result.source, "compared": comparison(result, account), "before_bytes": result.state}
    found["left_over_bytes"] = left_over
    engine.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="llama-350m")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rank-ratio", type=float, default=0.25)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --device cpu measures the same on the CPU")
    os.environ["DS_ACCELERATOR"] = args.device
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce for CPUs, which only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if args.device == "cuda":
        torch.cuda.set_device(0)
    deepspeed.init_distributed("nccl" if args.device == "cuda" else "gloo")
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, {args.shape}, {args.micro_batch} x {args.seq_len} tokens, ZeRO-{args.stage}\n")
    print("| method | GiB of | model | measured | error |\n|---|---|---|---|---|")
    rows = {}
    for method in args.methods:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        rows[method] = measure(method, args, device)
        for what, pair in rows[method]["compared"].items():
            figures = f"{pair['model'] / GIB:.4f} | {pair['measured'] / GIB:.4f} | {pair['error']:+.1%}"
            print(f"| {method} | {what} | {figures} |", flush=True)
    if args.json:
        setup = {k: v for k, v in vars(args).items() if k != "json"}
        found = {"device": name, "torch": torch.__version__, "setup": setup, "methods": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    leave_process_groups()


if __name__ == "__main__":
    main()
