"""RSO without DeepSpeed: one process, DistributedDataParallel, or FSDP2.

python examples/torch_ranks.py
torchrun --nproc-per-node 2 examples/torch_ranks.py --engine fsdp2
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import rso_ds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", default="none", choices=("none", "ddp", "fsdp2"))
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    device = torch.device("cpu")
    if args.engine != "none":
        dist.init_process_group()
        if torch.cuda.is_available():
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4
    )
    model: nn.Module = LlamaForCausalLM(shape).to(device)
    config = rso_ds.RSOConfig(lr=4e-3, dense_lr=1.6e-2, rank_ratio=0.25, interval=10)  # of a short run
    rso_ds.convert(model, config)  # first the subspaces, then the wrapper, then the optimizer
    if args.engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif args.engine == "fsdp2":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = rso_ds.RSO(model, config)

    generator = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        ids = ((torch.randint(256, (4, 1), generator=generator) + torch.arange(32)) % 256).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()  # at the end of an interval W takes B P^T in, and a new P is drawn
        optimizer.zero_grad()
        if step % 10 == 9 and rank == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}  subspace {optimizer.boundary.draw}", flush=True)
    if dist.is_initialized():
        rso_ds.comm.leave_process_groups()


if __name__ == "__main__":
    main()
