"""The folded form: W holds B P^T after every step. (Engines and stages: torch_cases.py, deepspeed_cases.py.)"""

from types import SimpleNamespace

import pytest
import torch
from support import tiny_llama
from support.saved_runs import error_of, saved
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import rso_ds
from rso_ds.boundary import Boundary
from rso_ds.checkpoint.lora import export_lora
from rso_ds.layers import SubspaceLayer
from rso_ds.layers.form import Shape, choose_form
from rso_ds.layers.functional import folded_linear, projected_input

TOKENS, IN, OUT, RANK = 6, 10, 8, 3


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients(sampler, with_bias):
    """y = x W^T + b; of B the gradient is dy^T x P, that of x (W + B P^T)^T at B = 0."""
    g = torch.Generator().manual_seed(0)
    x, w, bias, dy = (torch.randn(*s, generator=g).double() for s in ((2, 3, IN), (OUT, IN), (OUT,), (2, 3, OUT)))
    p = rso_ds.subspace.sample_projection(sampler, 0, "x", 0, IN, RANK)
    P = rso_ds.subspace.dense_projection(p, IN).double()
    leaves = [x.requires_grad_(), torch.zeros(OUT, RANK).double().requires_grad_()]
    leaves += [bias.requires_grad_()] if with_bias else []
    bias = bias if with_bias else None
    p = p if sampler == "coordinate" else P
    y = folded_linear(x, projected_input(x, p), w, leaves[1], bias)
    expected = nn.functional.linear(x, w + leaves[1] @ P.t(), bias)
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(got, want)


def converted(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, OUT, bias=False))
    config = rso_ds.RSOConfig(rank=RANK, targets="all-linear", form="folded", **options)
    rso_ds.convert(model, config)
    return model, rso_ds.RSO(model, config)


def test_keeps_x_P_and_a_reference_to_W_only():
    layer = converted()[0][0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 3, IN, requires_grad=True))
    extra = [t for t in kept if t.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()]
    assert [tuple(t.shape) for t in extra] == [(TOKENS, RANK)]


def test_compiles_whole_and_not_again_after_merges():
    model, optimizer = converted(interval=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, fullgraph=True, backend=counter), torch.randn(4, IN)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not model[0].B.any()
    assert optimizer.boundary.draw == 2
    assert counter.frame_count == 1


@pytest.mark.parametrize("sampler", ["haar", "gaussian", "coordinate"])
def test_takes_the_steps_of_the_other_form(sampler):
    """Losses over four boundaries in fp32: 7.2e-7 at most was measured."""
    losses = {}
    for form in ("two_path", "folded"):
        model = tiny_llama.build()
        config = rso_ds.RSOConfig(rank=4, interval=3, lr=1e-2, eps=1e-6, sampler=sampler, form=form)
        rso_ds.convert(model, config)
        optimizer = rso_ds.RSO(model, config)
        losses[form] = []
        for step in range(13):
            optimizer.zero_grad()
            loss = tiny_llama.loss_of(model, tiny_llama.tokens(step, 4))
            loss.backward()
            optimizer.step()
            losses[form].append(loss.item())
    torch.testing.assert_close(losses["folded"], losses["two_path"], rtol=0, atol=2e-5)
    assert max(losses["folded"]) - min(losses["folded"]) > 0.1


def bf16_movement(form, rounding):
    """(the way W went, the way it goes in fp64) over one subspace of 100 steps, each below half of bf16's last bit."""
    ways = {}
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
        with torch.no_grad():
            layer.weight.normal_()
        start = layer.weight.detach().double()
        model = nn.Sequential(layer).to(dtype)
        mine = {"form": form, "merge_rounding": rounding} if dtype is torch.bfloat16 else {}
        config = rso_ds.RSOConfig(rank=16, targets="all-linear", interval=100, lr=1e-4, **mine)
        rso_ds.convert(model, config)
        optimizer = rso_ds.RSO(model, config)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        for _ in range(100):
            model(x).double().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ways[dtype] = rso_ds.to_dense(model)[0].weight.detach().double() - start
    return ways[torch.bfloat16], ways[torch.float64]


def test_bf16_loses_small_steps_unless_rounded_stochastically():
    """Share of fp64's way that W goes: 1.00 in two-path form, 0.06 folded, 0.97 folded with stochastic rounding. (Its
    distance from where fp64 arrives, relative to that way: 0.17, 0.97, 0.60.)"""
    found = {}
    for form, rounding in (("two_path", "nearest"), ("folded", "nearest"), ("folded", "stochastic")):
        got, want = bf16_movement(form, rounding)
        found[form, rounding] = ((got * want).sum() / want.square().sum()).item()
    assert found["two_path", "nearest"] == pytest.approx(1, abs=0.1)
    assert found["folded", "nearest"] < 0.5
    assert found["folded", "stochastic"] == pytest.approx(1, abs=0.1)


SQUARE = [Shape(1024, 1024, 256)]
STOCHASTIC = {"merge_rounding": "stochastic"}


@pytest.mark.parametrize(
    ("options", "facts", "form", "why"),
    [
        ({}, {}, "folded", "pays from 342 tokens"),
        ({"tokens_per_step": 342}, {}, "folded", "pays from 342 tokens"),
        ({"tokens_per_step": 341}, {}, "two_path", "341 tokens a rank and step do not pay for the merges, 342 would"),
        ({"tokens_per_step": 1, "sampler": "coordinate"}, {}, "folded", "pays from 1 tokens"),
        ({"form": "two_path"}, {}, "two_path", "set in the configuration"),
        ({"proximal": 0.1}, {}, "two_path", "'proximal' needs the B"),
        ({"communicate": "boundary"}, {}, "two_path", "'communicate' needs the B"),
        ({}, {"decays": True}, "two_path", "weight decay"),
        ({}, {"low_precision": True}, "two_path", "rounded to nearest would lose"),
        ({**STOCHASTIC, "tokens_per_step": 3073}, {"low_precision": True}, "folded", "pays from 3,073 tokens"),
        ({**STOCHASTIC, "tokens_per_step": 3072}, {"low_precision": True}, "two_path", "do not pay for the merges"),
        (STOCHASTIC, {"low_precision": True}, "two_path", "pay from 3,073 'tokens_per_step' on, which is not set"),
        ({"master_weights": "device", "tokens_per_step": 3073}, {"low_precision": True}, "folded", "pays"),
        (
            {**STOCHASTIC, "tokens_per_step": 1751, "sampler": "coordinate"},
            {"low_precision": True},
            "folded",
            "pays from 1,751 tokens",
        ),
        ({"master_weights": "cpu"}, {"low_precision": True}, "two_path", "between CPU and device"),
        ({}, {"merge_sends": "W"}, "two_path", "would send W"),
    ],
)
def test_choice_of_the_form(options, facts, form, why):
    chosen, reason = choose_form(
        rso_ds.RSOConfig(**options), SQUARE, **{"low_precision": False, "decays": False, **facts}
    )
    assert (chosen, why in reason) == (form, True), reason


def test_embeddings_cost_merges_and_save_nothing():
    vocabulary = Shape(32000, 1024, 256, linear=False)
    assert choose_form(rso_ds.RSOConfig(), [vocabulary], False, False)[0] == "two_path"
    form, why = choose_form(rso_ds.RSOConfig(tokens_per_step=10_000), [*SQUARE, vocabulary], False, False)
    assert (form, "do not pay for the merges, 11,009 would" in why) == ("two_path", True)


def test_choice_takes_effect_in_every_layer():
    """``targets`` with tied embedding and head, of which the boundary knows one module."""
    model = tiny_llama.build(tie=True)
    config = rso_ds.RSOConfig(rank=RANK, targets=["default", "embeddings", "head"])
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    assert {m.form for m in model.modules() if isinstance(m, SubspaceLayer)} == {"folded"}
    assert optimizer.boundary.config.form == "folded"
    assert optimizer.form.startswith("form folded: pays from ")


@pytest.mark.parametrize("changed", [{"proximal": 0.1}, {"communicate": "boundary"}])
def test_what_needs_the_whole_B_is_refused(changed):
    with pytest.raises(rso_ds.RSOConfigError, match=rf"'{next(iter(changed))}': .* set 'form' to 'two_path'"):
        rso_ds.RSOConfig(form="folded", **changed)


def test_masters_that_send_weights_at_each_step_are_refused():
    config = rso_ds.RSOConfig(form="folded", master_weights="cpu")
    with pytest.raises(rso_ds.RSOUnsupportedError, match="a merge sends W: use 'form': 'two_path', ZeRO-3 or FSDP2"):
        Boundary(config, {}, SimpleNamespace(merge_sends_weights=True), [], [])


def test_checkpoints_of_the_other_form_are_refused():
    state = converted()[1].state_dict()
    plain = state["rso"] | {"form": "two_path"}
    unnamed = {key: value for key, value in state["rso"].items() if key != "form"}
    for rso in (plain, unnamed):
        with pytest.raises(rso_ds.RSOCheckpointError, match="'form': 'two_path', this run has 'folded': its B is part"):
            converted()[1].load_state_dict({**state, "rso": rso})


def test_model_converted_in_the_other_form_is_refused():
    model = converted()[0]
    with pytest.raises(rso_ds.RSOConversionError, match="was converted with 'form': 'folded'"):
        rso_ds.RSO(model, rso_ds.RSOConfig(rank=RANK, targets="all-linear", form="two_path"))


def test_current_subspace_is_no_adapter(tmp_path):
    saved(tmp_path / "run", tiny_llama.build(), form="folded")
    message = error_of(tmp_path / "run", tmp_path / "out", export=export_lora, kind=rso_ds.RSOConfigError)
    assert "'form': 'folded', whose current subspace is part of W already" in message
