"""The default targets of known model types: every layer of the blocks, the gradients of the stock model, and back."""

import copy

import pytest
import torch
from reference.rso import Settings, train
from support.exhaustive import quick
from torch import nn

import rso_ds
from rso_ds.layers import rso_layers

pytest.importorskip("transformers")
from support.model_inputs import batch_for, build, loss_of
from support.model_types import KINDS

from rso_ds.layers.default_targets import _FAMILIES, DEFAULT_TARGETS
from rso_ds.layers.kinds import is_turned, ordinary_name, ordinary_weight

ASKED = [
    "t5-gated", "bart", "phi3", "gemma3_text", "gemma3", "mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v2",
    "deepseek_v3", "vit", "whisper", "modernbert", "deberta", "deberta-v2", "falcon", "albert", "llama4_text",
]  # fmt: skip
TRAINED = ["t5-gated", "falcon", "deepseek_v3"]
FLOAT32 = {"xglm"}  # fills its mask with numbers that float64 has not


def dtype_of(kind):
    return torch.float32 if kind in FLOAT32 else torch.float64


def is_linear(module):
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def fed_alike(model, batch):
    """Linear layers of one parent that one forward pass hands the same tensor, as sets of names."""
    seen, kept = {}, []  # kept: an id may be given again once its tensor is freed

    def look(name):
        def hook(module, args):
            kept.append(args[0])
            seen.setdefault((name.rpartition(".")[0], id(args[0])), set()).add(name)

        return hook

    handles = [m.register_forward_pre_hook(look(n)) for n, m in model.named_modules() if is_linear(m)]
    loss = loss_of(model, batch)
    for handle in handles:
        handle.remove()
    return loss, [names for names in seen.values() if len(names) > 1]


def close(got, expected, kind, what):
    tolerance = 1e-3 if kind in FLOAT32 else 2e-6  # transformers' norms and losses compute in fp32
    torch.testing.assert_close(
        got, expected, atol=tolerance, rtol=tolerance, check_dtype=False, msg=lambda m: f"{what}: {m}"
    )


def test_every_type_is_tried_and_has_one_entry():
    assert {kind.partition("-")[0] if kind not in DEFAULT_TARGETS else kind for kind in KINDS} <= set(DEFAULT_TARGETS)
    types = [name for _, names in _FAMILIES for name in names]
    assert len(types) == len(set(types))
    parts = {f"{tower}_{part}_model" for tower in ("clip", "siglip") for part in ("text", "vision")}
    assert set(types) - set(KINDS) == parts


@pytest.mark.parametrize("kind", quick(KINDS, ASKED))
def test_one_step_and_back(kind):
    """Which layers; one P for siblings with one input; with lean blocks the gradients of the stock model; and back."""
    stock = build(kind, dtype_of(kind))
    batch = batch_for(stock, dtype_of(kind))
    model = copy.deepcopy(stock)
    expected, siblings = fed_alike(stock, batch)
    expected.backward()
    keys = {name: value.shape for name, value in stock.state_dict().items()}

    conversion = rso_ds.convert(model, rso_ds.RSOConfig(rank=4, form="two_path"))
    layers = dict(rso_layers(model))
    linear = {n for n, m in stock.named_modules() if is_linear(m)}
    named = [(n, p, stock.get_submodule(n.rpartition(".")[0])) for n, p in stock.named_parameters()]
    stacked = {n for n, p, owner in named if p.dim() == 3 and hasattr(owner, "has_gate")}  # llama4's have another form
    stacked -= set(KINDS[kind].dense)
    chosen = {n for n in linear if not any(f".{n}".endswith(f".{end}") for end in KINDS[kind].dense)}
    assert set(layers) == chosen | stacked
    for names in siblings:
        if names <= set(layers):
            assert len({layers[n].subspace for n in names}) == 1, names
    loss = loss_of(model, batch)
    close(loss, expected, kind, "loss")
    loss.backward()
    assert conversion.layers == layers
    plain = dict(stock.named_parameters())
    for name, layer in layers.items():
        whole = plain[ordinary_name(name, layer.kind)].grad
        if whole is None:  # an expert without tokens
            assert layer.B.grad is None
            continue
        whole = ordinary_weight(whole, layer.kind)
        P = layer.current_projection().to(whole.dtype)
        close(layer.B.grad, whole @ P, kind, f"gradient of B of {name}")
    for name, param in model.named_parameters():
        if name in plain and param.requires_grad and plain[name].grad is not None:
            close(param.grad, plain[name].grad, kind, f"gradient of {name}")

    with torch.no_grad():
        for layer in layers.values():
            layer.B.normal_(std=0.01)
    moved = {
        n: layer.weight + layer.B @ layer.current_projection().to(layer.B.dtype).t() for n, layer in layers.items()
    }
    moved = {ordinary_name(n, layers[n].kind): ordinary_weight(w, layers[n].kind) for n, w in moved.items()}
    rso_ds.to_dense(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert {name: value.shape for name, value in model.state_dict().items()} == keys
    for name, weight in moved.items():
        torch.testing.assert_close(model.get_parameter(name), weight)


@pytest.mark.parametrize("form", quick(["two_path", "folded"], ["two_path"]))
@pytest.mark.parametrize("kind", quick(KINDS, TRAINED))
def test_trains_like_the_reference(kind, form):
    model = build(kind, dtype_of(kind))
    batch = batch_for(model, dtype_of(kind))
    oracle = copy.deepcopy(model)
    config = rso_ds.RSOConfig(rank=4, interval=2, lr=1e-2, eps=1e-4, form=form)
    rso_ds.convert(model, config)
    groups: dict[str, list[str]] = {}
    for name, layer in rso_layers(model):
        groups.setdefault(layer.subspace.name, []).append(name)
    turned = [name for name, layer in rso_layers(model) if is_turned(layer.kind)]
    optimizer = rso_ds.RSO(model, config)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    settings = Settings(groups, 4, interval=2, lr=1e-2, eps=1e-4, form=form, transposed=turned)
    if kind in FLOAT32:
        pytest.skip("the reference computes in float64, which this model does not know")
    expected = train(oracle, settings, loss_of, [[batch]] * 3)
    close(losses, expected.losses, kind, "losses")
    final = rso_ds.to_dense(model).state_dict()
    for name, weight in expected.weights.items():
        close(final[name], weight, kind, name)
