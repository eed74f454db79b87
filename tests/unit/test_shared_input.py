"""One z for the layers that share an input: computed once, kept once, forgotten in time, never mixed up."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import rso_ds
from rso_ds.layers import functional as module_under_test
from rso_ds.layers import rso_layers

TOKENS, HIDDEN, RANK = 6, 12, 4


class Attention(nn.Module):
    """Three layers named so that they form a group; ``order`` is the order in which they are called."""

    order = ("q_proj", "k_proj", "v_proj")

    def __init__(self):
        super().__init__()
        for name in self.order:
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x, other=None):
        xs = {"q_proj": x, "k_proj": x if other is None else other, "v_proj": x if other is None else other}
        ys = {name: getattr(self, name)(xs[name]) for name in self.order}
        return ys["q_proj"] * torch.tanh(ys["k_proj"]) + ys["v_proj"]


class OnlySome(Attention):
    def forward(self, x):
        return self.q_proj(x)


def model_of(kind=Attention, lean="all", sampler="haar", dtype=torch.float64, std=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind()).to(dtype)
    rso_ds.convert(model, rso_ds.RSOConfig(rank=RANK, targets=["*"], lean=lean, sampler=sampler))
    for _, layer in rso_layers(model):
        nn.init.normal_(layer.B, std=std)
    return model


def inputs(dtype=torch.float64):
    return torch.randn(2, 3, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model, x, loss):
    return torch.autograd.grad(loss, [x, *(p for p in model.parameters() if p.requires_grad)])


def held(model):
    return [layer.shared_input._z for _, layer in rso_layers(model) if layer.shared_input._z is not None]


@pytest.fixture
def projections(monkeypatch):
    """The list of inputs that were projected."""
    seen = []
    inner = module_under_test.project
    monkeypatch.setattr(module_under_test, "project", lambda x, P: seen.append(x) or inner(x, P))
    return seen


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
def test_value_and_gradients_equal_those_of_separate_projections(projections, sampler):
    shared, separate = model_of(sampler=sampler), model_of(lean="none", sampler=sampler)
    x = inputs()
    y = shared(x)
    assert len(projections) == 2
    expected = separate(x)
    assert len(projections) == 2 + 6
    torch.testing.assert_close(y, expected)
    for got, want in zip(gradients(shared, x, y.sum()), gradients(separate, x, expected.sum()), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck_through_a_shared_z():
    model = model_of()[0]
    assert torch.autograd.gradcheck(model, inputs())


def test_kept_once_and_nothing_held_afterwards():
    model, kept = model_of(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        y = model(inputs())
    z = {t.untyped_storage().data_ptr() for t in kept.values() if tuple(t.shape) == (TOKENS, RANK)}
    assert len(z) == 2
    assert held(model) == []
    y.sum().backward()
    assert held(model) == []


def test_nothing_is_held_when_only_some_members_are_called():
    model = model_of(OnlySome)
    y = model(inputs())
    assert held(model) == []
    y.sum().backward()


def test_members_in_another_order(monkeypatch):
    x = inputs()
    want = model_of(lean="none")(x)
    model = model_of()
    monkeypatch.setattr(Attention, "order", ("v_proj", "q_proj", "k_proj"))
    torch.testing.assert_close(model(x), want)
    assert held(model) == []


def test_members_with_different_inputs_do_not_mix():
    x, other = inputs(), inputs() * 2 + 1
    shared, separate = model_of()[0], model_of(lean="none")[0]
    torch.testing.assert_close(shared(x, other), separate(x, other))
    assert held(shared) == []


def test_an_input_changed_in_place_between_members_is_projected_anew():
    model, x = model_of()[0], inputs().detach()
    model.q_proj(x)
    x.add_(1.0)
    torch.testing.assert_close(model.k_proj(x), model_of(lean="none")[0].k_proj(x))


def test_a_view_of_the_same_memory_is_the_same_input(projections):
    """ZeRO-3 gives every layer a view of its own of the input."""
    model, x = model_of()[0], inputs() * 1.0
    model.q_proj(x.view_as(x))
    model.k_proj(x.view_as(x))
    assert len(projections) == 1
    model.v_proj(x.transpose(0, 1))
    assert len(projections) == 2


def test_no_grad_between_members_does_not_leak_into_training():
    model, x = model_of()[0], inputs()
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).grad_fn is not None
    (grad,) = torch.autograd.grad(model.v_proj(x).sum(), x)
    assert grad.abs().sum() > 0


def test_several_forwards_before_a_backward():
    model, x = model_of(), inputs()
    want = [gradients(model, x, model(x * k).sum()) for k in (1.0, 2.0)]
    first, second = model(x * 1.0), model(x * 2.0)
    for loss, expected in ((second, want[1]), (first, want[0])):
        for got, grad in zip(gradients(model, x, loss.sum()), expected, strict=True):
            torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_bitwise_the_same(use_reentrant):
    model, x = model_of(), inputs()
    want = gradients(model, x, model(x).square().sum())
    y = x
    for block in model:
        y = checkpoint(block, y, use_reentrant=use_reentrant)
    y.square().sum().backward()
    got = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert held(model) == []


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
def test_compiles_whole_and_not_again_at_a_boundary(sampler):
    model, x = model_of(sampler=sampler, dtype=torch.float32, std=0.0), inputs(torch.float32)
    optimizer = rso_ds.RSO(model, rso_ds.RSOConfig(rank=RANK, targets=["*"], interval=1, sampler=sampler))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        expected = gradients(model, x, model(x).square().sum())
        for got, want in zip(gradients(model, x, compiled(x).square().sum()), expected, strict=True):
            torch.testing.assert_close(got, want)
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert held(model) == []


def test_evaluation_and_inference_mode():
    model, x = model_of(), inputs()
    expected = model(x)
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(x.detach()), expected)
    assert held(model) == []


def test_copies_share_among_themselves_only():
    model = model_of()
    twin = copy.deepcopy(model)
    assert twin[0].q_proj.shared_input is twin[0].k_proj.shared_input
    assert twin[0].q_proj.shared_input is not model[0].q_proj.shared_input
    torch.testing.assert_close(twin(inputs()), model(inputs()))
    assert held(twin) == []


def test_to_dense_leaves_no_hook():
    model = model_of()
    rso_ds.to_dense(model)
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
def test_one_P_for_all_layers_of_equal_shape(sampler):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, 9))
    config = rso_ds.RSOConfig(
        rank=RANK,
        targets=["*"],
        share_projection="shape",
        sampler=sampler,
        interval=1,
        carry_over="project",
        form="two_path",
    )
    rso_ds.convert(model, config)
    assert model[0].subspace is model[2].subspace is not model[1].subspace
    optimizer = rso_ds.RSO(model, config)
    assert len(optimizer.boundary.subspaces) == 2
    x = torch.randn(5, HIDDEN)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.solver.step()
        before = model(x)
        optimizer.boundary.step_applied([1e-3, 1e-3])
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        optimizer.zero_grad()
    assert model[0].subspace.draw == 3


def test_coordinate_stores_indices_only():
    model = model_of(sampler="coordinate")
    model(inputs())
    p = model[0].q_proj.subspace.P
    assert p.shape == (RANK,)
    assert p.dtype == torch.int64
    assert p.untyped_storage().nbytes() == 8 * RANK
