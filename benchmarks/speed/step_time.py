"""Time of a whole training step: AdamW, LoRA, GaLore, APOLLO and RSO in each form, by turns in the same processes.

    torchrun --nproc-per-node 2 benchmarks/speed/step_time.py --model llama-35m --engine zero2 --json step.json
    torchrun --nproc-per-node 2 benchmarks/speed/step_time.py --engine ddp --methods AdamW GaLore "RSO folded haar"

A step is forward, backward, exchange and optimizer; RSO's boundaries fall where they fall (``--interval``). Each method
takes ``--steps`` steps in a round, and another one goes first in each. GaLore and APOLLO work on matrices and run under
``ddp`` only. Kept bytes are what forward keeps for backward. Peak is the most that a rank holds in its second step
above what was there before the method: of CUDA's allocator, on a CPU of all storages that torch makes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import rso_ds
from rso_ds.comm import install
from rso_ds.models import LLAMA_SHAPES, llama_config
from rso_ds.planning.memory.kept import KeptRecorder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory"))
from peak import Peak

LR = 1e-3
CUDA = torch.cuda.is_available()
# Name -> (kind, options).
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adamw", {}),
    "LoRA": ("lora", {}),
    "GaLore": ("galore", {}),
    "APOLLO": ("apollo", {}),
    **{
        f"RSO {form.replace('_', '-')} {sampler}": ("rso", {"form": form, "sampler": sampler})
        for form in ("two_path", "folded")
        for sampler in ("haar", "coordinate")
    },
}
MATRICES = ("galore", "apollo")  # their optimizers need whole matrices


class Method:
    """One model with its optimizer under one engine; ``step`` takes one optimizer step on one micro batch."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device) -> None:
        kind, options = METHODS[name]
        torch.manual_seed(0)
        shape = llama_config(args.model, args.vocab)
        if args.layers:
            shape.num_hidden_layers = args.layers
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=dtype).to(device).train()
        if args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rank = max(1, round(args.rank_ratio * shape.hidden_size))
        config = rso_ds.RSOConfig(lr=LR, rank=rank, interval=args.interval, torch_adam=torch_adam(args), **options)
        if kind == "lora":
            model = lora(model, rank)
        self.vocab, self.device = args.vocab, device
        self.generator = torch.Generator().manual_seed(dist.get_rank())
        self.forward: Any
        if args.engine == "ddp":
            self._under_ddp(kind, model, config, rank)
        else:
            self._under_deepspeed(kind, model, config, args)
        self.model = model

    def _under_ddp(self, kind: str, model: nn.Module, config: rso_ds.RSOConfig, rank: int) -> None:
        if kind == "rso":
            rso_ds.convert(model, config)
        self.forward = DistributedDataParallel(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        if kind == "rso":
            optimizer: Any = rso_ds.RSO(self.forward, config)
        elif kind in MATRICES:
            optimizer = projected(kind, model, rank)
        else:
            optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)

        def finish(loss: torch.Tensor) -> None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        self.finish: Callable[[torch.Tensor], None] = finish

    def _under_deepspeed(self, kind: str, model: nn.Module, config: rso_ds.RSOConfig, args: argparse.Namespace) -> None:
        import deepspeed

        from rso_ds.engines.deepspeed.attach import count_traffic

        setup: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": args.batch,
            "zero_optimization": {"stage": int(args.engine[-1]), "reduce_bucket_size": 5e7},
            "bf16": {"enabled": args.bf16},
        }
        if kind == "rso":
            keys = ("lr", "rank", "interval", "torch_adam", "form", "sampler")
            setup["optimizer"] = {"type": "RSO", "params": {key: getattr(config, key) for key in keys}}
            engine = rso_ds.initialize(model=model, config=setup)[0]
        else:
            params = {"lr": LR, "weight_decay": 0.0, "torch_adam": torch_adam(args)}
            setup["optimizer"] = {"type": "AdamW", "params": params}
            trained = [p for p in model.parameters() if p.requires_grad]
            engine = deepspeed.initialize(model=model, model_parameters=trained, config=setup)[0]
            count_traffic(engine)
        self.forward = engine

        def finish(loss: torch.Tensor) -> None:
            engine.backward(loss)
            engine.step()

        self.finish = finish

    def step(self, batch: int, seq_len: int) -> float:
        ids = torch.randint(self.vocab, (batch, seq_len), generator=self.generator).to(self.device)
        start = now()
        self.finish(self.forward(input_ids=ids, labels=ids, use_cache=False).loss)
        return now() - start

    def kept(self, batch: int, seq_len: int) -> int:
        ids = torch.randint(self.vocab, (batch, seq_len), generator=self.generator).to(self.device)
        with KeptRecorder(self.model) as recorder:
            loss = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
        self.finish(loss)
        return recorder.total


def torch_adam(args: argparse.Namespace) -> bool:
    """Whether DeepSpeed is to take torch's Adam: its own kernel is built by a CUDA toolkit."""
    return args.torch_adam or not CUDA


def lora(model: nn.Module, rank: int) -> nn.Module:
    """Adapters on the block's linear layers; embeddings, norms and head train, as under RSO."""
    from peft import LoraConfig, get_peft_model

    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"})
    trained = {id(p) for n, p in model.named_parameters() if not any(f"{name}.weight" in n for name in names)}
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    for p in adapted.parameters():
        if id(p) in trained:
            p.requires_grad_(True)
    return adapted


def projected(kind: str, model: nn.Module, rank: int) -> Any:
    inside = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    ids = {id(p) for p in inside}
    rest = {"params": [p for p in model.parameters() if id(p) not in ids]}
    group: dict[str, Any] = {"params": inside, "rank": rank, "update_proj_gap": 200, "proj_type": "std"}
    if kind == "galore":
        from galore_torch import GaLoreAdamW

        return GaLoreAdamW([rest, {**group, "scale": 0.25}], lr=LR, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW([rest, {**group, "scale": 1.0, "scale_type": "channel", "proj": "random"}], lr=LR)


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    names = [n for n in args.methods if args.engine == "ddp" or METHODS[n][0] not in MATRICES]
    counter = install()
    methods, rows = {}, {}
    for name in names:
        gc.collect()
        with Peak() as peak:
            methods[name] = method = Method(name, args, device)
            method.step(args.batch, args.seq_len)
            peak.from_now_on()
            method.step(args.batch, args.seq_len)
        kept = method.kept(args.batch, args.seq_len)
        for _ in range(args.warm_up):
            method.step(args.batch, args.seq_len)
        trained = sum(p.numel() for p in method.model.parameters() if p.requires_grad)
        rows[name] = {
            "method": name, "kept_bytes": kept, "peak_bytes": peak.bytes, "trained": trained, "seconds": [], "sent": [],
        }  # fmt: skip
    for index in range(args.rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            dist.barrier()
            before = counter.by_kind()["gradient"]
            rows[name]["seconds"] += [methods[name].step(args.batch, args.seq_len) for _ in range(args.steps)]
            rows[name]["sent"].append((counter.by_kind()["gradient"] - before) / args.steps)
    return list(rows.values())


def table(rows: list[dict[str, Any]], tokens: int) -> str:
    dense = statistics.median(rows[0]["seconds"])
    head = [
        "s a step",
        f"of {rows[0]['method']}",
        "tokens/s a rank",
        "kept, MB",
        "peak, MB",
        "gradient MB sent",
        "trained",
    ]
    lines = ["| method | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for r in rows:
        times = sorted(r["seconds"])
        middle = statistics.median(times)
        quarter = len(times) // 4
        cells = [
            f"{middle:.3f} ({times[quarter]:.3f}-{times[-1 - quarter]:.3f})", f"{middle / dense:.3f}",
            f"{tokens / middle:,.0f}", f"{r['kept_bytes'] / 1e6:.0f}", f"{r['peak_bytes'] / 1e6:.0f}",
            f"{statistics.mean(r['sent']) / 1e6:.1f}",
            f"{r['trained'] / 1e6:.2f} M",
        ]  # fmt: skip
        lines.append(f"| {r['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LLAMA_SHAPES, default="llama-35m")
    parser.add_argument("--engine", choices=["ddp", "zero0", "zero1", "zero2", "zero3"], default="zero2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank-ratio", type=float, default=0.25, help="rank / hidden size, of all that have one")
    parser.add_argument("--layers", type=int, help="blocks, if not as many as the model has")
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="steps of a method in a round")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--torch-adam", action="store_true", help="on a GPU too, where a CUDA toolkit can build the fused one"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if CUDA else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    rows = measure(args, device)
    if dist.get_rank() == 0:
        name = torch.cuda.get_device_name() if CUDA else platform.machine()
        print(f"{name}, {dist.get_world_size()} ranks\n\n{table(rows, args.batch * args.seq_len)}")
        if args.json:
            setup = {k: v for k, v in vars(args).items() if k != "json"}
            found = {"device": name, "ranks": dist.get_world_size(), "torch": torch.__version__, "setup": setup}
            args.json.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
