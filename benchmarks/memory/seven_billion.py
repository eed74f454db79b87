"""LLaMA-7B takes real RSO steps under ZeRO-3 on two CPU ranks, inside 24 GiB.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/memory/seven_billion.py

Random bf16 weights built under zero.Init, never whole on a rank; random tokens, the same each step, so
that the loss must fall. Prints each step's loss, time and memory, the split of what each rank holds, and
what ``rso-ds memory`` predicts for the same JSON. ``--shape llama-60m`` tries it in a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import deepspeed  # noqa: F401  (its libraries belong to the bare process)
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import rso_ds
from rso_ds.models import LLAMA_SHAPES, llama_config
from rso_ds.planning.memory.measured import split_of_state

GIB = 2**30


def resident() -> float:
    """GiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB


def peak() -> float:
    """GiB of this process in memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def summed(value: float) -> float:
    box = torch.tensor([value])
    dist.all_reduce(box)
    return box.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-7b", choices=LLAMA_SHAPES)
    parser.add_argument("--deepspeed", default=str(Path(__file__).with_name("seven_billion.json")))
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    ds_json = json.loads(Path(args.deepspeed).read_text())
    before = resident()
    say(f"{args.shape}, {dist.get_world_size()} ranks; each process takes {before:.2f} GiB before the model")
    torch.manual_seed(0)
    keep_alive = HfDeepSpeedConfig(ds_json)  # transformers then builds under zero.Init
    start = time.monotonic()
    model = AutoModelForCausalLM.from_config(llama_config(args.shape, 32000, 2048), dtype=torch.bfloat16)
    del keep_alive
    say(f"built in {time.monotonic() - start:.0f} s, {resident():.2f} GiB")
    engine, *_ = rso_ds.initialize(model=model, model_parameters=model.parameters(), config=ds_json)
    say(f"engine ready, {resident():.2f} GiB, peak so far {peak():.2f} GiB")
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 32000, (1, args.seq_len), generator=generator)
    engine.train()
    for step in range(1, args.steps + 1):
        start = time.monotonic()
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        mean = summed(loss.item()) / dist.get_world_size()
        say(
            f"step {step}: loss {mean:.4f}, draw {engine.rso.draw}, {time.monotonic() - start:.0f} s,"
            f" {resident():.2f} GiB now, {peak():.2f} GiB peak a rank, {summed(peak()):.2f} GiB peak of all ranks"
        )
    say("GiB this rank holds between steps:")
    for kind, size in split_of_state(engine).items():
        say(f"  {kind:<18} {size / GIB:7.3f}")
    say(f"measured peak beyond the bare process: {peak() - before:.2f} GiB a rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
