"""Memory of one training step, measured: what a block keeps op by op, and the peak of AdamW, LoRA, GaLore, RSO.

    python benchmarks/memory/memory.py blocks                       # op-by-op table, fake tensors, LLaMA-7B shape
    python benchmarks/memory/memory.py kept --seq-len 256           # model against measurement, 9M to 1B
    python benchmarks/memory/memory.py speed --shape llama-20m      # step time with and without each lean piece
    python benchmarks/memory/memory.py peak --shape llama-350m --batch 16 --seq-len 256   # one GPU, or the CPU

``peak`` takes two real optimizer steps in bf16 and reports the second: on CUDA the allocator's peak, on a
CPU the peak of all storages that torch makes. LoRA needs ``peft``, GaLore ``galore-torch``; a method whose
package is missing is named and left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peak import Peak
from transformers import AutoModelForCausalLM, PreTrainedModel

import rso_ds
from rso_ds.models import LLAMA_SHAPES, llama_config
from rso_ds.planning.memory.kept import KeptRecorder, by_kind
from rso_ds.planning.memory.trace import trace_training

GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Lean = str | list[str] | None


def build(shape: str, vocab: int, lean: Lean, rank: int, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(shape, vocab, 2048), dtype=dtype)
    if lean is not None:
        rso_ds.convert(model, rso_ds.RSOConfig(rank=rank, lean=lean))
    return model


def blocks(args: argparse.Namespace) -> None:
    """Units of batch x seq x hidden x 2 bytes that one block keeps, op by op, in bf16."""
    unit = args.batch * args.seq_len * llama_config(args.shape).hidden_size * 2
    forms: dict[str, Lean] = {"stock": None, "RSO, stock block": "none", "RSO, lean": "all"}
    for name, lean in forms.items():
        trace = trace_training(
            lambda lean=lean: build(args.shape, args.vocab, lean, args.rank, torch.bfloat16),  # type: ignore[misc]
            args.batch,
            args.seq_len,
        )
        print(f"{name}: {trace.per_block / unit:.3f} units a block, {trace.kept / GIB:.3f} GiB kept with the loss")
        for entry, size in by_kind(trace.inside).items():
            print(f"    {entry:<75} {size / trace.traced / unit:7.3f}")


def kept(args: argparse.Namespace) -> None:
    """Kept bytes of every shape up to 1B: fake tensors against a real pass."""
    for shape in LLAMA_SHAPES:
        if shape == "llama-7b":
            continue
        rank = llama_config(shape).hidden_size // 4
        fake = trace_training(
            lambda s=shape, r=rank: build(s, args.vocab, "all", r, torch.bfloat16), args.batch, args.seq_len
        ).kept
        model: Any = build(shape, args.vocab, "all", rank, torch.bfloat16).to(DEVICE).train()
        ids = torch.randint(0, args.vocab, (args.batch, args.seq_len), device=DEVICE)
        with KeptRecorder(model) as recorder:
            model(input_ids=ids, labels=ids, use_cache=False)
        error = fake / recorder.total - 1
        print(f"{shape:<11} model {fake:>13,}  measured {recorder.total:>13,}  {error:+.2%}", flush=True)


def speed(args: argparse.Namespace) -> None:
    """Median and spread of forward and backward, the forms interleaved so that load falls on all alike."""
    forms: dict[str, Lean] = {"stock": None, "RSO, stock block": "none"}
    forms |= {f"RSO, {p}": [p] for p in ("shared_input", "norm", "activation", "loss")} | {"RSO, lean": "all"}
    for dtype in (torch.float32, torch.bfloat16):
        models = {
            n: build(args.shape, args.vocab, lean, args.rank, dtype).to(DEVICE).train() for n, lean in forms.items()
        }
        ids = torch.randint(0, args.vocab, (args.batch, args.seq_len), device=DEVICE)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.repeats + 2):
            for name, model in models.items():
                start = time.perf_counter()
                model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
                model.zero_grad()
        reference = statistics.median(times["RSO, stock block"][2:])
        for name, all_times in times.items():
            t = sorted(all_times[2:])
            middle = statistics.median(t)
            print(f"{dtype!s:<14} {name:<20} {1e3 * middle:8.1f} ms ({1e3 * t[0]:.1f} to {1e3 * t[-1]:.1f}),", end=" ")
            print(f"{middle / reference:.3f} of RSO with the stock block")


def peak(args: argparse.Namespace) -> None:
    for name, prepare in METHODS.items():
        needed = {"LoRA": "peft", "GaLore": "galore_torch"}.get(name)
        if needed and importlib.util.find_spec(needed) is None:
            print(f"{name}: left out, {needed} is not installed")
            continue
        gc.collect()
        print(json.dumps({"method": name, "device": DEVICE, **measure(prepare, args)}), flush=True)


def measure(prepare: Callable[[Any, argparse.Namespace], Any], args: argparse.Namespace) -> dict[str, float]:
    """GiB: peak of the second step, and what was there before it."""
    with Peak() as peak:
        model: Any = build(args.shape, args.vocab, None, args.rank, torch.bfloat16).to(DEVICE).train()
        model, optimizer = prepare(model, args)
        ids = torch.randint(0, args.vocab, (args.batch, args.seq_len), device=DEVICE)
        before = 0
        for step in range(2):
            if step == 1:
                peak.from_now_on()
                before = peak.held()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"peak_gib": round(peak.bytes / GIB, 3), "before_gib": round(before / GIB, 3)}


def _adamw(model: Any, args: argparse.Namespace) -> Any:
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)


def _rso(model: Any, args: argparse.Namespace) -> Any:
    config = rso_ds.RSOConfig(rank=args.rank)
    rso_ds.convert(model, config)
    return model, rso_ds.RSO(model, config)


def _lora(model: Any, args: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)


def _galore(model: Any, args: argparse.Namespace) -> Any:
    from galore_torch import GaLoreAdamW

    linear = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    ids = {id(p) for p in linear}
    others = [p for p in model.parameters() if id(p) not in ids]
    galore = {"params": linear, "rank": args.rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return model, GaLoreAdamW([{"params": others}, galore], lr=1e-3)


METHODS = {"AdamW": _adamw, "LoRA": _lora, "GaLore": _galore, "RSO": _rso}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("blocks", "kept", "speed", "peak"))
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="llama-7b")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    {"blocks": blocks, "kept": kept, "speed": speed, "peak": peak}[args.what](args)


if __name__ == "__main__":
    main()
