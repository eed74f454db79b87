"""Embedding and head in a subspace, apart and tied: training, conversion and back, what is refused."""

import copy

import pytest
import torch
from reference.rso import Settings, train
from torch import nn
from torch.nn import functional as F
from unit.test_conversion import MODELS, fill_B, gpt2, llama, opt

import rso_ds
from rso_ds import RSOConfig, RSOConversionError
from rso_ds.checkpoint import dense_state_dict, save_dense
from rso_ds.layers import parameter_counts, rso_layers, subspace_modules

VOCAB, HIDDEN, RANK, STEPS, INTERVAL, PAD = 11, 7, 3, 11, 3, 2
BOTH = ["default", "embeddings", "head"]


class Net(nn.Module):
    """Embedding, norm, head with a bias; the smallest model with all that can be tied."""

    def __init__(self, tie: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN, padding_idx)
        self.norm = nn.LayerNorm(HIDDEN)
        self.out = nn.Linear(HIDDEN, VOCAB)
        if tie:
            self.out.weight = self.tokens.weight

    def get_input_embeddings(self):
        return self.tokens

    def get_output_embeddings(self):
        return self.out

    def forward(self, ids):
        return self.out(self.norm(self.tokens(ids)))


def build(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def batch(step: int) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (4, 6), generator=torch.Generator().manual_seed(step % 3))
    ids[0, 0] = PAD
    return ids


def loss_of(forward, ids):
    return F.cross_entropy(forward(ids)[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))


# -- training, in float64 ------------------------------------------------------------------------------

CASES = {
    "embedding": (["embeddings"], {}, {}),
    "head": (["head"], {}, {}),
    "both": (["embeddings", "head"], {}, {}),
    "tied": (["embeddings", "head"], {"tie": True}, {}),
    "padding": (["embeddings", "head"], {"padding_idx": PAD}, {}),
    "tied_padding": (["embeddings", "head"], {"tie": True, "padding_idx": PAD}, {}),
    "coordinate": (["embeddings", "head"], {}, {"sampler": "coordinate"}),
    "tied_coordinate": (["embeddings", "head"], {"tie": True}, {"sampler": "coordinate"}),
    "tied_project": (["embeddings", "head"], {"tie": True}, {"carry_over": "project", "sampler": "gaussian"}),
    "tied_decay": (["embeddings", "head"], {"tie": True}, {"weight_decay": 0.1, "proximal": 0.3}),
    "tied_sgd": (["embeddings", "head"], {"tie": True}, {"solver": "sgd", "carry_over": "reset"}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case):
    targets, options, rso = CASES[case]
    rso = {"lr": 1e-2, "eps": 1e-6, "interval": INTERVAL, **rso}
    names = {"embeddings": "tokens", "head": "out"}
    groups = {names[t]: [names[t]] for t in (targets[:1] if options.get("tie") else targets)}
    expected = train(
        build(**options), Settings(groups=groups, rank=RANK, **rso), loss_of, [[batch(i)] for i in range(STEPS)]
    )
    model, start = build(**options), build(**options)
    config = RSOConfig(rank=RANK, targets=targets, **rso)
    assert list(rso_ds.convert(model, config).layers) == list(groups)
    optimizer = rso_ds.RSO(model, config)
    losses = []
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(i))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.boundary.draw == STEPS // INTERVAL == 3
    torch.testing.assert_close(losses, expected.losses, rtol=1e-11, atol=1e-12)
    rso_ds.to_dense(model)
    assert (model.out.weight is model.tokens.weight) == options.get("tie", False)
    assert model.tokens.padding_idx == options.get("padding_idx")
    final = model.state_dict()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(final[name], weight, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    if case == "padding":
        assert torch.equal(model.tokens.weight[PAD], start.tokens.weight[PAD])


@pytest.mark.parametrize("tie", [False, True])
def test_resume_in_the_middle_of_a_subspace(tie):
    config = RSOConfig(rank=RANK, targets=["embeddings", "head"], interval=INTERVAL)

    def start():
        model = build(tie=tie)
        rso_ds.convert(model, config)
        return model, rso_ds.RSO(model, config)

    def run(resume_at):
        model, optimizer = start()
        for i in range(STEPS):
            if i == resume_at:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model, optimizer = start()
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            optimizer.zero_grad()
            loss_of(model, batch(i)).backward()
            optimizer.step()
        return dense_state_dict(model)

    straight, resumed = run(None), run(7)
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)


# -- Hugging Face models: there and back ---------------------------------------------------------------

WHOLE = {
    "llama": (llama, False),
    "llama_tied": (lambda: llama(tie_word_embeddings=True), True),
    "gpt2": (gpt2, True),
    "opt": (opt, True),
    "bert": (MODELS["bert"][0], True),
}


@pytest.fixture
def ids():
    return torch.randint(2, 32, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", WHOLE)
def test_conversion_and_the_way_back(kind, ids, tmp_path):
    make, tied = WHOLE[kind]
    torch.manual_seed(0)
    model = make().eval()
    names = {n: p.shape for n, p in model.state_dict().items()}
    objects = {n: [m for m, q in model.named_parameters(remove_duplicate=False) if q is p] for n, p in pairs(model)}
    plain = model(input_ids=ids).logits
    conversion = rso_ds.convert(model, RSOConfig(rank=4, targets=BOTH))
    assert len(list(subspace_modules(model))) - len(conversion.layers) == tied
    assert list(dict(rso_layers(model))) == list(conversion.layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for attribute in ("weight", "B", "subspace"):
        assert (getattr(embedding, attribute) is getattr(head, attribute)) == tied
    torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=1e-6, rtol=1e-5)
    fill_B(model)
    moved = model(input_ids=ids).logits
    exported = dense_state_dict(model)
    assert {n: p.shape for n, p in exported.items()} == names
    save_dense(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, moved, atol=1e-5, rtol=1e-5)
    rso_ds.to_dense(model)
    torch.testing.assert_close(model(input_ids=ids).logits, moved, atol=1e-5, rtol=1e-5)
    assert objects == {
        n: [m for m, q in model.named_parameters(remove_duplicate=False) if q is p] for n, p in pairs(model)
    }  # every tie, that of BERT's biases too
    for name, value in model.state_dict().items():
        assert torch.equal(value, exported[name]), name


def pairs(model):
    return list(model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_whole_models_train_like_the_reference(kind, ids):
    make, tied = WHOLE[kind]
    torch.manual_seed(0)
    model = make().double()
    names = [n for n, m in model.named_modules() if m in (model.get_input_embeddings(), model.get_output_embeddings())]
    settings = Settings(groups={n: [n] for n in (names[:1] if tied else names)}, rank=4, interval=2)

    def loss_of(forward, batch):
        return forward(input_ids=batch, labels=batch, use_cache=False).loss

    expected = train(copy.deepcopy(model), settings, loss_of, [[ids]] * 7)
    config = RSOConfig(rank=4, interval=2, lr=1e-3, eps=1e-6, targets=["embeddings", "head"])
    rso_ds.convert(model, config)
    optimizer = rso_ds.RSO(model, config)
    for step in range(7):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.losses[step], abs=1e-6)
    got = dense_state_dict(model)
    # transformers computes norms and losses in parts in fp32, hence not 1e-12
    for name, weight in expected.weights.items():
        torch.testing.assert_close(got[name], weight, atol=2e-6, rtol=1e-6)


def test_meta_device_keeps_the_tie():
    with torch.device("meta"):
        model = llama(tie_word_embeddings=True)
    rso_ds.convert(model, RSOConfig(rank=4, targets=BOTH))
    assert model.lm_head.B is model.model.embed_tokens.B
    assert model.lm_head.B.is_meta


# -- selection and counting ----------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
def test_counts(tie):
    model = llama(tie_word_embeddings=tie)
    dense = sum(p.numel() for p in model.parameters())
    config = RSOConfig(rank=4, targets=BOTH)
    rso_ds.convert(model, config)
    counts = parameter_counts(model)
    b = 2 * 4 * (16 + 8 + 8 + 16 + 24 + 24 + 16) + (1 if tie else 2) * 4 * 32
    norms = 5 * 16
    assert counts["B"] == b
    assert counts["communicated"] == b + norms
    assert counts["dense"] == dense
    table = rso_ds.summary_table(model, config)
    assert ("model.embed_tokens = lm_head " in table) == tie
    assert f"{14 + (1 if tie else 2)} layers" in table


def test_off_by_default_and_each_alone():
    model = llama()
    rso_ds.convert(model, RSOConfig())
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight.requires_grad
    for word, name in (("embeddings", "model.embed_tokens"), ("head", "lm_head")):
        assert list(rso_ds.convert(llama(), RSOConfig(rank=4, targets=[word])).layers) == [name]


def test_a_frozen_pair_stays_as_it_is():
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight.requires_grad_(False)
    rso_ds.convert(model, RSOConfig(targets=BOTH))
    assert type(model.model.embed_tokens) is nn.Embedding


def with_embedding(**options):
    model = llama()
    model.model.embed_tokens = nn.Embedding(32, 16, **options)
    return model


def scaled():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma3TextConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            intermediate_size=24, vocab_size=32, tie_word_embeddings=False,
        )
    )  # fmt: skip


def two_linears():
    model = build()
    model.more = nn.Linear(HIDDEN, VOCAB)
    model.more.weight = model.out.weight
    return model


def not_tied_yet():
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


REFUSALS = {
    "no embedding": (
        lambda: nn.Sequential(nn.Linear(4, 4)), ["embeddings"],
        "'embeddings': Sequential.get_input_embeddings() gives no layer of the model: leave 'embeddings' out",
    ),
    "no head": (
        lambda: llama().model, ["q_proj", "head"],
        "'head': LlamaModel.get_output_embeddings() gives no layer of the model: leave 'head' out of the list, or name"
        ' a linear layer by a glob ("*head")',
    ),
    "another class": (
        scaled, ["embeddings"],
        "'embeddings': model.embed_tokens is of class Gemma3TextScaledWordEmbedding and only nn.Embedding itself",
    ),
    "sparse": (lambda: with_embedding(sparse=True), BOTH, "has sparse=True, which a subspace does not follow. Build"),
    "max_norm": (lambda: with_embedding(max_norm=1.0), BOTH, "Build the embedding with max_norm=None"),
    "scaled": (lambda: with_embedding(scale_grad_by_freq=True), BOTH, "has scale_grad_by_freq=True"),
    "only the embedding of a pair": (
        lambda: llama(tie_word_embeddings=True), ["embeddings"],
        "model.embed_tokens.weight is tied to lm_head.weight: one of them would train densely what the other freezes."
        " Select both",
    ),
    "only the head of a pair": (
        gpt2, ["default", "head"],
        'lm_head.weight is tied to transformer.wte.weight.*"targets": ["default", "embeddings", "head"]',
    ),
    "two linear layers": (two_linears, ["out", "more"], "out.weight is tied to more.weight: only an embedding and a"),
    "a tie not made": (not_tied_yet, BOTH, "but they are two parameters: call model.tie_weights()"),
    "rank": (llama, ["embeddings"], r"'rank': 99 exceeds the smaller side of layer 'model.embed_tokens'"),
    "by name": (llama, ["embed_tokens"], 'The token embedding is selected by the word "embeddings".'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    make, targets, message = REFUSALS[case]
    model = make()
    before = [type(m) for m in model.modules()]
    with pytest.raises(RSOConversionError) as error:
        rso_ds.convert(model, RSOConfig(targets=targets, rank=99 if case == "rank" else 2))
    first, *rest = message.split(".*")
    assert first in str(error.value)
    assert all(part in str(error.value) for part in rest)
    assert [type(m) for m in model.modules()] == before
