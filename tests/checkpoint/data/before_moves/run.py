"""A small run that is saved in the middle of a subspace and goes on: what has written the files beside this one.

    python run.py write FOLDER KIND       train SAVED steps, save, train on; the losses of the steps after that
    python run.py continue FOLDER KIND    load what ``write`` has saved, train on; the losses again

KIND: "checkpoint" (of ``RSO.checkpointer``), "state_dict" (``torch.save`` of those of model and optimizer), or "zero2"
(``engine.save_checkpoint`` of a DeepSpeed engine, in two processes with RANK and so on set). Losses come as a line of
JSON, of rank 0, in hexadecimal, with what their last bits depend on beside the code.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import rso_ds

SAVED, STEPS, BATCH = 6, 14, 8
OPTIONS = {
    "lr": 1e-2, "rank": 3, "interval": 4, "form": "two_path", "weight_decay": 0.1, "targets": ["*"],
    "torch_adam": True,
}  # fmt: skip


def machine():
    """Matrix products and QR add in an order that the libraries choose by processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), names[0] if names else ""]


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 7))


def batch(step):
    """Inputs [BATCH, 12] and targets [BATCH, 7]."""
    numbers = torch.randn(BATCH, 19, generator=torch.Generator().manual_seed(step))
    return numbers[:, :12], numbers[:, 12:]


class Single:
    """One process; ``kind`` "checkpoint" or "state_dict"."""

    def __init__(self, kind):
        self.kind, self.model = kind, model_of()
        config = rso_ds.RSOConfig(**OPTIONS)
        rso_ds.convert(self.model, config)
        self.optimizer = rso_ds.RSO(self.model, config)

    def step(self, number):
        x, y = batch(number)
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, folder):
        if self.kind == "checkpoint":
            self.optimizer.checkpointer().save(folder / "checkpoint", f"step{SAVED}")
        else:
            parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(parts, folder / "state_dict.pt")

    def load(self, folder):
        if self.kind == "checkpoint":
            self.optimizer.checkpointer().load(folder / "checkpoint")
        else:
            parts = torch.load(folder / "state_dict.pt", weights_only=True)
            self.model.load_state_dict(parts["model"])
            self.optimizer.load_state_dict(parts["optimizer"])


class Zero2:
    """One of several ranks, each with its share of the batch."""

    def __init__(self):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
        world = int(os.environ["WORLD_SIZE"])
        config = {
            "train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH // world,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
            "optimizer": {"type": "RSO", "params": OPTIONS},
        }  # fmt: skip
        self.engine, *_ = rso_ds.initialize(model=model_of(), config=config)
        self.mine = slice(int(os.environ["RANK"]) * BATCH // world, (int(os.environ["RANK"]) + 1) * BATCH // world)

    def step(self, number):
        x, y = batch(number)
        loss = nn.functional.mse_loss(self.engine(x[self.mine]), y[self.mine])
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def save(self, folder):
        self.engine.save_checkpoint(folder / "zero2")

    def load(self, folder):
        self.engine.load_checkpoint(folder / "zero2")


def main(action, folder, kind):
    torch.set_num_threads(1)
    run = Zero2() if kind == "zero2" else Single(kind)
    if action == "write":
        for number in range(SAVED):
            run.step(number)
        run.save(Path(folder))
    else:
        run.load(Path(folder))
    losses = [run.step(number).hex() for number in range(SAVED, STEPS)]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"machine": machine(), "losses": losses}), flush=True)
    rso_ds.comm.leave_process_groups()


if __name__ == "__main__":
    main(*sys.argv[1:])
