"""What the layer computes, what it keeps, and the modes it must be right in."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import rso_ds
from rso_ds.engines.replicated import ReplicatedLayout
from rso_ds.layers import merge_, merged_weight, subspace_linear
from rso_ds.planning.memory.live import LiveBytes
from rso_ds.weights import merge, outer_momentum
from rso_ds.weights.masters import WeightMasters

TOKENS, IN, OUT, RANK = 6, 10, 8, 3


def operands(dtype=torch.float64, batch=(2, 3)):
    g = torch.Generator().manual_seed(0)
    x, w, b, p, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((*batch, IN), (OUT, IN), (OUT, RANK), (IN, RANK), (OUT,))
    )
    return x.requires_grad_(), w, b.requires_grad_(), p, bias.requires_grad_()


def dense(x, w, b, p, bias):
    return nn.functional.linear(x, w + b @ p.t(), bias)


@pytest.mark.parametrize("batch", [(6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_equal_the_dense_formula(batch, with_bias):
    x, w, b, p, bias = operands(batch=batch)
    bias = bias if with_bias else None
    leaves = [t for t in (x, b, bias) if t is not None]
    y, expected = subspace_linear(x, w, b, p, bias), dense(x, w, b, p, bias)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    assert torch.autograd.gradcheck(subspace_linear, operands())


def test_double_backward_is_refused():
    x, w, b, p, bias = operands()
    (grad,) = torch.autograd.grad(subspace_linear(x, w, b, p, bias).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def converted(dtype=torch.float32, std=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, OUT, bias=False)).to(dtype)
    rso_ds.convert(model, rso_ds.RSOConfig(rank=RANK, targets=["*"]))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.B, std=std)
    return model


def saved_tensors(model, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    return y, kept


@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_x_P_and_references_only(autocast):
    """Kept: x P [tokens, r] and the very storages of weight, B and P. Never x, never a copy of W."""
    layer = converted()[0]
    x = torch.randn(2, 3, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _, kept = saved_tensors(layer, x)
    own = {t.untyped_storage().data_ptr() for t in (layer.weight, layer.B, layer.subspace.P)}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [tuple(t.shape) for t in extra] == [(TOKENS, RANK)]
    assert extra[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert extra[0].untyped_storage().nbytes() == TOKENS * RANK * extra[0].element_size()


def test_keeps_nothing_without_gradients():
    model = converted()
    with torch.no_grad():
        assert saved_tensors(model, torch.randn(4, IN))[1] == []


def test_eval_and_inference_mode_give_the_same_output():
    model = converted()
    x = torch.randn(4, IN)
    expected = model(x)
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_to_fp32_as_a_dense_linear(dtype):
    x, w, b, p, bias = operands(torch.float32)
    exact = dense(x, w, b, p, bias)
    want = torch.autograd.grad(exact.square().sum(), (x, b, bias))
    with torch.autocast("cpu", dtype=dtype):
        y = subspace_linear(x, w, b, p, bias)
    assert y.dtype == dtype
    got = torch.autograd.grad(y.float().square().sum(), (x, b, bias))
    for g, e in zip((y.float(), *got), (exact, *want), strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() / e.norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype):
    model = converted(dtype)
    y = model(torch.randn(4, IN, dtype=dtype))
    y.float().sum().backward()
    assert model[0].subspace.P.dtype == dtype
    assert model[0].B.grad.dtype == dtype
    assert model[0].weight.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, x = converted(), torch.randn(4, IN, requires_grad=True)
    params = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x).square().sum(), params)
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    for param, expected in zip(params, want, strict=True):
        torch.testing.assert_close(param.grad, expected)


def test_compiles_whole_and_not_again_at_a_boundary():
    model, x = converted(std=0.0), torch.randn(4, IN)
    config = rso_ds.RSOConfig(rank=RANK, targets=["*"], interval=1)
    optimizer = rso_ds.RSO(model, config)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.boundary.draw == 3
    assert counter.frame_count == 1


def test_moving_and_casting_the_model_moves_P():
    model = converted()
    model(torch.randn(2, IN))
    before = model[0].subspace.P
    model.double()
    model(torch.randn(2, IN, dtype=torch.float64))
    assert model[0].subspace.P.dtype == torch.float64
    torch.testing.assert_close(model[0].subspace.P.float(), before)
    assert not dict(model.named_buffers())
    assert {n.rpartition(".")[2] for n in model.state_dict()} == {"weight", "bias"}


def test_training_after_a_first_evaluation_in_inference_mode():
    model, x = converted(), torch.randn(4, IN)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert model[0].B.grad is not None


def test_fp32_masters_keep_what_bf16_rounds_away():
    """200 merges of 1/2000 of a weight: nearest bf16 never moves, the master arrives."""
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    b, p = torch.full((2, 1), 5e-4), torch.ones(3, 1)
    masters, kept, lost = WeightMasters("cpu"), weight, weight
    for _ in range(200):
        kept = masters.merge("w", kept, b, p, 1.0).to(torch.bfloat16)
        lost = merged_weight(lost, b, p).to(torch.bfloat16)
    assert torch.equal(lost, weight)
    torch.testing.assert_close(kept.float(), torch.full((2, 3), 1.1), atol=4e-3, rtol=0)


def by_columns(sampler="coordinate", columns=400, rank=20, dtype=torch.bfloat16):
    """(W, B, P) of 30 rows."""
    g = torch.Generator().manual_seed(0)
    weight, b = (torch.randn(30, n, generator=g).to(dtype) for n in (columns, rank))
    return weight, b, rso_ds.subspace.sample_projection(sampler, 0, "x", 0, columns, rank)


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_merge_in_place_is_the_merge_rounded_once(dtype, sampler, decay):
    weight, b, p = by_columns(sampler, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    update = b.to(wide) @ rso_ds.subspace.dense_projection(p, 400).to(wide).t()
    expected = (decay * weight.to(wide) + update).to(dtype)
    merge_(weight, b, p, decay, lambda merged: merged.to(dtype))
    torch.testing.assert_close(weight, expected)
    if sampler == "coordinate" and decay == 1.0 and dtype is torch.bfloat16:
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("master", [False, True])
def test_coordinates_move_their_columns_alone(master):
    """Of 400 columns in bf16 20 change: no tensor of the size of W is made, and no other column is rounded."""
    weight, b, p = by_columns()
    shards = SimpleNamespace(weight_masters=WeightMasters("device") if master else None, outer=None)
    merge = partial(ReplicatedLayout.merge_rows_, shards, "w", weight, b, p, 1.0)
    if master:
        merge(lambda merged: merged.to(torch.bfloat16))
    before, rounded = weight.clone(), []
    with LiveBytes() as live:
        merge(lambda merged: rounded.append(merged.shape) or merged.to(torch.bfloat16))
    assert rounded == [(30, 20)]
    assert live.peak < before.nbytes / 2
    changed = (weight != before).any(0).nonzero().flatten()
    assert set(changed.tolist()) == set(p.tolist())


def test_stochastic_rounding_of_fp16_weights_is_refused():
    model = converted(torch.float16, std=0.0)
    config = rso_ds.RSOConfig(rank=RANK, targets=["*"], merge_rounding="stochastic")
    with pytest.raises(rso_ds.RSOUnsupportedError, match="is for bf16 weights and these are fp16"):
        rso_ds.RSO(model, config)


def test_stochastic_rounding_is_unbiased_and_exact_on_representable_values():
    values = torch.tensor([1.0, 1.0 + 2**-9, -3.001])
    g = torch.Generator().manual_seed(0)
    many = torch.stack([rso_ds.layers.round_stochastically(values, g) for _ in range(4000)]).float()
    assert torch.equal(many[:, 0], torch.ones(4000))
    torch.testing.assert_close(many.mean(0), values, atol=5e-4, rtol=0)
    wide = torch.full((401, 1003), 1.0 + 2**-9)  # four numbers are made of one that is drawn: each is as good
    for part in range(4):
        mean = rso_ds.layers.round_stochastically(wide, g).float().flatten()[part::4].mean()
        torch.testing.assert_close(mean, wide[0, 0], atol=5e-5, rtol=0)
    assert len(many[:, 1].unique()) == 2


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
@pytest.mark.parametrize("outer", [False, True])
def test_a_merge_is_of_fp32_whatever_the_program_allows(allowed, outer, monkeypatch):
    """TF32 and bf16 products are for forward and backward: the setting is the program's again afterwards."""
    module = outer_momentum if outer else merge
    seen = []

    def settings():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

    inner = module.add_lifted_
    monkeypatch.setattr(module, "add_lifted_", lambda *a, **k: seen.append(settings()) or inner(*a, **k))
    weight, B, P = torch.zeros(3, 4), torch.ones(3, 2), torch.ones(4, 2)
    torch.set_float32_matmul_precision(allowed)
    try:
        before = settings()
        if outer:
            outer_momentum.OuterMomentum(0.5, {"x": weight}).merge("x", weight, B, P, 1.0)
        else:
            merge.merged_weight(weight, B, P)
        assert seen == [("ieee", "ieee")]
        assert settings() == before
        assert torch.get_float32_matmul_precision() == allowed
        with pytest.raises(RuntimeError):
            merge.merged_weight(weight, B, torch.ones(5, 2))
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
