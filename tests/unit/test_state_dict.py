"""Whoever saves, copies, averages or loads a model by its ``state_dict`` gets the weights that it computes with."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from unit.test_conversion import gpt2, llama

import rso_ds
from rso_ds.checkpoint import dense_state_dict

INTERVAL = 4
MODELS = {"llama": llama, "gpt2": gpt2}
IDS = torch.randint(2, 30, (2, 8), generator=torch.Generator().manual_seed(0))


def start(kind="llama", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype).eval()  # without dropout
    config = rso_ds.RSOConfig(**{"lr": 3e-2, "rank": 4, "interval": INTERVAL, "form": "two_path", **options})
    rso_ds.convert(model, config)
    return model, rso_ds.RSO(model, config)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_that_of_the_equal_dense_model(kind, dtype):
    model, optimizer = start(kind, dtype, targets=["default", "embeddings", "head"])
    train(model, optimizer, INTERVAL + 2)
    state, expected = model.state_dict(), dense_state_dict(model)
    plain = MODELS[kind]().to(dtype)
    assert state.keys() == expected.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    plain.load_state_dict(state)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(logits(plain.eval()), logits(model), atol=tolerance, rtol=0)


def test_tied_weights_are_one_tensor():
    model, optimizer = start("gpt2", targets=["default", "embeddings", "head"])
    train(model, optimizer, 2)
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


@pytest.mark.parametrize("kind", MODELS)
def test_save_pretrained_writes_what_was_trained(kind, tmp_path):
    model, optimizer = start(kind)
    train(model, optimizer, INTERVAL + 2)
    model.save_pretrained(tmp_path)
    loaded = type(MODELS[kind]()).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "folded"}, {"master_weights": "device"}, {"master_weights": "cpu"}, {"weight_decay": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_weights_come_back_and_stay(options, dtype):
    """Neither B, nor a master of W or of B, brings back what was trained since: steps of rate 0 change nothing."""
    model, optimizer = start(dtype=dtype, **options)
    train(model, optimizer, INTERVAL + 2)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, INTERVAL + 1)
    model.load_state_dict(best)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.boundary._decay = [1.0] * len(optimizer.boundary._decay)
    train(model, optimizer, 2 * INTERVAL)
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_a_state_with_B_needs_its_optimizers_state():
    """As versions before wrote it: W and B apart."""
    model, optimizer = start()
    train(model, optimizer, INTERVAL + 2)
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    expected = logits(model)

    model, optimizer = start()
    missing = set(model.state_dict()) - set(raw)
    model.load_state_dict({**raw, **{n: v for n, v in model.state_dict().items() if n in missing}})
    with pytest.raises(rso_ds.RSOCheckpointError, match="had a B for layer .*: load the optimizer's state"):
        train(model, optimizer, 1)
    del state["rso_layers"]
    optimizer.load_state_dict(state)
    torch.testing.assert_close(logits(model), expected)
    train(model, optimizer, 1)


def test_averages_of_weights():
    """In the folded form W has everything; else B would be averaged over different subspaces."""
    model, optimizer = start(form="folded")
    average = AveragedModel(model)
    sums = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for _ in range(4):
        train(model, optimizer, 3)
        average.update_parameters(model)
        for name, value in model.state_dict().items():
            sums[name] += value / 4
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, sums[name], atol=1e-6, rtol=0)

    model, optimizer = start()
    average = AveragedModel(model)
    train(model, optimizer, 2)
    average.update_parameters(model)
    for act in (lambda: logits(average), average.module.state_dict, lambda: dense_state_dict(average.module)):
        with pytest.raises(rso_ds.RSOUnsupportedError, match="B of different subspaces cannot be averaged"):
            act()


def test_a_copy_computes_the_same_and_trains():
    model, optimizer = start()
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    twin.double().float()
    twin.load_state_dict(model.state_dict())
    train(twin, rso_ds.RSO(twin, optimizer._config), INTERVAL + 1)


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_can_be_pickled(kind):
    model, optimizer = start(kind)
    train(model.train(), optimizer, INTERVAL + 2)
    buffer = io.BytesIO()
    torch.save(model.eval(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.train()(input_ids=IDS, labels=IDS).logits is None  # the lean loss is there
    assert type(loaded).__name__ == type(model).__name__


@pytest.mark.parametrize("form", ["two_path", "folded"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_without_memory_shows_the_dense_shapes_and_takes_what_is_assigned(kind, form):
    """Programs that build on the meta device read state_dict() to know what to load, then assign it."""
    torch.manual_seed(0)
    dense = MODELS[kind]().eval()
    with torch.device("meta"):
        model = MODELS[kind]().eval()
    rso_ds.convert(model, rso_ds.RSOConfig(rank=4, form=form))
    shown = model.state_dict()
    assert {n: t.shape for n, t in shown.items()} == {n: t.shape for n, t in dense.state_dict().items()}
    assert all(t.is_meta for t in shown.values())
    model.load_state_dict(dense.state_dict(), assign=True)
    if kind == "llama":
        model.model.rotary_emb = dense.model.rotary_emb  # its buffers are in no state dict
    else:
        model.tie_weights()
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)
