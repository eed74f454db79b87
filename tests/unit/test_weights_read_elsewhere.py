"""A layer whose weight other code reads stays dense and is named; a B without a gradient ends the first step."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rso_ds
from rso_ds.layers.bypass import weight_readers
from rso_ds.layers.targets import resolve_targets


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]


def by_function(layer, x):
    return F.linear(x, layer.weight)


class Reading(nn.Module):
    """Every way of reading the weight of a layer, and of asking for its facts only."""

    def __init__(self):
        super().__init__()
        for name in ("local", "passed", "method", "prop", "named", "wrapped", "asked"):
            setattr(self, name, nn.Linear(4, 4))
        self.several = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.by_key = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.outside = [nn.Linear(4, 4)]
        self.add_module("hidden", self.outside[0])
        self.embedding = nn.Embedding(5, 4)

    def through(self, x):
        return x @ self.method.weight

    @property
    def kernel(self):
        return self.prop.weight

    @torch.no_grad()
    def decorated(self, x):
        return F.linear(x, self.wrapped.weight)

    def forward(self, tokens):
        layer = self.local
        x = F.linear(self.embedding(tokens), layer.weight)
        x = by_function(self.passed, x)
        x = torch.utils.checkpoint.checkpoint(self.through, x, use_reentrant=False)
        x = x @ self.kernel @ getattr(self.named, "weight")  # noqa: B009
        for _, each in enumerate(self.several):
            x = F.linear(x, each.weight)
        x = self.decorated(x) + sum(F.linear(x, each.weight) for each in self.by_key.values())
        x = x @ self.outside[0].weight
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight is not None:
            x = self.asked(x.to(self.asked.weight.dtype))
        return x @ self.embedding.weight.T


def test_every_way_of_reading_a_weight_is_found_and_asking_for_its_dtype_is_none():
    model = Reading()
    model(torch.zeros(2, dtype=torch.long))
    assert set(weight_readers(model, linears(model))) == set(linears(model)) - {"asked"}


def test_own_forward_and_initialisers_do_not_count():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.reset()

        def reset(self):
            nn.init.zeros_(self.proj.weight)

        def forward(self, x):
            return self.proj(x)

    assert weight_readers(Model(), ["proj"]) == {}


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("Mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("FalconMamba", {"x_proj", "dt_proj", "out_proj"}),
        ("Mamba2", {"out_proj"}),
        ("Llama", set()),
    ],
)
def test_models_of_transformers(kind, read):
    transformers = pytest.importorskip("transformers")
    extra = {"num_heads": 4, "head_dim": 32, "n_groups": 1} if kind == "Mamba2" else {}
    extra = {"num_attention_heads": 4, "intermediate_size": 64} if kind == "Llama" else extra
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, hidden_size=64, num_hidden_layers=1, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in weight_readers(model, linears(model))} == read


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.after = nn.Linear(32, 32)

    def forward(self, x):
        return self.after(self.encoder(x))


@pytest.mark.parametrize("form", ["two_path", "folded"])
def test_evaluation_by_the_fast_path_equals_training_and_the_dense_model(form, caplog):
    torch.manual_seed(0)
    model = Encoder()
    config = rso_ds.RSOConfig(lr=1e-2, targets=["*"], interval=10, form=form)
    with caplog.at_level(logging.WARNING):
        conversion = rso_ds.convert(model, config)
    assert list(conversion.layers) == ["after"]
    read = ("linear1", "linear2", "self_attn.out_proj")
    assert set(conversion.left_dense) == {f"encoder.layers.{i}.{name}" for i in (0, 1) for name in read}
    for named in ("encoder.layers.0.linear1", "TransformerEncoderLayer.forward", "MultiheadAttention.forward"):
        assert named in caplog.text
    optimizer = rso_ds.RSO(model, config)
    x = torch.randn(4, 8, 32)
    before = model.encoder.layers[0].linear1.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    assert not torch.equal(model.encoder.layers[0].linear1.weight, before)
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
        dense = rso_ds.to_dense(copy.deepcopy(model)).eval()(x)
    torch.testing.assert_close(evaluated, trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["encoder.layers.*.linear?"], ["after", "linear1"]])
def test_targets_that_only_select_such_layers_are_refused(targets):
    model = Encoder() if targets != "all-linear" else nn.TransformerEncoderLayer(32, 4, 64)
    with pytest.raises(rso_ds.RSOConversionError, match=r"linear1.*TransformerEncoderLayer.forward reads its weight"):
        resolve_targets(model, targets)


class Partly(nn.Module):
    def __init__(self, name="idle"):
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.name = name
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        weight = self.state_dict()[f"{self.name}.weight"]  # a way of reading that the source does not show
        return self.used(x) @ weight


def first_step(model, **options):
    config = rso_ds.RSOConfig(lr=1e-2, targets=["*"], rank=2, form="two_path", **options)
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()


def test_a_layer_without_gradient_ends_the_first_step_by_name():
    model = Partly()
    with pytest.raises(rso_ds.RSOConversionError, match="no gradient for idle.*out of 'targets'"):
        first_step(model)
    assert not model.used.B.any()


def test_an_expert_without_tokens_and_a_dropped_layer_may_go_without():
    first_step(Partly("expert_3"))
    model = Partly()
    model.config = type("Config", (), {"layerdrop": 0.1})()
    first_step(model)


def test_a_layer_that_does_not_train_may_go_without():
    model = Partly()
    model.idle.requires_grad_(False)
    first_step(model)
