"""One rank of two: the hook for dense models against hand-projected gradients, and everything that must be refused."""

import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import rso_ds
from rso_ds.comm import (
    BucketCompression,
    DenseSubspace,
    agreement,
    compress_hook,
    dense_subspace_hook,
    install,
)
from rso_ds.comm.rank_context import RankContext
from rso_ds.layers import rso_layers
from rso_ds.recipes.training.torch_engine import TorchEngine
from rso_ds.subspace import dense_projection, sample_projection

TOKENS = ["default", "embeddings", "head"]
CONFIG = rso_ds.RSOConfig(rank=5, interval=2, eps=1e-6)
LOCAL = rso_ds.RSOConfig(rank=5, interval=2, eps=1e-6, communicate="boundary")


def gpt2():
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape, **no_dropout))


def gradients_of(model, step, rank):
    model.zero_grad()
    ids = tiny_llama.tokens(step, 4)[2 * rank : 2 * rank + 2]
    tiny_llama.loss_of(model, ids).backward()
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return {n: p.grad.clone() for n, p in bare.named_parameters() if p.grad is not None}


def mean(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def dense_hook(make, config, feedback, steps=6):
    """Largest relative difference between the hook's gradients and G P P^T (Q Q^T with feedback) made by hand."""
    rank = dist.get_rank()
    plain, hooked = make(), DistributedDataParallel(make(), bucket_cap_mb=0.02)
    state = DenseSubspace(hooked, config, error_feedback=feedback)
    hooked.register_comm_hook(state, dense_subspace_hook)
    layer_of = state.subspaces
    errors, worst = {}, 0.0
    before = install().total("gradient")
    rng = torch.get_rng_state()
    for step in range(steps):
        own = gradients_of(plain, step, rank)
        got = gradients_of(hooked, step, rank)
        for name, g in own.items():
            if name in layer_of:
                space = layer_of[name]
                draw = step // config.interval
                p = sample_projection(config.sampler, config.seed, space.name, draw, space.in_features, space.rank)
                p = dense_projection(p, space.in_features).to(g.dtype)
                g = g.t() if name in state.transposed else g
                scale = space.rank / space.in_features if feedback else 1.0
                g = g + errors.get(name, 0.0)
                if feedback:
                    errors[name] = g - scale * (g @ p) @ p.t()
                expected = scale * (mean(g) @ p) @ p.t()
                expected = expected.t() if name in state.transposed else expected
            else:
                expected = mean(g)
            worst = max(worst, ((got[name] - expected).abs().max() / expected.abs().max()).item())
    sent = sum(
        (p.numel() if n not in layer_of else layer_of[n].rank * (p.numel() // layer_of[n].in_features)) * 4
        for n, p in plain.named_parameters()
    )
    assert install().total("gradient") - before == sent * steps == state.sent_bytes
    assert torch.equal(rng, torch.get_rng_state())
    assert state.compression_stats()[0] > 1.5
    again = pickle.loads(pickle.dumps(state))
    with pytest.raises(rso_ds.RSOUnsupportedError, match="bind"):
        dense_subspace_hook(again, None)
    again.bind(DistributedDataParallel(make()))
    assert again.sent_bytes == state.sent_bytes
    return worst


def same_as_module_mode():
    """The hook's gradient of W is B.grad P^T of the converted model at the same point."""
    rank = dist.get_rank()
    hooked = DistributedDataParallel(tiny_llama.build())
    hooked.register_comm_hook(DenseSubspace(hooked, CONFIG), dense_subspace_hook)
    converted = tiny_llama.build()
    rso_ds.convert(converted, CONFIG)
    wrapped = DistributedDataParallel(converted)
    dense, low = gradients_of(hooked, 0, rank), gradients_of(wrapped, 0, rank)
    worst = 0.0
    for name, layer in rso_layers(converted):
        lifted = low[f"{name}.B"] @ layer.subspace.P.t()
        worst = max(worst, ((dense[f"{name}.weight"] - lifted).abs().max() / lifted.abs().max()).item())
    return worst


def converted():
    model = tiny_llama.build()
    rso_ds.convert(model, CONFIG)
    return model


def sharded(**options):
    model = converted()
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def twice():
    model = DistributedDataParallel(converted())
    model.register_comm_hook(BucketCompression(model), compress_hook)
    BucketCompression(model)


def mixed_hooks():
    model = DistributedDataParallel(tiny_llama.build())
    model.register_comm_hook(DenseSubspace(model, CONFIG), dense_subspace_hook)
    BucketCompression(model)


def local_steps_with_a_hook():
    model = DistributedDataParallel(converted())
    model.register_comm_hook(BucketCompression(model), compress_hook)
    rso_ds.RSO(model, LOCAL)


def mixed_dtypes():
    model = converted()
    model.model.layers[0].input_layernorm.weight.data = model.model.layers[0].input_layernorm.weight.data.bfloat16()
    for block in model.model.layers:
        fully_shard(block)
    rso_ds.RSO(fully_shard(model), CONFIG)


def drifted(wrap, change):
    """Rank 1 changes something after the first step; the boundary at the second must notice."""
    model = wrap(converted())
    optimizer = rso_ds.RSO(model, CONFIG)
    for step in range(2):
        tiny_llama.loss_of(model, tiny_llama.tokens(step, 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 1 and step == 0:
            with torch.no_grad():
                change(model, optimizer)


def drift_dense(model, optimizer):
    model.module.model.embed_tokens.weight[0, 0] += 1e-3


def drift_moment(model, optimizer):
    optimizer.state[model.lm_head.weight]["exp_avg_sq"]._local_tensor[0, 0] += 1e-3


def replicas(model):
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    return fully_shard(model, mesh=mesh)


def half_a_mesh():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    rso_ds.RSO(sharded(mesh=mesh["shards"]), CONFIG)


def by_columns():
    """P cannot be applied to columns of W; B, of 5 columns, is left cut by rows."""
    model = converted()
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] == 32 else Shard(0))
    rso_ds.RSO(model, CONFIG)


def zero_engine(hook):
    import deepspeed

    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer}
    engine, *_ = deepspeed.initialize(model=tiny_llama.build(), config=config)
    hook(engine)


def local_steps_in_deepspeed():
    params = {"rank": 5, "communicate": "boundary", "torch_adam": True}
    rso_ds.initialize(
        model=tiny_llama.build(),
        config={"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "RSO", "params": params}},
    )


def unequal_config():
    config = rso_ds.RSOConfig(rank=5, seed=dist.get_rank())
    model = tiny_llama.build()
    rso_ds.convert(model, config)
    rso_ds.RSO(DistributedDataParallel(model), config)


def unequal_rank():
    """DDP's own check of shapes would come first, in words about tensors."""
    params = {"rank": 5 + dist.get_rank()}
    ds_json = {"gradient_accumulation_steps": 1, "optimizer": {"type": "RSO", "params": params}}
    TorchEngine(tiny_llama.build(), ds_json, "ddp", RankContext(dist.get_rank(), 0, 2, False))


def one_poisoned_replica(folder):
    """Local steps; rank 1 leaves one step out, saves, and goes on from there: lrs and step counts of a rank."""
    rank = dist.get_rank()
    params = {"rank": 5, "interval": 3, "communicate": "boundary", "weight_decay": 0.1}
    schedule = {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "linear"}
    ds_json = {
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "RSO", "params": params},
        "scheduler": {"type": "WarmupLR", "params": schedule},
    }

    def start():
        return TorchEngine(tiny_llama.build(), ds_json, "ddp", RankContext(rank, rank, 2, False))

    engine = start()
    for step in range(7):
        loss = tiny_llama.loss_of(engine, tiny_llama.tokens(step, 4)[2 * rank : 2 * rank + 2])
        engine.backward(loss * (float("nan") if step == 1 and rank == 1 else 1.0))
        engine.step()
    engine.checkpoints.save(folder, "one")
    again = start()
    again.checkpoints.load(folder)

    def steps(engine):
        return [int(s["step"]) for s in engine.optimizer.state.values()]

    return {
        "lrs": [group["lr"] for group in engine.optimizer.param_groups],
        "skipped": engine.skipped_steps,
        "steps": steps(engine),
        "loaded": steps(again),
    }


def unused_gradients(wrap, folder):
    """What saves say, by situation, on this rank."""
    model = wrap(converted())
    optimizer = rso_ds.RSO(model, CONFIG)
    checkpoints = optimizer.checkpointer()
    said = {}

    def backward():
        tiny_llama.loss_of(model, tiny_llama.tokens(0, 2)).backward()

    def save(when):
        said[when] = message_of(lambda: checkpoints.save(folder, when.replace(" ", "_")))

    save("before all")
    backward()
    save("after a backward pass")
    backward()
    optimizer.step()
    save("after a step")
    backward()
    save("added to what a step has used")
    optimizer.zero_grad()
    save("dropped")
    backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    save("set to zero")
    if dist.get_rank() == 1:
        grad = next(p.grad for p in model.parameters() if p.grad is not None)
        (grad if wrap is DistributedDataParallel else grad._local_tensor).add_(1)
    save("of one rank")
    return said


def unequal_code():
    real = agreement.code_digest
    agreement.code_digest = lambda: f"{dist.get_rank():016x}"
    try:
        rso_ds.RSO(DistributedDataParallel(converted()), CONFIG)
    finally:
        agreement.code_digest = real


def unequal_weights():
    model = DistributedDataParallel(converted())
    if dist.get_rank() == 1:
        model.module.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    rso_ds.RSO(model, CONFIG)


REFUSED = {
    "bare model": lambda: rso_ds.RSO(converted(), CONFIG),
    "fsdp1": lambda: rso_ds.RSO(
        FullyShardedDataParallel(converted(), device_id=torch.device("cpu"), use_orig_params=True), CONFIG
    ),
    "registered twice": twice,
    "mixed hooks": mixed_hooks,
    "local steps with a hook": local_steps_with_a_hook,
    "compress_hook on a dense model": lambda: BucketCompression(DistributedDataParallel(tiny_llama.build())),
    "dense hook on a converted model": lambda: DenseSubspace(DistributedDataParallel(converted()), CONFIG),
    "hook on a bare model": lambda: BucketCompression(converted()),
    "hook on fsdp2": lambda: BucketCompression(sharded()),
    "hook on a zero engine": lambda: zero_engine(BucketCompression),
    "dense hook on a zero engine": lambda: zero_engine(lambda engine: DenseSubspace(engine, CONFIG)),
    "feedback with gaussian": lambda: DenseSubspace(
        DistributedDataParallel(tiny_llama.build()), rso_ds.RSOConfig(rank=5, sampler="gaussian"), error_feedback=True
    ),
    "unknown dtype": lambda: BucketCompression(DistributedDataParallel(converted()), "int4"),
    "mixed dtypes": mixed_dtypes,
    "half a mesh": half_a_mesh,
    "sharded by columns": by_columns,
    "local steps without replicas": lambda: rso_ds.RSO(sharded(), LOCAL),
    "local steps in deepspeed": local_steps_in_deepspeed,
    "replicas of other rows": lambda: rso_ds.RSO(sharded(), LOCAL, replicas=dist.group.WORLD),
    "replicas without shards": lambda: rso_ds.RSO(
        DistributedDataParallel(converted()), CONFIG, replicas=dist.group.WORLD
    ),
    "unequal rank in the training engine": unequal_rank,
    "unequal configuration": unequal_config,
    "unequal code": unequal_code,
    "unequal weights": unequal_weights,
    "drifted under ddp": lambda: drifted(DistributedDataParallel, drift_dense),
    "drifted under hsdp": lambda: drifted(replicas, drift_moment),
    "to_dense under fsdp2": lambda: rso_ds.to_dense(sharded()),
}

DENSE_HOOK = {
    "haar": (tiny_llama.build, {}, False),
    "coordinate": (tiny_llama.build, {"sampler": "coordinate"}, False),
    "gaussian": (tiny_llama.build, {"sampler": "gaussian"}, False),
    "uneven, shared by shape": (lambda: tiny_llama.build(85), {"share_projection": "shape"}, False),
    "haar with feedback": (tiny_llama.build, {}, True),
    "coordinate with feedback": (tiny_llama.build, {"sampler": "coordinate"}, True),
    "GPT-2": (gpt2, {}, False),
    "tied embeddings": (lambda: tiny_llama.build(tie=True), {"targets": TOKENS}, False),
}


def message_of(attempt):
    try:
        attempt()
    except rso_ds.RSOError as error:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return traceback.format_exc()
    return "NOT REFUSED"


def run(case: str, folder: Path) -> Any:
    """``case``: "refused: NAME", "dense hook: NAME", "unused gradients: ENGINE", "one poisoned replica" or
    "module mode"."""
    if case == "one poisoned replica":
        return one_poisoned_replica(folder / "poisoned")
    if case == "module mode":
        return same_as_module_mode()
    kind, _, name = case.partition(": ")
    if kind == "unused gradients":
        return unused_gradients({"ddp": DistributedDataParallel, "fsdp2": fully_shard}[name], folder / f"unused-{name}")
    if kind == "refused":
        return message_of(REFUSED[name])
    make, options, feedback = DENSE_HOOK[name]
    return dense_hook(make, rso_ds.RSOConfig(rank=5, interval=2, eps=1e-6, **options), feedback)
