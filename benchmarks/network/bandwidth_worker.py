"""One rank of bandwidth.py: builds every method once, then times them as it is told on standard input.

Commands and answers are lines of JSON, so that the parent can change the link between two passes of one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import rso_ds
from rso_ds.comm import DenseSubspace, dense_subspace_hook, install
from rso_ds.errors import RSOConfigError, RSOConversionError
from rso_ds.models import llama_config

LR = 1e-3
GALORE_GAP = 200  # its default; the only SVD of a run then falls into the warm-up
# DDP rebuilds its buckets after the first step and PowerSGD's first two steps are dense.
WARM_UP = 4
PROBE_MIB = 8

Built = tuple[DistributedDataParallel, torch.optim.Optimizer]


class LeftOut(Exception):
    """A method that cannot run here; the message is the row's reason."""


def adamw(model: nn.Module, rank: int) -> Built:
    return DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)


def galore(model: nn.Module, rank: int) -> Built:
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise LeftOut(f"galore-torch is not installed ({error})") from None
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    ids = {id(p) for p in linear}
    others = [p for p in model.parameters() if id(p) not in ids]
    group = {"params": linear, "rank": rank, "update_proj_gap": GALORE_GAP, "scale": 0.25, "proj_type": "std"}
    return DistributedDataParallel(model), GaLoreAdamW([{"params": others}, group], lr=LR, no_deprecation_warning=True)


def powersgd(model: nn.Module, rank: int) -> Built:
    # The hook blocks one of gloo's two threads for each bucket while it waits for its next exchange, and buckets
    # may then exchange in another order on the other rank: only a single bucket is safe.
    one_bucket = 1 + sum(p.numel() * p.element_size() for p in model.parameters()) // 2**20
    wrapped = DistributedDataParallel(model, bucket_cap_mb=one_bucket)
    state = PowerSGDState(process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    wrapped.register_comm_hook(state, powerSGD_hook)
    return wrapped, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)


def dense_subspace(model: nn.Module, rank: int) -> Built:
    wrapped, optimizer = adamw(model, rank)
    wrapped.register_comm_hook(DenseSubspace(wrapped, rso_ds.RSOConfig(rank=rank)), dense_subspace_hook)
    return wrapped, optimizer


def rso(model: nn.Module, rank: int, targets: Any = "default") -> Built:
    try:
        config = rso_ds.RSOConfig(lr=LR, rank=rank, targets=targets)
        rso_ds.convert(model, config)
    except (RSOConfigError, RSOConversionError) as error:
        raise LeftOut(f"rso_ds refuses it: {error}") from None
    wrapped = DistributedDataParallel(model)
    return wrapped, rso_ds.RSO(wrapped, config)


def rso_everywhere(model: nn.Module, rank: int) -> Built:
    return rso(model, rank, ["default", "embeddings", "head"])


# Name -> (how to build it, hidden size divided by the rank).
METHODS: dict[str, tuple[Callable[[nn.Module, int], Built], int]] = {
    "AdamW": (adamw, 16),
    "GaLore h/16": (galore, 16),
    "PowerSGD h/16": (powersgd, 16),
    "AdamW, DenseSubspace h/16": (dense_subspace, 16),
    "RSO h/4": (rso, 4),
    "RSO h/16": (rso, 16),
    "RSO h/16, embeddings and head too": (rso_everywhere, 16),
}


def sent_bytes() -> int:
    """Bytes that have left this namespace's link, with all headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == os.environ["GLOO_SOCKET_IFNAME"]:
            return int(numbers.split()[8])
    raise RuntimeError(f"no device {os.environ['GLOO_SOCKET_IFNAME']} in this namespace.")


class Method:
    def __init__(self, name: str, shape: str, vocab: int) -> None:
        build, part = METHODS[name]
        torch.manual_seed(0)
        config = llama_config(shape, vocab)
        self.model, self.optimizer = build(
            AutoModelForCausalLM.from_config(config, dtype=torch.float32), config.hidden_size // part
        )
        self.model.train()
        self.vocab = vocab
        # All methods see the same tokens in the same order; each rank has its own.
        self.generator = torch.Generator().manual_seed(dist.get_rank())
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self, batch: int, seq_len: int) -> float:
        ids = torch.randint(self.vocab, (batch, seq_len), generator=self.generator)
        start = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def run(self, steps: int, batch: int, seq_len: int) -> dict[str, Any]:
        """Times of some steps, processor time, bytes handed to collectives by kind, bytes on the wire."""
        counter = install()
        dist.barrier()
        counted, sent = counter.by_kind(), sent_bytes()
        busy = time.process_time()
        seconds = [self.step(batch, seq_len) for _ in range(steps)]
        busy = time.process_time() - busy
        after = counter.by_kind()
        dist.barrier()
        return {
            "seconds": seconds,
            "cpu": busy,
            "counted": {kind: after[kind] - counted[kind] for kind in after},
            "sent": sent_bytes() - sent,
        }


def probe() -> float:
    """Mbit/s at which one all_reduce of an idle machine really sends: what the shaping amounts to."""
    data = torch.zeros(PROBE_MIB * 2**18)
    dist.all_reduce(data)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(data)
    return data.numel() * 32 / (time.perf_counter() - start) / 1e6


def build_all(names: list[str], shape: str, vocab: int) -> tuple[dict[str, Method], dict[str, str]]:
    methods, left_out = {}, {}
    for name in names:
        try:
            methods[name] = Method(name, shape, vocab)
        except LeftOut as reason:
            left_out[name] = str(reason)
    return methods, left_out


def one_pass(methods: dict[str, Method], order: dict[str, Any]) -> dict[str, Any]:
    rate = probe()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in order["methods"]}
    for index in range(order["rounds"]):
        # Another method goes first in each round, so that none is always the one after the slowest.
        shift = index % len(order["methods"])
        for name in order["methods"][shift:] + order["methods"][:shift]:
            gc.collect()
            runs[name].append(methods[name].run(order["steps"], order["micro_batch"], order["seq_len"]))
    return {"mbit": rate, "runs": runs}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    # Libraries print to standard output too; the parent reads nothing but our answers there.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    install()
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    methods: dict[str, Method] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "build":
            methods, left_out = build_all(order["methods"], order["model"], order["vocab"])
            for method in methods.values():
                method.run(WARM_UP, order["micro_batch"], order["seq_len"])
            trainable = {name: method.trainable for name, method in methods.items()}
            answer: dict[str, Any] = {"trainable": trainable, "left_out": left_out}
        else:
            answer = one_pass(methods, order)
        answers.write(json.dumps(answer) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
