"""Lean blocks: the gradients of the stock ones, less kept, nothing else changed."""

import copy
import dataclasses
import inspect

import pytest
import torch
from support.exhaustive import EXHAUSTIVE
from torch import nn
from torch.nn import functional as F

import rso_ds
from rso_ds import RSOConfig, RSOConfigError, RSOConversionError
from rso_ds.layers import subspace_linear
from rso_ds.saved import apply_lean, loss
from rso_ds.saved.activations import ACTIVATIONS, activation, gated
from rso_ds.saved.loss import causal_lm_loss, chunk_rows, summed_cross_entropy
from rso_ds.saved.norms import rms_norm

transformers = pytest.importorskip("transformers")
from unit.test_conversion import LLAMA, MODELS, SMALL  # noqa: E402

VOCAB = SMALL["vocab_size"]


def leaf(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# -- the pieces by themselves, in float64 ------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck_of_the_norm(offset):
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6, offset), (leaf(2, 3, 8), leaf(8, seed=1)))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradcheck_of_activations(kind):
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, kind), (leaf(4, 6), leaf(4, 6, seed=1)))
    assert torch.autograd.gradcheck(lambda x: activation(x, kind), (leaf(4, 6),))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_of_the_loss_over_several_chunks(with_bias, monkeypatch):
    monkeypatch.setattr(loss, "MIN_CHUNK", 3)
    assert chunk_rows(10, 4, 32) == 3
    targets = torch.tensor([1, 2, -100, 4, 5, 6, -100, -100, -100, 31])
    bias = leaf(32, seed=2) if with_bias else None
    operands = (leaf(10, 4), leaf(32, 4, seed=1), bias, targets)
    assert torch.autograd.gradcheck(summed_cross_entropy, operands)
    hidden, weight, bias, _ = operands
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(*operands), expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("coordinates", [True, False])
def test_gradcheck_of_the_loss_of_a_head_in_a_subspace(with_bias, coordinates, monkeypatch):
    monkeypatch.setattr(loss, "MIN_CHUNK", 3)
    targets = torch.tensor([1, 2, -100, 4, 5, 6, -100, -100, -100, 31])
    bias = leaf(32, seed=2) if with_bias else None
    P = torch.tensor([3, 0]) if coordinates else leaf(4, 2, seed=4).detach()
    operands = (leaf(10, 4), leaf(32, 4, seed=1).detach(), bias, targets, leaf(32, 2, seed=3), P)
    assert torch.autograd.gradcheck(summed_cross_entropy, operands)
    hidden, weight, bias, _, B, _ = operands
    expected = F.cross_entropy(subspace_linear(hidden, weight, B, P, bias), targets, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(*operands), expected)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_a_head_in_a_subspace_in_low_precision(dtype, autocast):
    """As near to float64 as one rounding of each operand allows, gradients in the dtype of their parameters."""
    given = torch.float32 if autocast else dtype
    hidden, weight, B, P = leaf(600, 8), leaf(64, 8, seed=1).detach(), leaf(64, 3, seed=2), leaf(8, 3, seed=3).detach()
    targets = torch.randint(0, 64, (600,), generator=torch.Generator().manual_seed(0))
    exact = summed_cross_entropy(hidden, weight, None, targets, B, P) / 600
    low = [t.detach().to(given).requires_grad_(t.requires_grad) for t in (hidden, weight, B, P)]
    with torch.autocast("cpu", dtype, enabled=autocast):
        got = summed_cross_entropy(low[0], low[1], None, targets, low[2], low[3]) / 600
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=0)
    grads = torch.autograd.grad(got, (low[0], low[2])), torch.autograd.grad(exact, (hidden, B))
    for g, want in zip(*grads, strict=True):
        assert g.dtype == given
        assert (g.double() - want).norm() <= 3e-2 * want.norm()


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Qwen3RMSNorm", "GemmaRMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_equals_the_stock_module(name, dtype):
    family = name.removesuffix("RMSNorm").lower()
    stock = getattr(__import__(f"transformers.models.{family}.modeling_{family}", fromlist=[name]), name)(48)
    nn.init.normal_(stock.weight, 0.5)
    stock.to(dtype)
    lean = copy.deepcopy(stock)
    assert apply_lean(lean, ["norm"]) == {"norm": 1}
    x, dy = leaf(3, 5, 48, dtype=dtype), torch.randn(3, 5, 48, dtype=dtype)
    y, expected = lean(x), stock(x)
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y, (x, lean.weight), dy)
    want = torch.autograd.grad(expected, (x, stock.weight), dy)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert (g - w).double().norm() <= tolerance * w.double().norm()


def test_the_loss_of_fp16_keeps_gradients_that_a_mean_would_lose():
    """1/tokens of a probability is below fp16's smallest number; the loss scale must still reach it."""
    hidden, weight = leaf(4096, 8, dtype=torch.float16), leaf(64, 8, dtype=torch.float16, seed=1)
    labels = torch.randint(0, 64, (1, 4096), generator=torch.Generator().manual_seed(0))
    scale = 2.0**16
    got = torch.autograd.grad(causal_lm_loss(hidden[None], weight, None, labels) * scale, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference = causal_lm_loss(exact[0][None], exact[1], None, labels) * scale
    for g, w in zip(got, torch.autograd.grad(reference, exact), strict=True):
        assert (g.double() - w).norm() <= 2e-3 * w.norm()


# -- whole models ------------------------------------------------------------------------------------


def gemma():
    return transformers.AutoModelForCausalLM.from_config(
        transformers.GemmaConfig(**{**LLAMA, "tie_word_embeddings": True})
    )


CAUSAL = {**{k: v[0] for k, v in MODELS.items() if k not in ("bert", "roberta")}, "gemma": gemma}


def rounding(name: str) -> float:
    """A bias of keys cancels in the softmax: its gradient is rounding and nothing else."""
    return 1e-8 if name.endswith("k_proj.bias") else 1e-9


def pair(kind, dtype=torch.float32, std=0.05, **config):
    """(stock blocks, lean blocks): the same RSO model in training mode, B away from zero unless ``std`` is."""
    models = []
    for lean in ("none", "all"):
        torch.manual_seed(0)
        model = CAUSAL[kind]().to(dtype).train()
        rso_ds.convert(model, RSOConfig(rank=4, lean=lean, **config))
        for _, layer in rso_ds.layers.rso_layers(model):
            nn.init.normal_(layer.B, std=std)
        models.append(model)
    return models


def batch(padded=False):
    ids = torch.randint(2, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "use_cache": False}


def step(model, inputs):
    model.zero_grad()
    result = model(**inputs).loss
    result.backward()
    return result.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("padded", [False, True])
def test_whole_model_has_the_gradients_of_the_stock_blocks(kind, padded):
    stock, lean = pair(kind)
    (loss_s, grads_s), (loss_l, grads_l) = step(stock, batch(padded)), step(lean, batch(padded))
    torch.testing.assert_close(loss_l, loss_s, atol=1e-6, rtol=1e-6)
    assert grads_s.keys() == grads_l.keys()
    for name, want in grads_s.items():
        assert (grads_l[name] - want).norm() <= 1e-5 * want.norm() + rounding(name), name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_whole_model_in_float64(kind):
    """The stock norm and loss compute in fp32 whatever the model's dtype; that is all the difference there is."""
    stock, lean = pair(kind, torch.float64)
    (_, grads_s), (_, grads_l) = step(stock, batch()), step(lean, batch())
    for name, want in grads_s.items():
        assert (grads_l[name] - want).norm() <= 2e-6 * want.norm() + 1e-12, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_curves_are_the_same(kind):
    curves = []
    for model in pair(kind, std=0.0):
        config = next(iter(dict(rso_ds.layers.rso_layers(model)).values())).converted_with
        optimizer = rso_ds.RSO(model, dataclasses.replace(config, lr=3e-3, eps=1e-5, interval=5))
        losses = []
        for _ in range(30):
            losses.append(step(model, batch())[0].item())
            optimizer.step()
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0] - 0.3
    torch.testing.assert_close(curves[1], curves[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("extra", ["num_items_in_batch", "shift_labels"])
def test_loss_options_of_the_trainer(extra):
    stock, lean = pair("llama")
    inputs = batch()
    if extra == "num_items_in_batch":
        inputs[extra] = torch.tensor(100)
    else:
        inputs[extra] = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(step(lean, inputs)[0], step(stock, inputs)[0])


def test_what_the_lean_loss_does_not_know_is_left_to_the_stock_one():
    stock, lean = pair("llama")
    plain = batch()
    plain["labels"] = plain["input_ids"]
    inputs = {**plain, "ignore_index": int(plain["labels"][1, 2])}
    torch.testing.assert_close(step(lean, inputs)[0], step(stock, inputs)[0])
    assert step(lean, inputs)[0] != step(lean, plain)[0]


def test_where_logits_are_asked_for_there_are_logits():
    stock, lean = pair("llama")
    inputs = batch()
    assert lean(**inputs).logits is None
    without = {k: v for k, v in inputs.items() if k != "labels"}
    torch.testing.assert_close(lean(**without).logits, stock(**without).logits)
    torch.testing.assert_close(lean(inputs["input_ids"]).logits, stock(inputs["input_ids"]).logits)
    lean.eval(), stock.eval()
    ours, theirs = lean(**inputs), stock(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert torch.equal(
        lean.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False),
        stock.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False),
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    _, lean = pair("llama")
    _, want = step(lean, batch())
    lean.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _, got = step(lean, batch())
    assert all(torch.equal(got[n], want[n]) for n in want)


@EXHAUSTIVE
def test_compiles_whole():
    _, lean = pair("llama")
    inputs = batch()
    inputs.pop("attention_mask")
    loss_e, want = step(lean, inputs)
    compiled = torch.compile(lean, fullgraph=True, backend="aot_eager")
    lean.zero_grad()
    result = compiled(**inputs).loss
    result.backward()
    torch.testing.assert_close(result.detach(), loss_e)
    for name, param in lean.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(param.grad, want[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    stock, lean = pair("llama")
    with torch.autocast("cpu", dtype=dtype):
        losses = [m(**batch()).loss for m in (stock, lean)]
    torch.testing.assert_close(losses[1], losses[0], atol=3e-3, rtol=0)
    for value in losses:
        value.backward()
    for (name, a), (_, b) in zip(stock.named_parameters(), lean.named_parameters(), strict=True):
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 3e-2 * a.grad.norm() + 1e-6, name


# -- the switch --------------------------------------------------------------------------------------


def classes(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("kind", CAUSAL)
def test_to_dense_gives_the_stock_classes_back(kind):
    plain = CAUSAL[kind]()
    _, lean = pair(kind)
    rso_ds.to_dense(lean)
    assert classes(lean) == classes(plain)
    assert not any("_lean" in vars(m) for m in lean.modules())
    assert lean.state_dict().keys() == plain.state_dict().keys()


def test_pieces_one_by_one():
    changed = {}
    for piece in ("norm", "activation", "loss"):
        model = CAUSAL["llama"]()
        before = classes(model)
        rso_ds.convert(model, RSOConfig(rank=4, lean=[piece]))
        assert all(layer.shared_input.members == 1 for _, layer in rso_ds.layers.rso_layers(model))
        changed[piece] = {
            a.__name__ for a, b in zip(before, classes(model), strict=True) if a is not b and issubclass(b, a)
        }
    assert changed == {"norm": {"LlamaRMSNorm"}, "activation": {"LlamaMLP"}, "loss": {"LlamaForCausalLM", "Linear"}}


def test_names_and_signature_stay():
    stock, lean = pair("llama")
    assert type(lean).__name__ == type(stock).__name__ == "LlamaForCausalLM"
    assert isinstance(lean, type(stock))
    assert inspect.signature(lean.forward) == inspect.signature(stock.forward)
    assert type(lean)(lean.config)(**batch()).logits is not None  # a new object of the class is stock


@pytest.mark.parametrize(
    ("lean", "error", "message"),
    [
        (["norms"], RSOConfigError, "Did you mean 'norm'?"),
        ("some", RSOConfigError, "'lean' must be 'all' or 'none'"),
        (["liger"], RSOConversionError, "needs the package liger-kernel"),
    ],
)
def test_a_bad_switch_is_refused(lean, error, message, monkeypatch):
    monkeypatch.setattr("rso_ds.saved.apply.liger_installed", lambda: False)
    with pytest.raises(error, match=message):
        rso_ds.convert(CAUSAL["llama"](), RSOConfig(rank=4, lean=lean))


def test_a_piece_that_finds_nothing_is_refused_and_changes_nothing():
    model = CAUSAL["gpt2"]()
    before = classes(model)
    with pytest.raises(RSOConversionError, match="nothing in GPT2LMHeadModel for 'norm'"):
        rso_ds.convert(model, RSOConfig(rank=4, lean=["activation", "norm"]))
    assert classes(model) == before


def test_a_loss_of_the_callers_own_stays():
    model = CAUSAL["llama"]().train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 7
    rso_ds.convert(model, RSOConfig(rank=4))
    assert model(**batch()).loss.item() == 7


HEADS = {
    "llama": {},
    "qwen3": {"sampler": "coordinate"},
    "gpt2": {},  # tied
    "opt": {},  # tied
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_trained_in_a_subspace_has_the_lean_loss(kind):
    stock, lean = pair(kind, targets=["default", "embeddings", "head"], **HEADS[kind])
    assert type(lean.lm_head).__name__ == "RSOLinear"
    assert lean(**batch()).logits is None
    (loss_s, grads_s), (loss_l, grads_l) = step(stock, batch()), step(lean, batch())
    torch.testing.assert_close(loss_l, loss_s, atol=1e-6, rtol=1e-6)
    assert grads_s.keys() == grads_l.keys()
    assert any(name.endswith(("embed_tokens.B", "wte.B")) for name in grads_l)
    for name, want in grads_s.items():
        assert (grads_l[name] - want).norm() <= 1e-5 * want.norm() + rounding(name), name
    lean.eval(), stock.eval()
    torch.testing.assert_close(lean(**batch()).logits, stock(**batch()).logits)
    rso_ds.to_dense(lean)
    assert classes(lean) == classes(CAUSAL[kind]())


def test_liger_kernels_are_called_on_cuda_only(monkeypatch):
    """The kernels need a GPU; here only that CPU tensors never reach them."""
    monkeypatch.setattr("rso_ds.saved.norms.liger_rms_norm", None)
    monkeypatch.setattr("rso_ds.saved.activations.liger_silu_mul", None)
    assert rms_norm(leaf(2, 8), leaf(8), 1e-6, liger=True).shape == (2, 8)
    assert gated(leaf(2, 8), leaf(2, 8), "silu", liger=True).shape == (2, 8)
