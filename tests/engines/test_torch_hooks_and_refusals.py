"""DDP hooks and set-ups on two real ranks: the dense hook is exact, and what cannot work says so on both ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.environment import needs
from support.ranks import Cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rso_ds
from rso_ds.comm import BucketCompression, DenseSubspace

needs("deepspeed")


MESSAGES = {
    "bare model": "there are 2 ranks and the model is not wrapped",
    "fsdp1": "FSDP1) reduces the flat gradient of a whole unit, frozen W included",
    "registered twice": "has the communication hook compress_hook already",
    "mixed hooks": "has the communication hook dense_subspace_hook already",
    "local steps with a hook": "has the communication hook compress_hook already",
    "compress_hook on a dense model": "this one has no RSO layer",
    "dense hook on a converted model": "the model is converted: its gradients are r x n already",
    "hook on a bare model": "belong to DistributedDataParallel, and this is LlamaForCausalLM",
    "hook on fsdp2": "belong to DistributedDataParallel, and this is FSDPLlamaForCausalLM",
    "hook on a zero engine": "a DeepSpeed engine reduces gradients itself",
    "dense hook on a zero engine": "a DeepSpeed engine reduces gradients itself",
    "feedback with gaussian": "error_feedback needs orthonormal columns",
    "unknown dtype": "dtype must be one of bf16, int8, got 'int4'",
    "mixed dtypes": "FSDP2 needs one dtype for the trainable parameters of a unit",
    "half a mesh": "the mesh of fully_shard covers 1 of 2 ranks",
    "sharded by columns": "RSO needs fully_shard's Shard(0)",
    "local steps without replicas": "needs replicas that step apart",
    "local steps in deepspeed": "'communicate': 'boundary' cannot come into effect",
    "replicas of other rows": "replicas= joins ranks that hold the pieces [0, 1]",
    "replicas without shards": "replicas= is for models that fully_shard has cut",
    "unequal rank in the training engine": "ranks disagree on the RSO configuration",
    "unequal configuration": "ranks disagree on the RSO configuration",
    "unequal code": "ranks disagree on the code of rso_ds: 0000000000000000 on rank 0, 0000000000000001 on rank 1",
    "unequal weights": "ranks hold different bits of model.layers.1.mlp.up_proj.weight",
    "drifted under ddp": "ranks hold different bits of model.embed_tokens.weight (1 of",
    "drifted under hsdp": "ranks hold different bits of lm_head.weight (",
    "to_dense under fsdp2": "use rso_ds.checkpoint.dense_state_dict or save_dense",
}


@pytest.fixture(scope="module")
def results(pools):
    return Cases(pools, "torch_refusals")


@pytest.mark.parametrize("name", MESSAGES)
def test_refused_on_every_rank(results, name):
    for rank, message in enumerate(results.ranks(f"refused: {name}")):
        assert MESSAGES[name] in message, f"rank {rank}: {message}"
        assert message.startswith("RSO")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_gradients_that_no_step_has_used_are_not_left_behind_by_a_save(results, engine):
    for said in results.ranks(f"unused gradients: {engine}"):
        unused = {when for when, message in said.items() if "no optimizer step has used yet" in message}
        assert unused == {"after a backward pass", "added to what a step has used", "of one rank"}
        assert {message for when, message in said.items() if when not in unused} == {"NOT REFUSED"}


def test_every_attempt_has_its_message():
    from workers.torch_refusals import REFUSED

    assert set(REFUSED) == set(MESSAGES)


@pytest.mark.parametrize(
    "name",
    [
        "haar", "coordinate", "gaussian", "uneven, shared by shape", "haar with feedback", "coordinate with feedback",
        "GPT-2", "tied embeddings",
    ],
)  # fmt: skip
def test_dense_hook_sends_g_p_and_returns_the_projected_mean(results, name):
    """Three draws of P; relative to the largest entry of each gradient."""
    assert max(results.ranks(f"dense hook: {name}")) < 2e-5


def test_dense_hook_agrees_with_the_converted_model(results):
    assert max(results.ranks("module mode")) < 2e-5


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_hooks_are_refused_for_one_rank(one_rank):
    model = nn.Sequential(nn.Linear(4, 4))
    config = rso_ds.RSOConfig(rank=2, targets=["0"])
    with pytest.raises(rso_ds.RSOUnsupportedError, match="there is one rank and nothing to exchange"):
        DenseSubspace(DistributedDataParallel(model), config)
    rso_ds.convert(model, config)
    with pytest.raises(rso_ds.RSOUnsupportedError, match="there is one rank and nothing to exchange"):
        BucketCompression(DistributedDataParallel(model))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_local_steps_of_one_rank_are_ordinary_steps(one_rank, momentum):
    """Without outer momentum nothing differs; with it W moves further, so the option does act."""

    def train(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        config = rso_ds.RSOConfig(rank=2, targets=["0", "2"], interval=3, lr=1e-2, form="two_path", **options)
        rso_ds.convert(model, config)
        model = DistributedDataParallel(model)
        optimizer = rso_ds.RSO(model, config)
        for i in range(9):
            optimizer.zero_grad()
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i)).double()
            model(x).square().sum().backward()
            optimizer.step()
        return rso_ds.to_dense(model.module).state_dict()

    plain, apart = train(), train(communicate="boundary", outer_momentum=momentum)
    assert all(torch.equal(plain[name], apart[name]) for name in plain) == (momentum == 0.0)


def test_error_feedback_keeps_what_rounding_loses_and_forgets_an_overflow():
    """What int8 sends plus what it keeps is the gradient, to fp32 rounding; an inf does not stay behind."""
    from rso_ds.comm.compression import _quantize, _restore
    from rso_ds.comm.ddp_hooks import forget_overflow_

    gradient = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    codes, scales = _quantize(gradient)
    sent = _restore(codes, scales)
    assert codes.dtype == torch.int8
    assert (sent - gradient).abs().max() <= scales.max() / 2 * 1.001
    assert (sent - gradient).abs().max() > 1e-4
    gradient[0, 3] = torch.inf
    kept = forget_overflow_(gradient - _restore(*_quantize(gradient)))
    assert kept.isfinite().all()


def test_a_replica_that_leaves_a_step_out_keeps_the_schedule_and_its_own_counts(results):
    first, second = results.ranks("one poisoned replica")
    assert first["lrs"] == second["lrs"]
    assert (first["skipped"], second["skipped"]) == (0, 1)
    assert max(first["steps"]) == max(second["steps"]) + 1
    for result in (first, second):
        assert result["loaded"] == result["steps"]


def test_state_with_other_keepers_is_refused(one_rank):
    def optimizer(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6))
        config = rso_ds.RSOConfig(rank=2, targets=["0"], communicate="boundary", **options)
        rso_ds.convert(model, config)
        return rso_ds.RSO(DistributedDataParallel(model), config)

    with_momentum, without = optimizer(outer_momentum=0.5), optimizer()
    with pytest.raises(rso_ds.RSOCheckpointError, match=r"has nothing beside W, this run keeps \['outer_momentum'\]"):
        with_momentum.load_state_dict(without.state_dict())
    with pytest.raises(rso_ds.RSOCheckpointError, match=r"has \['outer_momentum'\] beside W, this run keeps nothing"):
        without.load_state_dict(with_momentum.state_dict())
