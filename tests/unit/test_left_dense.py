"""What "all-linear" and "default" leave dense: heads, poolers, routers, and layers that compute something else."""

import logging

import pytest
import torch
from support.exhaustive import quick
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import rso_ds
from rso_ds.layers.targets import select_targets


def dense(model, targets="all-linear"):
    """{name of a layer that 'targets' selects and that stays dense: why}."""
    return select_targets(model, targets)[1]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """Its head is registered first and called last."""

    def __init__(self):
        super().__init__()
        self.head, self.table = nn.Linear(8, 50, bias=False), nn.Embedding(50, 8)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(3)), nn.LayerNorm(8)

    def hidden(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids, targets=None):
        logits = self.head(self.hidden(ids))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


class LossOnly(Decoder):
    def forward(self, ids, targets):
        out, x = {}, self.hidden(ids)
        out["logits"] = self.head(x)
        out["loss"] = F.cross_entropy(out["logits"].flatten(0, 1), targets.flatten()) + 0.1 * x.pow(2).mean()
        return out["loss"]


class Stack(nn.Module):
    """No head: blocks alone."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Tied(Decoder):
    def __init__(self):
        super().__init__()
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.hidden(ids) @ self.table.weight.t(), self.head


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)])


class Enumerated(Layers):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                x = F.relu(x)
        return x


class Indexed(Layers):
    def forward(self, x):
        for i in range(len(self.layers)):
            x = torch.relu(self.layers[i](x))
        return x


class Sliced(Layers):
    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class Features(nn.Module):
    """A layer whose output is returned on request is no head if another layer reads it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, features=False):
        x = self.first(x)
        x = torch.relu(x)
        if features:
            return x
        return self.logits(x)

    def logits(self, x):
        return F.log_softmax(self.second(x), dim=-1)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.tasks = nn.ModuleDict({"a": nn.Linear(16, 2), "b": nn.Linear(16, 5)})
        self.more = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))

    def forward(self, x, task="a"):
        h, outs = self.body(x), []
        for head in self.more:
            outs.append(head(h))
        return self.tasks[task](h), outs


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).mean(-1))


def without_source():
    body = "def __init__(s):\n  super().__init__(); s.a = nn.Linear(8, 8); s.b = nn.Linear(8, 8)"
    space = {"nn": nn}
    exec(f"class Typed(nn.Module):\n {body}\n def forward(s, x): return s.b(s.a(x))", space)
    return space["Typed"]()


MODELS = {
    "decoder": (Decoder, {"head"}),
    "compiled": (lambda: torch.compile(Decoder()), {"_orig_mod.head"}),
    "loss only": (LossOnly, {"head"}),
    "no head": (Stack, set()),
    "tied": (Tied, {"head"}),
    "enumerated": (Enumerated, {"layers.2"}),
    "indexed": (Indexed, {"layers.2"}),
    "sliced": (Sliced, {"layers.2"}),
    "features": (Features, {"second"}),
    "several": (Several, {"tasks.a", "tasks.b", "more.0.2", "more.1.2"}),
    "sequential": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1)), {"2"}),
    "one layer": (lambda: nn.Sequential(nn.Linear(8, 8)), set()),
    "no source": (without_source, {"b"}),
}


@pytest.mark.parametrize("kind", quick(MODELS, set(MODELS) - {"compiled"}))
def test_the_output_layers_of_a_plain_model(kind):
    build, heads = MODELS[kind]
    model = build()
    found = dense(model)
    assert set(found) == heads, found
    assert all(select_targets(model, [f"*{name}"])[1] == {} for name in heads - {"head"})  # by name they are taken


def test_a_model_with_no_linear_layer_but_its_head_is_refused_with_the_reason():
    with pytest.raises(rso_ds.RSOConversionError, match="stays dense: fc: an output layer of Conv"):
        rso_ds.convert(Convolutions(), rso_ds.RSOConfig(rank=2, targets="all-linear"))
    with pytest.raises(rso_ds.RSOConversionError, match="has no linear layer"):
        rso_ds.convert(nn.Sequential(nn.Conv1d(2, 4, 3)), rso_ds.RSOConfig(targets="all-linear"))


def test_what_stays_dense_is_named_at_the_start_and_trains(caplog):
    model = Decoder()
    config = rso_ds.RSOConfig(rank=2, targets="all-linear")
    with caplog.at_level(logging.WARNING):
        conversion = rso_ds.convert(model, config)
    assert conversion.left_dense == {"head": "an output layer of Decoder"}
    for text in (caplog.text, rso_ds.summary_table(model, config)):
        assert "head: an output layer of Decoder" in text
    assert model.head.weight.requires_grad
    assert "left dense" not in rso_ds.summary_table(rso_ds.to_dense(model), config)


def test_what_is_frozen_is_not_said_to_train():
    model = Decoder()
    model.head.requires_grad_(False)
    assert rso_ds.convert(model, rso_ds.RSOConfig(rank=2, targets="all-linear")).left_dense == {}


# -- models of transformers ------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64}
TASKS = {
    ("Bert", "ForSequenceClassification"): {"classifier", "bert.pooler.dense"},
    ("Bert", "ForTokenClassification"): {"classifier"},
    ("Bert", "ForQuestionAnswering"): {"qa_outputs"},
    ("Bert", "ForMultipleChoice"): {"classifier", "bert.pooler.dense"},
    ("Roberta", "ForSequenceClassification"): {"classifier.dense", "classifier.out_proj"},
    ("Electra", "ForSequenceClassification"): {"classifier.dense", "classifier.out_proj"},
    ("DistilBert", "ForSequenceClassification"): {"pre_classifier", "classifier"},
    ("Llama", "ForSequenceClassification"): {"score"},
    ("Bart", "ForSequenceClassification"): {"classification_head.dense", "classification_head.out_proj"},
    ("T5", "ForSequenceClassification"): {"classification_head.dense", "classification_head.out_proj"},
    ("GPT2", "DoubleHeadsModel"): {"lm_head", "multiple_choice_head.summary"},
}


@pytest.mark.parametrize("case", TASKS, ids="".join)
@pytest.mark.parametrize("targets", ["all-linear", "default"])
def test_heads_and_poolers_of_transformers(case, targets):
    transformers = pytest.importorskip("transformers")
    family, task = case
    config = getattr(transformers, f"{family}Config")()
    for key, value in {
        **SMALL,
        "d_model": 16,
        "d_ff": 24,
        "d_kv": 8,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
    }.items():
        if hasattr(config, key):
            setattr(config, key, value)
    for key in ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, key):
            setattr(config, key, 1)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}{task}")(config)
    selected, left = select_targets(model, targets)
    trains = {name for name in selected if name not in left}
    heads = TASKS[case]
    assert trains
    assert not trains & heads
    if targets == "all-linear":
        assert set(left) == heads


class OnTop(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.fc = body, nn.Linear(16, 3)

    def forward(self, **batch):
        return self.fc(self.body(**batch)[0])


def test_a_model_around_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(**SMALL)
    assert set(dense(OnTop(transformers.LlamaModel(llama)))) == {"fc"}
    wrapped = nn.ModuleDict({"net": transformers.LlamaForCausalLM(llama)})
    assert dense(wrapped) == {"net.lm_head": "the output head"}


class Experts(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.gate, self.experts, self.shared, self.after = nn.Linear(8, 4), experts, nn.Linear(8, 4), nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.after(self.shared(x)))


class Stored(nn.Module):
    """Experts in one tensor."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 16, 8))


@pytest.mark.parametrize("experts", [lambda: nn.ModuleList(Block() for _ in range(4)), Stored])
def test_routers(experts):
    model = Experts(experts())
    model.shared = nn.Linear(8, 6)
    model.after = nn.Linear(6, 8)
    assert dense(model) == {"gate": "the router of 4 experts"}
    assert dense(model, ["gate"]) == {}


# -- subclasses of nn.Linear -----------------------------------------------------------------------------


class Named(nn.Linear):
    def __init__(self, *sizes, label="x"):
        super().__init__(*sizes)
        self.label = label


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LoRA(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lora_A = nn.Parameter(torch.zeros(2, self.in_features))


def normed():
    return nn.utils.weight_norm(nn.Linear(8, 8))


def parametrised():
    return parametrize.register_parametrization(nn.Linear(8, 8), "weight", nn.Tanh())


def hooked():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: F.linear(x, layer.weight) * 3
    return layer


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Scaled(8, 8), "Scaled, is a subclass of nn.Linear whose own forward"),
        (lambda: LoRA(8, 8), "LoRA, holds lora_A besides"),
        (normed, "computed from other parameters"),
        (parametrised, "computed from other parameters"),
        (hooked, "other code has replaced the forward"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_that_compute_something_else_stay_dense_with_the_reason(build, why):
    model = nn.Sequential(build(), nn.Linear(8, 8), nn.LayerNorm(8))
    x, before = torch.randn(3, 8), None
    before = model(x)
    conversion = rso_ds.convert(model, rso_ds.RSOConfig(rank=2, targets="all-linear"))
    assert list(conversion.layers) == ["1"]
    assert why in conversion.left_dense["0"]
    torch.testing.assert_close(model(x), before)
    with pytest.raises(rso_ds.RSOConversionError, match="'0' selects stays dense: 0: ") as refused:
        rso_ds.convert(nn.Sequential(build(), nn.Linear(8, 8)), rso_ds.RSOConfig(rank=2, targets=["0"]))
    assert why in str(refused.value)
    assert "requires_grad" not in str(refused.value)


def test_a_subclass_that_computes_what_nn_linear_does_is_converted_and_comes_back():
    model = nn.Sequential(Named(8, 8, label="first"), nn.Linear(8, 8), nn.LayerNorm(8))
    keys = list(model.state_dict())
    rso_ds.convert(model, rso_ds.RSOConfig(rank=2, targets="all-linear"))
    assert all(isinstance(model[i], rso_ds.RSOLinear) for i in (0, 1))
    rso_ds.to_dense(model)
    assert [type(m) for m in model] == [Named, nn.Linear, nn.LayerNorm]
    assert model[0].label == "first"
    assert list(model.state_dict()) == keys


def test_a_lazy_layer_is_refused_before_its_first_input():
    with pytest.raises(rso_ds.RSOConversionError, match="run one batch through the model"):
        rso_ds.convert(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)), rso_ds.RSOConfig(targets="all-linear"))


class InPlace(nn.Module):
    """Falcon and LLaMA-4 add residuals so; autograd refuses it for views that a function of its own has made."""

    def __init__(self):
        super().__init__()
        self.table, self.q_proj, self.k_proj = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.table(ids)
        x += 1
        q, k = self.q_proj(x), self.k_proj(x)
        q += x
        k *= 2
        return q.square().sum() + k.square().sum()

    def get_input_embeddings(self):
        return self.table


@pytest.mark.parametrize("form", ["two_path", "folded"])
def test_what_a_layer_returns_may_be_changed_in_place(form):
    torch.manual_seed(0)
    model, ids = InPlace(), torch.randint(9, (2, 3))
    model(ids).backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    conversion = rso_ds.convert(model, rso_ds.RSOConfig(rank=8, targets=["*_proj", "embeddings"], form=form))
    model(ids).backward()
    assert len(conversion.layers) == 3
    for name, layer in conversion.layers.items():
        torch.testing.assert_close(layer.B.grad, expected[f"{name}.weight"] @ layer.current_projection())
