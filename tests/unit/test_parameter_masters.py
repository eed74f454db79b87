"""A model in bf16: its solver steps on fp32 copies, and whatever else looks at the optimizer sees the model's own."""

from __future__ import annotations

import copy

import pytest
import torch
from unit.test_conversion import llama

import rso_ds
from rso_ds.layers import rso_layers


def start(dtype, **options):
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16).to(dtype)
    config = rso_ds.RSOConfig(**{"lr": 1e-3, "rank": 4, "interval": 50, "form": "two_path", **options})
    rso_ds.convert(model, config)
    return model, rso_ds.RSO(model, config)


def feed(model, optimizer, steps, first=0):
    """The same gradients, whatever the model computes: bf16 numbers."""
    for i in range(first, first + steps):
        g = torch.Generator().manual_seed(i)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=g).bfloat16().to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"solver": "sgd", "carry_over": "project"}, {"proximal": 0.3}], ids=str)
def test_parameters_are_those_of_an_fp32_run_rounded(options):
    low, low_optimizer = start(torch.bfloat16, **options)
    wide, wide_optimizer = start(torch.float32, **options)
    feed(low, low_optimizer, 40)
    feed(wide, wide_optimizer, 40)
    expected = dict(wide.named_parameters())
    for name, param in low.named_parameters():
        assert param.dtype == torch.bfloat16
        assert torch.equal(param, expected[name].bfloat16()), name


def test_second_moments_do_not_freeze():
    low, low_optimizer = start(torch.bfloat16, interval=1000)
    wide, wide_optimizer = start(torch.float32, interval=1000)
    for model, optimizer in ((low, low_optimizer), (wide, wide_optimizer)):
        feed(model, optimizer, 300)
        for p in model.parameters():
            p.grad = None if not p.requires_grad else torch.zeros_like(p)
        for _ in range(300):
            optimizer.step()
    pairs = zip(rso_layers(low), rso_layers(wide), strict=True)
    for (name, mine), (_, theirs) in pairs:
        got = low_optimizer._layout.solver_part(mine.B).second
        assert torch.equal(got, wide_optimizer.solver.state[theirs.B]["exp_avg_sq"].view(-1)), name
        assert got.dtype == torch.float32


@pytest.mark.parametrize("way", ["state_dict", "checkpoint"])
def test_goes_on_bit_for_bit(way, tmp_path):
    def run(stop):
        model, optimizer = start(torch.bfloat16, interval=4)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        for i in range(11):
            if i == stop:
                if way == "checkpoint":
                    optimizer.checkpointer(scheduler=scheduler).save(tmp_path, "here")
                saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
                model, optimizer = start(torch.bfloat16, interval=4)
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
                if way == "checkpoint":
                    optimizer.checkpointer(scheduler=scheduler).load(tmp_path)
                else:
                    for part, state in zip((model, optimizer, scheduler), saved, strict=True):
                        part.load_state_dict(state)
            feed(model, optimizer, 1, i)
            scheduler.step()
        assert optimizer.solver.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.7**5)
        return model.state_dict()

    straight, resumed = run(None), run(6)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_groups_hold_the_models_parameters_and_what_is_loaded_is_followed():
    model, optimizer = start(torch.bfloat16)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    feed(model, optimizer, 3)
    assert all(p.grad is None for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    feed(model, optimizer, 3, first=3)
    model.load_state_dict(before)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    feed(model, optimizer, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_state_of_a_model_in_another_dtype_is_refused():
    _, low = start(torch.bfloat16)
    _, wide = start(torch.float32)
    with pytest.raises(rso_ds.RSOCheckpointError, match="fp32 copies of .* parameters in 16 bits, this model has 0"):
        wide.load_state_dict(low.state_dict())
