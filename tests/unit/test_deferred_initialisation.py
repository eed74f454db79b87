"""Models made on the meta device: B begins at zero, and no weight trains that nobody has initialised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from unit.test_conversion import gpt2, llama

import rso_ds

CONFIG = rso_ds.RSOConfig(lr=1e-2, rank=4, interval=3, targets=["*"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.b(self.a(x).relu())


def materialised():
    """Memory that is not zero, as ``to_empty`` may find it."""
    with torch.device("meta"):
        model = Net()
    rso_ds.convert(model, CONFIG)
    for module in model.modules():
        module._apply(lambda t: torch.full_like(t, 7.0, device="cpu"), recurse=False)
    return model


def begins(model):
    rso_ds.RSO(model, CONFIG)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith(".B"))
    assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_nobody_initialised_are_refused():
    with pytest.raises(rso_ds.RSOConversionError, match="weight of layer 'a' has not been initialised since to_empty"):
        rso_ds.RSO(materialised(), CONFIG)


def test_an_init_function_that_knows_weights_by_name():
    model = materialised()
    for layer in (model.a, model.b):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.a.bias)
    begins(model)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_reset_parameters_is_that_of_the_ordinary_layer(kind):
    build = gpt2 if kind == "conv1d" else llama
    model = build()
    config = rso_ds.RSOConfig(rank=4, targets=["embeddings"] if kind == "embedding" else "default")
    rso_ds.convert(model, config)
    layer = next(layer for _, layer in rso_ds.layers.rso_layers(model) if layer.kind == kind)
    nn.init.ones_(layer.B)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert not layer.B.any()
    if kind == "conv1d":
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert not layer.bias.any()
        return
    torch.manual_seed(3)
    plain = layer.stock(nn.Parameter(torch.empty_like(layer.weight)), layer.bias)
    plain.reset_parameters()
    assert torch.equal(plain.weight, layer.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_the_weights_of_a_plain_model(assign):
    plain = Net()
    if assign:
        with torch.device("meta"):
            model = Net()
        rso_ds.convert(model, CONFIG)
    else:
        model = materialised()
    model.load_state_dict(plain.state_dict(), assign=assign)
    begins(model)
    x = torch.randn(2, 16)
    torch.testing.assert_close(model(x), plain(x))


def test_layers_without_memory_are_refused():
    with torch.device("meta"):
        model = Net()
    rso_ds.convert(model, CONFIG)
    with pytest.raises(rso_ds.RSOConversionError, match="layer 'a' is on the meta device"):
        rso_ds.RSO(model, CONFIG)


def test_what_a_B_holds_from_before_is_refused():
    model = Net()
    rso_ds.convert(model, CONFIG)
    with torch.no_grad():
        model.b.B[1, 2] = 1e17
    with pytest.raises(rso_ds.RSOConversionError, match=r"begins with B = 0.*layer 'b' has values up to 1e\+17"):
        rso_ds.RSO(model, CONFIG)


def test_a_second_optimizer_begins_with_the_first_draw():
    model = Net()
    rso_ds.convert(model, CONFIG)
    optimizer = rso_ds.RSO(model, CONFIG)
    for _ in range(CONFIG.interval):
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    twin = copy.deepcopy(model)
    again = rso_ds.RSO(twin, CONFIG)
    assert (model.a.subspace.draw, twin.a.subspace.draw, again.boundary.draw) == (1, 0, 0)


def test_ties_that_were_lost_are_refused():
    config = rso_ds.RSOConfig(rank=4, targets=["default", "embeddings", "head"])
    with torch.device("meta"):
        model = gpt2()
    rso_ds.convert(model, config)
    model.to_empty(device="cpu")
    for _, layer in rso_ds.layers.subspace_modules(model):
        layer.reset_parameters()
    with pytest.raises(rso_ds.RSOConversionError, match="'lm_head' was tied to another"):
        rso_ds.RSO(model, config)
