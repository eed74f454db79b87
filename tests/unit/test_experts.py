"""Experts that a model keeps as 3-D parameters: one subspace for all E matrices of one parameter."""

import copy
import io
import logging

import pytest
import torch
from reference.rso import Settings, train
from support import tiny_llama, tiny_moe
from support.environment import needs
from support.exhaustive import EXHAUSTIVE, quick
from support.saved_runs import error_of, exported, saved
from torch import nn

import rso_ds
from rso_ds.checkpoint.export import export_dense
from rso_ds.checkpoint.lora import export_lora
from rso_ds.layers import grouped, merge_
from rso_ds.layers.grouped import Routing, dense_experts, subspace_experts
from rso_ds.layers.summary import share_outside
from rso_ds.subspace import sample_projection

needs("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
STEPS, INTERVAL, RANK = 13, 3, 4


def converted(kind, dtype=torch.float64, layers=1, **options):
    model = tiny_moe.build(kind, layers=layers).to(dtype)
    config = rso_ds.RSOConfig(
        **{"lr": 1e-2, "rank": RANK, "interval": INTERVAL, "targets": tiny_moe.TARGETS, "eps": 1e-6, **options}
    )
    rso_ds.convert(model, config)
    return model, config


def loss(model, step=0):
    return tiny_llama.loss_of(model, tiny_llama.tokens(step, 2))


def stepped(model, config, steps):
    optimizer = rso_ds.RSO(model, config)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        value = loss(model, i)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return optimizer, losses


OPTIONS = {
    "default": {},
    "project-gaussian": {"carry_over": "project", "sampler": "gaussian"},
    "folded-coordinate-decay": {"form": "folded", "sampler": "coordinate", "weight_decay": 0.1},
    "stock_block-srht-reset": {"lean": "none", "sampler": "srht", "carry_over": "reset"},
    "by_shape": {"share_projection": "shape"},
}


@pytest.mark.parametrize(
    ("kind", "option"), quick([(k, o) for k in KINDS for o in OPTIONS], list(zip(KINDS, OPTIONS, strict=False)))
)
def test_equals_reference(kind, option):
    options = {"interval": INTERVAL, "lr": 1e-2, "eps": 1e-6, **OPTIONS[option]}
    groups = tiny_moe.groups(1)
    settings = {k: v for k, v in options.items() if k not in ("lean", "share_projection")}
    if "share_projection" in options:
        names = [n for members in groups.values() for n in members]
        narrow = [n for n in names if n.endswith("down_proj")]
        width = (
            tiny_moe.build(kind, layers=1).model.layers[0].mlp.experts.down_proj.shape[1 if kind == "gpt_oss" else 2]
        )
        groups = {f"in=32,rank={RANK}": [n for n in names if n not in narrow], f"in={width},rank={RANK}": narrow}
    expected = train(
        tiny_moe.build(kind, layers=1).double(),
        Settings(groups=groups, rank=RANK, transposed=tiny_moe.transposed(kind, 1), **settings),
        tiny_llama.loss_of,
        [[tiny_llama.tokens(i, 2)] for i in range(STEPS)],
    )
    model, config = converted(kind, **OPTIONS[option])
    _, losses = stepped(model, config, STEPS)
    torch.testing.assert_close(losses, expected.losses, rtol=1e-10, atol=1e-12)
    final = rso_ds.to_dense(model).state_dict()
    assert set(final) == set(expected.weights)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(final[name], weight, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


class Declared(nn.Module):
    """Experts laid out in one of the ways that transformers knows, of which no small model has all."""

    def __init__(self, config, experts=4, hidden=6, inner=5):
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def made(*shape):
            return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64))

        gate, turned, biased = config.gate, config.turned, config.biased
        self.num_experts, self.act_fn = experts, nn.GELU()
        up, out = ("gate_up_proj", 2 * inner) if gate else ("up_proj", inner)
        setattr(self, up, made(experts, *((hidden, out) if turned else (out, hidden))))
        self.down_proj = made(experts, *((inner, hidden) if turned else (hidden, inner)))
        if biased:
            setattr(self, f"{up}_bias", made(experts, out))
            self.down_proj_bias = made(experts, hidden)
        if config.norm:
            self.post_expert_norm = nn.LayerNorm(hidden).double()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("transformers computes")


class Layout:
    _experts_implementation = "batched_mm"

    def __init__(self, gate, turned, biased, norm):
        self.gate, self.turned, self.biased, self.norm = gate, turned, biased, norm


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("lean", ["all", "none"])
@pytest.mark.parametrize("targets", [["*_proj"], ["down_proj"]])
def test_every_declared_layout(gate, turned, biased, norm, lean, targets):
    """Value, and the gradients of inputs, router weights, B and all else, equal those of transformers' own forward."""
    kind = use_experts_implementation(
        type("Declared", (Declared,), {"forward": Declared.forward}),
        has_gate=gate, is_transposed=turned, has_bias=biased, has_post_expert_norm=norm,
    )  # fmt: skip
    module = kind(Layout(gate, turned, biased, norm))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(7, 6, generator=g, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(7, 2, generator=g, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(3, generator=g)[:2] for _ in range(7)])  # the last expert gets no token
    dy = torch.randn(7, 6, generator=g, dtype=torch.float64)

    def run():
        y = module(x, index, scores)
        names, leaves = zip(*[(n, p) for n, p in module.named_parameters() if p.requires_grad], strict=True)
        return y, dict(zip(["x", "scores", *names], torch.autograd.grad(y, [x, scores, *leaves], dy), strict=True))

    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    expected, gradients = run()
    rso_ds.convert(module, rso_ds.RSOConfig(rank=3, targets=targets, lean=lean if lean == "none" else "all"))
    layers = {name: m for name, m in module.named_modules() if isinstance(m, rso_ds.layers.RSOExperts)}
    assert set(layers) == {n for n in before if n.endswith("_proj") and (targets == ["*_proj"] or n == "down_proj")}
    got, ours = run()
    torch.testing.assert_close(got, expected)
    for name, layer in layers.items():
        full = gradients.pop(name)
        gradients[f"{name}.B"] = (full.mT if turned else full) @ layer.projection()
        assert not ours[f"{name}.B"][3].any()
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    rso_ds.to_dense(module)
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    torch.testing.assert_close(module(x, index, scores), expected)


def operands(dtype, tokens=9, experts=4, width=16, out=24, rank=8):
    g = torch.Generator().manual_seed(0)
    x, w, b, p = (
        torch.randn(*s, generator=g).to(dtype)
        for s in ((tokens, width), (experts, out, width), (experts, out, rank), (width, rank))
    )
    index = torch.randint(0, experts - 1, (tokens, 2), generator=g)
    return x.requires_grad_(), w, b.requires_grad_(), p, Routing.of(index, experts)


@pytest.mark.parametrize("folded", [False, True])
def test_gradcheck(folded):
    x, w, b, p, routing = operands(torch.float64, 4, 3, 4, 5, 2)
    if folded:  # of B only the gradient counts: that of the two-path form at B = 0
        b = torch.zeros_like(b, requires_grad=True)
        dy = torch.randn(8, 5, dtype=torch.float64)
        two, one = (
            torch.autograd.grad(subspace_experts(x, w, b, p, routing, True, folded=f), [x, b], dy)
            for f in (False, True)
        )
        torch.testing.assert_close(two, one)
    else:
        assert torch.autograd.gradcheck(lambda x, b: subspace_experts(x, w, b, p, routing, True), (x, b))


def test_torchs_grouped_kernel_computes_the_same(monkeypatch):
    """On a GPU one kernel takes all experts; torch has it for CPUs too, so that its use can be tried here."""

    def results():
        x, w, b, p, routing = operands(torch.bfloat16)
        y = subspace_experts(x, w, b, p, routing, True)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, b])]

    loops = results()
    seen = []
    monkeypatch.setattr(grouped, "_one_kernel", lambda *tensors: seen.append(tensors) or True)
    for kernel, loop in zip(results(), loops, strict=True):
        torch.testing.assert_close(kernel, loop, rtol=2e-2, atol=2e-1)
        assert (kernel - loop).float().norm() < 1e-2 * loop.float().norm()
    assert len(seen) == 5


def test_pairs_are_summed_in_the_order_of_the_choices():
    index = torch.tensor([[2, 0], [0, 2], [1, 0]])
    routing = Routing.of(index, 4)
    assert routing.sizes == [3, 1, 2, 0]
    assert routing.token.tolist() == [0, 1, 2, 2, 0, 1]
    values = torch.arange(12.0).view(6, 2)
    expected = torch.zeros(3, 2)
    expected.index_add_(0, routing.token, values)
    assert torch.equal(routing.sum_of_pairs(values), expected)
    w = torch.randn(4, 5, 3)
    x = torch.randn(3, 3)
    each = torch.stack([w[e] @ x[t] for t, e in zip(routing.token, routing.expert, strict=True)])
    torch.testing.assert_close(dense_experts(x, w, routing, True), each)


@pytest.mark.parametrize("kind", KINDS)
def test_what_backward_keeps(kind):
    """z of each token and of each pair, gate and up, and what routes: neither inputs nor outputs of the experts."""
    model, _ = converted(kind, torch.float32)
    module = model.model.layers[0].mlp.experts
    tokens, k, hidden = 64, 2, tiny_moe.HIDDEN
    x = torch.randn(tokens, hidden, requires_grad=True)
    index = torch.stack([torch.randperm(module.num_experts)[:k] for _ in range(tokens)])
    kept = {}
    known = {id(p) for p in model.parameters()} | {id(x)}

    def pack(t):
        if id(t) not in known and t.is_floating_point():
            kept[t.untyped_storage()._cdata] = tuple(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x, index, torch.rand(tokens, k, requires_grad=True))
    inner = module.gate_up_proj.out_features
    projections = [module.gate_up_proj.projection().shape, module.down_proj.projection().shape]
    wanted = [*projections, (tokens, RANK), (tokens * k, RANK), (tokens * k, inner), (tokens * k,)]
    if kind == "gpt_oss":
        wanted.append((tokens, module.num_experts))  # weights by expert, for the bias of the down projection
    assert sorted(kept.values()) == sorted(map(tuple, wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_those_of_the_ordinary_model(kind):
    model, config = converted(kind)
    names = set(tiny_moe.build(kind, layers=1).state_dict())
    stepped(model, config, 4)  # one step into the second subspace
    state = {n: t.clone() for n, t in model.state_dict().items()}
    assert set(state) == names
    expected = loss(model).item()
    fresh, _ = converted(kind)
    result = fresh.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert loss(fresh).item() == pytest.approx(expected, rel=1e-12)
    plain = tiny_moe.build(kind, layers=1).double()
    plain.load_state_dict(state)
    assert loss(plain).item() == pytest.approx(expected, rel=1e-12)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert loss(twin).item() == pytest.approx(expected, rel=1e-12)
        assert loss(rso_ds.to_dense(twin)).item() == pytest.approx(expected, rel=1e-12)
        assert type(twin.model.layers[0].mlp.experts).__name__ == type(plain.model.layers[0].mlp.experts).__name__
    assert loss(model).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", quick(KINDS, {"mixtral"}))
def test_exports_have_the_names_that_transformers_publishes(kind, tmp_path):
    """Other programs read those, and ``from_pretrained`` fuses them again."""
    model, folder = saved(tmp_path / "run", tiny_moe.build(kind, layers=1), targets=tiny_moe.TARGETS)
    export_dense(folder, tmp_path / "out")
    model.save_pretrained(tmp_path / "stock")
    stock = exported(tmp_path / "stock")
    assert exported(tmp_path / "out").keys() == stock.keys()
    assert all(torch.equal(t, stock[n]) for n, t in exported(tmp_path / "out").items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    torch.testing.assert_close(loss(loaded), loss(rso_ds.to_dense(model)), rtol=1e-6, atol=1e-6)
    message = error_of(folder, tmp_path / "lora", export=export_lora, kind=rso_ds.RSOConfigError)
    assert "layers.0.mlp.experts.gate_up_proj" in message
    assert "without --lora" in message


@EXHAUSTIVE
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_its_optimizers_state(kind):
    straight, config = converted(kind)
    stepped(straight, config, 7)
    optimizer, _ = stepped(again := converted(kind)[0], config, 4)
    state = copy.deepcopy([again.state_dict(), optimizer.state_dict()])
    resumed, _ = converted(kind)
    resumed.load_state_dict(state[0])
    optimizer = rso_ds.RSO(resumed, config)
    optimizer.load_state_dict(state[1])
    for i in range(4, 7):
        optimizer.zero_grad()
        loss(resumed, i).backward()
        optimizer.step()
    for (name, one), two in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_share_outside_the_subspaces_is_told(caplog):
    model = tiny_moe.build("mixtral")
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    config = rso_ds.RSOConfig(rank=4, targets=list(tiny_moe.ATTENTION))
    rso_ds.convert(model, config)
    share, parts = share_outside(model)
    assert parts["model.layers.*.mlp.experts.gate_up_proj"] == pytest.approx(2 / 3 * experts / total)
    assert share == pytest.approx(1 - 2 * (2 * 32 * 32 + 2 * 16 * 32) / total)
    assert f"{share:.1%}  of the weights are in no subspace" in rso_ds.summary_table(model, config)
    with caplog.at_level(logging.WARNING):
        rso_ds.RSO(model, config)
    assert f"{share:.1%}  of the weights are in no subspace: model.layers.*.mlp.experts.gate_up_proj" in caplog.text
    caplog.clear()
    model, config = converted("mixtral", torch.float32, targets=[*tiny_moe.TARGETS, "embeddings"])
    assert share_outside(model)[0] < 0.2
    with caplog.at_level(logging.WARNING):
        rso_ds.RSO(model, config)
    assert not caplog.text


def test_experts_among_other_ranks_are_left_alone():
    """Expert parallelism of transformers gives each rank some of the experts, which no layout here knows."""
    model = tiny_moe.build("mixtral", layers=1)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(rso_ds.RSOConversionError, match=r"no linear layer .* matches 'experts\.gate_up_proj'"):
        rso_ds.convert(model, rso_ds.RSOConfig(rank=4, targets=tiny_moe.TARGETS))


@pytest.mark.parametrize("sampler", ["haar", "coordinate"])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_merges_of_stacked_experts_are_those_of_their_rows(sampler, decay):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 8, generator=g).bfloat16()
    B, P = torch.randn(3, 5, 4, generator=g).bfloat16(), sample_projection(sampler, 0, "x", 0, 8, 4)
    stacked, rows = weight.clone(), weight.clone().view(15, 8)
    merge_(stacked, B, P, decay, torch.Tensor.bfloat16)
    merge_(rows, B.view(15, 4), P, decay, torch.Tensor.bfloat16)
    assert torch.equal(stacked.view(15, 8), rows)
    assert not torch.equal(stacked, weight)


def test_rank_above_an_experts_smaller_side_is_refused():
    with pytest.raises(rso_ds.RSOConversionError, match=r"experts\.down_proj.*out=32, in=24"):
        converted("mixtral", rank=25, targets=["experts.down_proj"])
