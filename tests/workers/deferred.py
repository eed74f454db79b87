"""One rank: models whose memory comes late (meta device and FSDP2) or in pieces (``deepspeed.zero.Init``)."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from support import tiny_llama
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

import rso_ds
from rso_ds.checkpoint import dense_state_dict
from rso_ds.layers import rso_layers

STEPS = 7


def fsdp2(meta: bool) -> dict[str, Any]:
    """``meta``: convert and shard before there is memory, then load; else the usual order. The steps are the same."""
    config = rso_ds.RSOConfig(lr=1e-2, rank=4, interval=3, form="two_path")
    values = tiny_llama.build().state_dict()
    if meta:
        with torch.device("meta"):
            model = tiny_llama.build()
    else:
        model = tiny_llama.build()
    rso_ds.convert(model, config)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    if meta:
        model.to_empty(device="cpu")
        for _, layer in rso_layers(model):
            layer.B.detach().to_local().fill_(1e17)
        model.load_state_dict({n: _like(v, model.state_dict()[n]) for n, v in values.items()})
        for name, buffer in tiny_llama.build().named_buffers():
            model.get_buffer(name).copy_(buffer)
    optimizer = rso_ds.RSO(model, config)
    ids = tiny_llama.tokens(0, 4).chunk(2)[dist.get_rank()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    shown = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in model.state_dict().items()}
    return {"shown": shown, "weights": dense_state_dict(model)}


def _like(value: torch.Tensor, target: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)


def zero_init(kind: str) -> dict[str, Any]:
    """Elements of a layer's W and B that this rank holds, and in whole, before DeepSpeed has built an engine."""
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=16))
        else:
            model = tiny_llama.build()
    held = rso_ds.convert(model, rso_ds.RSOConfig(rank=4)).layers
    return {
        name: [(p.data.numel(), p.ds_tensor.numel(), p.ds_numel) for p in (x.weight, x.B)] for name, x in held.items()
    }


def first_calls(_: None) -> list[str]:
    """In which order ``rso_ds.initialize`` chooses the device and calls collectives; on GPUs the first collective
    before the choice would run on device 0 of every rank."""
    accelerator = deepspeed.accelerator.get_accelerator()
    calls: list[str] = []

    def noting(name: str, inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return inner(*args, **kwargs)

        return call

    gather, set_device = dist.all_gather_object, accelerator.set_device
    dist.all_gather_object, accelerator.set_device = noting("collective", gather), noting("set_device", set_device)
    try:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "RSO", "params": {"rank": 4, "torch_adam": True}},
        }
        engine, *_rest = rso_ds.initialize(model=tiny_llama.build(), config=config)
    finally:
        dist.all_gather_object = gather
        del accelerator.set_device
    engine.destroy()
    return calls


WORK = {
    "first-calls": (first_calls, None),
    "fsdp2": (fsdp2, False),
    "fsdp2-meta": (fsdp2, True),
    "zero-init-gpt2": (zero_init, "gpt2"),
    "zero-init-llama": (zero_init, "llama"),
}


def run(case: str, _: Path) -> Any:
    act, argument = WORK[case]
    return act(argument)
