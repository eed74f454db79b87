"""What an embedding in a subspace computes, what it keeps, and the modes it must be right in."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from unit.test_conversion import fill_B
from unit.test_embedding_and_head import HIDDEN, PAD, RANK, VOCAB, batch, build

import rso_ds
from rso_ds import RSOConfig
from rso_ds.layers import subspace_embedding


def operands(dtype=torch.float64, coordinates=False):
    g = torch.Generator().manual_seed(0)
    w, b, p = (torch.randn(*s, generator=g).to(dtype) for s in ((VOCAB, HIDDEN), (VOCAB, RANK), (HIDDEN, RANK)))
    return batch(0), w, b.requires_grad_(), torch.tensor([5, 0, 3]) if coordinates else p


@pytest.mark.parametrize("coordinates", [False, True])
def test_gradcheck(coordinates):
    assert torch.autograd.gradcheck(subspace_embedding, operands(coordinates=coordinates))


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("padding_idx", [None, PAD])
def test_value_and_gradient_equal_the_dense_formula(shape, padding_idx):
    ids, w, b, p = operands()
    ids = ids.view(shape)
    y, expected = subspace_embedding(ids, w, b, p, padding_idx), F.embedding(ids, w + b @ p.t(), padding_idx)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    (got,), (want,) = torch.autograd.grad(y, b, dy), torch.autograd.grad(expected, b, dy)
    torch.testing.assert_close(got, want)
    assert (got[PAD] == 0).all() == (padding_idx == PAD)


@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_ids_and_references_only(coordinates, autocast):
    ids, w, b, p = operands(torch.float32, coordinates)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = subspace_embedding(ids, w, b, p)
    assert y.dtype == torch.float32  # as nn.Embedding under autocast
    assert kept
    assert {t.untyped_storage().data_ptr() for t in kept} <= {t.untyped_storage().data_ptr() for t in (ids, w, b, p)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    ids, w, b, p = operands(dtype)
    y = subspace_embedding(ids, w, b, p)
    assert y.dtype == dtype
    (got,) = torch.autograd.grad(y.float().sum(), b)
    assert got.dtype == dtype
    exact = F.embedding(ids, w.double() + b.double() @ p.double().t())
    (want,) = torch.autograd.grad(exact.sum(), b)
    assert (y.double() - exact).norm() < 1e-2 * exact.norm()
    assert (got.double() - want).norm() < 2e-2 * want.norm()


def test_frequent_tokens_are_summed_in_fp32():
    """4096 times the same token in bf16: summed in bf16 the gradient would stop growing at 256 of them."""
    _, w, b, p = operands(torch.bfloat16)
    (got,) = torch.autograd.grad(subspace_embedding(torch.ones(4096, dtype=torch.long), w, b, p).float().sum(), b)
    torch.testing.assert_close(got[1].float(), 4096 * p.float().sum(0), rtol=2e-2, atol=8)


@pytest.mark.parametrize("tie", [False, True])
def test_compiles_whole(tie):
    model = build(tie=tie).float()
    rso_ds.convert(model, RSOConfig(rank=RANK, targets=["embeddings", "head"]))
    fill_B(model)
    expected = model(batch(0))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(batch(0)), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    """Reentrant checkpointing needs an input that requires a gradient: B gives it to the embedding's output."""
    model = build()
    rso_ds.convert(model, RSOConfig(rank=RANK, targets=["embeddings", "head"]))
    fill_B(model)
    params = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(batch(0)).square().sum(), params)
    hidden = model.tokens(batch(0))
    checkpoint(lambda h: model.out(model.norm(h)), hidden, use_reentrant=use_reentrant).square().sum().backward()
    for param, expected in zip(params, want, strict=True):
        torch.testing.assert_close(param.grad, expected)
