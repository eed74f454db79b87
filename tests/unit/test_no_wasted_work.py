"""No wasted work: the products of one layer, counted as they are dispatched, and what is allocated beside them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop

import rso_ds

TOKENS, IN, OUT, RANK = 30, 22, 14, 5


def converted(form, sampler):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    config = rso_ds.RSOConfig(rank=RANK, targets="all-linear", form=form, sampler=sampler)
    rso_ds.convert(model, config)
    rso_ds.RSO(model, config)
    backward(model)  # draws P
    model.zero_grad()
    return model


def backward(model):
    model(torch.ones(TOKENS, IN, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
@pytest.mark.parametrize("form", ["two_path", "folded"])
def test_products_are_those_of_the_closed_form(form, sampler):
    """Forward x W^T and x P, backward dy W and dy^T z; two-path also z B^T, dy B and dz P^T. Coordinates gather."""
    model = converted(form, sampler)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **options: mm_flop(a, b)}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        backward(model)
    through_p = 0 if sampler == "coordinate" else IN * RANK
    expected = 2 * IN * OUT + OUT * RANK + through_p
    if form == "two_path":
        expected += 2 * OUT * RANK + through_p
    assert counted.get_total_flops() == 2 * TOKENS * expected


@pytest.mark.parametrize("form", ["two_path", "folded"])
def test_without_a_matrix_a_product_with_P_costs_the_sum_of_the_factors(form, monkeypatch):
    monkeypatch.setattr("rso_ds.subspace.samplers.transform_cost", lambda in_features, rank: 0)
    model = converted(form, "srht")
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **options: mm_flop(a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted, Made() as made:
        backward(model)
    through_p = IN * (2 + 11)  # 22 = 2 * 11
    expected = 2 * IN * OUT + OUT * RANK + through_p
    if form == "two_path":
        expected += 2 * OUT * RANK + through_p
    assert counted.get_total_flops() == 2 * TOKENS * expected
    assert not {tuple(sorted(shape)) for shape in made.shapes} & {tuple(sorted((OUT, IN))), tuple(sorted((IN, RANK)))}


class Made(TorchDispatchMode):
    """Shapes of every tensor with memory of its own that an operator returns."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, torch.Tensor):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
@pytest.mark.parametrize("form", ["two_path", "folded"])
def test_nothing_of_the_size_of_W_or_P_is_made(form, sampler):
    model = converted(form, sampler)
    with Made() as made:
        backward(model)
    sizes = {tuple(sorted(shape)) for shape in made.shapes}
    assert tuple(sorted((OUT, RANK))) in sizes  # the gradient of B: it does look
    assert not sizes & {tuple(sorted((OUT, IN))), tuple(sorted((IN, RANK)))}
