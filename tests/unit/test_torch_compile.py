"""``torch.compile`` of whole models and blocks: one graph, not compiled again at boundaries, the eager results.

(Layer, shared input and lean model alone: test_layer.py, test_folded_form.py, test_shared_input.py,
test_exact_savings.py. Under DDP, FSDP2 and ZeRO: the ``compiled`` cases of torch_cases.py and deepspeed_cases.py.)
"""

import pytest
import torch
from support import tiny_llama
from support.exhaustive import EXHAUSTIVE, quick
from torch._dynamo.testing import CompileCounterWithBackend

import rso_ds

STEPS, BATCH = 7, 4


def train(compiled, **options):
    """Losses of ``STEPS`` steps over three boundaries; ``compiled(model)`` may compile it."""
    model = tiny_llama.build()
    config = rso_ds.RSOConfig(lr=1e-2, eps=1e-5, rank=5, interval=2, **options)
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    forward = compiled(model)
    losses = []
    for step in range(STEPS):
        loss = tiny_llama.loss_of(forward, tiny_llama.tokens(step, BATCH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert optimizer.boundary.draw == 3
    return losses


@pytest.mark.parametrize("sampler", quick(["haar", "coordinate"], {"haar"}))
@pytest.mark.parametrize(
    ("form", "lean"),
    quick([("two_path", "all"), ("folded", "all"), ("folded", "none")], {("two_path", "all"), ("folded", "none")}),
)
def test_whole_model_is_one_graph(form, sampler, lean):
    options = {"form": form, "sampler": sampler, "lean": lean}
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    got = train(lambda model: torch.compile(model, fullgraph=True, backend=counter), **options)
    torch.testing.assert_close(got, train(lambda model: model, **options), rtol=1e-5, atol=0)
    assert counter.frame_count == 1


@EXHAUSTIVE
def test_a_projection_without_a_matrix_is_one_graph_too(monkeypatch):
    monkeypatch.setattr("rso_ds.subspace.samplers.transform_cost", lambda in_features, rank: 0)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    got = train(lambda model: torch.compile(model, fullgraph=True, backend=counter), form="two_path", sampler="srht")
    torch.testing.assert_close(got, train(lambda model: model, form="two_path", sampler="srht"), rtol=1e-5, atol=0)
    assert counter.frame_count == 1


def test_blocks_share_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def blocks(model):
        for block in model.model.layers:
            block.compile(fullgraph=True, backend=counter)
        return model

    got = train(blocks, form="folded")
    torch.testing.assert_close(got, train(lambda model: model, form="folded"), rtol=1e-5, atol=0)
    assert counter.frame_count == 1


@EXHAUSTIVE
@pytest.mark.parametrize("form", ["two_path", "folded"])
def test_inductor(form):
    torch._dynamo.reset()
    got = train(torch.compile, form=form)
    torch.testing.assert_close(got, train(lambda model: model, form=form), rtol=1e-4, atol=0)
